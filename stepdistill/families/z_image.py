"""Z-Image: a flow-matching transformer over one stream of image and prompt tokens, with a Qwen3 text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ZImagePipeline
from torch import Tensor, nn

from stepdistill.config.kinds import Positive, Share, Tokens
from stepdistill.core.denoise import Condition
from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.guidance import LINEAR, Capped, Rule, Truncated
from stepdistill.core.schedule import Rectified
from stepdistill.families.flow import Flow, shift_of
from stepdistill.families.parts import Needs
from stepdistill.families.sizes import check_size
from stepdistill.networks.layers import named, rebuilt, refuse_sites
from stepdistill.networks.roles import Sites, Tap

TARGETS = (
    *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
)
PATCHES = {"all_patch_size": [2], "all_f_patch_size": [1]}
ROUND = 32  # the network fills a prompt and an image up to multiples of so many tokens, with tokens that it has learnt
HEAD_SIDE = 16  # of the feature map of a discriminator's head


@dataclass(frozen=True, kw_only=True)
class ZImage(Flow):
    """Z-Image pipelines (Cai et al. 2025, https://arxiv.org/abs/2511.22699), with one network for image and prompt.

    Z-Image-Turbo has the parts of the base and almost its config, but is a few-step student already: take the base. Of
    a single file the network alone is read; the other parts are those of `single_file_config`.

    Args:
        max_sequence_length: maximum number of tokens of a prompt, with those of the chat template around it.
        cfg_normalization: the norm of a guided output, over the whole image, is at most this many times the norm of
            the output with the prompt; none is no limit.
        cfg_truncation: guidance ends where `1 - t / 1000` is above it; 1 is never.
    """

    multiple: ClassVar[int] = 16
    pipeline_class: ClassVar[type[DiffusionPipeline]] = ZImagePipeline
    seeds_steps: ClassVar[bool] = False
    ragged: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(
        network={"siglip_feat_dim": None},  # Omni's network puts the prompt before the image
        width=("cap_feat_dim", ("text_encoder",)),
        shifts_latents=True,
        single_file=("z-image-turbo",),  # that of the base, too
        beside_file=("text_encoder", "vae"),
    )

    max_sequence_length: Tokens = 512
    cfg_normalization: Positive | None = None
    cfg_truncation: Share = 1.0

    def check_network(self, config: Mapping[str, Any]) -> None:
        for key, value in PATCHES.items():
            if list(config[key]) != value:
                got, why = f"a network with {key} {list(config[key])}", "the pipeline takes patches of 2 x 2 latents"
                raise ConfigError(problem(got, str(value), why, "choose another teacher"))
        most = (config["axes_lens"][0] - 2) // ROUND * ROUND  # the image has the place after the prompt's
        if self.max_sequence_length > most:
            got, why = f"family.max_sequence_length {self.max_sequence_length}", "the network has no place for more"
            raise ConfigError(problem(got, f"at most {most}", why, "set it to that number or less"))

    def arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self.max_sequence_length}

    def guidance(self, scale: float) -> dict[str, Any]:
        # the pipeline's number is `scale - 1`: it adds that many times the difference to the output with the prompt
        rule: dict[str, Any] = {"cfg_normalization": self.cfg_normalization} if self.cfg_normalization else {}
        rule |= {"cfg_truncation": self.cfg_truncation} if self.cfg_truncation < 1 else {}
        return {"guidance_scale": scale - 1, **(rule if scale > 1 else {})}

    @property
    def rule(self) -> Rule:
        rule = LINEAR if self.cfg_normalization is None else Capped(self.cfg_normalization)
        return rule if self.cfg_truncation == 1 else Truncated(rule, self.cfg_truncation)

    def schedule(self, scheduler: Any, tokens: int | None = None) -> Rectified:  # noqa: ANN401
        return Rectified(shift_of(scheduler))

    def native_size(self, pipe: DiffusionPipeline) -> tuple[int, int]:
        side = 128 * pipe.vae_scale_factor  # no config says it
        return side, side

    def latent_shape(self, pipe: DiffusionPipeline, height: int, width: int) -> tuple[int, ...]:
        scale, config = pipe.vae_scale_factor, pipe.transformer.config
        # the network has a table of places for rows and one for columns
        check_size(height, width, 2 * scale, 2 * scale * min(config["axes_lens"][1:]))
        return (config["in_channels"], height // scale, width // scale)

    def time(self, net: nn.Module, given: float) -> float:
        return 1000 - 1000 * given

    def lora_targets(self, net: nn.Module) -> list[str]:
        return named(net, TARGETS, (nn.Linear,))

    def tap(self, net: nn.Module) -> Tap:
        """The image's tokens at half the depth."""
        config: Any = net.config
        return Tap(f"layers.{config['n_layers'] // 2}", config["dim"], 2, HEAD_SIDE, image="first")

    def taps(self, net: nn.Module) -> tuple[Tap, ...]:
        """The image's tokens after each block."""
        config: Any = net.config
        before = [f"layers.{i}" for i in range(1, config["n_layers"])] + ["all_final_layer.2-1"]
        return tuple(replace(self.tap(net), before=name) for name in before)

    def sites(self, net: nn.Module) -> Sites:
        """Raises ConfigError: image and prompt are one sequence in every layer."""
        refuse_sites("Z-Image")

    def limits(self, pipe: DiffusionPipeline) -> dict[str, int]:
        template = len(pipe.tokenizer(_chat(pipe, "")).input_ids)
        return {"tokenizer": self.max_sequence_length - template}

    @torch.no_grad()
    def condition(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        """States (B, L, C) with zeros after a prompt's own tokens, and their mask (B, L).

        `encode_prompt` gives the same as a list, but it also writes the chat template into the caller's prompts.
        """
        tokens = pipe.tokenizer(
            [_chat(pipe, prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.max_sequence_length,
            truncation=True,
            return_tensors="pt",
        )
        device, own = pipe.text_encoder.device, tokens.attention_mask.bool()
        states = pipe.text_encoder(
            input_ids=tokens.input_ids.to(device), attention_mask=own.to(device), output_hidden_states=True
        ).hidden_states[-2]
        first = own.long().argsort(dim=1, descending=True, stable=True)  # wherever the tokenizer puts its padding
        length = int(own.sum(1).max())
        mask, order = (part[:, :length].to(device) for part in (own.gather(1, first), first))
        states = states.gather(1, order[..., None].expand(-1, -1, states.shape[-1]))
        return {"states": states.where(mask[..., None], 0.0), "mask": mask}

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        lengths = cond["mask"].sum(1).tolist()  # all at once: reading them waits for the device
        captions = [row[:length] for row, length in zip(cond["states"].unbind(), lengths, strict=True)]
        images = list(x_t.unsqueeze(2).unbind())
        y = net(images, (1000 - t) / 1000, captions, return_dict=False)[0]
        return -torch.stack(y).squeeze(2)

    def narrow(self, net: nn.Module, width: float) -> nn.Module:
        config: Any = net.config
        heads = max(1, round(width * config["n_heads"]))
        dim = heads * config["dim"] // config["n_heads"]
        return rebuilt(net, dim=dim, n_heads=heads, n_kv_heads=heads)


def _chat(pipe: DiffusionPipeline, prompt: str) -> str:
    """A prompt in the chat template, as the text encoder reads it."""
    return pipe.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
