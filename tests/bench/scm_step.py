"""Cost of a step of sCM, SANA-Sprint and BOOT beside one of LCM and of DMD2, on one network.

    python tests/bench/scm_step.py

Each side is a run of the library at the size of the bundled teacher `tiny-sd` (rank 64, batch 16, float32, without
gradient checkpointing; weights, latents and embeddings are random), with the settings of its class but for the warm-up
of sCM, which is over. The sides take turns. A turn is five steps, so that DMD2's one update of the student and five of
its fake score are in it.

*ratio*: seconds of CPU on one thread over LCM's, turn by turn: quartiles. *calls* of the network are a step's, and
*rows* for each sample; a derivative in forward mode is one call, with the plain kernel of attention.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count

import torch
from dmd2_memory import SETUPS, scene
from dmd2_plain import FAMILY, RATE, Setup
from harness import CPU, WALL, Rows, Side, interleaved, quartiles, ratios, surroundings
from torch import Tensor

from stepdistill.methods.base import Batch, Method
from stepdistill.methods.boot import Boot
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.gan import Ladd
from stepdistill.methods.scm import SCM
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.roles import LoraSpec
from stepdistill.training.memory.forecast import Rehearsal
from stepdistill.training.optimizers import Optimizers
from stepdistill.training.recipe import TrainSpec

METHODS: Mapping[str, Method] = {
    "LCM": Consistency(),
    "DMD2": DMD2(),
    "sCM": SCM(warmup_steps=0),
    "sCM by difference": SCM(warmup_steps=0, difference=0.1),
    "SANA-Sprint": SCM(warmup_steps=0, gan=Ladd()),
    "SANA-Sprint by difference": SCM(warmup_steps=0, difference=0.1, gan=Ladd()),
    "BOOT": Boot(),
}
STEPS, WARM, TURNS = 5, 1, 12
TINY = replace(SETUPS["tiny"], rank=64, batch=16, checkpointing=False)


def batches(setup: Setup, states: Tensor, side: int) -> Iterator[list[Batch]]:
    """One micro-batch a step, of random latents."""
    shape = (4, side, side)
    generator = torch.Generator().manual_seed(0)
    for step in count():
        index = tuple(range(step * setup.batch, (step + 1) * setup.batch))
        latents = torch.randn(setup.batch, *shape, generator=generator)
        yield [Batch(index, {"states": states}, shape, latents)]


def make(method: Method, setup: Setup) -> Side:
    """A side whose step is five steps of the method."""
    net = setup.network()
    spec = TrainSpec(output_dir="unused", learning_rate=RATE)
    places = {"tap": FAMILY.tap(net), "taps": FAMILY.taps(net)}
    backbone = Backbone(net, LoraSpec(rank=setup.rank), FAMILY.lora_targets(net), **places)
    optimizers = Optimizers(backbone, spec).declare(method).build()
    null = {"states": setup.embeddings(net, 1, 0)}
    feed = batches(setup, setup.embeddings(net, setup.batch, 1), net.config["sample_size"])
    device, roles = torch.device("cpu"), method.roles()
    run = Rehearsal(method, optimizers, lambda i: scene(setup, backbone, null, i), feed, device, roles)
    numbers = count()
    return Side(
        lambda: [run.step(next(numbers), next(run.batches)) for _ in range(STEPS)],
        [net],
        dict.fromkeys(("backward", "clip, optimizer"), 0.0),
    )


def figures(rows: Rows, setup: Setup) -> dict[str, dict[str, object]]:
    """Of each side a step's calls, rows a sample and milliseconds of CPU, and its ratio to LCM's."""
    return {
        name: {
            "ratio": [round(value, 3) for value in quartiles(ratios(turns, rows["LCM"], CPU))],
            "ratio_wall": round(quartiles(ratios(turns, rows["LCM"], WALL))[1], 3),
            "calls": sum(turn["calls"] for turn in turns) / len(turns) / STEPS,
            "rows": round(sum(turn["rows"] for turn in turns) / len(turns) / STEPS / setup.batch, 2),
            "ms": round(quartiles([turn[CPU] for turn in turns])[1] * 1e3 / STEPS, 1),
        }
        for name, turns in rows.items()
    }


def main() -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as a run does
    found = figures(interleaved({name: make(method, TINY) for name, method in METHODS.items()}, WARM, TURNS), TINY)
    for name, row in found.items():
        print(f"{name:>26}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
    shape = {"rank": TINY.rank, "batch": TINY.batch, "turns": TURNS}
    print(json.dumps({"name": "scm_step", **found, **shape, **surroundings()}))


if __name__ == "__main__":
    main()
