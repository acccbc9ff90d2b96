"""The check of a network that a method differentiates along its inputs, before training."""

from __future__ import annotations

import torch

from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.trigflow import central_difference, tangent
from stepdistill.networks.roles import TEACHER
from stepdistill.students.base_model import name_of
from stepdistill.training.setup import Session


def check_derivative(session: Session) -> None:
    """A network that the method differentiates is in float32, and each of its operations has a derivative."""
    way = session.run.method.derivative
    if way is None:
        return
    if session.dtype != torch.float32:
        got = f"train.mixed_precision {name_of(session.dtype)} with {type(session.run.method).__name__}"
        why = "it takes the derivative of the network along its inputs, which half precision gets wrong by 0.5 to 2 %"
        todo = "set train.mixed_precision to no; the frozen base then takes four bytes a number"
        raise ConfigError(problem(got, "float32", why, todo))
    if way == "forward":
        reason = undifferentiated(session)
        if reason:
            got = f"a network with an operation that has no forward-mode derivative ({reason})"
            why = f"{type(session.run.method).__name__} differentiates the network along its inputs"
            todo = (
                "disable quantization, xFormers and other replaced attention; or set method.difference to 0.1, "
                "which takes a difference instead"
            )
            raise ConfigError(problem(got, "one that PyTorch differentiates", why, todo))


def undifferentiated(session: Session) -> str:
    """Why the teacher's network has no forward-mode derivative; empty where it has one.

    An operation of an extension may have no rule and still raise no error: its derivative is then taken for 0.
    """
    null, schedule, device = session.batches.null, session.schedule, session.accelerator.device
    shape, generator = (1, *session.batches.shape), torch.Generator().manual_seed(0)
    x, dx = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    t = torch.tensor([500.5], device=device)
    given = (session.denoiser(TEACHER), schedule, x, schedule.angle(t), t, null, dx)
    try:
        ours = tangent(*given)
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    exact = central_difference(*given, 0.1)
    off = ((ours - exact).norm() / exact.norm()).item()
    return f"its derivative and a difference are {off:.0%} apart" if off > 0.02 else ""  # rounding is a tenth of it
