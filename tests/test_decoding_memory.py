"""Memory of Distilled Decoding: predicted without weights, and what the same code takes; checkpoints and precision."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from decoders import lines_of, small_janus
from oracles.planted import planted
from safetensors.torch import load_file
from transformers import JanusConfig, JanusForConditionalGeneration, LlamaConfig

from stepdistill.cli.main import main
from stepdistill.data.bundled import build
from stepdistill.data.bundled.build_tokens import janus_config, janus_processor
from stepdistill.decoding.contract import read_decoder
from stepdistill.decoding.memory import batches_of, predict_decoder, rehearse_decoder
from stepdistill.decoding.run import DecodingRun, read_run
from stepdistill.decoding.session import DecodingSession, decoding_session, fresh_heads, roles_of, round_base
from stepdistill.decoding.train import distill_decoder
from stepdistill.networks.recompute import checkpoint_blocks
from stepdistill.training.memory.forecast import cycle, prime
from stepdistill.training.memory.tracker import Tracker
from stepdistill.training.optimizers import Optimizers

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def janus(tmp_path_factory) -> Path:
    return small_janus(tmp_path_factory.mktemp("janus"))


@pytest.fixture(scope="module")
def outlines(tmp_path_factory) -> Path:
    """Folders without weights: of a model of four layers, and of one of the size of Janus-Pro-1B."""
    place, processor = tmp_path_factory.mktemp("outlines"), janus_processor(build.drawing_texts(), 600)
    text = LlamaConfig(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=16384,
    )
    configs = {"deep": janus_config(len(processor.tokenizer), 64, 4), "large": JanusConfig(text_config=text)}
    for name, config in configs.items():
        config.save_pretrained(place / name)
        processor.save_pretrained(place / name)
    return place


@pytest.fixture(autouse=True)
def own_precision():
    """The precision of a run is its own."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def run_of(janus: Path, tmp_path: Path, *overrides: str) -> DecodingRun:
    run = read_run(None, [*lines_of(janus, tmp_path), *overrides])
    assert isinstance(run, DecodingRun)
    return run


def session_on(run: DecodingRun) -> DecodingSession:
    """A session of real tensors, which a tracker that is open sees."""
    teacher = run.teacher.load()
    for module in teacher.model.modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, key, buffer.clone())
    for p in teacher.model.parameters():
        p.data = p.data.clone()
    session = decoding_session(run, Accelerator(mixed_precision=run.train.mixed_precision), teacher)
    round_base(session.backbone, session.base_dtype)
    return session


CASES = [
    [],
    ["train.mixed_precision=bf16", "train.gradient_checkpointing=true", "train.gradient_accumulation_steps=2"],
    ["method.whole=true", "method.ema_decay=null", "lora.rank=64", "lora.alpha=null"],
]


@pytest.mark.parametrize("overrides", CASES, ids=["lora", "half", "whole"])
def test_what_is_predicted_without_weights_is_what_steps_take(janus, tmp_path, monkeypatch, overrides):
    run = run_of(janus, tmp_path, *overrides)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were read")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "safe_open", never)
        patch.setattr(JanusForConditionalGeneration, "from_pretrained", never)
        found = predict_decoder(run)
    whole: Any = JanusForConditionalGeneration.from_pretrained(janus)
    assert found.loading == sum(4 * p.numel() for p in whole.parameters())
    tracker = Tracker(CPU)
    with tracker:
        session = session_on(run)
        loop = rehearse_decoder(session)
        loop.optimizers.add(loop.roles)
        if run.train.gradient_checkpointing:
            session.backbone.enable_checkpointing()
        loop.optimizers.build()
        prime(loop.optimizers)
        gc.collect()
        kept = tracker.total
        tracker.reset()
        cycle(loop, next(loop.batches))
        assert (found.static, found.peak) == (kept, tracker.peak)
        tracker.reset()
        micro_batches = next(batches_of(session))
        for step in range(6):  # as many known tokens as a run draws
            loop.context = session.context
            loop.step(step, micro_batches)
    assert 0.7 * found.peak < tracker.peak <= found.peak


def test_recomputed_blocks_lower_the_peak_and_change_no_gradient(janus, outlines, tmp_path):
    sizes = [
        predict_decoder(run_of(outlines / "deep", tmp_path, f"train.gradient_checkpointing={on}")).activations
        for on in ("false", "true")
    ]
    assert sizes[1] < 0.6 * sizes[0]
    with planted(checkpoint_blocks, "block.training = True", "pass"):  # transformers recomputes none in evaluation mode
        on = run_of(outlines / "deep", tmp_path, "train.gradient_checkpointing=true")
        assert predict_decoder(on).activations > 0.95 * sizes[0]
    run, gradients, calls = run_of(janus, tmp_path), [], []
    for on in (False, True):
        session = session_on(run)
        optimizers = Optimizers(session.backbone, run.train).add(roles_of(session, fresh_heads)).build()
        for p in optimizers.params("student").values():
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()), std=0.1)
        if on:
            session.backbone.enable_checkpointing()
        layer: Any = session.backbone.net.get_submodule("layers.0.mlp")
        calls.append(0)

        def count(*_: object) -> None:
            calls[-1] += 1

        layer.register_forward_pre_hook(count)
        (update,) = run.method.updates(session.context(0), next(batches_of(session))[0], 0)
        update.loss.backward()
        gradients.append({name: optimizers.params(name) for name in optimizers.by_role})
    assert calls == [1, 2]
    for role, params in gradients[0].items():
        for key, p in params.items():
            assert p.grad is not None and torch.equal(p.grad, gradients[1][role][key].grad), key


def test_half_precision_is_the_student_s_alone(janus, tmp_path):
    """Pairs and contract are those of the float32 teacher; what is written is the rounded base with its LoRA, in
    float32."""
    full, half = (
        run_of(janus, tmp_path / name, f"train.mixed_precision={name}", "train.max_train_steps=2", "data.count=4")
        for name in ("no", "bf16")
    )
    outs = [distill_decoder(full)]
    AcceleratorState._reset_state()
    outs.append(distill_decoder(half))
    contracts = [read_decoder(out) for out in outs]
    assert [each.dtype for each in contracts] == ["float32", "bfloat16"]
    assert contracts[0].base_hash == contracts[1].base_hash
    pairs = [[load_file(file)["tokens"] for file in run.data.files] for run in (full, half)]
    assert all(torch.equal(*both) for both in zip(*pairs, strict=True))
    losses = [json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["loss"] for out in outs]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)
    base = half.teacher.load().model.model.language_model.state_dict()
    saved = load_file(outs[1] / "language_model" / "model.safetensors")
    lora, key = load_file(outs[1] / "checkpoint-2" / "ema_student.safetensors"), "layers.0.mlp.up_proj"
    down, up = (lora[f"{key}.lora_{which}.weight"] for which in "AB")
    assert up.abs().max() > 0 and {p.dtype for p in saved.values()} == {torch.float32}
    expected = base[f"{key}.weight"].bfloat16().float() + 10 / 4 * up @ down
    assert torch.allclose(saved[f"{key}.weight"], expected, atol=1e-7)
    heads = load_file(outs[1] / "heads" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(heads["codebook"], half.teacher.load().codes)
    AcceleratorState._reset_state()
    more = ["train.resume_from_checkpoint=latest", "train.max_train_steps=3", "train.mixed_precision=bf16"]
    # a resumed run has the same teacher: its digest is of the weights as they were read
    distill_decoder(run_of(janus, tmp_path / "bf16", *more, "data.count=4"))


def test_the_size_of_janus_pro(outlines, tmp_path, capsys):
    """24 layers of width 2048, 16,384 codes, 576 tokens."""
    lines = [*lines_of(outlines / "large", tmp_path), "lora.rank=64", "train.gradient_checkpointing=true"]
    (tmp_path / "run.yaml").write_text("{}")
    main(["train", str(tmp_path / "run.yaml"), "--dry-run", *lines, "train.train_batch_size=4"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    counts = {" ".join(row[:-5]): float(row[-5]) for row in rows if row[-4:-3] == ["M"]}
    linear = 4 * 2048**2 + 3 * 2048 * 5632
    base = 102400 * 2048 + 24 * (linear + 2 * 2048) + 2048
    assert counts["base"] == pytest.approx(base / 1e6, abs=0.01)
    student = 24 * 64 * (4 * 2 * 2048 + 3 * (2048 + 5632))
    heads = (8 * 2048 + 2048) + 2 * 2048 + 2 * 2048 + (2048 * 8 + 8) + (2048 * 2048 + 2048) + (2048 * 16384 + 16384)
    assert counts["student"] == counts["ema_student"] == pytest.approx(student / 1e6, abs=0.01)
    assert counts["heads"] == pytest.approx(heads / 1e6, abs=0.01)
    assert set(counts) == {"base", "image tokens", "vqmodel", "student", "heads", "ema_student", "ema_heads"}
    assert not (tmp_path / "run").exists()
