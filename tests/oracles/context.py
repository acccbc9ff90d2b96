"""Run a method's own `updates` against closed forms: a `StepContext` with scripted draws and fake denoisers.

What runs is the method as it ships, down to the loss it yields; only networks and random draws are replaced.
Everything is in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn

from oracles.gaussian import levels
from stepdistill.core.denoise import Condition, Denoise
from stepdistill.core.prediction import Estimate, Kind, estimate, estimate_at_levels, output
from stepdistill.core.schedule import DiscreteVP, NoiseSchedule, Rectified, expand
from stepdistill.methods.base import Batch, StepContext, Update
from stepdistill.methods.consistency import Consistency


class Table(DiscreteVP):
    """A table whose levels and grid are float64 whatever the time's dtype."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return super().__call__(t.double())

    def grid(self, n: int) -> Tensor:
        return super().grid(n).double()


class Flow(Rectified):
    """The same for the straight path."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return super().__call__(t.double())

    def grid(self, n: int) -> Tensor:
        return super().grid(n).double()


def stable_diffusion() -> Table:
    """Stable Diffusion's scaled linear table."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return Table((1 - betas).cumprod(0))


def column(*values: float) -> Tensor:
    """(B, 1, 1, 1): one pixel a sample."""
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


def spoken(kind: Kind, est: Estimate, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """What a network of this kind puts out, from the definitions and not by `stepdistill.core.prediction`."""
    x0, eps = est
    return {"epsilon": eps, "sample": x0, "v_prediction": alpha_t * eps - sigma_t * x0, "flow": eps - x0}[kind]


@dataclass(frozen=True)
class Network:
    """A closed form that speaks as a network of some kind, and is converted as `Denoiser` converts."""

    denoise: Denoise
    kind: Kind
    schedule: NoiseSchedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        return self.queried(x_t, t, cond, *self.schedule(t))

    def queried(self, x_t: Tensor, t: Tensor, cond: Condition, alpha_t: Tensor, sigma_t: Tensor) -> Estimate:
        y = spoken(self.kind, self.denoise(x_t, t, cond), *(expand(v, x_t) for v in self.schedule(t)))
        return estimate_at_levels(self.kind, y, x_t, alpha_t, sigma_t)

    def native(self, est: Estimate, t: Tensor) -> Tensor:
        return output(self.kind, est, t, self.schedule)


def consistency(end: str = "clean", segments: int = 1, n: int = 50, **more: object) -> Consistency:
    """With what closed forms speak about: the squared loss, and no guidance unless it is given."""
    terms = {"loss_type": "l2", "guidance_scale": 1.0} | more
    return Consistency(end=end, segments=(segments,), num_ddim_timesteps=n, **terms)


class Tabular:
    """A student with the output `y = offset_j + slope_j x` at each time j of a grid, and none elsewhere.

    For Gaussian data it holds the optimum, so what training converges to shows with no error of capacity.
    """

    def __init__(self, schedule: NoiseSchedule, n: int, kind: Kind = "sample") -> None:
        self.schedule, self.kind, self.times = schedule, kind, schedule.grid(n).double()
        self.offset = torch.zeros(n + 1, dtype=torch.float64, requires_grad=True)
        self.slope = torch.zeros(n + 1, dtype=torch.float64, requires_grad=True)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        j = torch.searchsorted(self.times, t.double()).clamp(max=len(self.times) - 1)
        strange = t[self.times[j] != t].tolist()
        assert not strange, f"the student is asked at times that it is not trained at: {strange}"
        y = expand(self.offset[j], x_t) + expand(self.slope[j], x_t) * x_t
        return estimate(self.kind, y, x_t, t, self.schedule)

    def fit(self, j: int, loss: Tensor) -> None:
        """Exact least squares at time j: one Newton step on a loss that is quadratic in offset and slope."""
        parameters = (self.offset, self.slope)
        gradient = [g[j] for g in torch.autograd.grad(loss, parameters, create_graph=True)]
        rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in gradient]
        hessian = torch.stack([torch.stack([value[j] for value in row]) for row in rows])
        assert hessian.diagonal().min() > 1e-15, f"the loss of step {j - 1} does not depend on the student at {j}"
        move = torch.linalg.solve(hessian, torch.stack(gradient).detach())
        with torch.no_grad():
            self.offset[j] -= move[0]
            self.slope[j] -= move[1]


@dataclass(frozen=True)
class Scripted(StepContext):
    """A step context whose draws, by purpose, and whose noise are given."""

    draws: Mapping[str, Tensor]
    eps: Tensor
    common: float = 0.5

    def draw(self, batch: Batch, purpose: str) -> Tensor:
        return self.draws[purpose]

    def noise(self, batch: Batch, purpose: str) -> Tensor:
        return self.eps

    def shared(self, purpose: str) -> float:
        return self.common


@dataclass(frozen=True)
class Rows:
    """B samples, one pixel each, and the draws that they get.

    Args:
        i: (B,) the grid step from time i + 1 to time i.
        x0, eps: (B, 1, 1, 1).
        mean: (B, 1, 1, 1) the prompts.
        chance: (B,) in [0, 1), the draw of the end time; 0.5 if none is given.
        guidance: (B,) in [0, 1), the draw of the guidance scale; 0.5 if none is given.
    """

    i: Tensor
    x0: Tensor
    eps: Tensor
    mean: Tensor
    chance: Tensor | None = None
    guidance: Tensor | None = None

    def where(self, mask: Tensor) -> Rows:
        """The rows that `mask` (B,) keeps."""
        return Rows(*(value if value is None else value[mask] for value in astuple(self)))


def teacher_table(schedule: NoiseSchedule, n: int, mean: float, std: float) -> Tabular:
    """The student that is the teacher of Gaussian data, at the start of training."""
    student = Tabular(schedule, n)
    alpha_t, sigma_t = schedule(student.times)
    slope = alpha_t * std**2 / ((alpha_t * std) ** 2 + sigma_t**2)
    with torch.no_grad():
        student.slope.copy_(slope)
        student.offset.copy_(mean * (1 - alpha_t * slope))
    return student


def update(
    method: Consistency,
    schedule: NoiseSchedule,
    roles: Mapping[str, Denoise],
    rows: Rows,
    null: float = 0.0,
    step: int = 0,
) -> Update:
    """The one update that the method yields for `rows`; the teacher is guided against the prompt `null`."""
    half = torch.full((len(rows.i),), 0.5, dtype=torch.float64)
    draws = {
        "t": (rows.i + 0.5) / method.num_ddim_timesteps,
        "s": half if rows.chance is None else rows.chance,
        "guidance_scale": half if rows.guidance is None else rows.guidance,
    }
    context = Scripted(
        schedule=schedule,
        null={"mean": column(null)},
        denoiser=roles.__getitem__,
        module=nn.ModuleDict().__getitem__,
        decode=nn.Identity(),
        seed=0,
        step=step,
        device=torch.device("cpu"),
        draws=draws,
        eps=rows.eps,
    )
    batch = Batch(tuple(range(len(rows.i))), {"mean": rows.mean}, (1, 1, 1), latents=rows.x0)
    (only,) = method.updates(context, batch, step)
    return only


def product(i: Tensor, chance: Tensor, mean: float, guidance: tuple[float, ...] = (0.5,)) -> Rows:
    """Every pair of (i, chance) with two states of either sign and with each guidance draw."""
    pairs = zip(i.tolist(), chance.tolist(), strict=True)
    rows = [(*pair, g, sign) for pair in pairs for g in guidance for sign in (-1.0, 1.0)]
    index, chances, draws, signs = torch.tensor(rows, dtype=torch.float64).T
    sign = signs.reshape(-1, 1, 1, 1)
    return Rows(index.long(), mean + 0.5 * sign, sign, torch.full_like(sign, mean), chances, draws)


def step_rows(method: Consistency, i: int, segments: int, mean: float, guidance: tuple[float, ...] = (0.5,)) -> Rows:
    """Rows for grid step i: each end time that its segment allows, equally often."""
    count = i % (method.num_ddim_timesteps // segments) + 1 if method.end == "any" else 1
    chance = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return product(torch.full((count,), i), chance, mean, guidance)


def every_step(method: Consistency, segments: int, mean: float) -> Rows:
    """The rows of all grid steps in one batch."""
    return joined([step_rows(method, i, segments, mean) for i in range(method.num_ddim_timesteps)])


def joined(parts: list[Rows]) -> Rows:
    """Several batches as one."""
    return Rows(*(torch.cat(values) for values in zip(*map(astuple, parts), strict=True)))


def sweep(
    method: Consistency,
    schedule: NoiseSchedule,
    teacher: Denoise,
    mean: float,
    kind: Kind = "sample",
    null: float = 0.0,
    guidance: tuple[float, ...] = (0.5,),
    segments: int | None = None,
) -> Tabular:
    """Train a tabular student to convergence, exactly.

    Targets only look down the grid, so one upward sweep of least squares on the method's losses does it.
    """
    student = Tabular(schedule, method.num_ddim_timesteps, kind)
    roles = {"teacher": teacher, "student": student, "ema": student}
    for i in range(method.num_ddim_timesteps):
        rows = step_rows(method, i, segments or method.segments[0], mean, guidance)
        student.fit(i + 1, update(method, schedule, roles, rows, null).loss)
    return student


def affine(method: Consistency, student: Tabular, schedule: NoiseSchedule, t: float, s: float) -> tuple[float, float]:
    """`(gain, offset)` of the method's jump from t to s."""
    x, times = column(0.0, 1.0), [torch.full((2,), value, dtype=torch.float64) for value in (t, s)]
    zero, one = method.jump(student(x, times[0], {}), x, *times, schedule).flatten().tolist()
    return one - zero, zero


def solved(method: Consistency, schedule: NoiseSchedule, teacher: Denoise) -> Denoise:
    """The student that LCM (`end: clean`) or PCM (`end: edge`) converges to, for any teacher.

    Its estimate makes the jump land where the teacher's solver lands, step by step on the training grid.
    """
    n = method.num_ddim_timesteps
    times, length = schedule.grid(n).tolist(), n // method.segments[0]

    def student(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        x0, eps = x_t.clone(), torch.zeros_like(x_t)
        for row in range(len(x_t)):
            j = times.index(t[row].item())
            if j == 0:
                continue
            end, x = (j - 1) // length * length, x_t[row : row + 1]
            own = {key: value[row : row + 1] for key, value in cond.items()}
            for k in range(j, end, -1):
                est = teacher(x, torch.tensor([times[k]], dtype=torch.float64), own)
                alpha_s, sigma_s = levels(schedule, times[k - 1])
                x = alpha_s * est.x0 + sigma_s * est.eps
            alpha_t, sigma_t = levels(schedule, times[j])
            if method.end == "clean":
                skip = 0.25 / ((10 * times[j]) ** 2 + 0.25)
                x0[row] = (x[0] - skip * x_t[row]) / (1 - skip) ** 0.5
            else:
                alpha_s, sigma_s = levels(schedule, times[end])
                x0[row] = (sigma_t * x[0] - sigma_s * x_t[row]) / (sigma_t * alpha_s - sigma_s * alpha_t)
            eps[row] = (x_t[row] - alpha_t * x0[row]) / sigma_t
        return Estimate(x0, eps)

    return student


@dataclass(frozen=True)
class Drawn(StepContext):
    """A step context that draws from one generator, for closed forms that are means over many draws.

    Args:
        source: the generator.
        fixed: draws (uniform shares) by purpose that are the same for all samples.
        seen: noise by purpose, as it was drawn last.
    """

    source: torch.Generator
    fixed: Mapping[str, float]
    seen: dict[str, Tensor]

    def draw(self, batch: Batch, purpose: str) -> Tensor:
        size = len(batch.index)
        if purpose in self.fixed:
            return torch.full((size,), self.fixed[purpose], dtype=torch.float64)
        return torch.rand(size, dtype=torch.float64, generator=self.source)

    def noise(self, batch: Batch, purpose: str) -> Tensor:
        shape = (len(batch.index), *batch.shape)
        self.seen[purpose] = torch.randn(shape, dtype=torch.float64, generator=self.source)
        return self.seen[purpose]

    def shared(self, purpose: str) -> float:
        if purpose in self.fixed:
            return self.fixed[purpose]
        return torch.rand((), generator=self.source).item()


def drawn(schedule: NoiseSchedule, roles: Mapping[str, object], seed: int = 0, **fixed: float) -> Drawn:
    """A context over closed forms by role (also the teacher), and modules; guidance is against the mean `null`."""
    return Drawn(
        schedule=schedule,
        null={"mean": torch.zeros(1, 1, 1, 1, dtype=torch.float64)},
        denoiser=roles.__getitem__,  # pyright: ignore[reportArgumentType]
        module=roles.__getitem__,  # pyright: ignore[reportArgumentType]
        decode=nn.Identity(),
        seed=0,
        step=0,
        device=torch.device("cpu"),
        source=torch.Generator().manual_seed(seed),
        fixed={key.replace("_", " "): value for key, value in fixed.items()},
        seen={},
    )
