"""FLUX.2 klein: a flow-matching transformer of tokens of 2 x 2 latents, with the states of a Qwen3 as its prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn

from stepdistill.config.kinds import Count, Positive
from stepdistill.core.denoise import Condition
from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.schedule import Rectified
from stepdistill.families.flow import Flow, shift_of
from stepdistill.families.parts import Needs
from stepdistill.networks.layers import after_blocks, attentions, inner, named, rebuilt
from stepdistill.networks.roles import Sites, Tap

TARGETS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
    *("attn.to_qkv_mlp_proj", "attn.to_out"),
)
STEPS = 50  # the maker's number, by which the pipeline's shift is chosen
TOKENS = 4096  # of an image of the native size, 1024 x 1024


@dataclass(frozen=True, kw_only=True)
class Flux2Klein(Flow):
    """FLUX.2 klein base pipelines, 4B and 9B; the distilled ones, which ignore guidance, are no teachers.

    Latents are those that the network sees: patches of 2 x 2 of the autoencoder's, normalised by its batch norm.

    Args:
        max_sequence_length: number of tokens of every prompt. Shorter ones are padded, and the network attends to the
            padding, so another number makes another model.
        text_encoder_out_layers: layers of the text encoder whose states a prompt is.
        shift: timestep shift of the teacher; none takes the scheduler's. If that depends on the image size, none takes
            the pipeline's shift in 50 steps (7.6 at 1024 x 1024 pixels).
    """

    multiple: ClassVar[int] = 16
    pipeline_class: ClassVar[type[DiffusionPipeline]] = Flux2KleinPipeline
    seeds_steps: ClassVar[bool] = False
    takes_negative_prompt: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs(
        relatives=("Flux2KleinInpaintPipeline",),
        network={"guidance_embeds": False, "patch_size": 1},
        width=("joint_attention_dim", 3 * ("text_encoder",)),  # the states of three layers, side by side
        places=4,
        vae={"batch_norm_eps": 1e-4},  # a tiny autoencoder has no batch norm, which the pipeline asks for
        pipeline={"is_distilled": (False, "its pipeline ignores guidance, and it is a student already")},
    )

    max_sequence_length: Count = 512
    text_encoder_out_layers: tuple[Count, Count, Count] = (9, 18, 27)
    shift: Positive | None = None

    def arguments(self) -> dict[str, Any]:
        return {
            "max_sequence_length": self.max_sequence_length,
            "text_encoder_out_layers": list(self.text_encoder_out_layers),
        }

    def schedule(self, scheduler: Any, tokens: int | None = None) -> Rectified:  # noqa: ANN401
        if self.shift is not None:
            return Rectified(self.shift)
        if not scheduler.config.get("use_dynamic_shifting", False):
            return Rectified(shift_of(scheduler))
        return Rectified(math.exp(compute_empirical_mu(tokens or TOKENS, STEPS)))

    def scale_factor(self, pipe: DiffusionPipeline) -> int:
        """Pixels along one side of a patch."""
        return 2 * pipe.vae_scale_factor

    def tokens(self, pipe: DiffusionPipeline, height: int, width: int) -> int:
        side = self.scale_factor(pipe)
        return (height // side) * (width // side)

    def native_size(self, pipe: DiffusionPipeline) -> tuple[int, int]:
        side = pipe.default_sample_size * pipe.vae_scale_factor
        return side, side

    def unpack(self, packed: Tensor, height: int, width: int) -> Tensor:
        """From tokens (B, height x width, C), which the scheduler steps; or from the form of the argument."""
        return packed if packed.ndim == 4 else packed.transpose(1, 2).unflatten(2, (height, width))

    def latents_of(self, pipe: DiffusionPipeline, drawn: Tensor, height: int, width: int) -> Tensor:
        """From the autoencoder's own latents."""
        return self._normalised(pipe, drawn)

    def fresh(self, latents: Tensor) -> Tensor:
        # of tokens: `randn_like` of transposed latents would draw in another order
        tokens = latents.flatten(2).transpose(1, 2)
        noise = torch.randn(tokens.shape, dtype=latents.dtype, device=latents.device)
        return self.unpack(noise, *latents.shape[-2:])

    def time(self, net: nn.Module, given: float) -> float:
        return 1000 * given

    def lora_targets(self, net: nn.Module) -> list[str]:
        # not the modulation: all blocks share its three layers
        return named(net, TARGETS, (nn.Linear,))

    def tap(self, net: nn.Module) -> Tap:
        """The image's tokens where the two streams join."""
        return Tap("single_transformer_blocks.0", inner(net), 1, 64, image="last")

    def taps(self, net: nn.Module) -> tuple[Tap, ...]:
        """The image's tokens after each block."""
        places = after_blocks(net, self.tap(net), "transformer_blocks", "single_transformer_blocks")
        # only the second kind of blocks takes the prompt's tokens in the same sequence, before the image's
        return tuple(one if one.before.startswith("single_") else replace(one, image=None) for one in places)

    def sites(self, net: nn.Module) -> Sites:
        """The image's part of every joint attention of two streams; the prompt there is the block's text stream."""
        return attentions(net, "attn", "time_guidance_embed.timestep_embedder")

    def limits(self, pipe: DiffusionPipeline) -> dict[str, int]:
        chat = [{"role": "user", "content": ""}]
        template = pipe.tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return {"tokenizer": self.max_sequence_length - len(pipe.tokenizer(template).input_ids)}

    @torch.no_grad()
    def condition(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        last, have = max(self.text_encoder_out_layers), pipe.text_encoder.config.num_hidden_layers
        if last > have:
            got, why = f"family.text_encoder_out_layers with {last}", f"the text encoder has {have} layers"
            raise ConfigError(problem(got, f"at most {have}", why, "name three of its layers"))
        states, _ = pipe.encode_prompt(list(prompts), device=pipe.text_encoder.device, **self.arguments())
        return {"states": states}

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        height, width = x_t.shape[-2:]
        states = cond["states"]
        y = net(
            x_t.flatten(2).transpose(1, 2),
            timestep=t / 1000,
            guidance=None,
            encoder_hidden_states=states,
            txt_ids=_places(1, 1, states.shape[1]).to(x_t.device),
            img_ids=_places(height, width, 1).to(x_t.device),
            return_dict=False,
        )[0]
        return self.unpack(y, height, width)

    @torch.no_grad()
    def encode(self, pipe: DiffusionPipeline, pixels: Tensor) -> Tensor:
        coded = pipe.vae.encode(pixels.to(pipe.vae.dtype), return_dict=False)[0].mode()
        return self._normalised(pipe, coded.float())

    def decode(self, pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
        mean, std = _moments(pipe)
        whole = (latents * std + mean).unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3)  # (B, C, h, 2, w, 2)
        whole = whole.flatten(4, 5).flatten(2, 3)
        return pipe.vae.decode(whole.to(pipe.vae.dtype), return_dict=False)[0].float()

    def _normalised(self, pipe: DiffusionPipeline, coded: Tensor) -> Tensor:
        """Patches (B, 4 C, h / 2, w / 2) of the autoencoder's latents (B, C, h, w), each channel normalised."""
        mean, std = _moments(pipe)
        patches = coded.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 1, 3, 5, 2, 4)  # (B, C, 2, 2, h, w)
        return (patches.flatten(1, 3) - mean) / std

    def narrow(self, net: nn.Module, width: float) -> nn.Module:
        config: Any = net.config
        return rebuilt(net, num_attention_heads=max(1, round(width * config["num_attention_heads"])))


def _places(height: int, width: int, length: int) -> Tensor:
    """Coordinates (height x width x length, 4) of tokens: the image they are of, row, column, place in the prompt."""
    sides = (1, height, width, length)
    return torch.cartesian_prod(*(torch.arange(side) for side in sides))


def _moments(pipe: DiffusionPipeline) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (4 C, 1, 1) of patches, from the buffers of the autoencoder's batch norm."""
    norm = pipe.vae.bn
    std = (norm.running_var + pipe.vae.config["batch_norm_eps"]).sqrt()
    return norm.running_mean.view(-1, 1, 1), std.view(-1, 1, 1)
