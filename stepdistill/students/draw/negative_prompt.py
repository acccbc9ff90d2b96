"""Negative prompts for students that are sampled without guidance: subtracted inside attention, in the same pass.

    call = stepdistill.load_student(pipe, folder)
    with stepdistill.negative_prompt(pipe, "flowers", scale=0.2):
        pipe("a garden", **call)

Guidance combines two outputs of the network, and one-step students blend both images. NASA instead subtracts the
attention output of the negative prompt from that of the prompt, before the last layer of attention:
`Z = Z+ - scale Z-` with `Z+- = softmax(Q K+-^T / sqrt(d)) V+-`, from the same queries and weights. Nguyen et al. 2024,
https://arxiv.org/abs/2412.02687. NAG extrapolates and stays near Z+. Chen et al. 2025, https://arxiv.org/abs/2505.21179.

In networks with cross-attention (UNets, PixArt, SANA, Wan, LTX-Video) every cross-attention layer is called a second
time, with the tokens of the negative prompt and their mask. For networks with joint attention of text and image (SD3,
Flux, Qwen-Image) NASA's authors give no code, so this is our interpretation. Each block is called a second time, with
the tokens of the negative prompt in place of the prompt's. The tokens of the image, and the embedding of time and
pooled prompt, are the same in both calls. The second call gives Z-, the attention of the image's queries to [image;
negative], and the negative tokens for the next block. Z is Z+ - scale Z- for the image's queries only, and the prompt's
tokens do not change. So each such block costs about twice as much.

Everything is done by hooks: names, weights, LoRAs and attention processors do not change.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal
from weakref import WeakSet

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_ltx import LTXAttention, LTXVideoTransformerBlock
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn

from stepdistill.config.registry import every
from stepdistill.core.errors import ConfigError, problem
from stepdistill.families.base import Family
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.families.prompt_limits import warn_of_cut
from stepdistill.networks.taps import inputs_of

Mode = Literal["nasa", "nag"]
Combine = Callable[[Tensor, Tensor], Tensor]
CROSS = (Attention, WanAttention, LTXAttention)
JOINT = (JointTransformerBlock, FluxTransformerBlock, FluxSingleTransformerBlock, QwenImageTransformerBlock)
_busy: WeakSet[nn.Module] = WeakSet()


@contextmanager
def negative_prompt(
    pipe: DiffusionPipeline,
    prompt: str | Sequence[str],
    scale: float = 0.2,
    mode: Mode = "nasa",
    limit: float = 2.5,
    blend: float = 0.25,
    family: Family | None = None,
) -> Iterator[None]:
    """Images that `pipe` generates inside the context avoid the negative prompt; afterwards the network is as before.

    Load the student first; its LoRA may be active or fused. In a call with guidance, which a student does not need, the
    negative prompt acts on both halves of the batch. Contexts cannot be nested: put both concepts into one prompt.

    Args:
        prompt: one for all images, or one for each image of a call, in their order; with
            `num_images_per_prompt=2` that is two for each prompt.
        scale: 0 has no effect. Published for NASA: 0.04 to 0.3 for one-step UNets, 0.45 to 0.8 for PixArt; a scale
            that is too large ruins the image. For NAG it is phi; its authors use 4 to 11.
        mode: `nasa`, or `nag`: `Z~ = Z+ + scale (Z+ - Z-)`, made smaller where its 1-norm over a token's channels is
            more than `limit` times that of Z+, and finally `blend Z~ + (1 - blend) Z+`.
        limit: for NAG, at least 1.
        blend: for NAG, in [0, 1].
        family: for pipelines other than those of `stepdistill.families`, or to change its settings, such as the
            `max_sequence_length` of SD3; None selects the family with the pipeline's class.

    Raises:
        ConfigError: a value out of its range, an unknown pipeline, IP-Adapters, or a negative prompt inside another;
            inside the context, a number of prompts that does not match the images, or gradient checkpointing.
    """
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    combine = _combine(texts, scale, mode, limit, blend)
    family = family or _family(pipe)
    if isinstance(family, ImageToVideo):
        why, todo = "its attention reads the image, too, and was not tried with this", "leave the negative prompt out"
        raise ConfigError(problem(f"a negative prompt in a {type(pipe).__name__}", "a text-to-video one", why, todo))
    net: Any = family.network(pipe)
    places = [m for m in net.modules() if isinstance(m, JOINT)] or _cross_attention(net)
    if not places:
        got, expected = f"a {type(net).__name__}", "a network with cross-attention or joint attention"
        why, todo = "the negative prompt is subtracted inside these layers", "sample without a negative prompt"
        raise ConfigError(problem(got, expected, why, todo))
    _check(net)
    warn_of_cut(family, pipe, texts)
    subtraction = _Subtraction(_embedded(family, pipe, places[0], texts), combine)
    _busy.add(net)
    try:
        subtraction.attach(net, places)
        yield
    finally:
        subtraction.remove()
        _busy.discard(net)


def nasa(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """`Z+ - scale Z-` of a layer's attention outputs (B, N, D) for the prompt and for the negative prompt."""
    return positive - scale * negative


def nag(positive: Tensor, negative: Tensor, scale: float, limit: float, blend: float) -> Tensor:
    """Extrapolate from Z- through Z+, limit each token to `limit` times the 1-norm of Z+, and blend with Z+."""
    z, away = positive.float(), positive.float() - negative.float()
    far = z + scale * away
    size, most = far.abs().sum(-1, keepdim=True), limit * z.abs().sum(-1, keepdim=True)
    far = torch.where(size > most, far * (most / size), far)
    return (z + blend * (far - z)).to(positive.dtype)  # exactly Z+ where either is 0


def _combine(texts: Sequence[str], scale: float, mode: str, limit: float, blend: float) -> Combine:
    wrong = [
        (not texts, "no negative prompt", "one, or one for each image"),
        (mode not in ("nasa", "nag"), f"mode {mode!r}", "nasa or nag"),
        (not 0 <= scale < math.inf, f"scale {scale}", "a finite number, 0 or more"),
        (not 1 <= limit < math.inf, f"limit {limit}", "a finite number, 1 or more"),
        (not 0 <= blend <= 1, f"blend {blend}", "a number from 0 to 1"),
    ]
    for is_so, got, expected in wrong:
        if is_so:
            raise ConfigError(problem(got, expected, "the negative prompt cannot be applied", "change the value"))
    return partial(nasa, scale=scale) if mode == "nasa" else partial(nag, scale=scale, limit=limit, blend=blend)


def _family(pipe: DiffusionPipeline) -> Family:
    families = {cls.pipeline_class: cls for cls in every(Family)}
    if type(pipe) not in families:
        expected = f"one of {sorted(kind.__name__ for kind in families)}"
        why, todo = "a family defines how prompts are embedded", "pass the family of the pipeline's network as `family`"
        raise ConfigError(problem(f"a {type(pipe).__name__}", expected, why, todo))
    return families[type(pipe)](pretrained_teacher_model=pipe.name_or_path)


def _check(net: Any) -> None:  # noqa: ANN401
    if net in _busy:
        why, todo = "the two would interfere", "put both concepts into one prompt, or pass one prompt for each image"
        raise ConfigError(problem("a negative prompt inside another one", "one at a time", why, todo))
    adapters = sorted({type(p).__name__ for p in net.attn_processors.values() if "IPAdapter" in type(p).__name__})
    if adapters:
        why, todo = "the negative prompt would remove the image prompt", "call pipe.unload_ip_adapter() first"
        raise ConfigError(problem(f"IP-Adapters ({', '.join(adapters)})", "none", why, todo))


def _cross_attention(net: nn.Module) -> list[nn.Module]:
    """The layers that see the prompt. LTX-Video's do not say so themselves: the width of the text may be their own."""
    layers = [m for m in net.modules() if isinstance(m, (Attention, WanAttention)) and m.is_cross_attention]
    return [*layers, *(m.attn2 for m in net.modules() if isinstance(m, LTXVideoTransformerBlock))]


@torch.no_grad()
def _embedded(family: Family, pipe: DiffusionPipeline, place: nn.Module, texts: Sequence[str]) -> Mapping[str, Any]:
    """The inputs of the layer or block `place` for prompts: tokens (P, L, D), their mask, and their places.

    The network itself projects and normalizes the tokens and converts the tokenizer's mask: it is run up to `place`.
    """
    net: Any = family.network(pipe)
    where: Any = {"device": net.device, "dtype": net.dtype}
    cond = family.condition(pipe, texts)
    cond = {key: v.to(**where) if v.is_floating_point() else v.to(net.device) for key, v in cond.items()}
    x_t = torch.zeros(len(texts), *family.latent_shape(pipe, *family.native_size(pipe)), **where)
    t = torch.zeros(len(texts), device=net.device)
    return inputs_of(net, place, lambda: family.call(net, x_t, t, cond))


class _Subtraction:
    """Hooks that call layers or blocks a second time, and combine the attention outputs of the image's tokens.

    Args:
        inputs: of the first layer or block for the negative prompts: their tokens (P, L, D), and perhaps their mask,
            (P, 1, L) to be added to the logits, or (P, L) of the true ones.
        combine: Z of Z+ and Z-, (B, N, D) each.
    """

    def __init__(self, inputs: Mapping[str, Any], combine: Combine) -> None:
        self.inputs, self.combine = inputs, combine
        self.states: Tensor = inputs["encoder_hidden_states"]
        self.stream = self.states  # with joint blocks: the negative tokens that enter the next block
        self.asking = False  # whether this is the call for Z-, which comes first
        self.negative: Tensor | None = None  # Z- of the current layer
        self.length = 0  # of the text before the image's tokens, if a block has both in one sequence
        self.handles: list[Any] = []

    def attach(self, net: nn.Module, places: Sequence[nn.Module]) -> None:
        """Hook into a network that sees the prompt at `places`, all cross-attention layers or all joint blocks."""
        self.handles.append(net.register_forward_pre_hook(self._start))
        for place in places:
            attn: Any = place if isinstance(place, CROSS) else place.attn
            ask = self._ask_layer if isinstance(place, CROSS) else self._ask_block
            self.handles.append(place.register_forward_pre_hook(ask, with_kwargs=True))
            if isinstance(place, FluxSingleTransformerBlock):  # its attention has no output layer
                self.handles.append(attn.register_forward_hook(self._end_single))
            else:
                self.handles.append(attn.to_out[0].register_forward_pre_hook(self._end))

    def remove(self) -> None:
        """Restore the network."""
        for handle in self.handles:
            handle.remove()

    def _start(self, net: Any, args: tuple) -> None:  # noqa: ANN401
        if torch.is_grad_enabled() and net.is_gradient_checkpointing:
            got, todo = "gradient checkpointing", "call net.disable_gradient_checkpointing(), or use torch.no_grad()"
            raise ConfigError(problem(got, "none", "recomputed blocks would use the wrong tokens", todo))
        self.stream = self.states

    def _ask_layer(self, attn: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(attn.forward).bind(*args, **kwargs)
        x = given.arguments["hidden_states"]
        mask = self._mask("attention_mask", x)
        given.arguments |= {"encoder_hidden_states": self._rows(self.states, x), "attention_mask": mask}
        self._ask(attn, given)

    def _ask_block(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(block.forward).bind(*args, **kwargs)
        text, x = given.arguments["encoder_hidden_states"], given.arguments["hidden_states"]
        stream = self._rows(self.stream, x)
        given.arguments["encoder_hidden_states"] = stream
        if isinstance(block, QwenImageTransformerBlock):
            given.arguments["encoder_hidden_states_mask"] = self._mask("encoder_hidden_states_mask", x)
            image, words = given.arguments["image_rotary_emb"]
            turns = self.inputs["image_rotary_emb"][1]  # of another image size, and so from another place on
            given.arguments["image_rotary_emb"] = image, words[:1] * (turns / turns[:1]).to(words.device)
        elif given.arguments.get("image_rotary_emb") is not None:  # all text tokens have the same position
            parts = given.arguments["image_rotary_emb"]
            moved = [torch.cat([p[:1].expand(stream.shape[1], -1), p[text.shape[1] :]]) for p in parts]
            given.arguments["image_rotary_emb"] = tuple(moved)
        self.length = stream.shape[1]
        self.stream, _ = self._ask(block, given)
        self.length = text.shape[1]

    def _ask(self, module: nn.Module, given: inspect.BoundArguments) -> Any:  # noqa: ANN401
        self.asking = True
        output = module.forward(*given.args, **given.kwargs)  # not __call__, which would run this hook again
        self.asking = False
        return output

    def _end(self, layer: nn.Module, args: tuple) -> tuple | None:
        mixed = self._met(args[0])
        return None if mixed is None else (mixed,)

    def _end_single(self, attn: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        mixed = self._met(output[:, self.length :])
        return None if mixed is None else torch.cat([output[:, : self.length], mixed], dim=1)

    def _met(self, attended: Tensor) -> Tensor | None:
        """Z, or None while the layer computes Z-."""
        if self.asking:
            self.negative = attended
            return None
        assert self.negative is not None
        negative, self.negative = self.negative, None
        return self.combine(attended, negative)

    def _mask(self, name: str, x: Tensor) -> Tensor | None:
        """The negative prompts' mask, one row for each row of x; None without one."""
        mask = self.inputs.get(name)
        return None if mask is None else self._rows(mask, x)

    def _rows(self, value: Tensor, x: Tensor) -> Tensor:
        """The value with one row for each row of x."""
        if len(value) not in (1, len(x)):
            got, expected = f"{len(value)} negative prompts", f"1, or {len(x)}, one for each image"
            why = "each image has one negative prompt"
            todo = "repeat them like the prompts, and disable guidance, which doubles the rows"
            raise ConfigError(problem(got, expected, why, todo))
        value = value.to(x) if value.is_floating_point() else value.to(x.device)
        return value.expand(len(x), *value.shape[1:])
