"""A guided step in one pass with guidance adapters, beside the same in two: seconds of CPU, at equal batch.

    python tests/bench/guidance_step.py

Reference: classifier-free guidance in its plainest form: one call of the network on two rows an image, with and
without the prompt, `uncond + w (cond - uncond)`, and a DDIM step. Ours: one call on one row, with adapters attached as
`stepdistill.load_student` does it, and the same DDIM step. Both take the same network, in turn, step by step; while it
is the reference's turn the adapters are off, and their hooks do nothing.

Weights and embeddings are random: what they are costs nothing. The adapters are those of AGD's recipes, their outputs
random instead of zero. `time_ratio` is the median over turns of (ours / reference), in seconds of CPU, which other
programs disturb least.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from diffusers import UNet2DConditionModel
from dmd2_plain import FAMILY, Setup, noise_table
from harness import CPU, WALL, Rows, Side, interleaved, quartiles, ratios, surroundings, table
from torch import Tensor, nn

from stepdistill.data.bundled import build as tiny
from stepdistill.methods.agd import AdapterGuidance
from stepdistill.networks.guidance_adapters import OFF, Attachment, build
from stepdistill.networks.roles import Adapters

SIDES = ("two passes", "adapters")
GUIDANCE, NOW, THEN = 7.5, 799, 759
WARM = 1


@dataclass(frozen=True)
class Case:
    """A network's size, the adapters' role on it, and turns to measure."""

    setup: Setup
    role: Adapters
    turns: int


RECIPE = AdapterGuidance()
CASES = {
    "SD 1.5": Case(Setup(dtype=torch.float32), Adapters(RECIPE.arch, RECIPE.width), 5),
    "tiny": Case(Setup(partial(tiny.unet, (64, 112), 128), torch.float32, tiny.LENGTH), Adapters("mixed", 48), 60),
}


def attached(net: nn.Module, role: Adapters) -> Attachment:
    """Adapters with an effect."""
    sites = FAMILY.sites(net)
    modules = build(role, sites).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    for key, p in modules.named_parameters():
        if ".out." in key:
            p.data = 0.01 * torch.randn(p.shape, generator=generator)
    return Attachment(net, sites, modules, GUIDANCE)


class Bench:
    """The two sides over one network."""

    def __init__(self, case: Case) -> None:
        self.net: UNet2DConditionModel = case.setup.network().eval()
        self.adapters = attached(self.net, case.role)
        self.on, self.off = self.adapters.hooks.now, OFF
        self.x_t = torch.randn(case.setup.batch, 4, *[self.net.config["sample_size"]] * 2)
        states = case.setup.embeddings(self.net, case.setup.batch, 1)
        null = case.setup.embeddings(self.net, 1, 0).expand_as(states)
        self.states, self.both = states, torch.cat([null, states])

    def ddim(self, eps: Tensor) -> Tensor:
        """A DDIM step with this estimate of the noise."""
        (alpha, sigma), (alpha_s, sigma_s) = ((a.sqrt(), (1 - a).sqrt()) for a in noise_table()[[NOW, THEN]])
        return alpha_s * (self.x_t - sigma * eps) / alpha + sigma_s * eps

    @torch.no_grad()
    def two_passes(self) -> Tensor:
        self.adapters.hooks.now = self.off
        y = self.net(torch.cat([self.x_t, self.x_t]), NOW, self.both, return_dict=False)[0]
        uncond, cond = y.chunk(2)
        return self.ddim(uncond + GUIDANCE * (cond - uncond))

    @torch.no_grad()
    def one_pass(self) -> Tensor:
        self.adapters.hooks.now = self.on
        return self.ddim(self.net(self.x_t, NOW, self.states, return_dict=False)[0])

    def sides(self) -> dict[str, Side]:
        steps = dict(zip(SIDES, (self.two_passes, self.one_pass), strict=True))
        return {name: Side(step, [self.net], {}) for name, step in steps.items()}

    def share(self) -> float:
        """The adapters' parameters over the network's."""
        sizes = (sum(p.numel() for p in module.parameters()) for module in (self.adapters.adapters, self.net))
        return next(sizes) / next(sizes)


def ratio(rows: Rows, clock: str) -> list[float]:
    """Quartiles of (ours / reference)."""
    return [round(value, 3) for value in quartiles(ratios(rows["adapters"], rows["two passes"], clock))]


def summary(found: dict[str, tuple[Rows, float]]) -> dict[str, object]:
    """The line for programs."""
    (large, extra), (small, little) = found["SD 1.5"], found["tiny"]
    return {
        "name": "guidance_step",
        "time_ratio": ratio(large, CPU)[1],
        "time_ratio_wall": ratio(large, WALL)[1],
        **{key: {side: large[side][0][key] for side in SIDES} for key in ("calls", "rows")},
        "seconds": {side: round(median(row[CPU] for row in large[side]), 3) for side in SIDES},
        "extra_parameters": round(extra, 4),
        "tiny": {
            "time_ratio": ratio(small, CPU),
            "time_ratio_wall": ratio(small, WALL),
            "extra_parameters": round(little, 4),
        },
        **surroundings(),
    }


def measure(case: Case) -> tuple[Rows, float]:
    """What each step took, and the share of parameters that is added."""
    bench = Bench(case)
    return interleaved(bench.sides(), WARM, case.turns), bench.share()


def main() -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as a run does
    found = {}
    for name, case in CASES.items():
        found[name] = rows, share = measure(case)
        role = case.role
        print(f"{name}: batch {case.setup.batch}, {role.arch} of width {role.width}, {share:.1%} more parameters")
        print("ms of a guided step: median and half the distance between the quartiles")
        print(table(rows, (CPU, WALL), 1e3))
        print(table(rows, ("calls", "rows"), 1))
        for clock in (CPU, WALL):
            low, middle, high = ratio(rows, clock)
            print(f"{clock}: adapters / two passes = {middle:.3f}, quartiles {low:.3f} and {high:.3f}", flush=True)
    print(json.dumps(summary(found)))


if __name__ == "__main__":
    main()
