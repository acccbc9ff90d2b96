"""Base of PixArt-alpha and PixArt-Sigma: a transformer with a variance-preserving noise schedule and a T5 text
encoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from stepdistill.config.kinds import Count
from stepdistill.core.denoise import Condition
from stepdistill.families.parts import Needs
from stepdistill.families.vp import VariancePreserving
from stepdistill.networks.layers import after_blocks, attentions, halfway, named, rebuilt
from stepdistill.networks.roles import Sites, Tap

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_out"),
    *("adaln_single.linear", "caption_projection.linear_1", "caption_projection.linear_2"),
)


@dataclass(frozen=True, kw_only=True)
class PixArt(VariancePreserving):
    """A pipeline with a `PixArtTransformer2DModel`. The variance that it predicts is not used.

    Images have exactly the requested size (`use_resolution_binning=False`), and captions are not cleaned
    (`clean_caption=False`). Diffusers has no LoRA loader for these pipelines. `stepdistill.load_student` loads the
    student, and `stepdistill convert --to fused` writes a fused network that plain Diffusers loads.
    """

    network_name: ClassVar[str] = "transformer"
    needs: ClassVar[Needs] = Needs(width=("caption_channels", ("text_encoder",)))

    max_sequence_length: Count

    @property
    @abstractmethod
    def takes_size(self) -> bool:
        """Whether a network for 1024 x 1024 pixels takes the image's size as an input."""

    def arguments(self) -> dict[str, Any]:
        return {
            "max_sequence_length": self.max_sequence_length,
            "use_resolution_binning": False,
            "clean_caption": False,
        }

    def lora_targets(self, net: nn.Module) -> list[str]:
        return named(net, TARGETS, (nn.Linear,))

    def tap(self, net: nn.Module) -> Tap:
        """The tokens at half the depth."""
        return halfway(net)

    def taps(self, net: nn.Module) -> tuple[Tap, ...]:
        """The image's tokens after each block."""
        return after_blocks(net, self.tap(net), "transformer_blocks")

    def sites(self, net: nn.Module) -> Sites:
        """Every cross-attention."""
        return attentions(net, "attn2", "adaln_single.emb.timestep_embedder")

    def limits(self, pipe: DiffusionPipeline) -> dict[str, int]:
        return {"tokenizer": self.max_sequence_length}

    @torch.no_grad()
    def condition(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        states, mask, _, _ = pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=pipe.text_encoder.device,
            max_sequence_length=self.max_sequence_length,
        )
        # in pixels a latent; `call` sees only the latents, and the size conditions are in pixels
        scale = torch.full((len(prompts), 1), float(pipe.vae_scale_factor), device=states.device)
        return {"states": states, "mask": mask, "scale": scale}

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        height, width = x_t.shape[-2:]
        config: Any = net.config
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.takes_size and config["sample_size"] == 128:
            sizes["resolution"] = cond["scale"] * torch.tensor([[height, width]], device=x_t.device)
            sizes["aspect_ratio"] = torch.full_like(cond["scale"], height / width)
        y = net(
            x_t,
            encoder_hidden_states=cond["states"],
            encoder_attention_mask=cond["mask"],
            timestep=t,
            added_cond_kwargs=sizes,
            return_dict=False,
        )[0]
        return y[:, : config["in_channels"]]

    def narrow(self, net: nn.Module, width: float) -> nn.Module:
        config: Any = net.config
        heads = max(1, round(width * config["num_attention_heads"]))
        return rebuilt(net, num_attention_heads=heads, cross_attention_dim=heads * config["attention_head_dim"])
