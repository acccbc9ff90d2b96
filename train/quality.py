"""Make the head of the reward `Quality`: `python train/quality.py configs/quickstart.yaml --output head.safetensors`.

It learns to tell the config's teacher at full steps from the same teacher in few, on images of the config's prompts.
Every second prompt is held out, and the share of its images that are told right is printed.
"""

import argparse
from pathlib import Path

import torch

from stepdistill.config.load import load_config
from stepdistill.core.files import save_tensors, written_whole
from stepdistill.evaluation.metrics.features import efficientnet_lite0
from stepdistill.evaluation.spec import SEED_A
from stepdistill.networks.rewards.quality import logistic_head
from stepdistill.students.draw.call import generate, teacher_call
from stepdistill.training.recipe import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--output", type=Path, required=True, help="the .safetensors file")
    parser.add_argument("--steps", type=int, default=1, help="of the bad images")
    parser.add_argument("--num-images", type=int, default=512, help="of either kind")
    parser.add_argument("--size", type=int, default=64, help="pixels a side that the features are made of")
    args = parser.parse_args()
    run = load_config(Run, args.config, args.overrides)
    pipe, extractor = run.family.load(), efficientnet_lite0(args.size)
    captions = [run.data.captions(i * len(run.data) // args.num_images)[0] for i in range(args.num_images)]
    kinds = []
    for steps in (run.train.teacher_steps, args.steps):
        call = teacher_call(run.family, pipe, steps, run.teacher_guidance_scale, f"{steps} steps")
        kinds.append(extractor(generate(pipe, call, captions, SEED_A, progress=True)[0]))
    good, bad = kinds
    weight, bias = logistic_head(good[::2], bad[::2])
    right = torch.cat([good[1::2] @ weight + bias > 0, bad[1::2] @ weight + bias < 0]).float()
    made = {"weight": weight, "bias": bias, "size": torch.tensor(args.size)}
    with written_whole(args.output) as part:
        save_tensors(made, part, {"features": extractor.identity.id, "held_out_accuracy": f"{right.mean():.4f}"})
    print(f"{args.output}: {right.mean():.1%} of {len(right)} held-out images are told right")


if __name__ == "__main__":
    main()
