"""A pass through layers and networks with a LoRA: PEFT's two paths beside `W + s B A` formed first, in float32.

    python tests/bench/lora_pass.py                  # single layers at real sizes, and the bundled teacher's network
    python tests/bench/lora_pass.py sd15 sdxl sd3    # these networks at their real size too (SD3 with a quarter of its
                                                     # blocks), with random weights

*apart* is PEFT's own forward, *merged* is what `stepdistill.networks.lora_layers` does instead, and *auto* chooses by
the layer's shape and batch; *bare* has no LoRA. A pass is one without gradients, or forward and backward. One process
takes the forms in turn. A ratio is the median over turns of (form / apart), in seconds of CPU on one thread, which
other programs disturb least.

`LIMITS` of that module comes from the first table: `density` is P (I + O) / (I O), and merging wins where it is above.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from harness import CPU, Rows, Side, interleaved, quartiles, ratios, surroundings
from torch import Tensor, nn

from stepdistill.data.bundled import build
from stepdistill.families.base import Family
from stepdistill.families.sd import StableDiffusion
from stepdistill.families.sd3 import StableDiffusion3
from stepdistill.families.sdxl import StableDiffusionXL
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.lora_layers import Kept, choose_arithmetic
from stepdistill.networks.roles import TEACHER, Arithmetic, Lora, LoraSpec

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))

from tables.memory_at_size import SHAPES, Shape, stable_diffusion_3

FORMS: tuple[Arithmetic, ...] = ("apart", "merged", "auto")
LARGE_FORMS: tuple[Arithmetic, ...] = ("apart", "auto")
PASSES = ("forward", "forward and backward")
# kind, inputs, outputs, side of the square of places, batch, rank
LAYERS = [
    ("conv", 64, 64, 8, 16, 64),
    ("conv", 112, 112, 4, 32, 64),
    ("conv", 112, 112, 4, 16, 64),
    ("conv", 320, 320, 64, 1, 64),
    ("conv", 320, 320, 32, 1, 64),
    ("conv", 320, 320, 32, 1, 8),
    ("conv", 640, 640, 32, 2, 64),
    ("conv", 640, 640, 16, 4, 64),
    ("conv", 1280, 1280, 16, 4, 64),
    ("conv", 1280, 1280, 8, 1, 64),
    ("linear", 64, 512, 8, 16, 64),
    ("linear", 112, 112, 4, 16, 64),
    ("linear", 320, 320, 64, 1, 64),
    ("linear", 320, 320, 64, 1, 8),
    ("linear", 320, 2560, 32, 1, 64),
    ("linear", 640, 640, 32, 2, 64),
    ("linear", 1280, 1280, 32, 1, 64),
    ("linear", 1280, 1280, 16, 1, 64),
    ("linear", 1280, 10240, 16, 2, 64),
    ("linear", 1536, 1536, 32, 1, 64),
    ("linear", 1536, 6144, 32, 2, 64),
]
TINY = Shape(partial(build.unet, (64, 112), 128), {"states": (build.LENGTH, 128)}, SHAPES["sd15"].schedule, "epsilon")
SD3_BLOCKS = 6  # of 24, which are alike
SD3 = replace(SHAPES["sd3"], network=partial(stable_diffusion_3, SD3_BLOCKS))


class Case(NamedTuple):
    """A network and its family, the batch, the side of the latents, and turns: not measured, and measured."""

    shape: Shape
    family: type[Family]
    batch: int
    side: int
    warm: int
    turns: int


NETWORKS = {
    "tiny-sd, batch 32": Case(TINY, StableDiffusion, 32, 8, 1, 20),
    "tiny-sd, batch 8": Case(TINY, StableDiffusion, 8, 8, 1, 30),
    "sd15": Case(SHAPES["sd15"], StableDiffusion, 1, 64, 0, 2),
    "sdxl": Case(SHAPES["sdxl"], StableDiffusionXL, 1, 64, 0, 1),
    "sd3": Case(SD3, StableDiffusion3, 1, 64, 0, 2),
}


def with_lora(net: nn.Module, rank: int, targets: list[str]) -> Backbone:
    """A network with a LoRA that is not zero."""
    backbone = Backbone(net, LoraSpec(rank=rank), targets)
    backbone.add("student", Lora())
    for p in backbone.parameters_of("student").values():
        nn.init.normal_(p, std=0.02)
    return backbone


def sides(
    backbone: Backbone, call: Callable[[nn.Module], Tensor], gradient: bool, forms: Sequence[Arithmetic] = FORMS
) -> dict[str, Side]:
    """A side for each form, and one without the LoRA."""

    def step(role: str, form: Arithmetic) -> None:
        choose_arithmetic(backbone.net, form, Kept())
        with torch.set_grad_enabled(gradient), backbone.use(role) as net:
            y = call(net)
        if gradient:
            torch.autograd.backward(y, torch.ones_like(y))
        backbone.zero_grad(set_to_none=True)

    students = {form: Side(partial(step, "student", form), [], {}) for form in forms}
    return students | {"bare": Side(partial(step, TEACHER, "apart"), [], {})}


def share(rows: Rows, form: str) -> float:
    """(form / apart), the median over turns."""
    return round(quartiles(ratios(rows[form], rows["apart"], CPU))[1], 3)


def layer_row(kind: str, inputs: int, outputs: int, side: int, batch: int, rank: int) -> dict[str, object]:
    """The ratios of one layer."""
    layer = nn.Conv2d(inputs, outputs, 3, padding=1) if kind == "conv" else nn.Linear(inputs, outputs)
    shape = (batch, inputs, side, side) if kind == "conv" else (batch, side * side, inputs)
    backbone = with_lora(nn.Sequential(OrderedDict(layer=layer)), rank, ["layer"])
    x = torch.randn(shape, requires_grad=True)
    places, width = batch * side * side, inputs * (9 if kind == "conv" else 1)
    turns = max(3, min(30, int(2e11 / (places * width * outputs * 20))))
    row: dict[str, object] = {"density": round(places * (width + outputs) / (width * outputs), 2)}
    for name, gradient in zip(PASSES, (False, True), strict=True):
        rows = interleaved(sides(backbone, lambda net: net(x), gradient), 1, turns)
        row[name] = {form: share(rows, form) for form in ("merged", "auto")}
    return row


def network_row(name: str) -> dict[str, object]:
    """The ratios of a whole network."""
    case = NETWORKS[name]
    family, forms = case.family(pretrained_teacher_model="random"), FORMS if name.startswith("tiny") else LARGE_FORMS
    net = case.shape.network()
    backbone = with_lora(net, LoraSpec.rank, list(family.lora_targets(net)))
    x = torch.randn(case.batch, case.shape.channels, case.side, case.side, requires_grad=True)
    t = torch.full((case.batch,), 500.0)
    cond = {key: torch.randn(case.batch, *size) for key, size in case.shape.condition.items()}
    row: dict[str, object] = {}
    for pass_name, gradient in zip(PASSES, (False, True), strict=True):
        both = sides(backbone, lambda net: family.call(net, x, t, cond), gradient, forms)
        rows = interleaved(both, case.warm, case.turns)
        seconds = round(quartiles([one[CPU] for one in rows["apart"]])[1], 3)
        row[pass_name] = {form: share(rows, form) for form in rows if form != "apart"} | {"apart, s": seconds}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="networks at their real size")
    names = [name for name in NETWORKS if name.startswith("tiny")] + parser.parse_args().networks
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as a run does
    torch.manual_seed(0)
    line: dict[str, object] = {"name": "lora_pass"}
    for case in LAYERS:
        kind, inputs, outputs, side, batch, rank = case
        key = f"{kind} {inputs}-{outputs}, {side} x {side}, batch {batch}, rank {rank}"
        line[key] = layer_row(*case)
        print(f"{key:48} {line[key]}", flush=True)
    for name in names:
        line[name] = network_row(name)
        print(f"{name:48} {line[name]}", flush=True)
    print(json.dumps(line | surroundings()))


if __name__ == "__main__":
    main()
