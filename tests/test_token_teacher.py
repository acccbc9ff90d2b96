"""The training of the token teacher: its codebook, its loss, and a whole run in small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from stepdistill.data.bundled import emoji, token_autoencoder, token_teacher
from stepdistill.data.bundled.teacher import train_teacher
from stepdistill.data.bundled.teacher_spec import TeacherSpec
from stepdistill.data.bundled.token_autoencoder import codebook, spherical_means, tokens_of
from stepdistill.decoding.janus import Janus


def test_means_on_the_sphere_have_length_one_and_none_is_dead():
    torch.manual_seed(0)
    centres = normalize(torch.randn(6, 4), dim=1)
    x = normalize(centres.repeat(200, 1) + 0.05 * torch.randn(1200, 4), dim=1)
    means = spherical_means(x, 6)
    assert torch.allclose(means.norm(dim=1), torch.ones(6), atol=1e-6)
    nearest = (x @ means.T).argmax(1)
    assert torch.bincount(nearest, minlength=6).min() > 0
    sums = torch.zeros(6, 4).index_add(0, nearest, x)
    assert torch.allclose(means, normalize(sums, dim=1), atol=1e-3)


def test_tokens_are_in_raster_order():
    codes = normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    tokens = torch.tensor([[0, 1, 2], [3, 4, 5]])
    vectors = codes[tokens].permute(2, 0, 1)[None]
    assert tokens_of(vectors, codes).tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    patch, out = pytest.MonkeyPatch(), tmp_path_factory.mktemp("teacher") / "tiny"
    few = emoji.subjects()[:6]
    patch.setattr(emoji, "subjects", lambda: few)
    for name, value in (("TESTED", 4), ("COUNTED", 16), ("ROUNDS", 2), ("SAVED", 2)):
        patch.setattr(token_autoencoder, name, value)
    spec: dict[str, Any] = {"pipeline": "janus", "output_dir": str(out), "threads": 1, "vae_steps": 2, "images": 2}
    spec |= {"vae_code_steps": 2, "train_batch_size": 4, "checkpointing_steps": 1, "warmup": 1}
    train_teacher(TeacherSpec(**spec, max_train_steps=1))
    train_teacher(TeacherSpec(**spec, max_train_steps=2))  # goes on from what is there
    patch.undo()
    return out


def test_a_run_in_small_writes_a_teacher_that_draws(trained):
    teacher = Janus(pretrained_teacher_model=str(trained), guidance_scale=2.0).load()
    assert teacher.shape == (64, 8) and len(teacher.codes) == 256
    tokens = teacher.draw(["red apple"], torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0)))
    assert teacher.pixels(teacher.codes[tokens]).shape == (1, 3, 32, 32)
    sizes = sum(file.stat().st_size for file in trained.iterdir())
    assert sizes < 8e6 and "JanusForConditionalGeneration" in (trained / "README.md").read_text()


def test_the_loss_is_that_of_the_teachers_own_logits(trained):
    teacher = Janus(pretrained_teacher_model=str(trained), guidance_scale=1.0).load()
    prompts, tokens = ["red apple", "a big brown dog face"], torch.randint(256, (2, 64))
    asked = teacher.read(prompts)
    loss = token_teacher.token_loss(teacher.model, asked.ids, asked.mask, tokens)
    assert loss.item() == pytest.approx(-teacher.log_likelihood(prompts, tokens).mean().item(), rel=1e-5)
    assert torch.equal(token_teacher.without_words(asked.ids, teacher.processor), teacher.unconditional(asked).ids)
    assert torch.equal(codebook(teacher.model.model.vqmodel), teacher.codes)
