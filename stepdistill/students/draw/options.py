"""Changes to a student's sampling contract."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stepdistill.config.load import read_node
from stepdistill.core.errors import ConfigError
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.core.solvers import Sampler, check_starts
from stepdistill.methods.base import Method
from stepdistill.students.contract import Contract


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """Changes to the sampling contract; None keeps the contract's value.

    Args:
        steps: number of steps; the method defines where they start.
        timesteps: where steps start, descending, in the scheduler's time.
        sigmas: the same as `sigma_t` of `x_t = alpha_t x0 + sigma_t eps`.
        guidance_scale: w of `uncond + w (cond - uncond)`, at least 1; for guidance adapters, their scale.
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


AS_TRAINED = DrawOptions()


def changed_sampler(contract: Contract, schedule: NoiseSchedule, options: DrawOptions) -> Sampler:
    """The contract's sampler with these options. Raises ValueError or ConfigError if they are invalid."""
    sampler = contract.sampler()
    if options.steps is not None:
        method = read_node(Method, contract.method, "the method of the student")
        sampler = method.sampler(schedule, options.steps)
    times = options.timesteps
    if options.sigmas is not None:
        if not all(0 < sigma <= 1 for sigma in options.sigmas):
            raise ValueError(f"sigmas are {list(options.sigmas)}: expected noise levels above 0 and at most 1")
        times = tuple(schedule.time_of_sigma(sigma) for sigma in options.sigmas)
    if times is not None:
        check_starts(times)
        schedule.check(times)
        sampler = replace(sampler, timesteps=times)
    if options.guidance_scale is not None:
        if options.guidance_scale < 1:
            raise ValueError(f"guidance_scale is {options.guidance_scale:g}: expected 1 (no guidance) or more")
        sampler = replace(sampler, guidance_scale=options.guidance_scale)
    return sampler if options.eta is None else replace(sampler, eta=options.eta)


def is_trained(contract: Contract, schedule: NoiseSchedule, sampler: Sampler) -> bool:
    """Whether these are the contract's steps, or those of another number that the student's method trained it for."""
    if (sampler.timesteps, sampler.eta) == (contract.timesteps, contract.eta):
        return True
    try:
        method = read_node(Method, contract.method, "the method of the student")
    except ConfigError:  # a method that is not installed: nothing is known but the contract
        return False
    known = [method.sampler(schedule, steps) for steps in method.trained_steps]
    return any((sampler.timesteps, sampler.eta) == (one.timesteps, one.eta) for one in known)
