"""Prompts that ComfyUI encodes as Diffusers' pipelines do: its tokens, template, padding, mask and layers.

The language models are small and random, and the tokenizer is that of ComfyUI's folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chat
import pytest
import tiny
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
)

from clients.comfy import PLACE, text_encoders
from stepdistill.families.base import Family
from stepdistill.families.flux2_klein import Flux2Klein
from stepdistill.families.krea2 import Krea2
from stepdistill.families.qwen_image import QwenImage
from stepdistill.families.z_image import ZImage

PROMPTS = ("", " ", "red apple", "(a red:1.3) apple, and a {dog|cat} on the left\nof it", "naïve 🐙 " * 40)
SHAPE = {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
FOLDER = f"{PLACE}/comfy/text_encoders/qwen25_tokenizer"
TAPS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)  # the published layers of Krea 2
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}


def qwen3(kind: Any, layers: int) -> Any:
    shape = {"vocab_size": 151936, "hidden_size": 32, "head_dim": 128, "num_hidden_layers": layers}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-6}
    return kind(Qwen3Config(**shape, **SHAPE, **rope, max_position_embeddings=1024))


def qwen_vl() -> Any:
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}}
    text = {"vocab_size": 152064, "hidden_size": 256, "num_hidden_layers": 2, **SHAPE, **rope, "rms_norm_eps": 1e-6}
    vision = {**VISION, "out_hidden_size": 256, "patch_size": 14}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def qwen3_vl() -> Any:
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20], "rope_theta": 5e6}}
    text = {"vocab_size": 151936, "hidden_size": 32, "head_dim": 128, "num_hidden_layers": 36, **SHAPE, **rope}
    vision = {**VISION, "out_hidden_size": 32, "patch_size": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLModel(Qwen3VLConfig(text_config=text | {"rms_norm_eps": 1e-6}, vision_config=vision))


class Case(NamedTuple):
    family: Family
    model: Callable[[], Any]  # in Diffusers
    tokens: Callable[[], Any]  # ComfyUI's
    kind: Any
    name: str  # of ComfyUI's language model


CASES = {
    "klein": Case(
        Flux2Klein(pretrained_teacher_model="owner/base"),
        lambda: qwen3(Qwen3ForCausalLM, 28),
        *(text_encoders.flux.KleinTokenizer, text_encoders.flux.klein_te(), "qwen3_4b"),
    ),
    "z_image": Case(
        ZImage(pretrained_teacher_model="owner/base"),
        lambda: qwen3(Qwen3Model, 3),
        *(text_encoders.z_image.ZImageTokenizer, text_encoders.z_image.te(), "qwen3_4b"),
    ),
    "qwen_image": Case(
        QwenImage(pretrained_teacher_model="owner/base"),
        qwen_vl,
        *(text_encoders.qwen_image.QwenImageTokenizer, text_encoders.qwen_image.te(), "qwen25_7b"),
    ),
    "krea2": Case(
        Krea2(pretrained_teacher_model="owner/base"),
        qwen3_vl,
        *(text_encoders.krea2.Krea2Tokenizer, text_encoders.krea2.te(), "qwen3vl_4b"),
    ),
}


def encoder(case: Case, model: Any) -> Any:
    """ComfyUI's text encoder with the weights of `model`."""
    config = model.config.get_text_config()
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    options = {f"{case.name}_model_config": {key: getattr(config, key) for key in sizes}}
    made = case.kind(device="cpu", dtype=torch.float32, model_options=options)
    text = getattr(made, case.name).transformer
    state = {key.rpartition("language_model.")[2].removeprefix("model."): v for key, v in model.state_dict().items()}
    state = {f"model.{key}": value for key, value in state.items() if not key.startswith(("visual", "lm_head"))}
    missing, unknown = text.load_state_dict(state, strict=False)
    assert not unknown and all(key.startswith("visual.") for key in missing)
    return made


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_comfyui_encodes_prompts_as_diffusers_does(name):
    torch.manual_seed(0)
    case = CASES[name]
    model = case.model().eval()
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    pipe = tiny.pipeline(name)
    tokenizer = Qwen2TokenizerFast.from_pretrained(FOLDER, chat_template=chat.TEMPLATE)
    pipe.register_modules(text_encoder=model, tokenizer=tokenizer)
    vars(pipe)["text_encoder_select_layers"] = TAPS  # Krea 2's
    tokens, client = case.tokens(), encoder(case, model)
    for prompt in PROMPTS:
        cond = case.family.condition(pipe, [prompt])
        expected = cond["states"]
        if "mask" in cond:
            expected = expected[:, : int(cond["mask"].sum())]
        found, _, more = client.encode_token_weights(tokens.tokenize_with_weights(prompt))
        if name == "krea2":
            found = found.unflatten(-1, (len(TAPS), -1))
        assert found.shape == expected.shape, prompt
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_comfyui_cuts_no_prompt(name):
    """As the guide says: the pipelines cut at `max_sequence_length`."""
    tokens = CASES[name].tokens().tokenize_with_weights("apple " * 1500)
    assert [len(one) > 1500 for one in tokens[CASES[name].name]] == [True]
