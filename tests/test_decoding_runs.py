"""Distilled Decoding from config to folder on a small Janus: its tokens, pairs, runs, folder, and bad input."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import PROMPTS, lines_of, small_janus
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor
from transformers import JanusForConditionalGeneration

from stepdistill.config.load import load_config
from stepdistill.core.errors import ConfigError, DataError, StepdistillError
from stepdistill.core.random import noise_of
from stepdistill.decoding.contract import read_decoder
from stepdistill.decoding.janus import Janus, TokenTeacher
from stepdistill.decoding.run import DecodingRun
from stepdistill.decoding.session import fresh_heads
from stepdistill.decoding.train import distill_decoder


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A Janus with random weights, whose texts differ in length."""
    return small_janus(tmp_path_factory.mktemp("janus"))


@cache
def loaded(place: Path, **settings: Any) -> TokenTeacher:
    return Janus(pretrained_teacher_model=str(place), **settings).load()


def config(folder: Path, tmp_path: Path, *overrides: str) -> DecodingRun:
    return load_config(DecodingRun, None, [*lines_of(folder, tmp_path), *overrides])


def noise(rows: int, teacher: TokenTeacher) -> Tensor:
    return torch.stack([noise_of(0, i, teacher.shape) for i in range(rows)])


def test_the_teacher_is_transformers_own_sampler(folder):
    """Its greedy tokens are those of `generate`, with guidance, and each place's logits those of one whole pass."""
    teacher = loaded(folder, guidance_scale=3.0)
    steps, tokens = teacher.steps(PROMPTS), []
    each = [next(steps)]
    for _ in range(teacher.places):
        tokens.append(each[-1].argmax(-1))
        if len(tokens) < teacher.places:
            each.append(steps.send(tokens[-1]))
    greedy, processor = torch.stack(tokens, 1), teacher.processor
    ids = processor.tokenizer
    model: Any = JanusForConditionalGeneration.from_pretrained(folder)  # whole: `generate` asks what reads images
    settings = model.generation_config
    settings.generation_kwargs = {"boi_token_id": ids.convert_tokens_to_ids(processor.image_start_token)}
    settings.bos_token_id, settings.pad_token_id = ids.bos_token_id, ids.pad_token_id
    inputs = processor(text=PROMPTS, generation_mode="image", padding=True)
    theirs = model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=3.0)
    assert torch.equal(greedy, theirs) and len(greedy.unique()) > 4
    whole = teacher.logits(PROMPTS, greedy)
    assert torch.allclose(torch.stack(each, 1), whole, atol=1e-4)
    decoded = model.decode_image_tokens(greedy).permute(0, 3, 1, 2)
    assert torch.allclose(teacher.pixels(teacher.codes[greedy]), decoded, atol=1e-5)


def test_guidance_temperature_and_top_k_are_part_of_the_law(folder):
    """D11: the guided teacher draws what one whose logits are guided by hand does; the likelihood is that law's."""
    plain, guided = loaded(folder, guidance_scale=1.0), loaded(folder, guidance_scale=3.0, temperature=1.7, top_k=5)
    tokens = guided.draw(PROMPTS, noise(3, guided))
    cond = plain.logits(PROMPTS, tokens)
    asked = plain.read(PROMPTS)
    null = plain.unconditional(asked)
    words = asked.mask.sum(1) - 2
    assert ((null.ids == plain.processor.tokenizer.pad_token_id) & (asked.mask == 1)).sum(1).tolist() == words.tolist()
    text = torch.cat([plain.text(null), plain.model.prepare_embeddings_for_image_generation(tokens[:, :-1])], 1)
    mask = torch.cat([null.mask, torch.ones_like(tokens[:, :-1])], 1)
    with torch.no_grad():
        states = plain.model.model.language_model(
            inputs_embeds=text, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).last_hidden_state
        uncond = plain.model.model.generation_head(states[:, -tokens.shape[1] :])
    law = (uncond + 3 * (cond - uncond)) / 1.7
    assert torch.allclose(guided.logits(PROMPTS, tokens), law, atol=1e-4)
    by_hand = torch.stack([guided.map(noise(3, guided)[:, i], law[:, i]) for i in range(tokens.shape[1])], 1)
    assert (by_hand == tokens).float().mean() > 0.99
    cut = law.masked_fill(law < law.topk(5, -1).values[..., -1:], float("-inf"))
    likely = torch.log_softmax(cut, -1).gather(2, tokens[..., None])[..., 0].mean(1)
    assert torch.allclose(guided.log_likelihood(PROMPTS, tokens), likely, atol=1e-4) and likely.isfinite().all()
    given = guided.draw(PROMPTS, noise(3, guided), tokens[:, :7].flip(0))
    assert torch.equal(given[:, :7], tokens[:, :7].flip(0)) and (given != tokens).any()


@torch.no_grad()
def test_fresh_heads_write_as_the_teacher_does(folder):
    teacher = loaded(folder, guidance_scale=1.0)
    heads, states = fresh_heads(teacher), torch.randn(2, 5, 32)
    assert torch.allclose(heads.logits(states), teacher.model.model.generation_head(states), atol=1e-5)
    told = teacher.model.prepare_embeddings_for_image_generation(torch.arange(32))
    off, mean = (heads.read(teacher.codes) - told).square().sum(), (told - told.mean(0)).square().sum()
    assert torch.equal(heads.codebook, teacher.codes) and off < 0.95 * mean
    other = heads.read.weight + 1e-2 * torch.randn_like(heads.read.weight)
    assert (teacher.codes @ other.T + heads.read.bias - told).square().sum() > off


PLAIN = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
noise = torch.load(sys.argv[2])
tokens = [pipe(sys.argv[4:], noise=noise, num_inference_steps=n, output_type="tokens").images for n in (1, 2, 3)]
image = pipe(sys.argv[4], generator=torch.Generator().manual_seed(3)).images[0]
assert image.size == (32, 32) and not any(name.startswith("stepdistill.") for name in sys.modules)
torch.save(tokens, sys.argv[3])
"""


def test_a_run_writes_a_folder_that_opens_without_this_package(folder, tmp_path):
    """Tokens bit for bit, in a fresh process; and the merged LoRA is the role that was trained."""
    out = distill_decoder(config(folder, tmp_path))
    contract, teacher = read_decoder(out), loaded(folder, guidance_scale=3.0)
    assert contract.keeps == (0, 21, 42) and contract.base_hash == teacher.digest
    assert contract.proof and contract.proof.equal == contract.proof.tokens == 128
    eps = noise(3, teacher)
    torch.save(eps, tmp_path / "noise.pt")
    given = [str(out), str(tmp_path / "noise.pt"), str(tmp_path / "tokens.pt"), *PROMPTS]
    subprocess.run([sys.executable, "-c", PLAIN, *given], check=True, cwd=tmp_path, capture_output=True)
    theirs = torch.load(tmp_path / "tokens.pt")
    pipe: Any = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    for n, tokens in enumerate(theirs, start=1):
        assert torch.equal(pipe(PROMPTS, noise=eps, num_inference_steps=n, output_type="tokens").images, tokens)
    assert torch.equal(theirs[0][:, :21], theirs[2][:, :21])
    for steps in (0, 4):
        with pytest.raises(ValueError, match=f"num_inference_steps is {steps}: expected 1 to 3"):
            pipe("rose", num_inference_steps=steps)
    base, saved = (
        teacher.model.model.language_model.state_dict(),
        load_file(out / "language_model" / "model.safetensors"),
    )
    lora = load_file(out / "checkpoint-4" / "ema_student.safetensors")
    key = "layers.0.mlp.up_proj"
    down, up = (lora[f"{key}.lora_{which}.weight"] for which in "AB")
    assert up.abs().max() > 0
    expected = base[f"{key}.weight"] + 10 / 4 * up @ down
    assert torch.allclose(saved[f"{key}.weight"], expected, atol=1e-6)
    assert "trust_remote_code=True" in (out / "README.md").read_text()


def test_a_whole_student_shares_the_words_of_its_teacher_and_decodes_values_after_the_split(folder, tmp_path):
    whole = ("method.whole=true", "lora.rank=64", "lora.alpha=null")
    out = distill_decoder(config(folder, tmp_path, *whole, "method.ema_decay=null", "method.split=40"))
    base = loaded(folder, guidance_scale=3.0).model.model.language_model.state_dict()
    saved = load_file(out / "language_model" / "model.safetensors")
    assert torch.equal(saved["embed_tokens.weight"], base["embed_tokens.weight"])
    assert not torch.equal(saved["layers.0.mlp.up_proj.weight"], base["layers.0.mlp.up_proj.weight"])
    teacher, eps = loaded(folder, guidance_scale=3.0), noise(3, loaded(folder))
    pipe: Any = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    images, asked = pipe(PROMPTS, noise=eps, num_inference_steps=2, output_type="pt").images, teacher.read(PROMPTS)
    with torch.no_grad():
        tokens, values = pipe.heads.decode(pipe.language_model, teacher.text(asked), asked.mask, eps, (0, 21))
    vectors = torch.where(torch.arange(64)[:, None] < 40, teacher.codes[tokens], values)
    assert torch.allclose(images, (teacher.pixels(vectors) / 2 + 0.5).clamp(0, 1), atol=1e-5)
    assert read_decoder(out).split == 40 and not torch.equal(vectors, teacher.codes[tokens])


def test_a_resumed_run_is_the_run_bit_for_bit(folder, tmp_path):
    whole = distill_decoder(config(folder, tmp_path))
    cut = config(folder, tmp_path, f"train.output_dir={tmp_path / 'cut'}")
    distill_decoder(replace(cut, train=replace(cut.train, max_train_steps=2)))
    out = distill_decoder(replace(cut, train=replace(cut.train, resume_from_checkpoint="latest")))
    for file in ("heads/diffusion_pytorch_model.safetensors", "language_model/model.safetensors"):
        one, other = load_file(whole / file), load_file(out / file)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    rows = [[json.loads(line)["loss"] for line in (place / "metrics.jsonl").open()] for place in (whole, out)]
    assert rows[0] == rows[1] and len(rows[0]) == 4


def test_pairs_are_kept_and_those_of_another_teacher_refused(folder, tmp_path):
    run, teacher = config(folder, tmp_path), loaded(folder, guidance_scale=3.0)
    run.data.fill(teacher)
    first = run.data.files[0]
    before = first.stat().st_mtime_ns, load_file(first)["tokens"]
    assert torch.equal(before[1][:3], teacher.draw(PROMPTS, noise(3, teacher)).int())
    more = replace(run.data, count=130)
    more.fill(teacher)
    assert first.stat().st_mtime_ns == before[0] and len(more.files) == 3
    sample = more.sample(69, random.Random(0))
    assert sample.tokens is not None and sample.prompt == PROMPTS[69 % 3] and len(sample.tokens) == 64
    for changed in ({"guidance_scale": 2.0}, {"temperature": 1.5}, {"top_k": 3}):
        with pytest.raises(DataError, match="other teacher"):
            run.data.fill(loaded(folder, **{"guidance_scale": 3.0, **changed}))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.eval_samples=64"], "train.eval_samples=64, expected its default: it has no effect"),
        (["train.validation_prompts=[rose]"], "train.validation_prompts=.'rose',., expected its default"),
        (
            ["teacher.pretrained_teacher_model=nowhere"],
            "'nowhere', which does not exist, expected the folder",
        ),
        (["teacher.pretrained_teacher_model=/"], "which holds no model"),
        (["method.keeps=[0, 64]"], "fewer than the 64 tokens"),
        (["teacher.max_sequence_length=4"], "a prompt of 8 tokens, 'red apple': expected at most 4"),
    ],
)
def test_bad_input_is_one_clear_line_before_work_is_done(folder, tmp_path, overrides, message):
    with pytest.raises((StepdistillError, ValueError), match=message) as caught:
        distill_decoder(config(folder, tmp_path, *overrides))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists() and not list(tmp_path.glob("pairs/chunk*"))


def test_a_run_of_pipelines_is_told_apart(folder, tmp_path):
    with pytest.raises(ConfigError, match="family"):
        config(folder, tmp_path, "family.pretrained_teacher_model=tiny-sd")
