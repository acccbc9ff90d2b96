"""The commands on a config of Distilled Decoding: which run it is, its pairs, and bad input in one line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
import torch
from decoders import PROMPTS, lines_of, small_janus
from safetensors.torch import load_file
from transformers import JanusForConditionalGeneration, JanusProcessor

from stepdistill.cli.main import main
from stepdistill.config.load import top_keys
from stepdistill.core.random import noise_of
from stepdistill.decoding.contract import read_decoder
from stepdistill.decoding.janus import Janus
from stepdistill.decoding.run import DecodingRun, read_run
from stepdistill.decoding.session import prepare_decoding
from stepdistill.training.folder import open_folder
from stepdistill.training.recipe import Run


@pytest.fixture(scope="module")
def janus(tmp_path_factory) -> Path:
    return small_janus(tmp_path_factory.mktemp("janus"))


@pytest.fixture
def argv(janus, tmp_path) -> list[str]:
    """A config file, with overrides."""
    (tmp_path / "run.yaml").write_text("data: {seed: 3}\n")
    return [str(tmp_path / "run.yaml"), *lines_of(janus, tmp_path)]


def refused(capsys, *words: str) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stepdistill: ")]
    (line,) = said
    return line


def test_a_config_with_a_teacher_is_a_decoder_s(argv, tmp_path):
    assert isinstance(read_run(argv[0], argv[1:]), DecodingRun)
    quickstart = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
    assert isinstance(read_run(quickstart, ["train.teacher_steps=3", "--teacher-steps", "4"]), Run)
    (tmp_path / "mine.yaml").write_text("teacher: {pretrained_teacher_model: a/b}\ndata: {count: 3}\n")
    assert top_keys(tmp_path / "mine.yaml", ["train.seed=1", "--lora.rank", "3", "--seed=2"]) == {
        *("teacher", "data", "train", "lora")
    }


def test_pairs_are_made_once_whichever_command_makes_them(argv, janus, tmp_path, capsys):
    main(["data", "make", *argv])
    files = sorted((tmp_path / "pairs").glob("*.safetensors"))
    assert len(files) == 2 and not (tmp_path / "run").exists()
    teacher = Janus(pretrained_teacher_model=str(janus), guidance_scale=3.0).load()
    noise = torch.stack([noise_of(3, i, teacher.shape) for i in range(3)])
    assert torch.equal(load_file(files[0])["tokens"][:3], teacher.draw(PROMPTS, noise).int())
    before = files[0].stat().st_mtime_ns, files[1].read_bytes()
    files[1].unlink()
    main(["precompute", *argv])
    assert (files[0].stat().st_mtime_ns, files[1].read_bytes()) == before
    assert capsys.readouterr().out == f"{tmp_path / 'pairs'}: 70 pairs of noise and tokens\n"
    main(["data", "check", *argv])
    assert "Prompts: 3 samples, 3 usable" in capsys.readouterr().out
    said = refused(capsys, "train", *argv, "teacher.guidance_scale=2")
    assert "with other teacher" in said and "name another data.folder" in said and not (tmp_path / "run").exists()
    said = refused(capsys, "precompute", *argv, "data.seed=4")
    assert "with other seed: [3]" in said


def test_a_run_by_commands_has_a_folder_that_doctor_reads(argv, tmp_path, capsys):
    main(["train", *argv, "data.count=4", "--max-train-steps", "2", "method.ema_decay=null"])
    with pytest.raises(SystemExit) as ended:
        main(["doctor", str(tmp_path / "run"), "--reference", str(tmp_path / "none.json")])
    assert ended.value.code == 2
    capsys.readouterr()
    main(["doctor", str(tmp_path / "run")])
    report = capsys.readouterr().out
    assert "2 of 2 steps" in report and "nothing is off" in report and "collapse monitor" not in report


BAD = [
    (["train.eval_samples=64"], "train.eval_samples=64, expected its default: it has no effect"),
    (["train.validation_steps=2"], "train.validation_steps=2"),
    (["train.mixed_precision=fp16"], "mixed precision fp16, expected bf16 or no"),
    (["lora.init_from=owner/name"], "lora.init_from=owner/name, expected none"),
    (["lora.target_modules=[to_q]"], "lora.target_modules with to_q"),
    (["lora.roles.fake.rank=3"], "lora.roles.fake with DistilledDecoding, expected .* of its own: .'student'."),
    (["train.optimizers.x.type=torch.optim.SGD"], "expected a role that is trained: .'student', 'heads'."),
    (["teacher.pretrained_teacher_model=nowhere"], "'nowhere', which does not exist, expected the folder of a Janus"),
    (["teacher.pretrained_teacher_model=/"], "which holds no model"),
    (["method.keeps=[0, 64]"], r"keeps is \[0, 64\]: expected fewer than the 64 tokens"),
    (["method.split=64"], "split is 64: expected fewer than the 64 tokens"),
    (["teacher.top_k=33"], "top_k 33, expected at most the 32 codes"),
    (["train.allow_tf32=true"], "train.allow_tf32=True, expected its default"),
    (["method.whole=true"], "settings of a LoRA with method.whole=true, expected no `lora`"),
    (["data.proportion_empty_prompts=0.5"], "pairs belong to their prompts"),
    (["teacher.max_sequence_length=4"], "a prompt of 8 tokens, 'red apple': expected at most 4"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=[words[0].split("=")[0] for words, _ in BAD])
def test_bad_input_is_one_line_before_work_is_done(argv, tmp_path, capsys, overrides, message):
    said = refused(capsys, "train", *argv, *overrides)
    assert re.search(message, said), said
    assert not (tmp_path / "run").exists() and not (tmp_path / "pairs").exists()


@pytest.mark.parametrize("command", [["data", "make"], ["precompute"], ["train", "--dry-run"]])
def test_other_commands_refuse_it_too(argv, tmp_path, capsys, command):
    """The length of a prompt and the numbers of known tokens need the processor and the config alone."""
    for words, message in (
        ("teacher.max_sequence_length=4", "a prompt of 8 tokens"),
        ("method.keeps=[0, 64]", "expected fewer than the 64 tokens"),
        ("train.cache_latents=true", "train.cache_latents=True, expected its default"),
    ):
        assert message in refused(capsys, *command, *argv, words)
    assert not (tmp_path / "run").exists() and not (tmp_path / "pairs").exists()


def test_a_prompt_that_leaves_no_position_for_the_image_is_refused(argv, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a big brown dog face " * 3)
    assert "by the model's positions" in refused(capsys, "train", *argv)


def test_a_folder_with_parts_of_another_pipeline_is_refused_and_an_overwritten_student_goes(argv, tmp_path, capsys):
    out = tmp_path / "run"
    (out / "vqmodel").mkdir(parents=True)
    (out / "vqmodel" / "mine.txt").write_text("mine")
    refused(capsys, "train", *argv)
    assert (out / "vqmodel" / "mine.txt").read_text() == "mine"
    rmtree(out)
    short = (*argv, "data.count=4", "--max-train-steps", "1", "method.ema_decay=null")
    main(["train", *short])
    assert (out / "model_index.json").exists()
    run = read_run(argv[0], [*short[1:], "train.overwrite_output_dir=true"])
    assert isinstance(run, DecodingRun)
    open_folder(prepare_decoding(run), None)
    assert {file.name for file in out.iterdir()} == {"metrics.jsonl", "config.yaml"}


def test_a_student_of_short_prompts_alone_is_proved(argv, tmp_path):
    (tmp_path / "prompts.txt").write_text("rose")
    short = ("teacher.max_sequence_length=6", "data.count=4", "--max-train-steps", "1", "method.ema_decay=null")
    main(["train", *argv, *short])
    proof = read_decoder(tmp_path / "run").proof
    assert proof is not None and proof.equal == proof.tokens == 128


def test_a_teacher_is_known_by_its_words_and_its_template(janus):
    plain = Janus(pretrained_teacher_model=str(janus)).load()
    processor = JanusProcessor.from_pretrained(janus)
    processor.chat_template = "{% for message in messages %}draw {{ message['content'][0]['text'] }}{% endfor %}"
    told = replace(plain, processor=processor)
    assert told.digest != plain.digest
    assert torch.equal(told.read(["rose"]).ids, plain.read(["draw rose"]).ids)
    other = JanusProcessor.from_pretrained(janus)
    other.tokenizer.add_tokens(["unheard"])
    assert replace(plain, processor=other).digest != plain.digest


def changed(janus: Path, place: Path, change: Any) -> Path:
    """The model with another table of codes."""
    model: Any = JanusForConditionalGeneration.from_pretrained(janus)
    with torch.no_grad():
        change(model.model.vqmodel.quantize.embedding.weight)
    model.save_pretrained(place)
    JanusProcessor.from_pretrained(janus).save_pretrained(place)
    return place


CODES = {
    "alike": (lambda table: table[9].copy_(2 * table[4]), "codes 4 and 9 alike, expected different codes"),
    "dead": (lambda table: table[5].zero_(), "code 5 of length 0, expected codes of length 1"),
    "nan": (lambda table: table[7].fill_(float("nan")), "code 7 with NaN or infinity, expected finite codes"),
}


@pytest.mark.parametrize("fault", CODES)
def test_a_codebook_that_has_no_map(argv, janus, tmp_path, capsys, fault):
    change, message = CODES[fault]
    other = changed(janus, tmp_path / "other", change)
    for command in (["train"], ["data", "make"]):
        said = refused(capsys, *command, *argv, f"teacher.pretrained_teacher_model={other}")
        assert message in said, said
    assert not (tmp_path / "run").exists() and not (tmp_path / "pairs").exists()


def test_codes_have_the_length_that_the_decoder_sees(janus, tmp_path):
    """A table of another normalisation is the same model."""
    teachers = [
        Janus(pretrained_teacher_model=str(place)).load()
        for place in (janus, changed(janus, tmp_path / "other", lambda table: table.mul_(4)))
    ]
    assert torch.equal(*(teacher.codes for teacher in teachers))
    assert torch.allclose(teachers[1].codes.norm(dim=1), torch.ones(32))


def test_a_part_that_only_reads_images_or_writes_text_is_dropped(janus):
    model = Janus(pretrained_teacher_model=str(janus)).load().model
    assert [name for name, _ in model.named_children()] == ["model"]
    parts = {name for name, _ in model.model.named_children()}
    assert parts == {"vqmodel", "generation_embeddings", "generation_aligner", "generation_head", "language_model"}
