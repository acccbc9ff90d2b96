"""A stock flow scheduler whose config alone leads to given noise levels, for pipelines that take no list of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from stepdistill.core.errors import ConfigError, problem

TABLE = 1000  # entries of the scheduler's own table
OFF = 1e-6  # of a level: rounding of the scheduler's arithmetic


def shift_terminal(timesteps: Sequence[float], last: float | None = None) -> dict[str, float | None]:
    """`shift` and `shift_terminal` with which `FlowMatchEulerDiscreteScheduler` visits `timesteps` in n steps.

    The scheduler shifts n even levels from 1 to m by `s(u) = a u / (1 + (a - 1) u)`, a Moebius map, and then maps
    `1 - s` to `c (1 - s)`. With `d = (1 - m) / (n - 1)` the level after i steps obeys
    `1 - sigma_i = c i d / (a - (a - 1) i d)`, so two of them give a and c. m = s(1 / 1000) depends on a; iterated, it
    converges. Every evenly spaced grid with any shift is of this form, and any list of at most three levels.

    Args:
        timesteps: 1,000 sigma, descending from 1,000.
        last: m, where the pipeline gives the scheduler even levels from 1 to m; None where it gives their number alone.
            A shift alone then suffices for evenly spaced levels, and there is no `shift_terminal`.

    Raises:
        ConfigError: no values lead to them.
    """
    n, sigmas = len(timesteps), [t / TABLE for t in timesteps]
    shift, terminal = 1.0, None
    if last is not None and n > 1 and 0 < sigmas[-1] < 1:
        plain = {"shift": sigmas[-1] * (1 - last) / (last * (1 - sigmas[-1])), "shift_terminal": None}
        if _visits(plain, timesteps, last):
            return plain
    if n == 2:
        terminal = sigmas[1]
    elif n > 2:
        i, k = (n - 1) // 2, n - 1  # far apart, since rounding of close ones would be magnified
        y_i, y_k = 1 - sigmas[i], 1 - sigmas[k]
        m = last or 0.0
        for _ in range(200):
            d = (1 - m) / (n - 1)
            bent = i * k * d * (y_k - y_i)
            divisor = k * y_i - i * y_k + bent
            shift = bent / divisor if divisor > 0 else 0.0
            m = last or _shifted(shift, 1 / TABLE)
        scale = y_k * (shift - (shift - 1) * k * d) / (k * d)
        terminal = 1 - scale * (1 - _shifted(shift, m))
    found = {"shift": shift, "shift_terminal": terminal}
    if not (shift > 0 and (terminal is None or 0 < terminal < 1) and _visits(found, timesteps, last)):
        got, why = f"timesteps {[round(t, 3) for t in timesteps]}", "no scheduler's config leads to others"
        some = "three" if last is None else "two"  # and the lists of three whose second is not too near the first
        expected = f"up to {some} that begin at 1000, or evenly spaced ones with a shift"
        todo = "choose even steps: a number of them alone, without timesteps, that divides the grid of the method"
        raise ConfigError(problem(f"{got} for a pipeline that takes no list of them", expected, why, todo))
    return found


def _shifted(shift: float, u: float) -> float:
    return shift * u / (1 + (shift - 1) * u)


def _visits(config: dict[str, float | None], timesteps: Sequence[float], last: float | None) -> bool:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**config)  # pyright: ignore[reportArgumentType]
    n = len(timesteps)
    scheduler.set_timesteps(n, sigmas=None if last is None else [1 - i * (1 - last) / max(n - 1, 1) for i in range(n)])
    pairs = zip(scheduler.timesteps.tolist(), timesteps, strict=True)
    return all(abs(theirs - ours) <= OFF * ours for theirs, ours in pairs)
