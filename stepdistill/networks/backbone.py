"""One frozen network and its roles, which are PEFT adapters.

A role is what a distillation method switches between (teacher, student, fake score, average). Normally it is a named
LoRA on the frozen base, and the teacher is the base with every adapter off. This module handles the hazards of that:

- PEFT's own switches (`set_adapter`, `disable_adapters`) flip `requires_grad`, which silently drops the gradients of a
graph that is still alive. Roles are switched by the layers' active names instead, and no flag moves.
- Gradient checkpointing computes a block again during backward, under whichever role is active then. The
  checkpoint function installed here remembers the role of the forward pass, and the inputs of its adapters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from hashlib import sha256

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepdistill.networks.guidance_adapters import OFF, Context, Hooks, build
from stepdistill.networks.lora_layers import Kept, choose_arithmetic
from stepdistill.networks.peft_config import check_targets, peft_config
from stepdistill.networks.recompute import checkpoint_blocks
from stepdistill.networks.roles import ASSISTANT, TEACHER, Adapters, Copy, Ema, Lora, LoraSpec, Module, Role, Sites, Tap
from stepdistill.networks.taps import at_depths


class Backbone(nn.Module):
    """A frozen denoiser and the roles on it.

    Args:
        net: the pipeline's network. It is frozen, and put in evaluation mode for good: roles are compared by
            subtraction, so nothing may be random.
        spec: rank, alpha and targets.
        targets: the family's LoRA targets, used where `spec` names none.
        tap: where heads read its features, halfway.
        seed: keys the initial weights of LoRAs and modules, together with the role's name.
        narrow: the family's way to make a smaller network like `net`, for copies that ask for one.
        sites: where guidance adapters go.
        taps: where heads may read its features, after each block.
    """

    def __init__(
        self,
        net: nn.Module,
        spec: LoraSpec,
        targets: Sequence[str],
        tap: Tap | None = None,
        seed: int = 0,
        narrow: Callable[[nn.Module, float], nn.Module] | None = None,
        sites: Sites | None = None,
        taps: Sequence[Tap] = (),
    ) -> None:
        super().__init__()
        self.net = net.requires_grad_(False).eval()
        self.spec = spec
        self.targets = tuple(targets)
        self.tap = tap
        self.taps = tuple(taps)
        self.seed = seed
        self.narrow = narrow
        self.declared: dict[str, Role] = {}
        self.sites = sites
        self.others = nn.ModuleDict()  # Copy, Module and Adapters roles, and averages of these
        self._hooks: Hooks | None = None  # of adapters, where a role has any
        self._active: list[str] = []  # shared by all layers, so that a switch is one write and not hundreds
        self._beside: list[str] = []  # LoRAs that are on with every role
        self._kept = Kept()
        self._own: dict[str, dict[str, nn.Parameter]] = {}  # `parameters_of`: a walk takes milliseconds
        self._current: tuple[str, bool] = (TEACHER, True)

    def add(self, name: str, role: Role) -> None:
        """Declare a role. A LoRA starts at zero, so that it equals the teacher bit for bit."""
        if name in (TEACHER, ASSISTANT) or name in self.declared:
            raise ValueError(f"role {name!r} exists already: have {[TEACHER, ASSISTANT, *self.declared]}")
        self.declared[name] = role
        self._own.clear()
        match role:
            case Copy():
                place = next(self.net.parameters()).device
                network = self._copy(name, role).to(place, torch.float32)
                self.others[name] = network.eval().requires_grad_(True)
            case Module():
                with self._seeded(name):
                    self.others[name] = role.build(*self.places(role.depths)).to(next(self.net.parameters()).device)
            case Adapters():
                if self.sites is None:
                    raise ValueError(f"role {name!r} has guidance adapters, and this network has no sites for them")
                with self._seeded(name):
                    self.others[name] = build(role, self.sites).to(next(self.net.parameters()).device)
                self._hooks = self._hooks or Hooks(self.net, self.sites)
            case Ema(of=of) if of not in self.declared or of == name:
                raise ValueError(f"role {name!r} averages {of!r}, which is not declared before it")
            case Ema(of=of) if of in self.others:
                self.others[name] = deepcopy(self.others[of]).requires_grad_(False)
            case Ema(of=of) | Lora(of=of):  # a copy has the rank and the layers of what it copies
                self._add_adapter(name, self._config(of or name), trainable=isinstance(role, Lora))
                self.load_state(name, self.state(of or name))

    def places(self, depths: Sequence[float] = ()) -> tuple[Tap, ...]:
        """Where the network's features are read: after these shares of its blocks, or with none halfway."""
        if depths and self.taps:
            return at_depths(self.taps, depths)
        if depths or self.tap is None:
            raise ValueError(f"features {f'at {list(depths)}' if depths else 'halfway'}: this network has no tap there")
        return (self.tap,)

    def _copy(self, name: str, role: Copy) -> nn.Module:
        if role.source is None and role.width == 1:
            return deepcopy(self.net)
        with self._seeded(name):
            if role.source is not None:
                return role.source()
            if self.narrow is None:
                raise ValueError(f"role {name!r} has width {role.width}, and this backbone was given no `narrow`")
            return self.narrow(self.net, role.width)

    @contextmanager
    def _seeded(self, name: str) -> Iterator[None]:
        """The global generator at a seed of this role, inside only."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(sha256(f"{self.seed}/{name}".encode()).digest()[:7], "big"))
            yield

    def assist(self, config: LoraConfig, state: dict[str, Tensor]) -> None:
        """Add a frozen LoRA that is on beside every role inside `assisted`, and off everywhere else.

        It is no role: no checkpoint and no student holds it.
        """
        self._add_adapter(ASSISTANT, config, trainable=False, layers=state)
        set_peft_model_state_dict(self.net, state, adapter_name=ASSISTANT)

    @contextmanager
    def assisted(self) -> Iterator[None]:
        """Inside, the LoRA of `assist` is on with every role on the base, the teacher too; nothing without one."""
        self._beside = [ASSISTANT] if self.parameters_of(ASSISTANT) else []
        try:
            yield
        finally:
            self._beside = []
            self._switch(*self._current, self._hooks.now if self._hooks else OFF)

    def _config(self, role: str) -> LoraConfig:
        spec = self.spec.of(role)
        check_targets(self.net, spec)
        return peft_config(spec, self.targets)

    def _add_adapter(
        self, name: str, config: LoraConfig, trainable: bool, layers: dict[str, Tensor] | None = None
    ) -> None:
        flags = {p: p.requires_grad for p in self.net.parameters()}
        with self._seeded(name), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are the point
            inject_adapter_in_model(config, self.net, name, state_dict=layers)
        choose_arithmetic(self.net, self.spec.arithmetic, self._kept)
        for p in self.parameters_of(name).values():
            p.data = p.data.float()  # PEFT gives an adapter the base's half precision
            p.requires_grad_(trainable)
        for p, flag in flags.items():
            p.requires_grad_(flag)
        for layer in self.net.modules():
            if isinstance(layer, BaseTunerLayer):
                layer._active_adapter = self._active

    def _switch(self, name: str, grad: bool, context: Context) -> None:
        self._current = (name, grad)
        if self._hooks is not None:
            self._hooks.now = context
        self._active[:] = [*self._beside, *([] if name == TEACHER or name in self.others else [name])]

    def kind(self, name: str) -> Role:
        """The kind of a role, or of the role that it averages."""
        role = self.declared[name]
        return self.kind(role.of) if isinstance(role, Ema) else role

    def _context(self, name: str, scale: Tensor | None) -> Context:
        """What the hooks use while the role is active."""
        if name == TEACHER or not isinstance(self.kind(name), Adapters):
            return OFF
        if scale is None:
            raise ValueError(
                f"role {name!r} is called without a guidance scale, expected `guidance_scale` among the conditions: "
                "its adapters take it as an input; add a tensor of B numbers, or use `core.denoise.with_scale`"
            )
        modules = self.others[name]
        assert isinstance(modules, nn.ModuleList)
        return Context(modules, scale.float())

    @contextmanager
    def use(self, name: str, grad: bool = True, scale: Tensor | None = None) -> Iterator[nn.Module]:
        """The network of a role, for calls inside the context; everything is as before when it closes.

        With `grad=False` the role's own weights take no gradient, while one to the inputs still flows. A role with
        adapters takes the guidance `scale`, (B,) or (B, 1); others have no use for it.
        """
        with self._use(name, grad, self._context(name, scale)) as net:
            yield net

    @contextmanager
    def _use(self, name: str, grad: bool, context: Context) -> Iterator[nn.Module]:
        before = self._current, self._hooks.now if self._hooks else OFF
        params = list(self.parameters_of(name).values()) if not grad else []
        flags = [p.requires_grad for p in params]
        try:
            self._switch(name, grad, context)
            for p in params:
                p.requires_grad_(False)
            yield self.others[name] if name in self.others and context is OFF else self.net
        finally:
            for p, flag in zip(params, flags, strict=True):
                p.requires_grad_(flag)
            (name, grad), context = before
            self._switch(name, grad, context)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Inside, nothing writes to a role's weights: what is formed of them serves all passes."""
        self._kept.open = True
        try:
            yield
        finally:
            self._kept.open = False
            self._kept.values.clear()

    def _apply(self, fn: Callable, recurse: bool = True) -> Backbone:
        self._own.clear()  # `to_empty` and its like put other parameters in their place
        nn.Module._apply(self, fn, recurse)
        return self

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """A role's own parameters by name, trainable or averaged; the teacher has none."""
        if name == TEACHER:
            return {}
        if name not in self._own:
            whole = self.others[name] if name in self.others else self.net
            self._own[name] = {
                key: p for key, p in whole.named_parameters() if name in self.others or f".{name}." in key
            }
        return dict(self._own[name])

    def state(self, name: str) -> dict[str, Tensor]:
        """A role's tensors, under names without the role's name."""
        if name in self.others:
            return dict(self.others[name].state_dict())
        return get_peft_model_state_dict(self.net, adapter_name=name)

    def load_state(self, name: str, state: dict[str, Tensor]) -> None:
        """Copy tensors into a role; a missing or foreign key is an error."""
        if name in self.others:
            self.others[name].load_state_dict(state)
            return
        held = self.state(name)
        if held.keys() != state.keys():
            odd = sorted(held.keys() ^ state.keys())
            raise ValueError(
                f"role {name!r} holds {len(held)} tensors, the given state {len(state)}: "
                f"{len(held.keys() & state.keys())} names match, {len(odd)} do not, the first {odd[0]!r}. Was it "
                "trained with another lora.rank or lora.target_modules?"
            )
        set_peft_model_state_dict(self.net, state, adapter_name=name)

    def lora_config(self, name: str) -> dict:
        """The role's PEFT config as plain data, for LoRA metadata."""
        return self.net.peft_config[name].to_dict()  # pyright: ignore

    @torch.no_grad()
    def average(self, stepped: Sequence[str], step: int) -> None:
        """Move the averages whose sources have just stepped in `step` (from 0), and what follows these."""
        for of in stepped:
            for name, role in self.copies_of(of).items():
                if isinstance(role, Lora) or role.until is None or step < role.until:
                    means, values = (tuple(self.parameters_of(each).values()) for each in (name, of))
                    torch._foreach_lerp_(means, values, 1 - role.decay)

    def copies_of(self, name: str) -> dict[str, Ema | Lora]:
        """The roles that start as a copy of this one: its averages, and what follows it."""
        return {key: role for key, role in self.declared.items() if isinstance(role, Ema | Lora) and role.of == name}

    def enable_checkpointing(self) -> None:
        """Trade time for memory: blocks are computed again in backward, under the role of their forward pass."""

        def run(block: Callable, *args: object) -> object:
            name, grad = self._current
            context = self._hooks.now if self._hooks else OFF

            def again(*inputs: object) -> object:
                with self._use(name, grad, context):
                    return block(*inputs)

            return checkpoint(again, *args, use_reentrant=False)

        for net in [self.net, *self.others.values()]:
            if isinstance(net, type(self.net)):
                checkpoint_blocks(net, run)
