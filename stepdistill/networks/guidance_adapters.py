"""Guidance adapters: small modules beside the attention layers of a frozen network, attached by hooks.

An adapter computes from the guidance scale w, the timestep and the prompt what is added to its attention's output.
Hooks and not other modules, so that names, attention processors and LoRAs stay as they are. What comes in with a hook
is the image's tokens and the prompt's; the time's embedding is the network's own, and w is set from outside. Jensen &
Sadat 2025, https://arxiv.org/abs/2503.07274.

Unlike in the paper, the adapter's output is multiplied by w - 1, as the guided output's distance from the unguided one
is, so w = 1 is the base exactly. Without this factor small scales fit badly, since large ones dominate the squared
loss.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from stepdistill.networks.roles import Adapters, Site, Sites

logger = logging.getLogger(__name__)
UNIT = 4.0  # of w - 1, by which an adapter's output is multiplied
FREQUENCIES = 16
SLOWEST, FASTEST = 0.05, 0.8  # radians per unit of w


def scale_features(w: Tensor) -> Tensor:
    """Sines and cosines (B, 2 FREQUENCIES) of w (B,), slow enough that scales between trained ones interpolate."""
    pace = torch.logspace(math.log10(SLOWEST), math.log10(FASTEST), FREQUENCIES, device=w.device)
    angles = w[:, None] * pace
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ScaleEmbedding(nn.Module):
    """g(w), (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(2 * FREQUENCIES, width)
        self.rest = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.LayerNorm(width))

    def forward(self, w: Tensor) -> Tensor:
        # the sines in float32, whatever the weights are in
        return self.rest(self.first(scale_features(w.float()).to(self.first.weight.dtype)))


class CrossAttentionAdapter(nn.Module):
    """One head of attention from the image's tokens to g(w), the time and the prompt's tokens.

    Attention alone gives mixtures of the values of those few tokens. `mixed` puts the image's own tokens to them,
    and a nonlinearity behind, so that what is added can be any function of the image, too.
    """

    def __init__(self, site: Site, time_width: int, width: int, mixed: bool) -> None:
        super().__init__()
        self.mixed = mixed
        self.scale = ScaleEmbedding(width)
        self.time = nn.Linear(time_width, width)
        self.prompt = nn.Linear(site.prompt_width, width)
        self.q = nn.Linear(site.width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)  # a bias here has no effect
        self.v = nn.Linear(width, width, bias=False)
        self.out = zeroed(nn.Linear(width, site.width))

    def forward(self, x: Tensor, w: Tensor, time: Tensor, prompt: Tensor, true: Tensor | None = None) -> Tensor:
        """What is added, (B, N, D), to the output for x (B, N, D), w (B,), time (B, T), prompt (B, L, P), of whose
        tokens those in `true` (B, L) count, or all."""
        tokens = torch.cat([self.scale(w)[:, None], self.time(time)[:, None], self.prompt(prompt)], dim=1)
        q = self.q(x)
        mask = None if true is None else torch.cat([true.new_ones(len(true), 2), true], dim=1)[:, None]
        read = scaled_dot_product_attention(q, self.k(tokens), self.v(tokens), mask)
        return self.out(silu(read + q) if self.mixed else read)


class OffsetAdapter(nn.Module):
    """A vector from g(w), the time and the prompt's mean, the same for all of the image's tokens."""

    def __init__(self, site: Site, time_width: int, width: int) -> None:
        super().__init__()
        self.scale = ScaleEmbedding(width)
        self.time = nn.Linear(time_width, width)
        self.prompt = nn.Linear(site.prompt_width, width)
        self.layers = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.out = zeroed(nn.Linear(width, site.width))

    def forward(self, x: Tensor, w: Tensor, time: Tensor, prompt: Tensor, true: Tensor | None = None) -> Tensor:
        """As above; x is not looked at."""
        mean = prompt.mean(1) if true is None else (prompt * true[..., None]).sum(1) / true.sum(1, keepdim=True)
        return self.out(self.layers(self.scale(w) + self.time(time) + self.prompt(mean)))[:, None]


def zeroed(layer: nn.Linear) -> nn.Linear:
    """The layer with zeros for weights."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def build(role: Adapters, sites: Sites) -> nn.ModuleList:
    """An adapter for each site, float32, that adds zero."""

    def one(site: Site) -> nn.Module:
        if role.arch == "offset":
            return OffsetAdapter(site, sites.time_width, role.width)
        return CrossAttentionAdapter(site, sites.time_width, role.width, role.arch == "mixed")

    return nn.ModuleList(one(site).float() for site in sites.places)


class Context(NamedTuple):
    """What hooks work by: adapters in the order of the sites, w (B,), (B, 1) or (), and the time's embedding."""

    adapters: nn.ModuleList | None = None
    scale: Tensor | None = None
    time: Tensor | None = None


OFF = Context()


class Hooks:
    """Hooks at the sites of a network; `now` says which adapters are on. Off, they change nothing.

    Args:
        net: the network, trained or in a pipeline; nothing in it is replaced or added.
    """

    def __init__(self, net: nn.Module, sites: Sites) -> None:
        self.now = OFF
        places = [net.get_submodule(site.name) for site in sites.places]
        self.names = [list(inspect.signature(place.forward).parameters) for place in places]
        self.handles = [net.get_submodule(sites.time).register_forward_hook(self._time)]
        for i, place in enumerate(places):
            self.handles.append(place.register_forward_hook(self._site(i), with_kwargs=True))

    def remove(self) -> None:
        """Leave the network as it was."""
        for handle in self.handles:
            handle.remove()

    def _time(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.now.adapters is not None:
            self.now = self.now._replace(time=output)

    def _site(self, i: int) -> Any:  # noqa: ANN401
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:  # noqa: ANN401
            adapters, scale, time = self.now
            if adapters is None:
                return None
            assert scale is not None and time is not None
            given = dict(zip(self.names[i], args, strict=False)) | kwargs
            x, prompt = given["hidden_states"], given["encoder_hidden_states"]
            prompt = prompt[0] if isinstance(prompt, tuple) else prompt  # an IP-adapter sends its images with it
            kind = next(adapters[i].parameters()).dtype
            w = scale.to(x.device).reshape(-1).expand(len(x))
            true = given.get("encoder_hidden_states_mask")  # of families whose prompts differ in length
            more = adapters[i](x.to(kind), w, time.to(kind), prompt.to(kind), true)
            more = more * ((w - 1) / UNIT).to(more.dtype)[:, None, None]
            if isinstance(output, tuple):  # of the image, then of the prompt
                return (output[0] + more.to(output[0].dtype), *output[1:])
            return output + more.to(output.dtype)

        return hook


class Attachment:
    """Adapters that are on in a pipeline's network, at one scale for all images, until they are removed.

    They take the place of what was attached there before: two of them would guide twice.
    """

    _there: WeakKeyDictionary[nn.Module, Attachment] = WeakKeyDictionary()

    def __init__(self, net: nn.Module, sites: Sites, adapters: nn.ModuleList, scale: float) -> None:
        if net in self._there:
            self._there[net].remove()
        self.net, self.adapters, self.hooks = net, adapters, Hooks(net, sites)
        # the pipeline may be moved later, and does not know of what is attached
        self.mover = net.register_forward_pre_hook(self._follow)
        self.scale = scale
        self._there[net] = self

    @property
    def scale(self) -> float:
        """w; at 1 they add zero."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = value
        self.hooks.now = Context(self.adapters, torch.tensor(float(value)))

    def remove(self) -> None:
        """Leave the network as it was before."""
        self.hooks.remove()
        self.mover.remove()
        self._there.pop(self.net, None)

    def _follow(self, net: nn.Module, args: tuple) -> None:
        self.adapters.to(next(net.parameters()).device)


class GuidedCall(dict):
    """Keyword arguments of a pipeline's call, with guidance adapters attached to its network.

    The pipeline's own `guidance_scale` among them stays 1, which makes one pass; the scale of the adapters is set by
    the attribute: `call.guidance_scale = 5`.

    Args:
        arguments: of the call.
        attachment: the adapters.
        trained: lowest and highest scale of their training.
    """

    def __init__(self, arguments: Mapping[str, Any], attachment: Attachment, trained: tuple[float, float]) -> None:
        super().__init__(arguments)
        self.attachment, self.trained = attachment, trained

    @property
    def guidance_scale(self) -> float:
        """w of `uncond + w (cond - uncond)`."""
        return self.attachment.scale

    @guidance_scale.setter
    def guidance_scale(self, value: float) -> None:
        low, high = self.trained
        if not low <= value <= high:
            logger.warning(
                "guidance_scale %g is outside the range that the adapters were trained on, %g to %g. Outside it they "
                "extrapolate. Choose a scale inside, or train the adapters on a wider range",
                *(value, low, high),
            )
        self.attachment.scale = value

    def remove(self) -> None:
        """Remove the adapters; the pipeline then samples as before, with the guidance of its own calls."""
        self.attachment.remove()
