"""Drawing with a student folder: under its contract, or away from it where that is asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from stepdistill.config import load as config
from stepdistill.core.errors import StudentError, problem
from stepdistill.core.schedule import NoiseSchedule, Rectified
from stepdistill.core.solvers import Sampler, check_starts
from stepdistill.families.base import Family, each
from stepdistill.families.prompt_limits import warn_of_cut
from stepdistill.methods.base import Method
from stepdistill.networks.guidance_adapters import GuidedCall
from stepdistill.networks.pipeline_loras import merge, weigh
from stepdistill.students import single as student
from stepdistill.students.contract import Contract, absolute, is_multi, read_contract, read_multi, teacher
from stepdistill.students.draw.negative_prompt import Mode, negative_prompt
from stepdistill.students.load import load_student
from stepdistill.students.several import Students

logger = logging.getLogger(__name__)
STUDENT = "student"  # the adapter's name


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What to do otherwise than the contract says; None is as it says.

    Args:
        steps: as the method samples in so many.
        timesteps: where steps start, descending, in the scheduler's time.
        sigmas: the same as `sigma_t` of `x_t = alpha_t x0 + sigma_t eps`.
        guidance_scale: of `uncond + w (cond - uncond)`, at least 1; of guidance adapters what they are told.
        eta: share of each step that is noised again.
        height, width: in pixels.
    """

    steps: int | None = None
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    guidance_scale: float | None = None
    eta: float | None = None
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class Drawer:
    """A plain pipeline with a student in it.

    Args:
        native: the teacher's scheduler, which knows the noise process.
        loaded: what `stepdistill.load_student` gave.
        contract: None of several students, each of which has its own.
    """

    family: Family
    pipe: DiffusionPipeline
    native: Any
    loaded: Any
    contract: Contract | None

    @staticmethod
    def load(
        place: str | Path,
        base: str | None = None,
        device: torch.device | str = "cpu",
        strength: float | None = None,
        loras: Sequence[tuple[str, float]] = (),
        fuse: bool = False,
    ) -> Drawer:
        """The student of a folder or hub id in a fresh pipeline of its base, in float32.

        Args:
            base: another checkpoint of the base: pipeline folder, hub id or single file.
            strength: of the student's LoRA; None is what the contract says.
            loras: further LoRAs, styles or students, as folder, hub id or file, and strength.
            fuse: merge all LoRAs into the network.

        Raises:
            StudentError: there is no student, it does not fit the base, or has no LoRA to weigh or fuse.
        """
        folder = student.folder_of(place)
        several = is_multi(folder)
        contract = None if several else read_contract(folder)
        family = absolute(teacher(contract or read_multi(folder)))
        if base is not None:
            family = replace(family, pretrained_teacher_model=base)
        pipe = family.load()
        pipe.to(device)
        native, loaded = pipe.scheduler, load_student(pipe, folder, STUDENT)
        pipe.set_progress_bar_config(disable=True)
        own = None if contract is None or contract.lora is None else contract.lora
        if own is None and (strength is not None or loras or fuse):
            got, todo = f"a strength, further LoRAs or fusing for {place}", "leave these options out"
            raise StudentError(problem(got, "a student that is one LoRA", "it is none", todo))
        if own is not None:
            weights = {STUDENT: own.strength if strength is None else strength}
            for i, (source, weight) in enumerate(loras):
                weights |= {_style(family, pipe, source, f"lora-{i}"): weight}
            _weigh(family, pipe, weights)
        if fuse:
            fuse_all(family, pipe)
        return Drawer(family, pipe, native, loaded, contract)

    def call(self, wish: Wish) -> dict[str, Any]:
        """Arguments of the pipeline's call; its scheduler becomes the one that goes with them.

        Raises:
            StudentError: the student cannot be drawn so.
        """
        if self.contract is None:
            if wish != Wish():
                got, todo = "another way to draw for several students", "draw with one of the folders in students/"
                raise StudentError(problem(got, "none", "each has a contract of its own", todo))
            return {}
        found, contract = dict(self.loaded), self.contract
        sizes = {"height": wish.height, "width": wish.width}
        found |= {key: value for key, value in sizes.items() if value is not None}
        if isinstance(self.loaded, GuidedCall) and wish.guidance_scale is not None:
            self.loaded.guidance_scale = wish.guidance_scale
            wish = replace(wish, guidance_scale=None)
        if replace(wish, height=None, width=None) == Wish():
            return found
        schedule = self.family.schedule(self.native)
        try:
            sampler = wished(contract, schedule, wish)
            self.pipe.scheduler = self.native  # from which families read the noise process
            self.pipe.scheduler, steps = self.family.scheduler(self.pipe, sampler)
        except ValueError as error:
            raise StudentError(f"{error}") from error
        if sampler.timesteps != contract.timesteps or sampler.eta != contract.eta:
            logger.warning(
                "drawing at timesteps %s with eta %g; the student was trained for %s with eta %g",
                *([round(t, 2) for t in sampler.timesteps], sampler.eta),
                *([round(t, 2) for t in contract.timesteps], contract.eta),
            )
        old = ("timesteps", "sigmas", "num_inference_steps", "eta", *self.family.guidance(2))
        kept = {key: value for key, value in found.items() if key not in old}
        return steps | self.family.guidance(sampler.guidance_scale) | kept

    @contextmanager
    def against(
        self, text: str | None, call: dict[str, Any], scale: float | None = None, mode: Mode = "nasa"
    ) -> Iterator[dict[str, Any]]:
        """The call with a negative prompt, by guidance where it guides, else by
        `students.draw.negative_prompt`.

        Args:
            text: None is none.
            scale: of what is taken off without guidance; None is the default there.

        Raises:
            StudentError: there is a scale, or another mode, for a call that guides.
        """
        if text is None:
            yield call
            return
        ((name, own),) = [(key, call.get(key, 1.0)) for key in self.family.guidance(1.0)]
        if own > 1:
            if scale is not None or mode != "nasa":
                got, todo = f"a scale or mode for a negative prompt beside {name} {own:g}", "leave these out"
                raise StudentError(problem(got, "none", "guidance departs from the negative prompt", todo))
            yield call | {"negative_prompt": text}
            return
        given = {} if scale is None else {"scale": scale}
        with negative_prompt(self.pipe, text, mode=mode, family=self.family, **given):
            yield call

    @torch.no_grad()
    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], call: dict[str, Any], batch: int = 4
    ) -> Iterator[Image.Image]:
        """An image of each prompt.

        Image n is what the pipeline draws of the one prompt with `generator=torch.manual_seed(seeds[n])`, whatever
        else is drawn with it, but for rounding.
        """
        warn_of_cut(self.family, self.pipe, prompts)
        alone = not self.family.seeds_steps and self.pipe.scheduler.config.get("stochastic_sampling", False)
        size = 1 if alone else batch
        cuda = [self.pipe.device] if self.pipe.device.type == "cuda" else []
        for start in range(0, len(prompts), size):
            some, own = list(prompts[start : start + size]), seeds[start : start + size]
            with torch.random.fork_rng(cuda):
                generators = [torch.manual_seed(own[0])] if alone else [torch.Generator().manual_seed(n) for n in own]
                drawer: Any = self.loaded if isinstance(self.loaded, Students) else self.pipe
                made = drawer(some, generator=generators, **each(call, len(some)))
            yield from made if isinstance(made, list) else made.images


def wished(contract: Contract, schedule: NoiseSchedule, wish: Wish) -> Sampler:
    """The contract's sampler with what is wished for. Raises ValueError or ConfigError where that is no sampler."""
    sampler = contract.sampler()
    if wish.steps is not None:
        method = config.read(Method, contract.method, "the method of the student")
        sampler = method.sampler(schedule, wish.steps)
    times = wish.timesteps
    if wish.sigmas is not None:
        if not all(0 < sigma <= 1 for sigma in wish.sigmas):
            raise ValueError(f"sigmas are {list(wish.sigmas)}: expected shares of noise above 0, at most 1")
        times = tuple(_time(schedule, sigma) for sigma in wish.sigmas)
    if times is not None:
        check_starts(times)
        schedule.check(times)
        sampler = replace(sampler, timesteps=times)
    if wish.guidance_scale is not None:
        if wish.guidance_scale < 1:
            raise ValueError(f"guidance_scale is {wish.guidance_scale:g}: expected 1, which is none, or more")
        sampler = replace(sampler, guidance_scale=wish.guidance_scale)
    return sampler if wish.eta is None else replace(sampler, eta=wish.eta)


def fuse_all(family: Family, pipe: DiffusionPipeline) -> None:
    """Merge the LoRAs that are on into the network, at their strength: the same images, in less time."""
    if family.loads_lora:
        loader: Any = pipe
        loader.fuse_lora()
    else:
        merge(family.network(pipe))


def _time(schedule: NoiseSchedule, sigma: float) -> float:
    """The time at a share of noise; of a table the nearest entry."""
    if isinstance(schedule, Rectified):
        return 1000 * sigma
    times = torch.arange(schedule.span[0], schedule.span[1] + 1)
    return times[(schedule(times)[1] - sigma).abs().argmin()].item()


def _style(family: Family, pipe: DiffusionPipeline, source: str, name: str) -> str:
    loader: Any = pipe
    if not family.loads_lora:
        got, todo = f"a further LoRA {source} for a {type(pipe).__name__}", "leave it out"
        raise StudentError(problem(got, "none", "Diffusers has no LoRA loader for it", todo))
    try:
        loader.load_lora_weights(source, adapter_name=name)
    except (OSError, ValueError, RuntimeError) as error:
        todo = "check the path, and that it was trained on this family"
        raise StudentError(problem(f"LoRA {source}", "one that Diffusers loads", str(error), todo)) from error
    if not any(name in names for names in loader.get_list_adapters().values()):  # of which Diffusers only warns
        got, why = f"LoRA {source}", "none of its names is a layer's of this pipeline"
        raise StudentError(problem(got, f"one of a {type(pipe).__name__}", why, "check what it was trained on"))
    return name


def _weigh(family: Family, pipe: DiffusionPipeline, weights: dict[str, float]) -> None:
    if family.loads_lora:
        loader: Any = pipe
        loader.set_adapters(list(weights), list(weights.values()))
    else:
        weigh(family.network(pipe), weights)
