"""Krea 2: a flow-matching transformer over text and image in one sequence, which sees many layers of a Qwen3-VL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from diffusers import DiffusionPipeline, Krea2Pipeline
from torch import Tensor, nn

from stepdistill.core.denoise import Condition
from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.schedule import Rectified
from stepdistill.families.flow import size_shift
from stepdistill.families.parts import Needs
from stepdistill.families.qwen_vae import QwenVae
from stepdistill.networks.layers import inner, named, rebuilt, refuse_sites
from stepdistill.networks.roles import Sites, Tap

TARGETS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_gate", "attn.to_out.0"),
    *("ff.gate", "ff.up", "ff.down"),
)
SUFFIX = 5  # tokens of the template after the prompt, which are part of `max_sequence_length`
TURBO_SHIFT = math.exp(1.15)  # what the pipeline takes for a distilled network, at every size
HEAD_SIDE = 4  # tokens a side that a discriminator's head judges at once; the config has no native size


@dataclass(frozen=True, kw_only=True)
class Krea2(QwenVae):
    """Krea 2 pipelines, Raw and Turbo.

    The pipeline's `guidance_scale` g means `cond + g (cond - uncond)`. That of this package is one more: Raw's 3.5 is
    4.5 here, and 1 is none.

    Args:
        max_sequence_length: number of tokens of a prompt and the five tokens after it; longer prompts are truncated.
        is_distilled: whether the teacher is Turbo, a few-step model, whose pipeline has one shift (3.16) at every size.
            That of Raw depends on the size (2.48 at 1024 x 1024 pixels).
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = Krea2Pipeline
    seeds_steps: ClassVar[bool] = False
    ragged: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(
        width=("text_hidden_dim", ("text_encoder",)),
        places=4,
        scales_channels=True,
    )

    max_sequence_length: Annotated[int, Ge(SUFFIX + 1)] = 512
    is_distilled: bool = False

    def check_network(self, config: Mapping[str, Any]) -> None:
        """Raise ConfigError where the pipeline's index is of another model than the settings or the network say."""
        index: Any = self.pipeline_class.load_config(self.location(), revision=self.revision)
        distilled = index.get("is_distilled", False)
        if distilled != self.is_distilled:
            got, expected = f"{self.location()} with is_distilled {distilled}", f"{self.is_distilled}"
            why = "Turbo is a few-step model, and its scores are not those of the data that Raw has learnt"
            todo = "distill krea/Krea-2-Raw; to tune Turbo itself, set family.is_distilled to true"
            if self.is_distilled:
                why, todo = "the pipeline of Raw has another shift", "leave family.is_distilled out"
            raise ConfigError(problem(got, expected, why, todo))
        layers = index.get("text_encoder_select_layers")
        count = config["num_text_layers"] if layers is None else len(layers)
        if count != config["num_text_layers"]:
            got, expected = f"{count} text_encoder_select_layers in {self.location()}", f"{config['num_text_layers']}"
            why, todo = "the network fuses that many layers of the text encoder", "correct them in model_index.json"
            raise ConfigError(problem(got, expected, why, todo))

    def arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self.max_sequence_length}

    def guidance(self, scale: float) -> dict[str, Any]:
        return {"guidance_scale": scale - 1}

    def schedule(self, scheduler: Any, tokens: int | None = None) -> Rectified:  # noqa: ANN401
        turbo = self.is_distilled and scheduler.config.get("use_dynamic_shifting")
        return Rectified(TURBO_SHIFT if turbo else size_shift(scheduler, tokens))

    def lora_targets(self, net: nn.Module) -> list[str]:
        # the blocks that fuse the layers of the text have layers of the same names
        return [name for name in named(net, TARGETS, (nn.Linear,)) if name.startswith("transformer_blocks.")]

    def tap(self, net: nn.Module) -> Tap:
        """The image's tokens at half the depth."""
        config: Any = net.config
        return Tap(f"transformer_blocks.{config['num_layers'] // 2}", inner(net), 2, HEAD_SIDE, image="last")

    def taps(self, net: nn.Module) -> tuple[Tap, ...]:
        """The image's tokens after each block."""
        config: Any = net.config
        place = self.tap(net)
        between = (replace(place, before=f"transformer_blocks.{i}") for i in range(1, config["num_layers"]))
        return (*between, replace(place, before="final_layer", image=None))

    def sites(self, net: nn.Module) -> Sites:
        """Raises ConfigError: image and prompt are one sequence in every layer."""
        refuse_sites("Krea 2")

    def limits(self, pipe: DiffusionPipeline) -> dict[str, int]:
        return {"tokenizer": self.max_sequence_length - SUFFIX}

    @torch.no_grad()
    def condition(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        """The states (B, L, layers, width) of prompts and template, true tokens first, and their mask (B, L).

        The pipeline pads between a prompt and the end of its template. All text has the same rotary position, so that
        the order of tokens changes nothing.
        """
        check_template(pipe)
        states, mask = pipe.encode_prompt(  # pyright: ignore[reportAttributeAccessIssue]
            list(prompts), device=pipe.text_encoder.device, max_sequence_length=self.max_sequence_length
        )
        order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        mask = mask.gather(1, order)
        return {"states": states.take_along_dim(order[..., None, None], 1) * mask[..., None, None], "mask": mask}

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        height, width = x_t.shape[-2:]
        states, mask = cond["states"], cond["mask"]
        text = torch.zeros(states.shape[1], 3, device=x_t.device)
        y = net(
            self.pack(x_t),
            encoder_hidden_states=states,
            timestep=t / 1000,
            position_ids=torch.cat([text, self.places(x_t)]),
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        return self.unpack(y, height, width)

    def narrow(self, net: nn.Module, width: float) -> nn.Module:
        config: Any = net.config
        pairs = max(1, round(width * config["num_key_value_heads"]))
        return rebuilt(
            net,
            num_attention_heads=pairs * (config["num_attention_heads"] // config["num_key_value_heads"]),
            num_key_value_heads=pairs,
            intermediate_size=max(1, round(width * config["intermediate_size"])),
        )


def check_template(pipe: Any) -> None:  # noqa: ANN401
    """Raise ConfigError for a tokenizer that splits the template around prompts into other tokens than Krea 2's own.

    The pipeline drops the first tokens by their number. With more of them, part of the template would be read as the
    prompt, or all prompts would get the same states.
    """
    parts = (
        (pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_start_idx),
        (pipe.prompt_template_encode_suffix, pipe.prompt_template_encode_num_suffix_tokens),
    )
    for text, count in parts:
        found = len(pipe.tokenizer(text).input_ids)
        if found != count:
            got = f"a tokenizer with {found} tokens for {text[:30]!r} of the template"
            why = "the pipeline drops the template by that number of tokens, and prompts would be cut wrong"
            raise ConfigError(problem(got, str(count), why, "use the tokenizer of the teacher's own repository"))
