"""The bundled video teacher's shape, with random weights."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from PIL import Image

from stepdistill.data.bundled import build


@cache
def small() -> WanPipeline:
    torch.manual_seed(0)
    tokens = build.tokenizer(["cat moving left", "dog growing", "red heart"], size=600)
    pipe = build.wan(tokens, build.wan_vae(4, (1, 2, 2), 4), width=64, layers=2, text_width=32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALL = {"prompt": "cat moving left", "height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16}


@pytest.mark.parametrize(("multiples", "patch"), [((1, 2, 2), None), ((1, 2), 2)])
def test_the_factors_that_an_autoencoder_states_are_those_of_its_latents(multiples, patch) -> None:
    vae: AutoencoderKLWan = build.wan_vae(4, multiples, 4, patch)
    temporal, spatial = vae.config["scale_factor_temporal"], vae.config["scale_factor_spatial"]
    x = torch.rand(1, 3, 1 + 2 * temporal, 32, 32) * 2 - 1
    latents = vae.encode(x, return_dict=False)[0].mode()
    assert latents.shape == (1, 4, 3, 32 // spatial, 32 // spatial)
    assert vae.decode(latents, return_dict=False)[0].shape == x.shape


def test_one_folder_opens_for_text_to_video_one_frame_and_image_to_video(tmp_path, monkeypatch) -> None:
    small().save_pretrained(tmp_path)
    pipe = WanPipeline.from_pretrained(tmp_path)
    assert pipe.config["expand_timesteps"]
    pipe.set_progress_bar_config(disable=True)
    for frames in (1, 9):
        assert pipe(**CALL, num_frames=frames, output_type="np", return_dict=False)[0].shape == (1, frames, 32, 32, 3)
    other = WanImageToVideoPipeline.from_pretrained(tmp_path)
    other.set_progress_bar_config(disable=True)
    states, none = pipe.encode_prompt("cat moving left", "", max_sequence_length=16)  # the other cleans by `ftfy`
    call = CALL | {"prompt": None, "prompt_embeds": states, "negative_prompt_embeds": none}
    image = Image.effect_noise((32, 32), 60).convert("RGB")
    assert other(image, **call, num_frames=9, output_type="np", return_dict=False)[0].shape == (1, 9, 32, 32, 3)
