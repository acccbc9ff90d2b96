"""Base class of the methods: hyper-parameters, roles, and a generator of updates in the paper's order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stepdistill.config.kinds import Decay
from stepdistill.core.denoise import Condition, Denoise, RoleDenoise, guided
from stepdistill.core.guidance import Combine, Norm, combine_linearly
from stepdistill.core.random import step_generator
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.core.solvers import Sampler, check_starts, few_step, student_starts
from stepdistill.data.base import GuidedState, Source
from stepdistill.networks.rewards.base import MeasureReward, Reward
from stepdistill.networks.roles import TEACHER, Ema, Lora, Role


class Update:
    """One optimizer step on a loss, of one or several roles.

    Args:
        roles: the roles that the step trains.
        loss: a scalar with a graph.
        logs: further scalars to log. The loss is logged by itself, as `loss` for the student and as `loss_ROLE` for
            another first role, unless `logs` has that name.
    """

    def __init__(self, roles: str | tuple[str, ...], loss: Tensor, /, **logs: Tensor) -> None:
        self.roles = (roles,) if isinstance(roles, str) else roles
        self.loss = loss
        name = "loss" if self.roles[0] == "student" else f"loss_{self.roles[0]}"
        self.logs = {name: value.detach() for name, value in {name: loss, **logs}.items()}


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B samples.

    Args:
        index: the samples' positions in the whole run's stream of data; they key the random draws.
        cond: the family's embeddings, B rows each.
        shape: (C, H, W) of one latent.
        latents: (B, C, H, W) clean latents in the network's scale, where the data has them.
        noise: (B, C, H, W) the starting noise of the teacher, where the data are pairs or guided trajectories.
        prompts: what `cond` embeds, B of them.
        state: of B guided trajectories, where the data are such.
    """

    index: tuple[int, ...]
    cond: Condition
    shape: tuple[int, ...]
    latents: Tensor | None = None
    noise: Tensor | None = None
    prompts: tuple[str, ...] = ()
    state: GuidedState | None = None

    @property
    def x0(self) -> Tensor:
        """`latents`, for a method that needs "latents"."""
        if self.latents is None:
            raise ValueError("this method needs latents, and the batch has none: use a data source that provides them")
        return self.latents

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Noise and the latents that the teacher turned it into, for a method that needs "pairs"."""
        if self.latents is None or self.noise is None:
            raise ValueError("this method needs pairs of noise and the teacher's latents, and the batch has none")
        return self.noise, self.latents

    @property
    def guided_state(self) -> GuidedState:
        """`state`, for a method that needs "trajectories"."""
        if self.state is None:
            raise ValueError("this method needs guided trajectories, and the batch has none: use data.Trajectories")
        return self.state


@dataclass(frozen=True)
class StepContext:
    """What a method may use in one step: denoisers and modules by role, the schedule, the null condition, the rule of
    guidance, images (B, 3, H, W) in about [-1, 1] decoded from latents, and random draws.

    Draws are keyed by (seed, step, sample, purpose), so the number of processes, gradient accumulation, or a term
    switched off change no other draw. No method uses a global generator.
    """

    schedule: NoiseSchedule
    null: Condition
    denoiser: Callable[[str], RoleDenoise]
    module: Callable[[str], nn.Module]
    decode: Callable[[Tensor], Tensor]
    seed: int
    step: int
    device: torch.device
    combine: Combine = field(default=combine_linearly, kw_only=True)
    first_schedule: NoiseSchedule | None = field(default=None, kw_only=True)  # see `student_schedule`

    @property
    def student_schedule(self) -> NoiseSchedule:
        """The schedule at the run's first size, which the student's levels are taken from; `schedule` is the step's."""
        return self.schedule if self.first_schedule is None else self.first_schedule

    def guided(self, role: str, scale: float | Tensor) -> Denoise:
        """A role under guidance of `scale`, a number or (B,), by the rule of the teacher's pipeline; 1 is none."""
        return guided(self.denoiser(role), self.null, scale, self.combine)

    def noise(self, batch: Batch, purpose: str) -> Tensor:
        """Standard normal (B, C, H, W)."""
        rows = [torch.randn(batch.shape, generator=self._generator(i, purpose)) for i in batch.index]
        return torch.stack(rows).to(self.device)

    def draw(self, batch: Batch, purpose: str) -> Tensor:
        """Uniform in [0, 1), (B,)."""
        rows = [torch.rand((), generator=self._generator(i, purpose)) for i in batch.index]
        return torch.stack(rows).to(self.device)

    def guidance(self, scale: float | tuple[float, float], batch: Batch) -> float | Tensor:
        """A guidance scale, or one for each sample (B,) from a range."""
        if not isinstance(scale, tuple):
            return scale
        low, high = scale
        return low + (high - low) * self.draw(batch, "guidance_scale")

    def shared(self, purpose: str) -> float:
        """One uniform number in [0, 1), the same for every sample, micro-batch and process of this step."""
        return torch.rand((), generator=self._generator("shared", purpose)).item()

    def _generator(self, index: int | str, purpose: str) -> torch.Generator:
        return step_generator(self.seed, self.step, index, purpose)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A distillation method. Subclasses are final, hold nothing but hyper-parameters, and cite their paper.

    A method must say its data (`needs`), its `sampler` and its `updates`; the rest has defaults.

    Args:
        guidance_scale: guidance scale of the teacher in training: one scale, or the range that it is drawn from. A
            method that guides its teacher declares it as a hyper-parameter; for any other it is None.
        sampling_guidance_scale: default guidance scale of the student, stored in the contract; None for a method
            without this choice.
        guidance_norm: how the teacher's guided output is scaled in training; None is the rule of its pipeline.
        held_out: a reward that the student is never trained on, which scores it at each validation.
    """

    use: ClassVar[Literal["sampling", "training"]] = "sampling"  # "training": the student is no model to draw with
    takes_assistant: ClassVar[bool] = False  # whether `train.assistant` fits: not where a step of training samples
    guidance_scale: float | tuple[float, float] | None = field(init=False, default=None)
    sampling_guidance_scale: float | None = field(init=False, default=None)
    guidance_norm: Norm | None = field(init=False, default=None)
    held_out: Reward | None = field(init=False, default=None)

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """What a sample must carry: "prompts", "latents" (which images provide, too), "pairs" (latents and their
        noise), or "trajectories" (guided states). As a rule a constant of the class, `ClassVar[frozenset[str]]`."""

    @property
    def derivative(self) -> Literal["forward", "difference"] | None:
        """How the network is differentiated along its inputs, which asks for float32: in forward mode, by differences
        of its outputs, or not at all."""
        return None

    @abstractmethod
    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        """How the student is sampled in `steps` steps (None: as many as it is trained for)."""

    @property
    def trained_steps(self) -> tuple[int, ...]:
        """Numbers of sampling steps that it is trained for; empty stands for the contract's alone."""
        return ()

    @abstractmethod
    def updates(self, context: StepContext, batch: Batch, step: int) -> Iterator[Update]:
        """The updates of one step. Their number and roles depend on `step` and the config only; no yield inside a
        role's context or `no_grad`; only detached tensors are held across a yield."""

    def roles(self) -> dict[str, Role]:
        """The roles beside the teacher, in order."""
        return {"student": Lora()}

    def student_role(self) -> str:
        """The role that is written as the student."""
        return "student"

    def check(self, schedule: NoiseSchedule) -> None:
        """Raise ValueError where this method cannot run on this noise process; called before any training."""
        schedule.check(self.sampler(schedule).timesteps)

    def check_data(self, data: Source) -> None:  # noqa: B027
        """Raise ConfigError for a source that has what the method needs, but not of the kind that it trains on."""

    @property
    def trained_rewards(self) -> tuple[Reward, ...]:
        """The rewards that the student is trained on. They score it at each validation, as `held_out` does."""
        return ()

    def calibrate(self, measure: MeasureReward) -> Method:
        """The method as it is trained, with what it must know of its rewards."""
        return self

    def finalize(self, straightness: Callable[[], float]) -> Method:
        """The method as it is written into the contract after training. `straightness` measures that of the student's
        paths, over their transport cost."""
        return self


@dataclass(frozen=True, kw_only=True)
class Averaged(Method):
    """A method whose student may be an exponential moving average, the role `ema`.

    Args:
        ema_decay: decay of the exponential moving average of the student, which is exported; none exports the student
            itself.
    """

    ema_decay: Decay | None = 0.99

    @property
    def average(self) -> dict[str, Role]:
        """The role of the average, or none."""
        return {} if self.ema_decay is None else {"ema": Ema("student", self.ema_decay)}

    def roles(self) -> dict[str, Role]:
        """A student, and its average."""
        return {"student": Lora(), **self.average}

    def student_role(self) -> str:
        """The average where there is one."""
        return "student" if self.ema_decay is None else "ema"


@dataclass(frozen=True, kw_only=True)
class Tuning(Averaged):
    """A method that tunes a few-step model and keeps its steps: it trains at the noise levels that are sampled.

    The few-step model is the role `teacher`: the base with the student of `start_from` fused in, or a pipeline that is
    distilled already, such as a Turbo model. The trained LoRA starts at zero, as that model.

    Args:
        sampling: how the few-step model is sampled, such as `{timesteps: [999, 749, 499, 249], eta: 1.0}`; none takes
            the sampling contract of the student in `start_from`.
    """

    sampling: Sampler | None = None

    def __post_init__(self) -> None:
        if self.sampling is not None:
            check_starts(self.sampling.timesteps)

    def sampler(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        return self.few_steps(schedule, steps)

    def few_steps(self, schedule: NoiseSchedule, steps: int | None = None) -> Sampler:
        """The few-step model's sampler; other numbers of steps than its own are spaced evenly."""
        if self.sampling is None:
            raise ValueError(
                "sampling is none: expected how the few-step model is sampled, since it is trained at these times; set "
                "method.sampling, or start_from to a student folder"
            )
        own = self.sampling.timesteps
        return replace(self.sampling, timesteps=student_starts(schedule, own, len(own), steps))

    def sampled(self, context: StepContext, role: str) -> Denoise:
        """A role's denoiser with the guidance that it is sampled with."""
        return context.guided(role, self.few_steps(context.student_schedule).guidance_scale)

    @torch.no_grad()
    def own_samples(self, context: StepContext, batch: Batch) -> Tensor:
        """Samples (B, C, H, W) of the few-step model for the prompts of the batch, each from a noise of its own."""
        schedule, sampler = context.schedule, self.few_steps(context.student_schedule)
        teacher = self.sampled(context, TEACHER)
        start = context.noise(batch, "sample start")
        return few_step(
            teacher, schedule, sampler, start, batch.cond, lambda k: context.noise(batch, f"sample again {k}")
        )


def check_effect(settings: Any, name: str, effective: bool, needs: str) -> None:  # noqa: ANN401
    """Raise ValueError where a setting has another value than its default, and no effect beside the other settings;
    `needs` is what it would need to have one."""
    value, default = vars(settings)[name], type(settings).__dataclass_fields__[name].default
    if not effective and value != default:
        raise ValueError(f"{name} is {value}: it has an effect only with {needs}; leave it out, or set that")


def check_steps(method: Any) -> None:  # noqa: ANN401
    """Raise ValueError for a method's `timesteps` that do not descend, or for another number of steps beside them."""
    times, steps = method.timesteps, method.num_inference_steps
    check_starts(times)
    check_effect(method, "num_inference_steps", times is None or len(times) == steps, "timesteps none")
