"""The noise process: `x_t = alpha_t x0 + sigma_t eps`, with time in the units of the pipeline's scheduler.

A time is a float tensor of the scheduler's timesteps: 0 ... 999 for a variance-preserving table, `1000 sigma` in
0 ... 1000 for a rectified flow. Time 0 of a table is still noisy (`sigma_0` = 0.029 for Stable Diffusion); clean data
is `None`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor


def expand(value: Tensor, like: Tensor) -> Tensor:
    """`value` (B,) with as many trailing axes of length one as `like` (B, ...) needs."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def per_sample(time: float | Tensor, like: Tensor) -> Tensor:
    """A time (B,) for each of the samples `like` (B, ...), from one number or from (B,)."""
    size = len(like)
    return time.expand(size) if isinstance(time, Tensor) else torch.full((size,), float(time), device=like.device)


class NoiseSchedule(ABC):
    """Signal and noise levels by time.

    A step of a sampler leads from its start to the start of the next step; a grid has the starts and the last end.

    Attributes:
        span: the lowest and the highest time.
        straight: whether `x_t` moves along a line, alpha + sigma = 1; the lowest time is then clean data.
    """

    span: tuple[float, float]
    straight: bool

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`(alpha_t, sigma_t)`, each of `t`'s shape, float32 (float64 where `t` is)."""

    @abstractmethod
    def time(self, log_snr: Tensor) -> Tensor:
        """The time whose `log(alpha_t / sigma_t)` is `log_snr` (natural logarithm of amplitudes, not powers)."""

    def angle(self, t: Tensor) -> Tensor:
        """`atan(sigma_t / alpha_t)` (B,) in [0, pi/2]: the time of TrigFlow, in which 0 is clean and pi/2 is noise."""
        alpha_t, sigma_t = self(t)
        return torch.atan2(sigma_t, alpha_t)

    @abstractmethod
    def time_per_angle(self, t: Tensor) -> Tensor:
        """The derivative (B,) of the time by the angle, at t (B,)."""

    def lognormal_times(self, u: Tensor, mean: float, std: float) -> Tensor:
        """Times (B,) with `sigma_t / alpha_t = e^tau / 0.5`, tau ~ N(mean, std^2), from uniform draws (B,) in [0, 1).

        They are kept within `span`. The 0.5 is the standard deviation of data in EDM and TrigFlow (Lu & Song 2024,
        https://arxiv.org/abs/2410.11081, section 4), so `mean` is the papers' P_mean.
        """
        normal = torch.erfinv((2 * u - 1).clamp(-1 + 1e-6, 1 - 1e-6)) * math.sqrt(2)
        return self.time(-(mean + std * normal) - math.log(2)).clamp(*self.span)

    @abstractmethod
    def grid(self, n: int) -> Tensor:
        """The teacher's solver in n steps, (n + 1,) ascending: the end of the last step, then the n starts."""

    def starts(self, n: int) -> tuple[float, ...]:
        """Where the n steps of the teacher's solver start, descending."""
        return tuple(self.grid(n).flip(0)[:-1].tolist())

    @abstractmethod
    def even_starts(self, first: float, n: int) -> tuple[float, ...]:
        """`n` starts, descending and evenly spaced in time, of which `first` is the first."""

    @abstractmethod
    def random_times(self, u: Tensor, low: float, high: float, shift: float | None = None) -> Tensor:
        """Times (B,) in [low, high] from uniform draws (B,) in [0, 1): as dense there as the solver's grid is.

        Args:
            shift: s of `sigma = s v / (1 + (s - 1) v)`, sigma as a share of `alpha + sigma` and v uniform, by which
                times are spread instead (Esser et al. 2024, https://arxiv.org/abs/2403.03206, section 5.3.2).
        """

    @abstractmethod
    def time_of_sigma(self, sigma: float) -> float:
        """The time whose `sigma_t` is `sigma`; of a table the nearest entry."""

    @abstractmethod
    def denoising_target(self, x0: Tensor, eps: Tensor) -> Tensor:
        """What denoising score matching compares: the noise, or on a straight path the velocity `eps - x0`."""

    @abstractmethod
    def check(self, times: Iterable[float]) -> None:
        """Raise ValueError for times that a network on this schedule was never trained at."""

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor | None) -> Tensor:
        """`alpha_t x0 + sigma_t eps` for x0, eps (B, ...) and t (B,); `t=None` is clean data, `x0` itself.

        With an estimate's (x0, eps) this is the DDIM step to `t` (Song et al. 2021, https://arxiv.org/abs/2010.02502,
        eq. 12 at eta 0), and the Euler step of a rectified flow.
        """
        if t is None:
            return x0
        alpha_t, sigma_t = self(t)
        return expand(alpha_t, x0) * x0 + expand(sigma_t, x0) * eps

    def renoise(self, x_s: Tensor, s: Tensor | None, r: Tensor, z: Tensor) -> Tensor:
        """`alpha_r / alpha_s x_s + std z`: the forward process from s to the noisier r, z standard normal.

        Args:
            x_s: (B, ...), at the times s (B,); None is clean data.
            r: (B,), nowhere below s.
        """
        if s is None:
            return self.add_noise(x_s, z, r)
        (alpha_s, sigma_s), (alpha_r, sigma_r) = self(s), self(r)
        std = added_std(alpha_r, sigma_r, sigma_s / alpha_s)
        return expand(alpha_r / alpha_s, x_s) * x_s + expand(std, x_s) * z


def added_std(alpha_t: Tensor, sigma_t: Tensor, ratio: Tensor) -> Tensor:
    """The std (B,) of the noise which the forward process adds up to t, from where sigma is `ratio` times alpha."""
    return (sigma_t**2 - (alpha_t * ratio) ** 2).clamp(min=0).sqrt()


class DiscreteVP(NoiseSchedule):
    """A scheduler's exact table of `alphas_cumprod`, interpolated in log-SNR between its entries.

    Args:
        alphas_cumprod: (T,) decreasing, in [0, 1).
    """

    straight = False

    def __init__(self, alphas_cumprod: Tensor) -> None:
        table = alphas_cumprod.detach().double().cpu()
        self.log_snr = 0.5 * (table.log() - (1 - table).log())
        self.steps = len(table)
        self.span = (0.0, self.steps - 1.0)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = self._finite(t.device)
        first, last = self.span
        # where, and not clamp, whose forward-mode derivative at the ends is 0
        exact = torch.where(t < first, first, torch.where(t > last, last, t.double()))
        low = self._entry(exact)
        share = exact - low
        # both ends always take part: else the derivative at a whole time would be 0
        mixed = table[low] * (1 - share) + table[low + 1] * share
        kind = torch.float64 if t.dtype == torch.float64 else torch.float32
        return torch.sigmoid(2 * mixed).sqrt().to(kind), torch.sigmoid(-2 * mixed).sqrt().to(kind)

    def time(self, log_snr: Tensor) -> Tensor:
        table = self._finite(log_snr.device).flip(0)
        wanted = log_snr.double()
        high = torch.searchsorted(table, wanted).clamp(1, self.steps - 1)
        share = (wanted - table[high - 1]) / (table[high] - table[high - 1])
        return (self.steps - high - share.clamp(0, 1)).to(log_snr.dtype)

    def time_per_angle(self, t: Tensor) -> Tensor:
        table = self._finite(t.device)
        low = self._entry(t)
        alpha_t, sigma_t = self(t.double())
        return (-1 / (alpha_t * sigma_t * (table[low + 1] - table[low]))).to(t.dtype)

    def _entry(self, t: Tensor) -> Tensor:
        """The entry at or before a time that has a next one."""
        return t.double().floor().long().clamp(0, self.steps - 2)

    def _finite(self, device: torch.device) -> Tensor:
        """`log_snr`, of which a zero-terminal-SNR table's last is -inf: 0 * inf and inf / inf are nan."""
        return self.log_snr.to(device).clamp(min=-1e4)

    def grid(self, n: int) -> Tensor:
        if n < 1 or self.steps % n:
            divisors = [k for k in range(1, 201) if self.steps % k == 0]
            raise ValueError(
                f"a grid of {n} steps does not divide the table's {self.steps} entries: its timesteps would differ "
                f"from those of the schedulers. Choose one of {divisors}"
            )
        return torch.cat([torch.zeros(1), torch.arange(1, n + 1) * float(self.steps // n) - 1])

    def even_starts(self, first: float, n: int) -> tuple[float, ...]:
        return tuple(float(int((first + 1) * (n - i) / n) - 1) for i in range(n))  # of 999: 999, 749, 499, 249

    def random_times(self, u: Tensor, low: float, high: float, shift: float | None = None) -> Tensor:
        if shift is None:
            return (low + u * (high - low + 1)).floor().clamp(max=high)
        alpha_t, sigma_t = self(torch.tensor([low, high], dtype=torch.float64))
        first, last = (sigma_t / (alpha_t + sigma_t)).tolist()
        share = shifted_between(u, first, last, shift)
        return self.time(((1 - share) / share).log()).round().clamp(low, high)

    def time_of_sigma(self, sigma: float) -> float:
        times = torch.arange(self.span[0], self.span[1] + 1)
        return times[(self(times)[1] - sigma).abs().argmin()].item()

    def denoising_target(self, x0: Tensor, eps: Tensor) -> Tensor:
        return eps

    def check(self, times: Iterable[float]) -> None:
        odd = [t for t in times if not 0 <= t < self.steps or t != int(t)]
        if odd:
            raise ValueError(f"timesteps {odd}: expected whole numbers in 0 ... {self.steps - 1}, the table's entries")


class Rectified(NoiseSchedule):
    """The straight path `alpha = 1 - t / 1000`, `sigma = t / 1000`.

    Args:
        shift: where the solver's grid is dense; `sigma = shift u / (1 + (shift - 1) u)` for uniform u
            (Esser et al. 2024, https://arxiv.org/abs/2403.03206, section 5.3.2).
    """

    straight = True

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = shift
        self.span = (0.0, 1000.0)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t if t.dtype == torch.float64 else t.float()
        return 1 - sigma / 1000, sigma / 1000

    def time(self, log_snr: Tensor) -> Tensor:
        return 1000 * torch.sigmoid(-log_snr)

    def time_per_angle(self, t: Tensor) -> Tensor:
        alpha_t, sigma_t = self(t)
        return 1000 * (alpha_t.square() + sigma_t.square())

    def grid(self, n: int) -> Tensor:
        if n < 1:
            raise ValueError(f"a grid of {n} steps: expected at least 1")
        u = torch.arange(n + 1, dtype=torch.float64) / n
        return (1000 * self.shift * u / (1 + (self.shift - 1) * u)).float()

    def even_starts(self, first: float, n: int) -> tuple[float, ...]:
        return tuple(first * (n - i) / n for i in range(n))

    def random_times(self, u: Tensor, low: float, high: float, shift: float | None = None) -> Tensor:
        return 1000 * shifted_between(u, low / 1000, high / 1000, shift or self.shift)

    def time_of_sigma(self, sigma: float) -> float:
        return 1000 * sigma

    def denoising_target(self, x0: Tensor, eps: Tensor) -> Tensor:
        return eps - x0

    def check(self, times: Iterable[float]) -> None:
        odd = [t for t in times if not 0 <= t <= 1000]
        if odd:
            raise ValueError(f"timesteps {odd}: expected numbers in 0 ... 1000, which are 1000 sigma")


def shifted_between(u: Tensor, low: float, high: float, shift: float) -> Tensor:
    """`shift v / (1 + (shift - 1) v)` in [low, high] for v uniform, from uniform u (B,) in [0, 1).

    The range is that of v: to clamp afterwards would heap draws on its ends.
    """
    first, last = (share / (shift - (shift - 1) * share) for share in (low, high))
    v = first + u * (last - first)
    return shift * v / (1 + (shift - 1) * v)
