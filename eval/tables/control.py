"""The table of control: a ControlNet that was trained on the teacher alone, used with the teacher and with its student.

The control is the edge map of a drawing, and the distance is the mean absolute difference between it and the edge map
of the image that was generated. One drawing in eight is left out of the ControlNet's training, and only those are
controls in the table.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor

from stepdistill.config.dump import config_digest
from stepdistill.config.load import load_config
from stepdistill.data.bundled import emoji
from stepdistill.data.control import edges
from stepdistill.evaluation.metrics.jackknife import mean_interval, ratio_of_means
from stepdistill.evaluation.spec import SEED_B
from stepdistill.families.base import Family
from stepdistill.families.sd import StableDiffusion
from stepdistill.students.draw.call import PipelineCall, generate, student_call, teacher_call
from stepdistill.students.load import load_student
from stepdistill.training.recipe import Run
from tables.benchmark import Results, spans
from tables.recipes import recipes, trained

N, TRAINED, RATE, BATCH, POOL = 128, 300, 1e-3, 32, 2048  # POOL: images of the ControlNet's training
HELD = 8  # one drawing in so many is left out
STUDENTS = {"tiny-sd": {"lcm": ("consistency", (1, 4))}}  # table, and steps to draw in


def measure_control(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """How near teacher and students come to the control, with a ControlNet of the teacher and without."""
    for method, (table, counts) in STUDENTS.get(name, {}).items():
        if rows and method not in rows:
            continue
        file, folder = recipes(name, table)[method], work / "control" / name
        run, out = load_config(Run, file, []), trained(file)
        if not folder.exists():
            train_controlnet(run.family, folder)
        facts = {"teacher": name, "config": config_digest(run), "train_steps": TRAINED}
        for steps in counts:
            results.once(f"{name}/{method}/{steps}", partial(carried_control, run, out, folder, steps), **facts)


def held_out(drawing: emoji.Drawing) -> bool:
    """Whether the ControlNet never saw a drawing."""
    return drawing.index % HELD == 0


def train_controlnet(family: Family, folder: Path, steps: int = TRAINED) -> None:
    """Train a ControlNet on the frozen teacher, with the edges of each image for its control, and save it.

    The loss is that of v-prediction, `|eps - said|^2 / alpha_t^2`, so that the noisiest times count, where steps begin.
    """
    torch.manual_seed(0)
    pipe, rng, sheet = family.load(), random.Random(0), emoji.packed_sheet()
    seen = [drawing for drawing in emoji.subjects() if not held_out(drawing)]
    drawn = [rng.choice(seen) for _ in range(POOL)]
    pixels = emoji.pixels([emoji.image(sheet, drawing, rng) for drawing in drawn])
    latents = torch.cat([family.encode(pipe, part) for part in pixels.split(64)])
    texts = [emoji.caption(drawing, rng) for drawing in drawn]
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 64)).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (steps - i) / (0.4 * steps)))
    for i in range(steps):
        chosen, t = torch.randint(POOL, (BATCH,)), torch.randint(1000, (BATCH,))
        states = family.condition(pipe, [texts[k] for k in chosen.tolist()])["states"]
        eps, weight = torch.randn(BATCH, *latents.shape[1:]), 1 / pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        x_t = pipe.scheduler.add_noise(latents[chosen], eps, t)
        given = {"encoder_hidden_states": states, "return_dict": False}
        down, mid = net(x_t, t, controlnet_cond=edges(pixels[chosen]), **given)
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        loss = (weight * (pipe.unet(x_t, t, **given, **added)[0] - eps).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        decay.step()
        if i % 25 == 0:
            print(f"control {i}: {loss.item():.4f}", flush=True)
    net.save_pretrained(folder)


@cache
def controls(n: int) -> tuple[tuple[str, ...], Tensor]:
    """Prompts (the subgroups) and control images (n, 3, H, W) in [0, 1] of drawings that were left out of training."""
    rng, sheet = random.Random(1), emoji.packed_sheet()
    drawn = [drawing for drawing in emoji.subjects() if held_out(drawing)]
    chosen = [drawn[i % len(drawn)] for i in range(n)]
    pixels = emoji.pixels([emoji.image(sheet, drawing, rng) for drawing in chosen])
    return tuple(drawing.subgroup for drawing in chosen), edges(pixels)


def distances(pipe: Any, call: PipelineCall, control: bool, n: int = N, batch: int = 64) -> Tensor:  # noqa: ANN401
    """The distance of each image's edges to the control, (n,), from the same noises with control and without."""
    prompts, images = controls(n)
    found = []
    for start in range(0, n, batch):
        some = images[start : start + batch]
        row = call.plus(image=some) if control else call
        numbers = range(start, start + len(some))
        drawn = generate(pipe, row, prompts[start : start + batch], SEED_B, batch, numbers=numbers)[0]
        found.append((edges(drawn / 127.5 - 1) - some).abs().mean((1, 2, 3)))
    return torch.cat(found)


def carried_control(run: Run, out: Path, folder: Path, steps: int, n: int = N) -> Mapping[str, Any]:
    """The distances of teacher and student, with control and without, and the share of the gain that crosses over."""
    family, controls_of = run.family, run.family.controls
    assert isinstance(family, StableDiffusion) and controls_of is not None
    gains, means = {}, {}
    for who in ("teacher", "student"):
        pipe: Any = family.load()
        call = teacher_call(family, pipe, run.train.teacher_steps, run.teacher_guidance_scale, who)
        if who == "student":
            call = student_call(family, run.method, pipe, steps)
            load_student(pipe, out)
        without = distances(pipe, call, False, n)
        with_it = distances(controls_of.pipeline_of(pipe, controls_of.read(str(folder))), call, True, n)
        means |= {f"{who}_without": mean_interval(without), who: mean_interval(with_it)}
        gains[who] = without - with_it
    share = ratio_of_means(gains["student"], gains["teacher"])
    return {"n": n, "seeds": [SEED_B], "steps": steps} | spans(**means, share=share)
