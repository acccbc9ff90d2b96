"""The embedded data and the bundled teachers."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from diffusers import DiffusionPipeline

from stepdistill.data.bundled import build, bundled, emoji
from stepdistill.data.bundled.token_autoencoder import image_psnr, tokens_of, unit_vectors
from stepdistill.decoding.janus import Janus


def test_the_tokenizer_is_the_same_every_time() -> None:
    first, second = (build.tokenizer(build.drawing_texts()).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_a_prompt_of_the_tables_has_many_drawings_and_a_drawing_many_images() -> None:
    drawings = Counter(drawing.subgroup for drawing in emoji.subjects())
    assert emoji.prompts()
    assert min(drawings[prompt] for prompt in emoji.prompts()) >= 16
    rng, sheet, drawing = random.Random(0), emoji.packed_sheet(), emoji.subjects()[0]
    images = {emoji.image(sheet, drawing, rng).tobytes() for _ in range(200)}
    assert len(images) >= 16


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sd3", "tiny-wan"])
def test_plain_diffusers_loads_a_bundled_teacher(name: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(bundled(name))
    assert all(part is not None for key, part in pipe.components.items() if key.startswith(("text", "token", "vae")))


def test_transformers_loads_the_bundled_teacher_of_tokens() -> None:
    """Its images follow their prompts: the likelihood of drawings falls where their names are exchanged."""
    teacher = Janus(pretrained_teacher_model="tiny-ar", guidance_scale=1.0).load()
    source, drawn = emoji.packed_sheet(), emoji.subjects()[::17]
    x = emoji.pixels([emoji.image(source, drawing, random.Random(i)) for i, drawing in enumerate(drawn)])
    vae, names = teacher.model.model.vqmodel, [drawing.name for drawing in drawn]
    with torch.no_grad():
        vectors = unit_vectors(vae, x)
        tokens = tokens_of(vectors, teacher.codes)
        assert image_psnr(vae, x, coded=True) > 19
    own, others = (teacher.log_likelihood(each, tokens).mean().item() for each in (names, names[1:] + names[:1]))
    assert own > -1.5 and own - others > 0.1


def test_the_third_tower_of_sd3_is_silent() -> None:
    encoder, tokens = build.silent_t5(64)
    ids = tokens(["red apple"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    assert torch.equal(encoder(ids)[0], torch.zeros(1, 16, 64))
