"""Train the bundled teachers: a small autoencoder, then a UNet or a flow transformer with its text towers.

Plain pre-training, so it shares nothing with the distillation trainer: the text towers learn together with the
denoiser, on latents that are encoded once.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from stepdistill.core.files import written_whole
from stepdistill.data.bundled.image_teacher import ImageLessons
from stepdistill.data.bundled.teacher_spec import TeacherSpec
from stepdistill.data.bundled.token_teacher import TokenLessons
from stepdistill.data.bundled.video_teacher import VideoLessons


class Lessons(Protocol):
    """What a teacher learns from, for one spec; a folder keeps what is made once."""

    def networks(self) -> tuple[Any, nn.ModuleList]:
        """The pipeline or model, and its networks that learn."""
        ...

    def loss(self, pipe: Any, rng: random.Random, /) -> Tensor:  # noqa: ANN401
        """The loss of one batch, a scalar."""
        ...

    def write(self, pipe: Any, out: Path, /) -> None:  # noqa: ANN401
        """The folder of the pipeline or model, in half precision."""
        ...


CARD = """---
license: cc-by-4.0
tags: [diffusers, {task}]
---
# {name}

A toy teacher for stepdistill's quickstart, tests and tables: {learnt}, trained for {steps} steps
by `train/teacher.py`. Trained on Twemoji, Copyright 2020 Twitter, Inc and other contributors, graphics licensed under
CC-BY 4.0: https://creativecommons.org/licenses/by/4.0/
{note}"""
LENGTH_NOTE = "\nPass `max_sequence_length=16` to its call, as in its training.\n"
VIDEO_NOTE = """
Pass `height=32, width=32, num_frames=9, max_sequence_length=16` to its call, as in its training; `num_frames=1` draws
an image. `WanImageToVideoPipeline.from_pretrained` opens this folder, too, and animates an image.
"""
IMAGES, CLIPS = "32-pixel emoji from their names", "clips of 32-pixel emoji from their names and motions"
TOKENS_NOTE = """
It is a `JanusForConditionalGeneration` in half precision: load it with `dtype=torch.float32`.
"""
LESSONS: dict[str, Callable[[TeacherSpec, Path], Lessons]] = {
    "sd": ImageLessons,
    "sd3": ImageLessons,
    "wan": VideoLessons,
    "janus": TokenLessons,
}
CARDS = {
    "sd": {"task": "text-to-image", "learnt": IMAGES, "note": ""},
    "sd3": {"task": "text-to-image", "learnt": IMAGES, "note": LENGTH_NOTE},
    "wan": {"task": "text-to-video", "learnt": CLIPS, "note": VIDEO_NOTE},
    "janus": {"task": "text-to-image", "learnt": IMAGES, "note": TOKENS_NOTE},
}


def train_teacher(spec: TeacherSpec) -> Path:
    """Train one teacher and write its pipeline folder. A run that was cut goes on from its last checkpoint."""
    torch.set_num_threads(spec.threads)
    out = Path(spec.output_dir)
    work = out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    lessons = LESSONS[spec.pipeline](spec, work)
    pipe, nets = lessons.networks()
    params = list(nets.parameters())
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=spec.learning_rate, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        # constant, then linear to zero over the last 40 %
        lambda i: min(1.0, (i + 1) / spec.warmup, (spec.max_train_steps - i) / (0.4 * spec.max_train_steps)),
    )
    start, seconds, state = 0, 0.0, work / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        nets.load_state_dict(saved["nets"])
        average = saved["average"]
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        start, seconds = saved["step"], saved["seconds"]
    began = time.time()
    bar = tqdm(
        range(start, spec.max_train_steps),
        initial=start,
        total=spec.max_train_steps,
        desc="denoiser",
        mininterval=10,
    )
    mean = 0.0
    for step in bar:
        torch.manual_seed(spec.seed * 1_000_003 + step)
        loss = lessons.loss(pipe, random.Random(spec.seed * 1_000_003 + step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - min(spec.ema, (step + 1) / (step + 10)))
        mean += (loss.item() - mean) / min(step - start + 1, 200)
        bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
        if (step + 1) % spec.checkpointing_steps == 0 or step + 1 == spec.max_train_steps:
            facts = {"steps": step + 1, "seconds": round(seconds + time.time() - began), "loss": round(mean, 4)}
            saved = {"nets": nets.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
            saved |= {"schedule": schedule.state_dict(), "step": step + 1, "seconds": facts["seconds"]}
            with written_whole(state) as part:
                torch.save(saved, part)
            save_teacher(spec, lessons, pipe, params, average, out, facts)
    return out


@torch.no_grad()
def save_teacher(
    spec: TeacherSpec,
    lessons: Lessons,
    pipe: Any,  # noqa: ANN401
    params: list[nn.Parameter],
    average: list[Tensor],
    out: Path,
    facts: dict,
) -> None:
    """Write the folder with the averaged weights."""
    trained = [p.detach().clone() for p in params]
    for p, mean in zip(params, average, strict=True):
        p.copy_(mean)
    lessons.write(pipe, out)
    for file in out.rglob("config.json"):  # Diffusers and transformers keep the path that a part was read from
        kept = {key: value for key, value in json.loads(file.read_text()).items() if key != "_name_or_path"}
        file.write_text(json.dumps(kept, indent=2) + "\n")
    (out / "README.md").write_text(CARD.format(name=out.name, steps=facts["steps"], **CARDS[spec.pipeline]))
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    for p, old in zip(params, trained, strict=True):
        p.copy_(old)
