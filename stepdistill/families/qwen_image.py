"""Qwen-Image: a flow transformer of two streams, with a language model for its prompts, and guidance of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from stepdistill.core.denoise import Condition
from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.guidance import Rule, TokenNorm
from stepdistill.core.schedule import Rectified
from stepdistill.families.base import Stock
from stepdistill.families.flow import size_shift
from stepdistill.families.parts import Needs
from stepdistill.families.qwen_vae import QwenVae
from stepdistill.networks.layers import after_blocks, attentions, inner, named, rebuilt
from stepdistill.networks.roles import Sites, Tap

# without the modulation, `img_mod` and `txt_mod`, whose layers have six times as many outputs as inputs
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
)
# of the last block: the text that they make reaches no output
UNUSED = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")


@dataclass(frozen=True, kw_only=True)
class QwenImage(QwenVae):
    """Qwen-Image pipelines.

    The pipeline scales each guided token to the norm that it has with the prompt alone. Its schedule depends on the
    image's size, and ends above 0 where the scheduler has a `shift_terminal`: the teacher's own steps do, a student's
    do not.

    Args:
        max_sequence_length: maximum number of tokens of a prompt, with the five that the template puts behind it; the
            pipeline cuts longer ones.
        negative_prompt: what guidance departs from, in training and sampling. Without one the pipeline uses no
            guidance at all.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = QwenImagePipeline
    seeds_steps: ClassVar[bool] = False
    ragged: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(
        network={
            "patch_size": 2,
            **dict.fromkeys(("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"), False),
        },
        vae={"input_channels": 3},
        width=("joint_attention_dim", ("text_encoder",)),
        places=4,
        scales_channels=True,
    )

    max_sequence_length: Annotated[int, Ge(1), Le(1024)] = 512
    negative_prompt: str = " "

    def arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self.max_sequence_length}

    def guidance(self, scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": scale} | ({"negative_prompt": self.negative_prompt} if scale > 1 else {})

    @property
    def rule(self) -> Rule:
        return TokenNorm(2)

    def schedule(self, scheduler: Any, tokens: int | None = None) -> Rectified:  # noqa: ANN401
        return Rectified(size_shift(scheduler, tokens))

    def solver(self, pipe: DiffusionPipeline, steps: int, tokens: int | None = None) -> Stock:
        config: dict[str, Any] = {"shift": self.schedule(pipe.scheduler, tokens).shift}
        if steps > 1:  # of one step it makes nan
            config["shift_terminal"] = pipe.scheduler.config.get("shift_terminal")
        even = [1 - i / steps for i in range(steps)]
        return FlowMatchEulerDiscreteScheduler(**config), {"num_inference_steps": steps, "sigmas": even}

    def lora_targets(self, net: nn.Module) -> list[str]:
        last = len(net.get_submodule("transformer_blocks")._modules) - 1
        unused = {f"transformer_blocks.{last}.{name}" for name in UNUSED}
        return [name for name in named(net, TARGETS, (nn.Linear,)) if name not in unused]

    def tap(self, net: nn.Module) -> Tap:
        """The image's tokens at half the depth."""
        config: Any = net.config
        return Tap(f"transformer_blocks.{config['num_layers'] // 2}", inner(net), 2, 64)

    def taps(self, net: nn.Module) -> tuple[Tap, ...]:
        """The image's tokens after each block."""
        return after_blocks(net, self.tap(net), "transformer_blocks")

    def sites(self, net: nn.Module) -> Sites:
        """The image's part of every joint attention; the prompt there is the block's own text stream."""
        return attentions(net, "attn", "time_text_embed.timestep_embedder")

    def limits(self, pipe: DiffusionPipeline) -> dict[str, int]:
        _, after = pipe.prompt_template_encode.split("{}")
        return {"tokenizer": self.max_sequence_length - len(pipe.tokenizer(after).input_ids)}

    @torch.no_grad()
    def condition(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        """States (B, L, D) of the prompts' tokens, true ones first and zeros behind, and their mask (B, L).

        It is what the pipeline's `encode_prompt` gives, and says how many tokens are true without reading states.
        """
        check_prefix(pipe)
        drop, encoder = pipe.prompt_template_encode_start_idx, pipe.text_encoder
        given = pipe.tokenizer(
            [pipe.prompt_template_encode.format(prompt) for prompt in prompts],
            max_length=pipe.tokenizer_max_length + drop,
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(encoder.device)
        ids, kept = given.input_ids, given.attention_mask
        states = encoder(input_ids=ids, attention_mask=kept, output_hidden_states=True).hidden_states[-1]
        places = [row.nonzero()[drop:, 0][: self.max_sequence_length] for row in kept]
        rows = [row[place] for row, place in zip(states, places, strict=True)]
        counted = torch.arange(max(map(len, places)), device=states.device)
        mask = torch.stack([counted < len(place) for place in places])
        return {"states": pad_sequence(rows, batch_first=True), "mask": mask}

    def unconditional(self, pipe: DiffusionPipeline) -> Condition:
        """The embedding of `negative_prompt`."""
        return self.condition(pipe, [self.negative_prompt])

    def call(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        height, width = x_t.shape[-2:]
        y = net(
            self.pack(x_t),
            timestep=t / 1000,
            encoder_hidden_states=cond["states"],
            encoder_hidden_states_mask=None if cond["mask"].all() else cond["mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
            return_dict=False,
        )[0]
        return self.unpack(y, height, width)

    def narrow(self, net: nn.Module, width: float) -> nn.Module:
        config: Any = net.config
        slim = rebuilt(net, num_attention_heads=max(1, round(width * config["num_attention_heads"])))
        last = slim.transformer_blocks[-1]
        for name in (*UNUSED, "attn.norm_added_q"):
            layer = last.get_submodule(name)
            for key, value in list(layer.named_parameters()):
                delattr(layer, key)
                layer.register_buffer(key, value.data)
        return slim


def check_prefix(pipe: DiffusionPipeline) -> None:
    """Raise ConfigError where the template's beginning is not the number of tokens that the pipeline drops."""
    before, _ = pipe.prompt_template_encode.split("{}")
    count, drop = len(pipe.tokenizer(before).input_ids), pipe.prompt_template_encode_start_idx
    if count != drop:
        got, expected = f"a tokenizer that makes {count} tokens of the template before the prompt", str(drop)
        why = "the pipeline drops so many, and would cut the prompt or keep a part of the template"
        todo = "use the tokenizer that belongs to the teacher's text encoder"
        raise ConfigError(problem(got, expected, why, todo))
