"""From the start of a process to its first training step, ours beside diffusers' LCM-LoRA script: seconds of CPU.

    python tests/bench/start_up.py

Reference: what that script imports and does before its loop, but for its reader of shards (webdataset), with the same
pipeline folder: both networks, LoRA, optimizer, tracker, and the empty prompt. Ours: `stepdistill train
configs/quickstart.yaml`. Each round starts each side in a process of its own, and another side begins each round.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
ROUNDS = 7


def script(folder: Path, output: Path) -> None:
    """The script's start, in its order."""
    import accelerate  # noqa: F401
    import diffusers  # noqa: F401
    import numpy as np  # noqa: F401
    import torch
    import torch.nn.functional as F  # noqa: F401, N812
    import torch.utils.checkpoint
    import transformers  # noqa: F401
    from accelerate import Accelerator
    from accelerate.logging import get_logger  # noqa: F401
    from accelerate.utils import ProjectConfiguration, set_seed
    from diffusers import AutoencoderKL, DDPMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import resolve_interpolation_mode  # noqa: F401
    from diffusers.utils import check_min_version, is_wandb_available  # noqa: F401
    from diffusers.utils.import_utils import is_xformers_available  # noqa: F401
    from huggingface_hub import create_repo, upload_folder  # noqa: F401
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict  # noqa: F401
    from torch.utils.data import default_collate  # noqa: F401
    from torchvision import transforms  # noqa: F401
    from tqdm.auto import tqdm
    from transformers import AutoTokenizer, CLIPTextModel, PretrainedConfig  # noqa: F401

    config = ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs"))
    accelerator = Accelerator(log_with="tensorboard", project_config=config)
    set_seed(0)
    DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer", use_fast=False)
    text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    teacher = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    for part in (vae, text, teacher):
        part.requires_grad_(False)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    unet.train()
    names = "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut".split()
    names += ["downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"]
    unet = get_peft_model(unet, LoraConfig(r=64, target_modules=names))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    rates = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=0, num_training_steps=200)
    accelerator.prepare(unet, optimizer, rates)
    tokens = tokenizer([""] * 32, return_tensors="pt", padding="max_length", max_length=tokenizer.model_max_length)
    text(tokens.input_ids)[0]
    accelerator.init_trackers("lcm")
    tqdm(range(200), disable=True)


def ours(folder: Path, output: Path) -> None:
    """`stepdistill train` to its first step, which ends it."""
    from stepdistill.cli.dialect import heavy_imports, quieten
    from stepdistill.cli.main import main

    quieten()
    with heavy_imports():  # what the command imports, as it does
        from stepdistill.training import distill, loop

    def stop(*_: object) -> None:
        raise SystemExit(0)

    assert distill.training_loop is loop.training_loop
    loop.train_step = stop
    try:
        main(["train", "configs/quickstart.yaml", "--output-dir", str(output), f"--pretrained-teacher-model={folder}"])
    except SystemExit as end:
        if end.code != 0:
            raise


SIDES: dict[str, Callable[[Path, Path], None]] = {"script": script, "ours": ours}


def start(name: str) -> None:
    """Start a side in this process, and print how many seconds of CPU it took."""
    with TemporaryDirectory() as output:
        SIDES[name](ROOT / "stepdistill/data/bundled/tiny-sd", Path(output))
        spent = time.process_time()
    print(json.dumps({"start, CPU": spent}))


def main() -> None:
    from harness import memory, ratios, surroundings, table

    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(ROOT)
    rows = memory(Path(__file__), tuple(SIDES), ROUNDS)
    print(table(rows, ("start, CPU",), 1))
    line = {
        "name": "start_up",
        "seconds": {name: round(median(row["start, CPU"] for row in side), 2) for name, side in rows.items()},
        "ratio": round(median(ratios(rows["ours"], rows["script"], "start, CPU")), 3),
        **surroundings(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    start(sys.argv[1]) if len(sys.argv) > 1 else main()
