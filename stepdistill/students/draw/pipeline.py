"""Generate images with a student folder, with its sampling contract or with other options."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill.core.cost import Cost
from stepdistill.core.errors import StudentError, problem
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.families.base import Family
from stepdistill.families.controlled import load_controlled
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.families.prompt_limits import warn_of_cut
from stepdistill.networks.guidance_adapters import GuidedCall
from stepdistill.networks.pipeline_loras import fuse_loras
from stepdistill.students.base_model import absolute
from stepdistill.students.contract import Contract, read_contracts, teacher
from stepdistill.students.draw.arguments import each
from stepdistill.students.draw.call import PipelineCall, generate, scheduled, teacher_call
from stepdistill.students.draw.filters import DrawnImage, safety_flags
from stepdistill.students.draw.loras import load_style, weigh_loras
from stepdistill.students.draw.negative_prompt import Mode, negative_prompt
from stepdistill.students.draw.options import AS_TRAINED, DrawOptions, changed_sampler, is_trained
from stepdistill.students.load import folder_of, load_student
from stepdistill.students.several import Students
from stepdistill.students.sizes import warn_of_size

logger = logging.getLogger(__name__)
STUDENT = "student"  # the adapter's name


@dataclass(frozen=True)
class StudentPipeline:
    """A plain pipeline that generates images with one or several students, or as the teacher without any.

    Args:
        native: the teacher's scheduler, which defines the noise process.
        loaded: the result of `stepdistill.load_student`; None for the teacher.
        contracts: one for each student.
    """

    family: Family
    pipe: DiffusionPipeline
    native: Any
    loaded: Any
    contracts: tuple[Contract, ...]

    @staticmethod
    def of(
        family: Family,
        place: str | Path | None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        controlnet: str | None = None,
    ) -> StudentPipeline:
        """A new pipeline of a family with the student of a folder or hub id loaded; None is the teacher alone.

        Args:
            controlnet: folder or hub id of a ControlNet, which the stock pipeline calls before the network.

        Raises:
            StudentError: there is no student, or it does not fit the family.
        """
        folder = None if place is None else folder_of(place)
        contracts = () if folder is None else read_contracts(folder)
        pipe = family.load() if controlnet is None else load_controlled(family, controlnet)
        pipe.to(device)
        if dtype != torch.float32:  # it is float32 already, and Diffusers warns of any cast
            pipe.to(dtype)
        pipe.set_progress_bar_config(disable=True)
        native, loaded = pipe.scheduler, None if folder is None else load_student(pipe, folder, STUDENT)
        return StudentPipeline(family, pipe, native, loaded, contracts)

    @staticmethod
    def load(
        place: str | Path,
        base: str | None = None,
        device: torch.device | str = "cpu",
        strength: float | None = None,
        loras: Sequence[tuple[str, float]] = (),
        fuse: bool = False,
        controlnet: str | None = None,
    ) -> StudentPipeline:
        """The student of a folder or hub id in a new pipeline of its base, in float32.

        Args:
            base: another checkpoint of the base: pipeline folder, hub id or single file.
            strength: of the student's LoRA; None takes the contract's.
            loras: further LoRAs, such as styles: a folder, hub id or file, and a strength.
            fuse: fuse all LoRAs into the network.
            controlnet: see `of`.

        Raises:
            StudentError: there is no student, it does not fit the base, or it has no LoRA to scale or fuse.
        """
        folder = folder_of(place)
        if strength is not None or loras or fuse:
            check_one_lora(folder)
        family = absolute(teacher(read_contracts(folder)[0]))
        if base is not None:
            family = replace(family, pretrained_teacher_model=base)
        student = StudentPipeline.of(family, folder, device, controlnet=controlnet)
        styles = {load_style(family, student.pipe, source, f"lora-{i}"): w for i, (source, w) in enumerate(loras)}
        student.weigh(styles, strength)
        if fuse:
            fuse_loras(student.pipe)
        return student

    def weigh(self, loras: Mapping[str, float], strength: float | None = None) -> None:
        """Let the student's LoRA and further ones be on, each at its strength; of several students nothing changes.

        Args:
            loras: strengths by adapter name.
            strength: of the student's LoRA; None takes the contract's.
        """
        lora = self.contract.lora if self.contract else None
        own = {} if lora is None else {STUDENT: lora.strength if strength is None else strength}
        if own or loras:
            weigh_loras(self.family, self.pipe, {**own, **loras})

    @property
    def contract(self) -> Contract | None:
        """The student's contract; None for several students, which have one each, and for the teacher."""
        return self.contracts[0] if len(self.contracts) == 1 else None

    @property
    def drawer(self) -> Any:  # noqa: ANN401
        """The callable that generates images: the pipeline, or its several students."""
        return self.loaded if isinstance(self.loaded, Students) else self.pipe

    def calls(self, options: DrawOptions = AS_TRAINED, name: str = STUDENT) -> tuple[PipelineCall, ...]:
        """The pipeline call of each student; the scale of guidance adapters takes effect at once.

        Raises:
            StudentError: a student cannot be sampled with these options.
            ConfigError: the pipeline refuses the size.
        """
        if not self.contracts:
            assert options.steps is not None and options.guidance_scale is not None
            size = (options.height, options.width) if options.height and options.width else None
            calls = [teacher_call(self.family, self.pipe, options.steps, options.guidance_scale, name, size)]
        elif isinstance(self.loaded, Students):
            known = zip(self.loaded.schedulers, self.loaded.calls, strict=True)
            calls = [PipelineCall(name, scheduler, call, self.family) for scheduler, call in known]
        else:
            calls = [PipelineCall(name, self.pipe.scheduler, dict(self.loaded), self.family)]
        sizes = {"height": options.height, "width": options.width}
        given = {key: value for key, value in sizes.items() if value is not None}
        calls = [call.plus(**given) for call in calls]
        for call in calls if given else ():
            self.family.latent_shape(self.pipe, call.arguments["height"], call.arguments["width"])
        if isinstance(self.loaded, GuidedCall) and options.guidance_scale is not None:
            self.loaded.guidance_scale = options.guidance_scale
            options = replace(options, guidance_scale=None)
        if not self.contracts or replace(options, height=None, width=None) == AS_TRAINED:
            return tuple(calls)
        return tuple(self._changed(*each, options) for each in zip(calls, self.contracts, strict=True))

    def _schedule(self, contract: Contract) -> NoiseSchedule:
        """The noise process that a student was trained on."""
        return self.family.schedule_at(self.pipe, self.native, contract.resolution)

    def _changed(self, call: PipelineCall, contract: Contract, options: DrawOptions) -> PipelineCall:
        """A call with the scheduler and arguments of another sampler than the contract's."""
        try:
            sampler = changed_sampler(contract, self._schedule(contract), options)
            with scheduled(self.pipe, self.native):  # families read the noise process from it
                scheduler, steps = self.family.scheduler(self.pipe, sampler)
        except ValueError as error:
            raise StudentError(f"{error}") from error
        old = ("timesteps", "sigmas", "num_inference_steps", "eta", *self.family.guidance(2))
        kept = {key: value for key, value in call.arguments.items() if key not in old}
        arguments = steps | self.family.guidance(sampler.guidance_scale) | kept
        return replace(call, scheduler=scheduler, arguments=arguments)

    def call(self, options: DrawOptions = AS_TRAINED) -> PipelineCall:
        """The call of `draw`; a warning is logged for steps that the student was not trained for.

        Raises:
            StudentError: the student cannot be sampled with these options.
        """
        contract = self.contract
        if contract is None:
            if options != AS_TRAINED:
                got, todo = "sampling options for several students", "use one of the folders in students/"
                raise StudentError(problem(got, "none", "each student has its own sampling contract", todo))
            return PipelineCall(STUDENT, self.pipe.scheduler, {}, self.family)
        (call,) = self.calls(options)
        warn_of_size(contract, (call.arguments["height"], call.arguments["width"]))
        schedule = self._schedule(contract)
        sampler = changed_sampler(contract, schedule, replace(options, guidance_scale=None))
        if not is_trained(contract, schedule, sampler):
            logger.warning(
                "sampling at timesteps %s with eta %g, but the student's contract has %s with eta %g",
                *([round(t, 2) for t in sampler.timesteps], sampler.eta),
                *([round(t, 2) for t in contract.timesteps], contract.eta),
            )
        return call

    @contextmanager
    def against(
        self, text: str | None, call: PipelineCall, scale: float | None = None, mode: Mode = "nasa"
    ) -> Iterator[PipelineCall]:
        """The call with a negative prompt: by guidance if the call uses it, else by `stepdistill.negative_prompt`.

        Args:
            text: the negative prompt; None for no negative prompt.
            scale: of the negative prompt without guidance; None is the default of `stepdistill.negative_prompt`.

        Raises:
            StudentError: a scale or another mode is set, and the call uses guidance.
        """
        if text is None:
            yield call
            return
        ((name, guidance),) = [(key, call.arguments.get(key, 1.0)) for key in self.family.guidance(1.0)]
        if guidance > 1:
            if scale is not None or mode != "nasa":
                got, todo = f"a scale or mode of the negative prompt with {name} {guidance:g}", "leave both out"
                raise StudentError(problem(got, "none", "guidance applies the negative prompt itself", todo))
            if not self.family.takes_negative_prompt:
                got, why = f"a negative prompt for a {type(self.pipe).__name__}", "its call has no argument for one"
                raise StudentError(problem(got, "none", why, "leave it out"))
            yield call.plus(negative_prompt=text)
            return
        given = {} if scale is None else {"scale": scale}
        with negative_prompt(self.pipe, text, mode=mode, family=self.family, **given):
            yield call

    @torch.no_grad()
    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], call: PipelineCall, batch: int = 4
    ) -> Iterator[DrawnImage]:
        """Generate an image of each prompt, or a video as a list of frames. Safety checker and watermarker stay in.

        Image n is the one that the pipeline generates from this prompt alone with
        `generator=torch.manual_seed(seeds[n])`, except for rounding. The other prompts have no effect on it.
        """
        warn_of_cut(self.family, self.pipe, prompts)
        stochastic = call.scheduler.config.get("stochastic_sampling", False) or "controlnet" in self.pipe.components
        alone = not self.family.seeds_steps and stochastic  # SD3 draws the control's latents from no given generator
        alone |= isinstance(self.family, ImageToVideo)  # LTX-Video's takes one image and one generator a call
        size, several = 1 if alone else batch, isinstance(self.loaded, Students)
        cuda = [self.pipe.device] if self.pipe.device.type == "cuda" else []
        for start in range(0, len(prompts), size):
            some, batch_seeds = list(prompts[start : start + size]), seeds[start : start + size]
            with torch.random.fork_rng(cuda), scheduled(self.pipe, call.scheduler), safety_flags(self.pipe) as flags:
                if alone:
                    generators = [torch.manual_seed(batch_seeds[0])]
                else:
                    generators = [torch.Generator().manual_seed(seed) for seed in batch_seeds]
                given = {"output_type": "pil"} | each(call.arguments, len(some))  # videos are arrays by default
                if several:
                    drawn = self.drawer(some, generator=generators, **given)
                else:  # by name: in a pipeline of image to video the prompt is the second argument
                    drawn = self.drawer(prompt=some, generator=generators[0] if alone else generators, **given)
            order = range(len(some))
            if several:  # each draws its share at once
                order = [i for places in self.loaded.route(some).values() for i in places]
            flagged = dict(zip(order, flags, strict=False))  # none without a checker
            for i, image in enumerate(drawn if several else drawn[0]):
                yield DrawnImage(image, flagged.get(i, False))

    def generate(
        self,
        calls: Sequence[PipelineCall],
        prompts: Sequence[str],
        seed: int,
        batch: int = 64,
        numbers: Sequence[int] | None = None,
        size: tuple[int, int] | None = None,
        first: Callable[[Sequence[int]], Tensor] | None = None,
    ) -> tuple[Tensor, Cost]:
        """Images (N, 3, H, W) uint8 from numbered noise, and their cost: see `students.draw.call.generate`.

        Args:
            first: the images that the videos with these numbers begin with.
        """
        images = None if first is None else first(numbers or range(len(prompts)))
        return generate(self.drawer, calls, prompts, seed, batch, numbers=numbers, size=size, images=images)


def check_one_lora(place: str | Path) -> None:
    """Raise StudentError for a student that is no LoRA, or several: nothing beside it can be weighed or fused."""
    if [contract.lora is None for contract in read_contracts(folder_of(place))] != [False]:
        got, todo = f"a strength, further LoRAs or fusing for {place}", "leave these options out"
        raise StudentError(problem(got, "a student that is one LoRA", "these options apply to a LoRA only", todo))
