"""Features inside a denoiser, and the discriminator heads of adversarial losses."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, interpolate, normalize, pad

from stepdistill.networks.roles import Tap

POWER_ITERATIONS = 8


class _Reached(Exception):  # noqa: N818 - it is no error
    """Carries a module's inputs out of a forward pass that ends there."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.inputs = inputs


def inputs_of(net: nn.Module, place: nn.Module, call: Callable[[], object]) -> dict[str, Any]:
    """The arguments that `place`, a part of `net`, is first given while `call()` runs `net`.

    The pass ends there: nothing from `place` on is computed. The hook sits before a module rather than after one,
    since what comes after a block may run inside a checkpointed function, which has to be left as it is.
    """

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        raise _Reached(_bound(module, args, kwargs))

    handle = place.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        with _ending(net):
            call()
    except _Reached as reached:
        return reached.inputs
    finally:
        handle.remove()
    name = next(name for name, module in net.named_modules() if module is place)
    raise RuntimeError(f"{type(net).__name__} never reached {name!r}: the tap names another module's input")


def features_before(net: nn.Module, taps: Sequence[Tap], x_t: Tensor, call: Callable[[], object]) -> tuple[Tensor, ...]:
    """The features (B, channels, [F,] H / patch, W / patch) that come into each `tap.before` while `call()` runs `net`.

    It is one pass, which ends at the last place.

    Args:
        taps: in order of depth.
        x_t: (B, C, [F,] H, W), what `call` gives the network; it tells the map's size where features are tokens.
    """
    *passed, last = (net.get_submodule(tap.before) for tap in taps)
    found: list[Tensor] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(_first(_bound(module, args, kwargs)))

    handles = [place.register_forward_pre_hook(note, with_kwargs=True, prepend=True) for place in passed]
    try:
        found.append(_first(inputs_of(net, last, call)))
    finally:
        for handle in handles:
            handle.remove()
    if len(found) < len(taps):
        raise RuntimeError(f"{type(net).__name__} reached {len(found)} of {[tap.before for tap in taps]}, expected all")
    return tuple(_map(features, tap, x_t) for features, tap in zip(found, taps, strict=True))


def _map(features: Tensor, tap: Tap, x_t: Tensor) -> Tensor:
    if features.ndim == 3:  # tokens (B, N, C), row by row
        *frames, height, width = x_t.shape[2:]
        sides = (*frames, height // tap.patch, width // tap.patch)
        if tap.image is not None:
            count = math.prod(sides)
            features = features[:, :count] if tap.image == "first" else features[:, -count:]
        features = features.transpose(1, 2).reshape(len(features), -1, *sides)
    return features


def _bound(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    return inspect.signature(module.forward).bind(*args, **kwargs).arguments


def _first(inputs: dict[str, Any]) -> Tensor:
    """What a block or a norm works on."""
    return next(iter(inputs.values()))


def at_depths(taps: Sequence[Tap], depths: Sequence[float]) -> tuple[Tap, ...]:
    """The places that lie after these shares of the blocks, in order of depth.

    In a network of few blocks several shares may lead to one place, which then counts once.

    Args:
        taps: the place after each block.
        depths: ascending, in (0, 1]; 1 is after the last block.
    """
    return tuple(dict.fromkeys(taps[max(1, round(share * len(taps))) - 1] for share in depths))


@contextmanager
def _ending(net: nn.Module) -> Iterator[None]:
    """A pass of `net` that ends early ends as others do, with the features as its output, and then leaves the call.

    Hooks on the whole network see no end of a pass that an exception leaves, and a sharded one would keep its weights
    gathered.
    """
    replaced, forward, ended = vars(net).get("forward"), net.forward, list[dict[str, Any]]()

    def run(*args: object, **kwargs: object) -> object:
        try:
            return forward(*args, **kwargs)
        except _Reached as reached:  # not kept: with it, the frames of the whole pass would stay, and their tensors
            ended.append(reached.inputs)
        return _first(ended[-1])

    def leave(module: nn.Module, args: tuple, output: Tensor) -> None:
        if ended:
            inputs = ended.pop()
            raise _Reached({**inputs, next(iter(inputs)): output})

    last = net.register_forward_hook(leave)
    net.forward = run
    try:
        yield
    finally:
        last.remove()
        del net.forward
        if replaced is not None:
            net.forward = replaced


class Head(nn.Module):
    """DMD2's discriminator head: halving convolutions down to 4 x 4, one that takes these in, a logit.

    Yin et al. 2024, https://arxiv.org/abs/2405.14867, section 4.3. On larger maps than the native one the logit is
    the mean over places; smaller ones are stretched to it.

    Args:
        tap: where the features come from.
    """

    def __init__(self, tap: Tap) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        side, width = tap.side, tap.channels
        self.side = side

        def block(kernel: int, stride: int, padding: int) -> list[nn.Module]:
            return [nn.Conv2d(width, width, kernel, stride, padding), _norm(width), nn.SiLU()]

        while side > 4:
            layers += block(4, 2, 1)
            side //= 2
        layers += [*block(side, side, 0), nn.Conv2d(width, 1, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, 1), float32, of features (B, channels, h, w), or (B, channels, F, h, w): the mean over frames."""
        if features.ndim == 5:
            frames = features.transpose(1, 2)
            return self(frames.flatten(0, 1)).view(frames.shape[:2]).mean(1, keepdim=True)
        features = features.float()
        size = [max(side, self.side) for side in features.shape[-2:]]
        if size != list(features.shape[-2:]):
            features = interpolate(features, size, mode="bilinear")
        return self.layers(features).mean((2, 3))


def _norm(width: int) -> nn.GroupNorm:
    # a map may be one place: a group of one channel there would be a constant
    return nn.GroupNorm(next(n for n in (32, 16, 8, 4, 2, 1) if width % n == 0 and width > n), width)


class LaddHead(nn.Module):
    """LADD's discriminator head: at each place a few convolutions over the tokens, with one logit a token.

    Sauer et al. 2024, https://arxiv.org/abs/2403.12015, section 3, in the form of SANA-Sprint. A place's head is two
    blocks and a last convolution with kernel 1. A block is a convolution, a norm, and LeakyReLU with slope 0.2; the
    kernels are 1 and 9, circular over the tokens row by row, and the second block is residual, `(x + f(x)) / sqrt(2)`.
    Published code normalises over every eight samples of a batch (BatchNormLocal). Here it is a GroupNorm within each
    sample, so that no logit depends on the other samples of its micro-batch.

    Args:
        taps: where the features come from.
    """

    def __init__(self, *taps: Tap) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_PlaceHead(tap.channels) for tap in taps)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B, N) of features (B, channels, h, w) of each place; N is the number of all their tokens.

        On maps of different sizes, as a UNet has them, a larger one has more of the logits.
        """
        pairs = zip(self.heads, features, strict=True)
        return torch.cat([head(part.flatten(2)) for head, part in pairs], 1)


class _PlaceHead(nn.Module):
    """The head of one place: (B, width, N) to logits (B, N)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(SpectralConv(width, width, 1), _norm(width), nn.LeakyReLU(0.2))
        self.second = nn.Sequential(SpectralConv(width, width, 9), _norm(width), nn.LeakyReLU(0.2))
        self.last = SpectralConv(width, 1, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.first(tokens)
        return self.last((x + self.second(x)) / math.sqrt(2)).squeeze(1)


class SpectralConv(nn.Conv1d):
    """A circular convolution (B, C, N) whose kernel, as a matrix (out, in x size), has the spectral norm 1.

    Miyato et al. 2018, https://arxiv.org/abs/1802.05957, section 2.1. The norm comes from power iteration. As
    published, each call goes on from the vector of the call before, so that a step's result depends on the number of
    its micro-batches. Here each call begins at one vector, which is the right one for the first weights.

    Args:
        inputs: channels in.
        outputs: channels out.
        size: of the kernel, odd.
    """

    start: Tensor

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__(inputs, outputs, size)
        self.register_buffer("start", torch.randn(outputs))
        self.start, _ = self._vectors(100)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in the base class
        beside = self.kernel_size[0] // 2
        around = pad(input, (beside, beside), mode="circular")
        return conv1d(around, self.weight / self.spectral_norm(), self.bias)

    def spectral_norm(self) -> Tensor:
        """The largest singular value, from below; its gradient is that of `u W v` at fixed vectors."""
        u, v = self._vectors(POWER_ITERATIONS)
        return u @ self.weight.flatten(1) @ v

    @torch.no_grad()
    def _vectors(self, iterations: int) -> tuple[Tensor, Tensor]:
        """The singular vectors of the largest value, left (out,) and right (in x size,)."""
        matrix, u, v = self.weight.flatten(1), self.start, self.start
        for _ in range(iterations):
            v = normalize(matrix.T @ u, dim=0)
            u = normalize(matrix @ v, dim=0)
        return u, v
