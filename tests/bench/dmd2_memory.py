"""A cycle of DMD2 on one shared base beside three copies of the network: memory, calls and time.

    python tests/bench/dmd2_memory.py

A cycle is `critic_steps` steps: as many updates of the fake score, and one of the student. Both sides have LoRAs in
float32 with Adam on a frozen network in the same precision, gradient checkpointing, and the same losses
(`tests/test_bench.py` compares them). Weights and embeddings are random: a text encoder and a VAE would be the same
on both sides.

Reference: the cycle in its plainest form (`dmd2_plain.py`). Teacher, student and fake score are a network each, and
the teacher is called twice, with and without the prompt.

Ours: `Backbone`, `Optimizers` and `train_step` as a run builds them. The calls are the fewest that the method allows.
Step i simulates k_i steps of the student, calls it once more for the sample, and the fake score for its own loss; one
step of the cycle compares the scores, too, with a call of the fake score and one of the teacher for both conditions
(two rows a sample). In all `sum(k_i) + 2 K + 2` calls and `sum(k_i) + 2 K + 3` rows a sample, for K critic steps.

*static*: all parameters, gradients and optimizer states, in bytes, each tensor once. *peak*: the largest resident
memory of a process that does nothing else, beyond its imports. A ratio is (ours / reference). At the size of Stable
Diffusion 1.5 time is that of the same processes, in seconds of CPU, which other programs disturb least. At the
bundled teacher's size one process takes both sides in turn, cycle by cycle.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

import torch
from diffusers import UNet2DConditionModel
from dmd2_plain import FAMILY, FULL, GUIDANCE, HIGH, LOW, RATE, TIMES, Reference, Setup, noise_table
from harness import CPU, WALL, Rows, Side, beyond, interleaved, memory, quartiles, ratios, surroundings, table
from torch import Tensor, nn

from stepdistill.core.denoise import Condition
from stepdistill.core.schedule import DiscreteVP
from stepdistill.data.bundled import build
from stepdistill.methods.base import Batch, StepContext
from stepdistill.methods.dmd2 import DMD2
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import LoraSpec
from stepdistill.training.memory.forecast import Rehearsal
from stepdistill.training.optimizers import Optimizers
from stepdistill.training.recipe import TrainSpec

SIDES = ("reference", "ours")
CAUSES = ("forward", "backward", "clip, optimizer", "rest")
MEASURED = ("static MiB", "peak MiB", "beyond imports", "calls", "rows")
WARM, CYCLES = 1, 24
SETUPS = {"SD 1.5": Setup(), "tiny": Setup(partial(build.unet, (64, 112), 128), torch.float32, build.LENGTH)}


def method(setup: Setup) -> DMD2:
    """Without an average, since the reference has none."""
    return DMD2(
        num_inference_steps=len(TIMES),
        guidance_scale=GUIDANCE,
        critic_steps=setup.critic_steps,
        t_range=(LOW, HIGH),
        ema_decay=None,
    )


def scene(setup: Setup, backbone: Backbone | None, null: Condition, step: int) -> StepContext:
    """What `Session.context` gives in a run; for draws alone there need be no network."""
    schedule = DiscreteVP(noise_table())
    return StepContext(
        schedule=schedule,
        null=null,
        denoiser=lambda role: Denoiser(backbone, role, schedule, "epsilon", FAMILY.call, setup.dtype),
        module=lambda role: backbone.others[role],
        decode=nn.Identity(),
        seed=0,
        step=step,
        device=torch.device("cpu"),
    )


def batches(setup: Setup, net: UNet2DConditionModel) -> Iterator[list[Batch]]:
    """One micro-batch a step; the states of a step are the same on both sides."""
    shape = (4, *[net.config["sample_size"]] * 2)
    for step in count():
        index = tuple(range(step * setup.batch, (step + 1) * setup.batch))
        yield [Batch(index, {"states": setup.embeddings(net, setup.batch, step + 1)}, shape)]


def production(setup: Setup) -> Rehearsal:
    """The steps of `stepdistill.distill`, around a network that no pipeline holds."""
    net = setup.network()
    spec = TrainSpec(output_dir="unused", learning_rate=RATE)
    backbone = Backbone(net, LoraSpec(rank=setup.rank), FAMILY.lora_targets(net))
    optimizers = Optimizers(backbone, spec).declare(method(setup)).build()
    if setup.checkpointing:
        backbone.enable_checkpointing()
    null = {"states": setup.embeddings(net, 1, 0)}
    context = partial(scene, setup, backbone, null)
    device, roles = torch.device("cpu"), method(setup).roles()
    return Rehearsal(method(setup), optimizers, context, batches(setup, net), device, roles)


class Held:
    """Bytes of all weights, gradients and optimizer states, each tensor once.

    A gradient is seen when its optimizer steps. Those of both roles count, though neither side keeps the one's while
    it makes the other's.
    """

    def __init__(self, nets: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> None:
        self.nets, self.optimizers = nets, optimizers
        self.gradients: dict[int, int] = {}
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(self.see)

    def see(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self.gradients |= {id(p): p.grad.nbytes for p in params if p.grad is not None}

    def bytes(self) -> int:
        kept = [t for net in self.nets for t in (*net.parameters(), *net.buffers())]
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        kept += [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return sum({t.data_ptr(): t.nbytes for t in kept}.values()) + sum(self.gradients.values())


def make(name: str, setup: Setup) -> tuple[Side, Held]:
    """A side whose step is a cycle, with its clocks in place; its first step, which makes Adam's states, is taken.

    So a cycle ends with the student's turn, and has all that a long run holds.
    """
    numbers = count()
    if name != "ours":
        plain = Reference(setup, full=name == "full fine-tune")
        nets, optimizers = [plain.teacher, plain.student, plain.fake], list(plain.optimizers.values())
        feed = batches(setup, plain.teacher)

        def step() -> object:
            number, (batch,) = next(numbers), next(feed)
            # as many simulated steps as ours, else the sides would differ by luck
            taken = int(scene(setup, None, {}, number).shared("step") * len(TIMES))
            return plain.step(number, batch.cond["states"], plain.draw(taken))
    else:
        run = production(setup)
        nets, optimizers = [run.optimizers.backbone.net], list(run.optimizers.by_role.values())

        def step() -> object:
            return run.step(next(numbers), next(run.batches))

    side = Side(lambda: [step() for _ in range(setup.critic_steps)], nets, dict.fromkeys(CAUSES, 0.0))
    held = Held(nets, optimizers)
    for net in nets:
        net.forward = side.timed(net.forward, "forward")
    for optimizer in optimizers:
        optimizer.step = side.timed(optimizer.step, "clip, optimizer")
    step()
    return side, held


def alone(name: str, setup: Setup) -> dict[str, float]:
    """A cycle of one side in a process of its own."""
    row: dict[str, float] = {}

    def work() -> None:
        side, held = make(name, setup)
        row.update(side.measure())
        row["static MiB"] = held.bytes() / 2**20

    peaks = beyond(work)
    return row | peaks


def full_fine_tune(setup: Setup) -> float:
    """GiB of the published form, without activations: student and fake score trained in full, a frozen teacher."""
    with torch.device("meta"):
        size = sum(p.numel() for p in setup.unet().parameters())
    return (2 * FULL + setup.dtype.itemsize) * size / 2**30


def middles(rows: Rows, key: str) -> dict[str, float]:
    """Each side's median."""
    return {side: round(median(row[key] for row in rows[side]), 1) for side in SIDES}


def share(rows: Rows, key: str) -> float:
    """Ours over the reference's, of medians."""
    return round(middles(rows, key)["ours"] / middles(rows, key)["reference"], 3)


def times(rows: Rows, clock: str) -> list[float]:
    """Quartiles of (ours / reference)."""
    return [round(value, 3) for value in quartiles(ratios(rows["ours"], rows["reference"], clock))]


def summary(setup: Setup, large: Rows, small: Rows, cycles: Rows) -> dict[str, object]:
    """The line for programs: `large` at full size; of the tiny network, `small` by process and `cycles` in turn."""
    return {
        "name": "dmd2_memory",
        "static_ratio": share(large, "static MiB"),
        "peak_ratio": share(large, "beyond imports"),
        "time_ratio": times(large, CPU)[1],
        "time_ratio_wall": times(large, WALL)[1],
        **{key: {side: large[side][0][key] for side in SIDES} for key in ("calls", "rows")},
        "static_mib": middles(large, "static MiB"),
        "peak_mib": middles(large, "beyond imports"),
        "full_fine_tune_gib": round(full_fine_tune(setup), 2),
        "tiny": {
            "static_ratio": share(small, "static MiB"),
            "peak_ratio": share(small, "beyond imports"),
            "time_ratio": times(cycles, CPU),
            "time_ratio_wall": times(cycles, WALL),
        },
        "rank": setup.rank,
        "batch": setup.batch,
        "critic_steps": setup.critic_steps,
        **surroundings(),
    }


def answered(setups: Mapping[str, Setup]) -> bool:
    """Prepare this process. Where `memory` has started it, print the cycle of its side at its size, and return True."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as a run does
    if len(sys.argv) == 1:
        return False
    size, side = sys.argv[1].split("/")
    print(json.dumps(alone(side, setups[size])))
    return True


def main() -> None:
    if answered(SETUPS):
        return
    large, small = SETUPS["SD 1.5"], SETUPS["tiny"]
    apart: dict[str, Rows] = {}
    for size, setup in SETUPS.items():
        # before this process grows: one begins with the peak of the one that starts it. Once: bytes repeat
        found = memory(Path(__file__), [f"{size}/{side}" for side in SIDES], rounds=1)
        apart[size] = {side: found[f"{size}/{side}"] for side in SIDES}
        print(f"{size}: DMD2, {setup.critic_steps} critic steps, batch {setup.batch}, LoRAs of rank {setup.rank}")
        print(table(apart[size], MEASURED, 1), flush=True)
    print(f"SD 1.5 trained in full, without activations: {full_fine_tune(large) * 1024:.1f} MiB")
    cycles = interleaved({side: make(side, small)[0] for side in SIDES}, WARM, CYCLES)
    print("ms of a cycle: median and half the distance between the quartiles")
    for size, rows in (("SD 1.5", apart["SD 1.5"]), ("tiny", cycles)):
        print(f"{size}\n{table(rows, (*CAUSES, CPU, WALL), 1e3)}")
        for clock in (CPU, WALL):
            low, middle, high = times(rows, clock)
            print(f"{clock}: ours / reference = {middle:.3f}, quartiles {low:.3f} and {high:.3f}")
    print(json.dumps(summary(large, apart["SD 1.5"], apart["tiny"], cycles)))


if __name__ == "__main__":
    main()
