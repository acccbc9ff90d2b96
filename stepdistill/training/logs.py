"""Logging of a run: a banner at the start, `metrics.jsonl`, and Accelerate's trackers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from stepdistill.core.files import written_whole
from stepdistill.families.rules import rule_with
from stepdistill.networks.backbone import Backbone
from stepdistill.training.recipe import Run


class Logs:
    """Scalars to `metrics.jsonl` and to every tracker; images to every tracker that shows them.

    Args:
        start: rows of later steps, left by a run that was cut after its last checkpoint, are dropped.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, start: int) -> None:
        self.accelerator = accelerator
        self.file = folder / "metrics.jsonl"
        if accelerator.is_main_process:
            rows = self.file.read_text().splitlines() if self.file.exists() and start else []
            kept = [row for row in rows if row.endswith("}") and json.loads(row)["step"] <= start]
            with written_whole(self.file) as part:
                part.write_text("".join(row + "\n" for row in kept))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row of scalars for a finished step."""
        if self.accelerator.is_main_process:
            with self.file.open("a") as stream:
                stream.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(dict(values), step=step)

    def images(self, step: int, title: str, images: Sequence[Image.Image]) -> None:
        """A list of images under one title."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                array = np.stack([np.asarray(image) for image in images])
                tracker.writer.add_images(title, array, step, dataformats="NHWC")
            if tracker.name in ("wandb", "trackio"):
                module = __import__(tracker.name)
                tracker.log({title: [module.Image(image) for image in images]}, step=step)


def banner(run: Run, backbone: Backbone, global_batch: int, start: int) -> str:
    """What will be trained, in a few lines."""
    counts = {name: sum(p.numel() for p in backbone.parameters_of(name).values()) for name in backbone.declared}
    rows = {
        "teacher": f"{run.family.pretrained_teacher_model} ({type(run.family).__name__})",
        "method": type(run.method).__name__,
        "data": f"{type(run.data).__name__}, {len(run.data):,} samples",
        "steps": f"{start:,} to {run.train.max_train_steps:,}, {global_batch} samples each",
        "trained": ", ".join(f"{name} {count / 1e6:.2f}M" for name, count in counts.items()),
        "output": run.train.output_dir,
    }
    scale = run.method.guidance_scale
    if scale is not None:
        rule = rule_with(run.method.guidance_norm, run.family, backbone.net)
        rows["guidance"] = f"{rule.equation}, w = {scale}"
    return "\n".join(["***** Running training *****", *(f"  {key:<10}{value}" for key, value in rows.items())])
