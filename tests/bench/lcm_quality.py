"""The quality of our LCM recipe's student beside those of a plain loop, at equal steps, batch, rank and data.

    python tests/bench/lcm_quality.py --work DIR

Plain loop: the training of diffusers' LCM-LoRA script in its plainest form, `Reference` of `consistency_step.py`, at
the script's default learning rate, loss and schedule, and at the best of its flags that were found for this teacher.
It trains on images and samples their encodings, as the script does: the same teacher's samples, decoded to 8 bits.
Its weight decay is the script's. The guidance is the recipe's and the grid is the same.

Ours: `configs/tables/consistency/tiny_sd_lcm.yaml`, shortened to as many steps, by `distill`.

Every student is loaded as a LoRA by plain Diffusers, and judged as the rows of the tables are. What DIR holds is not
made again. The last line is JSON; `ratios` are the excess of our student over that of a plain loop, by seed, at 4
steps.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from random import Random
from typing import Any, cast

import diffusers
import peft
import torch
from consistency_step import Reference, Setup
from diffusers import StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from harness import surroundings
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))

from tables import render
from tables.benchmark import Results, figures, prompts, taught
from tables.recipes import CONFIGS

from stepdistill.config.load import load_config
from stepdistill.core.pixels import to_uint8
from stepdistill.data.bundled import bundled
from stepdistill.evaluation.stored_features import StoredFeatures
from stepdistill.students.contract import CONTRACT
from stepdistill.students.draw.call import student_call
from stepdistill.training.distill import distill
from stepdistill.training.recipe import Run

TEACHER, OURS, AT = "tiny-sd", "ours", 4  # `AT`: the steps whose ratios are told


@dataclass(frozen=True)
class Flags:
    """Flags of the script that are not the same for all."""

    learning_rate: float
    loss_type: str
    lr_scheduler: str
    adam_weight_decay: float = 1e-2
    lr_warmup_steps: int = 0


FLAGS = {"default flags": Flags(1e-4, "l2", "constant"), "best flags": Flags(1e-3, "huber", "cosine")}


@dataclass(frozen=True)
class Race:
    """How long students are trained, and how they are judged."""

    train_steps: int = 120
    batch: int = 32
    samples: int = 1024
    seeds: tuple[int, ...] = (0, 1)
    n: int = 512
    steps: tuple[int, ...] = (1, 2, AT, 8)
    teacher_steps: int = 25

    def run(self, seed: int, folder: Path) -> Run:
        """Our recipe, which trains into this folder."""
        overrides = [
            f"data.source.prompts_file={CONFIGS / 'prompts.txt'}",
            f"data.count={self.samples}",
            f"train.output_dir={folder}",
            f"train.max_train_steps={self.train_steps}",
            f"train.train_batch_size={self.batch}",
            f"train.seed={seed}",
            f"train.teacher_steps={self.teacher_steps}",
            "train.resume_from_checkpoint=latest",
        ]
        return load_config(Run, CONFIGS / "consistency" / "tiny_sd_lcm.yaml", overrides)


SMOKE = Race(train_steps=2, batch=4, samples=8, seeds=(0,), n=40, steps=(AT,), teacher_steps=2)


@torch.no_grad()
def images(run: Run) -> list[tuple[Tensor, str]]:
    """The recipe's samples as a folder of images would hold them, (3, 32, 32) in [-1, 1], with their prompts."""
    samples = [run.data.sample(i, Random(0)) for i in range(len(run.data))]
    latents = torch.stack([sample.latents for sample in samples if sample.latents is not None])
    pipe = run.family.load()
    decoded = torch.cat([run.family.decode(pipe, part) for part in latents.split(128)])
    pixels = to_uint8((decoded / 2 + 0.5).clamp(0, 1)).float() / 127.5 - 1
    return [(each, sample.prompt) for each, sample in zip(pixels, samples, strict=True)]


class Script(Reference):
    """The plain loop with flags of the script."""

    def __init__(self, flags: Flags, race: Race, data: list[tuple[Tensor, str]]) -> None:
        super().__init__(bundled(TEACHER), Setup(batch=race.batch))
        self.flags = flags
        rate, decay = flags.learning_rate, flags.adam_weight_decay
        self.optimizer = torch.optim.AdamW(self.params, lr=rate, weight_decay=decay)
        warmup, steps = flags.lr_warmup_steps, race.train_steps
        self.lr_scheduler = get_scheduler(
            flags.lr_scheduler, self.optimizer, num_warmup_steps=warmup, num_training_steps=steps
        )
        drawn: DataLoader[Any] = DataLoader(cast("Dataset", data), race.batch, shuffle=True)
        self.batches = chain.from_iterable(repeat(drawn))

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels).latent_dist.sample() * self.vae.config.scaling_factor

    def distance(self, pred: Tensor, target: Tensor) -> Tensor:
        if self.flags.loss_type == "l2":
            return nn.functional.mse_loss(pred, target)
        return super().distance(pred, target)


def save_lora(folder: Path, net: nn.Module) -> None:
    """Write the LoRA of a network, with the names that the network has."""
    layers: dict[str, Any] = get_peft_model_state_dict(net)
    StableDiffusionPipeline.save_lora_weights(folder, layers)


def train(side: str, seed: int, race: Race, folder: Path) -> None:
    """A student into a folder from which plain Diffusers loads it, unless it is there."""
    run = race.run(seed, folder)
    if (folder / CONTRACT if side == OURS else folder).exists():
        return
    if side == OURS:
        distill(run)
        return
    torch.manual_seed(seed)
    script = Script(FLAGS[side], race, images(run))
    for number in range(race.train_steps):
        loss = script.step()
        if number % 10 == 0:
            print(f"{side}, seed {seed}, step {number}: loss {loss:.4g}", flush=True)
    half = folder.with_name(f"{folder.name}-half")  # an interrupted run leaves no folder that looks finished
    save_lora(half, script.unet)
    half.rename(folder)


def judge(run: Run, folder: Path, steps: int, ref: StoredFeatures) -> dict[str, Any]:
    """Figures of a student in a plain pipeline."""
    pipe: Any = run.family.load()
    pipe.load_lora_weights(folder)
    pipe.fuse_lora()  # the same student in two thirds of the time
    return figures(pipe, student_call(run.family, run.method, pipe, steps), ref)


def wrapped_loads(race: Race, work: Path) -> bool:
    """Whether plain Diffusers loads a LoRA as the script saves it: with the names of the model that PEFT wraps."""
    run = race.run(0, work)
    pipe, lora = run.family.load(), LoraConfig(target_modules=["to_q"])
    save_lora(work / "wrapped", get_peft_model(pipe.unet, lora))
    fresh: Any = run.family.load()
    try:
        fresh.load_lora_weights(work / "wrapped")
    except ValueError:
        return False
    return True


def reference(race: Race, work: Path) -> StoredFeatures:
    """Features of the teacher, seeds A and B; made once."""
    file = work / f"reference-{race.n}-{race.teacher_steps}.safetensors"
    if not file.exists():
        taught(TEACHER, race.run(0, work), prompts(race.n)).save(file)
    return StoredFeatures.load(file)


def measure(race: Race, work: Path) -> Mapping[str, Any]:
    """Figures by `SIDE/SEED/STEPS`."""
    work.mkdir(parents=True, exist_ok=True)
    file, ref = work / "rows.json", reference(race, work)
    results, facts = Results(file), {"n": race.n, "train_steps": race.train_steps, "batch": race.batch}
    for seed in race.seeds:
        for side in (OURS, *FLAGS):
            folder = work / f"{side} {seed} {race.train_steps}x{race.batch}".replace(" ", "-")
            train(side, seed, race, folder)
            for steps in race.steps:
                make = partial(judge, race.run(seed, folder), folder, steps, ref)
                results.once(f"{side}/{seed}/{steps}", make, **facts)
    return json.loads(file.read_text())


def summary(race: Race, rows: Mapping[str, Any], wrapped: bool) -> dict[str, Any]:
    """The line for programs; `wrapped` of `wrapped_loads`."""

    def ratio(side: str, seed: int) -> float:
        return round(rows[f"{OURS}/{seed}/{AT}"]["excess"] / rows[f"{side}/{seed}/{AT}"]["excess"], 3)

    return {
        "name": "lcm_quality",
        "ratios": {side: [ratio(side, seed) for seed in race.seeds] for side in FLAGS},
        "excess": {key: {name: row[name] for name in ("excess", "ci95")} for key, row in rows.items()},
        "wrapped_lora_loads": wrapped,
        "flags": {side: asdict(flags) for side, flags in FLAGS.items()},
        **asdict(race),
        **surroundings(),
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of students and figures")
    parser.add_argument("--smoke", action="store_true", help="two steps and 40 images, to see that it runs")
    args = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as a run does
    race = SMOKE if args.smoke else Race()
    line = summary(race, measure(race, args.work), wrapped_loads(race, args.work))
    print(render.RENDERERS["lcm_quality"](line))
    print(json.dumps(line))


if __name__ == "__main__":
    main()
