"""Caches that are filled before training: the same batches, and neither text encoders nor autoencoder loaded."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLLTXVideo, AutoencoderKLWan
from PIL import Image
from safetensors.torch import load_file, save_file
from test_families import one_file
from tiny import FAMILIES, VIDEOS, pipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection, Gemma2Model, T5EncoderModel, UMT5EncoderModel

from stepdistill.cli import main as cli
from stepdistill.core.errors import ConfigError, DataError, StepdistillError
from stepdistill.core.random import sample_rng
from stepdistill.data import FixedCrops, ImageFolder, InvertedImages, Partition, Prompts, TeacherSamples, Trajectories
from stepdistill.data.bundled import build
from stepdistill.families.lazy_pipeline import PARTS, LazyPipeline
from stepdistill.families.sd import StableDiffusion
from stepdistill.methods.consistency import Consistency
from stepdistill.networks.meta import is_shell
from stepdistill.networks.roles import LoraSpec
from stepdistill.students.base_model import base_of
from stepdistill.training import loop as trainer
from stepdistill.training.batches import NULL
from stepdistill.training.cache import keys as fingerprint
from stepdistill.training.cache import rows as cache
from stepdistill.training.cache.keys import Keys, family_keys
from stepdistill.training.cache.precompute import precompute, prompts_of
from stepdistill.training.cache.rows import RowStore
from stepdistill.training.checks import check_run
from stepdistill.training.distill import distill, make_data
from stepdistill.training.loop import training_loop
from stepdistill.training.optimizers import Optimizers
from stepdistill.training.recipe import Run, TrainSpec
from stepdistill.training.setup import Session, prepare

ROOT = Path(__file__).parent.parent
SIDE = 32
WORDS = ("red apple", "cat face", "rose", "octopus", "blue sky", "dog face", "smiling face", "red heart", "tree")
PROMPTS = Prompts(prompts=WORDS, proportion_empty_prompts=0.2)
ENCODERS = (
    *(CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel, UMT5EncoderModel, Gemma2Model),
    *(AutoencoderKL, AutoencoderDC, AutoencoderKLWan, AutoencoderKLLTXVideo),
)
LCM = Consistency(num_ddim_timesteps=10, guidance_scale=3.0, ema_decay=None, loss_type="l2")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Teachers and images."""
    folder = tmp_path_factory.mktemp("precompute")
    for name in FAMILIES:
        pipe = pipeline(name)
        if name == "sd":
            # epsilon multiplies rounding by sigma / alpha = 14.6 at t = 999
            pipe.scheduler = build.vp_scheduler("v_prediction")
        pipe.save_pretrained(folder / name)
    rng = random.Random(0)
    (folder / "images").mkdir()
    for i in range(5):
        image = Image.effect_noise((SIDE + 9, SIDE + 4), 90).convert("RGB")
        image.putpixel((0, 0), (rng.randrange(256), 0, 0))
        image.save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text(f"cat number {i}")
    return folder


def images(place: Path, **fields) -> ImageFolder:
    given = {"train_data_dir": str(place / "images"), "resolution": SIDE, "proportion_empty_prompts": 0.3}
    return ImageFolder(**given | fields)


def run_of(place: Path, out: Path, data, kept: Path | None, name: str = "sd", **train) -> Run:
    given = {
        "output_dir": str(out),
        "max_train_steps": 3,
        "train_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": "none",
        "checkpointing_steps": 1,
        "cache_dir": str(kept) if kept else None,
    }
    still = {"num_frames": 1} if name in VIDEOS else {}  # images are videos of one frame
    family = replace(FAMILIES[name], pretrained_teacher_model=str(place / name), **still)
    return Run(family=family, method=LCM, data=data, lora=LoraSpec(rank=4), train=TrainSpec(**given | train))


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The classes of text encoders and autoencoders that were loaded, in order."""
    found: list[str] = []
    for kind in ENCODERS:

        def counted(*given, plain=kind.from_pretrained, name=kind.__name__, **named):
            found.append(name)
            return plain(*given, **named)

        monkeypatch.setattr(kind, "from_pretrained", counted)
    return found


@pytest.fixture
def sealed(monkeypatch) -> None:
    """No text encoder and no autoencoder can be loaded."""

    def refuse(*given, **named):
        raise AssertionError("loaded")

    for kind in ENCODERS:
        monkeypatch.setattr(kind, "from_pretrained", refuse)


def stored(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every row of a cache's folder by id, whatever its file."""
    rows: dict[str, dict[str, torch.Tensor]] = {}
    for file in folder.glob("*.safetensors"):
        with cache.safe_open(file, "pt") as opened:
            facts = opened.metadata()
            for n, row in enumerate(json.loads(facts["ids"])):
                assert row not in rows, f"{row!r} twice"
                rows[row] = {name: opened.get_tensor(f"{n}.{name}") for name in json.loads(facts["names"])}
    return rows


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[row].keys() == b[row].keys() and all(torch.equal(a[row][key], b[row][key]) for key in a[row]) for row in a
    )


def batches(run: Run, steps: int = 3) -> list[torch.Tensor]:
    """The tensors of the first steps, and of the unconditional row."""
    session = prepare(run)
    found = [value for _, value in sorted(session.batches.null.items())]
    read = session.batches.steps(run.data, 0, 0, 1)
    for _ in range(steps):
        for part in next(read):
            found += [value for _, value in sorted(part.cond.items())]
            found += [] if part.latents is None else [part.latents]
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_from_the_cache_are_those_without(place, tmp_path, name, request):
    """Embeddings, the unconditional row, and latents, bit for bit, with no encoder in reach."""
    data = images(place)
    plain = batches(run_of(place, tmp_path / "a", data, None, name, cache_latents=True))
    kept = run_of(place, tmp_path / "b", data, tmp_path / "kept", name, cache_latents=True)
    filled = precompute(kept)
    assert (filled.prompts, filled.images, filled.lacking) == (6, 5, 0)
    request.getfixturevalue("sealed")
    found = batches(kept)
    assert len(plain) == len(found) and all(map(torch.equal, plain, found))


def parts(session: Session) -> set[str]:
    return {name for name, part in session.pipe.components.items() if is_shell(part)}


def trained(run: Run) -> tuple[Session, dict[str, torch.Tensor]]:
    """A run up to its end, without the student folder and its proof, which load a whole plain pipeline."""
    check_run(run)
    session = prepare(run)
    make_data(session)
    assert training_loop(session, Optimizers(session.backbone, run.train).declare(run.method).build())
    session.batches.save()
    return session, session.backbone.state("student")


def test_a_whole_training_from_the_cache_loads_neither(place, tmp_path, caplog, request):
    """The teacher's own samples are made in it, too, and the student is the same bit for bit."""

    def run(name: str, kept: Path | None) -> Run:
        samples = str(tmp_path / name / "samples")
        data = TeacherSamples(source=PROMPTS, folder=samples, count=8, num_inference_steps=2, guidance_scale=3.0)
        return run_of(place, tmp_path / name, data, kept, gradient_checkpointing=True)

    _, plain = trained(run("plain", None))
    precompute(run("cached", tmp_path / "kept"))
    request.getfixturevalue("sealed")
    caplog.clear()
    session, cached = trained(run("cached", tmp_path / "kept"))
    assert plain.keys() == cached.keys() and all(torch.equal(plain[key], cached[key]) for key in plain)
    assert any(value.abs().max() > 0 for key, value in cached.items() if "lora_B" in key)
    assert parts(session) == {"text_encoder", "vae"} and not caplog.records


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("on_disk", [False, True])
def test_two_epochs_encode_each_image_and_prompt_once(place, tmp_path, monkeypatch, workers, on_disk):
    """In micro-batches, by workers or not, beside validation prompts, of which one is a caption."""
    encoded, prompts = [0], Counter[str]()
    encode, condition = StableDiffusion.encode, StableDiffusion.condition

    def counted(family, pipe, pixels):
        encoded[0] += len(pixels)
        return encode(family, pipe, pixels)

    def told(family, pipe, texts):
        prompts.update(texts)
        return condition(family, pipe, texts)

    monkeypatch.setattr(StableDiffusion, "encode", counted)
    monkeypatch.setattr(StableDiffusion, "condition", told)
    how = {"gradient_accumulation_steps": 2, "dataloader_num_workers": workers, "cache_latents": True}
    kept = tmp_path / "kept" if on_disk else None
    run = run_of(place, tmp_path / "out", images(place, proportion_empty_prompts=0.0), kept, train_batch_size=1, **how)
    session = prepare(run)
    with closing(session.batches.steps(run.data, 0, 0, 1)) as read:
        for _ in range(6):  # two images each
            next(read)
            session.batches.condition(["cat number 0", "rose"])
    del prompts[""]  # what fills the last block of four
    assert encoded == [5] and prompts == Counter(["rose", *(f"cat number {i}" for i in range(5))])


def test_processes_that_read_end_with_the_loop(place, tmp_path, monkeypatch):
    """Also where an error holds the loop's frame: they ignore signals, and the exit would wait for them forever."""
    monkeypatch.setattr(trainer, "train_step", Mock(side_effect=ZeroDivisionError))
    with pytest.raises(ZeroDivisionError) as held:
        trained(run_of(place, tmp_path / "out", images(place), None, dataloader_num_workers=2))
    assert held.traceback and not multiprocessing.active_children()


def test_what_is_missing_is_loaded_for_once_and_said(place, tmp_path, caplog, loads):
    inner, kept = Prompts(prompts=WORDS), tmp_path / "kept"
    data = TeacherSamples(source=inner, folder=str(tmp_path / "samples"), count=9, num_inference_steps=2)
    precompute(run_of(place, tmp_path / "out", replace(inner, prompts=WORDS[:-2]), kept))
    loads.clear()
    caplog.clear()
    run = run_of(place, tmp_path / "out", data, kept, validation_prompts=("rose",), validation_steps=2, teacher_steps=4)
    run = replace(run, train=replace(run.train, watch_samples=0, max_train_steps=4))
    session, _ = trained(run)
    assert sorted(loads) == ["AutoencoderKL", "CLIPTextModel"] and not parts(session)
    told = "\n".join(record.message for record in caplog.records)
    assert told.count("loading text_encoder: ") == told.count("loading vae: ") == 1
    assert "loading vae: images are drawn" in told
    assert f"2 prompts were not in {kept} and had to be encoded" in told
    # now they are
    loads.clear()
    batches(replace(run, train=replace(run.train, resume_from_checkpoint="latest")))
    assert not loads


def test_without_latents_in_the_cache_the_autoencoder_is_loaded(place, tmp_path, caplog, loads):
    run = run_of(place, tmp_path / "out", images(place), tmp_path / "kept")
    assert precompute(run).images == 0
    assert "train.cache_latents is false" in caplog.text
    loads.clear()
    batches(run)
    assert loads == ["AutoencoderKL"]


def test_a_student_is_written_and_proven_after_training_from_the_cache(place, tmp_path):
    """The folder says nothing of the parts that were left out."""
    data = TeacherSamples(source=PROMPTS, folder=str(tmp_path / "samples"), count=4, num_inference_steps=2)
    run = run_of(place, tmp_path / "out", data, tmp_path / "kept", max_train_steps=1)
    precompute(run)
    out = distill(run)
    contract = json.loads((out / "distill_config.json").read_text())
    assert contract["base_without"] == [] and contract["proof"]["difference"] < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_shells_say_what_networks_say(place, name):
    family = replace(FAMILIES[name], pretrained_teacher_model=str(place / name))
    whole, hollow = family.load(), family.load(PARTS)
    names = {n for n in whole.components if n.startswith("text_encoder")} | {"vae", family.network_name}
    there = {n for n in names if whole.components[n] is not None}
    assert there == {n for n, part in hollow.components.items() if is_shell(part)}
    size = (32, 16) if name == "sd3" else (64, 32)  # the tiny SD3 has no position beyond 32
    assert family.latent_shape(hollow, *size) == family.latent_shape(whole, *size)
    assert family.native_size(hollow) == family.native_size(whole)
    partly = family.load(("text", "vae"))
    assert base_of(partly, family) == base_of(whole, family)


def test_parts_of_a_single_file_and_under_loras_are_let_go(place, tmp_path, monkeypatch):
    family = replace(FAMILIES["sd"], pretrained_teacher_model=str(tmp_path / "all.safetensors"))
    one_file(pipeline("sd"), tmp_path / "all.safetensors")
    monkeypatch.setattr(family.pipeline_class, "from_single_file", lambda where, config: pipeline("sd"), raising=False)
    pipe = family.load(("text",))
    assert is_shell(pipe.text_encoder) and not is_shell(pipe.vae) and not is_shell(pipe.unet)
    whole = LazyPipeline(family, pipe, torch.device("cpu")).text("asked for")
    assert not is_shell(whole.text_encoder)

    lora(place, tmp_path / "lora", ("text_encoder", "unet"))
    family = replace(
        FAMILIES["sd"], pretrained_teacher_model=str(place / "sd"), teacher_loras=(str(tmp_path / "lora"),)
    )
    fused, left = family.load(), family.load(("text",))
    assert base_of(fused, family) == base_of(left, family)
    later = LazyPipeline(family, left, torch.device("cpu")).text("asked for")
    states = [family.condition(pipe, ["rose"])["states"] for pipe in (fused, later, pipeline("sd"))]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def lora(place: Path, folder: Path, networks: tuple[str, ...], size: float = 0.05) -> None:
    """A LoRA of rank 2 on one layer of each of the networks."""
    layers = {
        "text_encoder": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "unet": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    }
    pipe, state = pipeline("sd"), {}
    for name in networks:
        path = layers[name]
        try:
            net = pipe.components[name].get_submodule(path.split(".", 1)[1])
        except AttributeError:  # without the prefix `text_model`
            net = pipe.components[name].get_submodule(path.split(".", 2)[2])
        state[f"{path}.lora_A.weight"] = torch.full((2, net.in_features), size)
        state[f"{path}.lora_B.weight"] = torch.full((net.out_features, 2), size)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "pytorch_lora_weights.safetensors")


def keys(place: Path, kept: Path, name: str = "sd", **fields) -> Keys:
    return family_keys(replace(FAMILIES[name], **{"pretrained_teacher_model": str(place)} | fields), kept)


def touch(file: Path) -> None:
    """Change one byte in the middle."""
    held = bytearray(file.read_bytes())
    held[len(held) // 2] ^= 1
    file.write_bytes(held)


WEIGHT = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "vae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
}


def test_keys_go_by_the_files_that_matter(place, tmp_path):
    mine, kept = tmp_path / "mine", tmp_path / "kept"
    shutil.copytree(place / "sdxl", mine)
    before = keys(mine, kept, "sdxl")
    assert before == keys(place / "sdxl", tmp_path / "other", "sdxl")  # content alone, wherever it lies
    for part, changed in (
        ("unet", (False, False)),
        ("vae", (False, True)),
        ("text_encoder", (True, False)),
        ("text_encoder_2", (True, False)),
    ):
        touch(mine / part / f"{WEIGHT[part]}.safetensors")
        after = keys(mine, kept, "sdxl")
        assert (after.text != before.text, after.vae != before.vae) == changed, part
        before = after
    for file, changed in (
        ("tokenizer_2/tokenizer.json", (True, False)),
        ("vae/config.json", (False, True)),
        ("scheduler/scheduler_config.json", (False, False)),
    ):
        path = mine / file
        path.write_text(path.read_text() + "\n")
        after = keys(mine, kept, "sdxl")
        assert (after.text != before.text, after.vae != before.vae) == changed, file
        before = after
    # SDXL's unconditional row goes by a flag of the pipeline
    index = mine / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": False}))
    after = keys(mine, kept, "sdxl")
    assert after.text != before.text and after.vae == before.vae


def test_keys_go_by_the_familys_arguments_and_its_loras(place, tmp_path):
    kept, sd = tmp_path / "kept", place / "sd"
    short, long = (keys(place / "sd3", kept, "sd3", max_sequence_length=n) for n in (16, 32))
    assert short.text != long.text and short.vae == long.vae
    assert keys(sd, kept) != keys(sd, kept, "sdxl")  # another family makes other tensors of the same files
    lora(place, tmp_path / "unet", ("unet",))
    lora(place, tmp_path / "both", ("unet", "text_encoder"))
    lora(place, tmp_path / "strong", ("unet", "text_encoder"), 0.1)
    loras = {n: keys(sd, kept, teacher_loras=(str(tmp_path / n),)) for n in ("unet", "both", "strong")}
    assert loras["unet"] == keys(sd, kept)
    assert len({found.text for found in loras.values()}) == 3 and len({found.vae for found in loras.values()}) == 1


def test_the_variants_weights_count(place, tmp_path):
    mine, kept = tmp_path / "mine", tmp_path / "kept"
    shutil.copytree(place / "sd", mine)
    weights = mine / "text_encoder"
    shutil.copy(weights / "model.safetensors", weights / "model.fp16.safetensors")
    (weights / "pytorch_model.bin").write_bytes(b"not read beside safetensors")
    (weights / "flax_model.msgpack").write_bytes(b"never read")
    plain, half = keys(mine, kept), keys(mine, kept, variant="fp16")
    touch(weights / "pytorch_model.bin")
    touch(weights / "flax_model.msgpack")
    assert (keys(mine, kept), keys(mine, kept, variant="fp16")) == (plain, half)
    touch(weights / "model.fp16.safetensors")
    assert keys(mine, kept) == plain and keys(mine, kept, variant="fp16").text != half.text
    names = ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors", "model.safetensors"]
    paths = [Path(name) for name in names]
    assert fingerprint._weights(paths, "fp16") == paths[:2]
    assert fingerprint._weights(paths, None) == fingerprint._weights(paths, "fp32") == paths[2:]


def test_a_hub_id_is_known_by_its_snapshot(place, tmp_path, monkeypatch):
    asked = []

    def download(name, **given):
        asked.append((name, given))
        return str(place / "sd")

    monkeypatch.setattr(FAMILIES["sd"].pipeline_class, "download", download)
    found = keys(Path("owner/name"), tmp_path, revision="v2", variant="fp16")
    assert asked == [("owner/name", {"revision": "v2", "variant": "fp16"})]
    assert found == keys(place / "sd", tmp_path)


def test_a_single_file_counts_whole(place, tmp_path):
    file = tmp_path / "all.safetensors"
    file.write_bytes(b"weights")
    plain = keys(file, tmp_path / "kept")
    assert keys(file, tmp_path / "kept", single_file_config="owner/name") != plain
    beside = keys(file, tmp_path / "kept", single_file_config=str(place / "sd"))
    assert plain.text != beside.text and plain.vae != beside.vae
    touch(file)
    after = keys(file, tmp_path / "kept")
    assert after.text != plain.text and after.vae != plain.vae


def test_a_file_is_read_once_for_its_digest(place, tmp_path, monkeypatch, caplog):
    mine, kept = tmp_path / "mine", tmp_path / "kept"
    shutil.copytree(place / "sd", mine)
    first, read = keys(mine, kept), []
    plain = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *given, **named: (read.append(path.name), plain(path, *given, **named))[1]
    )
    assert keys(mine, kept) == first and "model.safetensors" not in read
    os.utime(mine / "text_encoder" / "model.safetensors", ns=(1, 1))
    assert keys(mine, kept) == first and read.count("model.safetensors") == 1
    (kept / "files.json").write_text("{")
    assert keys(mine, kept) == first and read.count("model.safetensors") == 2
    assert "computing the files' digests again" in caplog.text
    (tmp_path / "file").write_text("")
    assert keys(mine, tmp_path / "file") == first and "cannot write" in caplog.text


def test_another_text_encoder_is_another_cache(place, tmp_path, caplog, loads):
    shutil.copytree(place / "sd", tmp_path / "sd")
    run = run_of(tmp_path, tmp_path / "out", PROMPTS, tmp_path / "kept")
    precompute(run)
    file = tmp_path / "sd" / "text_encoder" / "model.safetensors"
    save_file({key: value + 0.01 for key, value in load_file(file).items()}, file, {"format": "pt"})
    loads.clear()
    caplog.clear()
    session = prepare(run)
    assert "ignoring 1 cache files" in caplog.text
    assert torch.equal(
        session.batches.condition(["rose"])["states"], run.family.condition(run.family.load(), ["rose"])["states"]
    )
    assert sorted(loads) == ["AutoencoderKL", "CLIPTextModel", "CLIPTextModel"]  # the cache's, and the whole pipeline's


def test_it_goes_on_where_it_was_killed(place, tmp_path, monkeypatch):
    """SIGKILL between two files: what was written stays, and no row is encoded twice."""
    whole, cut = (run_of(place, tmp_path / "out", PROMPTS, tmp_path / name) for name in ("whole", "cut"))
    whole_rows = precompute(whole) and stored(tmp_path / "whole" / "prompts")
    monkeypatch.setattr(cache, "FLUSH", 4)
    child = os.fork()
    if child == 0:
        plain = RowStore.save

        def save(store: RowStore) -> None:
            if len(list((tmp_path / "cut" / "prompts").glob("*"))) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            plain(store)

        RowStore.save = save
        try:
            precompute(cut)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    before = stored(tmp_path / "cut" / "prompts")
    assert len(before) == 8
    encoded: list[str] = []
    plain = type(cut.family).condition
    monkeypatch.setattr(
        type(cut.family),
        "condition",
        lambda self, pipe, prompts: (encoded.extend(prompts), plain(self, pipe, prompts))[1],
    )
    assert precompute(cut).lacking == 0
    assert not set(encoded) - {""} & set(before) and set(encoded) | set(before) >= set(WORDS)
    assert equal(stored(tmp_path / "cut" / "prompts"), whole_rows)
    encoded.clear()
    precompute(cut)
    assert not encoded


def test_two_processes_share_the_work(place, tmp_path):
    """The same rows as one process makes, each made once."""
    data = images(place)
    run = run_of(place, tmp_path / "out", data, tmp_path / "one", cache_latents=True)
    precompute(run)
    config = {
        "family": {"type": "stepdistill.families.sd.StableDiffusion", "pretrained_teacher_model": str(place / "sd")},
        "method": {"type": "stepdistill.methods.consistency.Consistency"},
        "data": {
            "type": "stepdistill.data.ImageFolder",
            "train_data_dir": data.train_data_dir,
            "resolution": SIDE,
            "proportion_empty_prompts": 0.3,
        },
        "train": {"output_dir": str(tmp_path / "out"), "report_to": "none", "cache_latents": True},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    launch = ROOT / "configs" / "accelerate" / "two_processes_cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(launch)]
    given = ["precompute", str(tmp_path / "config.yaml"), "--cache_dir", str(tmp_path / "two")]
    done = subprocess.run(
        [*command, "-m", "stepdistill", *given],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("embeddings of 6 prompts, latents of 5 images") == 1
    for kind in ("prompts", "latents"):
        ours, theirs = stored(tmp_path / "one" / kind), stored(tmp_path / "two" / kind)
        assert len(list((tmp_path / "two" / kind).glob("*.safetensors"))) == 2 and equal(ours, theirs)


def test_every_prompt_that_a_source_yields_is_listed(place, tmp_path):
    listed = tmp_path / "prompts.jsonl"
    rows = [{"text": ["red apple", "an apple"]}, {"text": "rose"}, {"text": ["cat", "a cat", "some cat"]}]
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    inner = Prompts(prompts_file=str(listed), proportion_empty_prompts=0.5)
    files = {"folder": str(tmp_path / "made")}
    sources = [
        inner,
        images(place),
        FixedCrops(source=images(place), proportion_empty_prompts=0.2),
        Partition(source=inner, students=2, student=1),
        TeacherSamples(source=inner, count=40, proportion_empty_prompts=0.3, **files),
        Trajectories(source=inner, count=40, kept_steps=2, num_inference_steps=4, **files),
    ]
    for source in sources:
        found = set(prompts_of(run_of(place, tmp_path, source, None, validation_prompts=("octopus",))))
        drawn = {source.prompt(i, sample_rng(1, n)) for n in range(40) for i in range(len(source))}
        assert len(drawn) > 2 and drawn | {"octopus", ""} <= found, type(source).__name__
    # what a student's part goes around is made whole, for all students
    whole = TeacherSamples(source=replace(inner, proportion_empty_prompts=0.0), count=40, **files)
    part = Partition(source=whole, students=2)
    made = {whole.prompt_of(i) for i in range(40)}
    assert made <= set(prompts_of(run_of(place, tmp_path, part, None)))
    assert not made <= {caption for i in range(len(part)) for caption in part.captions(i)}
    # which images are inverted is known only when they are
    inverted = InvertedImages(source=images(place), count=3, **files)
    assert set(prompts_of(run_of(place, tmp_path, inverted, None))) == {"", *(f"cat number {i}" for i in range(5))}


def test_a_image_that_does_not_read_is_left_out(place, tmp_path, caplog, loads):
    shutil.copytree(place / "images", tmp_path / "images")
    (tmp_path / "images" / "3.png").write_bytes(b"no image")
    run = run_of(place, tmp_path / "out", images(tmp_path), tmp_path / "kept", cache_latents=True)
    filled = precompute(run)
    assert filled.lacking == 1 and "1 of these are missing: images that cannot be read" in str(filled)
    assert "3.png" in caplog.text
    loads.clear()
    batches(run)
    assert not loads


def test_latents_of_other_images_or_another_autoencoder_are_not_taken(place, tmp_path, loads):
    shutil.copytree(place / "images", tmp_path / "images")
    shutil.copytree(place / "sd", tmp_path / "sd")
    run = run_of(tmp_path, tmp_path / "out", images(tmp_path), tmp_path / "kept", cache_latents=True)
    precompute(run)
    loads.clear()
    Image.new("RGB", (SIDE, SIDE), "red").save(tmp_path / "images" / "2.png")
    precompute(run)
    assert loads == ["AutoencoderKL"]
    loads.clear()
    precompute(run)
    assert not loads
    touch(tmp_path / "sd" / "vae" / "diffusion_pytorch_model.safetensors")
    precompute(run)
    assert loads == ["AutoencoderKL"]


def test_places_that_can_be_no_cache(place, tmp_path, monkeypatch, capsys):
    with pytest.raises(ConfigError, match=r"no train\.cache_dir.*set train\.cache_dir"):
        precompute(run_of(place, tmp_path / "out", PROMPTS, None))
    file = tmp_path / "file"
    file.write_text("")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nothing")
    wrong = ((file, f"{file} is a file"), (file / "below" / "it", f"{file} is a file"), (link, "is a link to nothing"))
    for folder, why in wrong:
        run = run_of(place, tmp_path / "out", PROMPTS, folder)
        for start in (precompute, check_run):
            with pytest.raises(StepdistillError, match=why):
                start(run)
    monkeypatch.setattr(cache, "save_file", lambda *given: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(DataError, match="cannot be written.*the work resumes"):
        precompute(run_of(place, tmp_path / "out", PROMPTS, tmp_path / "kept"))
    with pytest.raises(SystemExit):
        cli.main(["precompute", "--help"])
    assert "stepdistill precompute mine.yaml --cache-dir caches/mine" in capsys.readouterr().out


def test_rows_that_are_on_disk_are_not_kept_in_memory(place, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "FLUSH", 2)
    store = RowStore(tmp_path, "key")
    for n in range(5):
        store.add([str(n)], {"row": torch.full((1, 3), float(n))})
    assert list(store._rows) == ["4"] and store._bytes == 12
    assert store.rows(["4", "0", "3"])["row"][:, 0].tolist() == [4, 0, 3]


def test_the_unconditional_row_is_in_the_cache(place, tmp_path):
    run = run_of(place, tmp_path / "out", PROMPTS, tmp_path / "kept", "sdxl")
    precompute(run)
    row = stored(tmp_path / "kept" / "prompts")[NULL]
    assert not row["states"].any() and row["scale"].tolist() == [4.0]  # zeros, which "" is not
    assert stored(tmp_path / "kept" / "prompts")[""]["states"].any()


def test_a_row_holds_the_size_of_a_latent(place, tmp_path):
    """SDXL's conditions do: of an autoencoder that shrinks less they are others."""
    shutil.copytree(place / "sdxl", tmp_path / "sdxl")
    run = run_of(tmp_path, tmp_path / "out", PROMPTS, tmp_path / "kept", "sdxl")
    precompute(run)
    shutil.rmtree(tmp_path / "sdxl" / "vae")
    build.vae((16, 16)).save_pretrained(tmp_path / "sdxl" / "vae")
    assert prepare(run).batches.condition(["rose"])["scale"].tolist() == [[2.0]]


def test_logs_name_the_reason(place, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        precompute(run_of(place, tmp_path / "out", PROMPTS, tmp_path / "kept"))
    assert (
        f"loading text_encoder: {len(WORDS) + 1} of {len(WORDS) + 1} prompts are not in {tmp_path / 'kept'}"
        in caplog.text
    )
