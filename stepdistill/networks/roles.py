"""The roles that a method may declare. `stepdistill.networks.backbone` builds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from stepdistill.config.kinds import Place

TEACHER = "teacher"
ASSISTANT = "assistant"  # no role: a LoRA beside every role in training, see `Backbone.assist`
AdapterArch = Literal["cross_attention", "mixed", "offset"]
Arithmetic = Literal["auto", "merged", "apart"]


@dataclass(frozen=True)
class Lora:
    """A trainable low-rank adapter. Its rank and alpha come from the config's `lora` section.

    Args:
        of: a LoRA that it starts as a copy of, and is moved towards after each optimizer step of that one; None is
            a LoRA of its own. Both have one rank and the same layers. Since the factors A and B are moved one by one,
            two that did not start equal would lose half of their size on the way.
        decay: `value <- decay value + (1 - decay) value_of`, in [0, 1].
    """

    of: str | None = None
    decay: float = 1.0


@dataclass(frozen=True)
class Ema:
    """The running average of another role, moved once after each optimizer step of that role.

    Args:
        of: the role that is averaged.
        decay: `mean <- decay mean + (1 - decay) value`, in [0, 1); 0 is a copy.
        until: the step (from 0) from which on it stays as it is; None never stops.
    """

    of: str
    decay: float
    until: int | None = None


@dataclass(frozen=True)
class Copy:
    """A full trainable network beside the base.

    Args:
        source: None copies the base; else a function that makes the network.
        width: below 1, the family's smaller version of the base with about this share of its channels, and fresh
            weights.
    """

    source: Callable[[], nn.Module] | None = None
    width: float = 1.0


@dataclass(frozen=True)
class Module:
    """A trainable module that is no denoiser, such as a discriminator's head.

    Args:
        build: makes it for the places where the network's features are read, each an argument of its own.
        depths: those places, as shares of the network's blocks that lie before them, ascending in (0, 1]; none is the
            family's one place halfway.
    """

    build: Callable[..., nn.Module]
    depths: tuple[float, ...] = ()


@dataclass(frozen=True)
class Adapters:
    """Trainable guidance adapters inside the base's attention: with them one pass does what guidance does in two.

    Each takes the guidance scale, the time and the prompt, and adds to its attention's output; at the start it adds
    zero. See `stepdistill.networks.guidance_adapters`.

    Args:
        arch: what they are: cross-attention, the same mixed with the image's own tokens, or an offset that is one
            vector for all places of the image.
        width: their inner dimension.
    """

    arch: AdapterArch
    width: int


@dataclass(frozen=True)
class Site:
    """A place for an adapter: the dotted name of an attention layer, and the channels of its output and its prompt."""

    name: str
    width: int
    prompt_width: int


@dataclass(frozen=True)
class Sites:
    """Where a family's network takes guidance adapters.

    Args:
        time: dotted name of the module whose output (B, time_width) is the time's embedding.
        places: in the order in which the adapters are stored.
    """

    time: str
    time_width: int
    places: tuple[Site, ...]


@dataclass(frozen=True)
class Tap:
    """Where a family's network is read for features: what comes into one of its modules.

    Args:
        before: the module's dotted name; nothing from it on is computed.
        channels: of the features.
        patch: side, in latent pixels, of the square that one feature stands for.
        side: of the feature map at the network's native size.
        image: where the image's tokens lie in a sequence that also has the prompt's; None where they are all of it.
    """

    before: str
    channels: int
    patch: int
    side: int
    image: Literal["first", "last"] | None = None


Role = Lora | Ema | Copy | Module | Adapters


@dataclass(frozen=True, kw_only=True)
class RoleLora:
    """The LoRA of one role, as far as it differs from the `lora` section.

    Args:
        rank: rank of the LoRA, at least 1; none takes the section's.
        alpha: the update is scaled by `alpha / rank`; none takes the section's.
        target_modules: names of layers, matched as in PEFT; none takes the section's.
        init_from: student folder or LoRA file that the role starts from, cut or padded to its rank; none starts it as
            the base, and the student as the section says.
    """

    rank: int | None = None
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    init_from: Place | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}: expected at least 1")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"lora.alpha is {self.alpha}: expected a positive number, or none for alpha = rank")


@dataclass(frozen=True, kw_only=True)
class LoraSpec(RoleLora):
    """The `lora` section of a config.

    Args:
        rank: rank of the LoRA, at least 1.
        alpha: the update is scaled by `alpha / rank`; none takes `rank`, a scale of 1.
        target_modules: names of layers, matched as in PEFT; none takes the family's list.
        init_from: student folder or LoRA file that the student starts from, cut or padded to its rank; no other role.
        roles: rank, alpha, targets and start of single roles, by role name; an average has those of its role.
        arithmetic: how a layer with a LoRA is computed. `merged` adds the LoRA to the weight first; `apart` computes
            both and adds the outputs, as PEFT does; `auto` takes what is cheaper for the layer's shape and batch. In
            half precision, under autocast, and in layers that are quantised or no plain Linear or Conv2d, `apart` is
            the only way.
    """

    rank: int = 64
    roles: dict[str, RoleLora] | None = None
    arithmetic: Arithmetic = "auto"

    def of(self, role: str) -> LoraSpec:
        """The spec of one role."""
        given = vars((self.roles or {}).get(role, RoleLora()))
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def starts(self) -> dict[str, str]:
        """The student folder or LoRA file that a role starts from, by role name."""
        student = {} if self.init_from is None else {"student": self.init_from}
        return student | {name: role.init_from for name, role in (self.roles or {}).items() if role.init_from}

    def without_starts(self) -> LoraSpec:
        """The same, with every role started as the base."""
        roles = self.roles and {name: replace(role, init_from=None) for name, role in self.roles.items()}
        return replace(self, init_from=None, roles=roles)
