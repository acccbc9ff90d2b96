"""No command writes over an input or over what this tool did not write; for its own files `--overwrite` is asked."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import SIDE, awake, backbone

from stepdistill.cli import main as cli
from stepdistill.cli.eval import _open
from stepdistill.core.errors import OutputError, StepdistillError
from stepdistill.core.outputs import MARK, check_output_file, check_output_folder, check_output_tree, is_marked
from stepdistill.families.base import Family
from stepdistill.families.sd import StableDiffusion
from stepdistill.methods.regression import Regression
from stepdistill.networks.roles import Lora
from stepdistill.students.base_model import Base
from stepdistill.students.contract import WEIGHTS
from stepdistill.students.draw.sheet import save_image
from stepdistill.students.write import write_unproven


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """A student of the bundled teacher."""
    folder, family = tmp_path_factory.mktemp("student") / "mine", StableDiffusion(pretrained_teacher_model="tiny-sd")
    pipe = family.load()
    bone = backbone("sd", pipe, 2)
    bone.add("student", Lora())
    awake(bone, "student")
    names = ("float32", "bfloat16", "float16")
    base = Base({name: "0" * 64 for name in names}, (), None)
    options = {"role": "student", "method": Regression(num_inference_steps=1, ema_decay=None), "base": base}
    write_unproven(folder, family=family, pipe=pipe, backbone=bone, resolution=(SIDE, SIDE), **options)
    return folder


def run(*argv: object) -> None:
    cli.main([str(word) for word in argv])


def refused(capsys, *argv: object) -> str:
    """The one line with which a command is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith("stepdistill: got output ") and said.count("\n") == 1, said
    return said


def content(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# the rule


def test_a_file_is_replaced_only_where_it_is_no_input_ours_and_asked_for(tmp_path):
    own, foreign, folder = tmp_path / "own.txt", tmp_path / "foreign.txt", tmp_path / "folder"
    own.write_bytes(b"x" * 3 + MARK)
    foreign.write_bytes(b"x")
    folder.mkdir()
    (folder / "own.txt").write_bytes(MARK)
    (tmp_path / "link.txt").symlink_to(own)
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "absent")
    check_output_file(tmp_path / "new" / "deep" / "file.txt")
    check_output_file(own, overwrite=True)
    check_output_file(folder / "new.txt", inputs=[folder])
    for file, inputs, overwrite, said in [
        (own, [], False, "add --overwrite"),
        (own, [own], True, "belongs to the input"),
        (tmp_path / "link.txt", [own], True, "belongs to the input"),
        (folder / "own.txt", ["org/model", folder], True, "belongs to the input"),
        (foreign, [], True, "without stepdistill's mark, .* if an earlier version of stepdistill wrote it, remove it"),
        (tmp_path / "nowhere.txt", [], True, "without stepdistill's mark"),
        (folder, [], True, "a folder, expected the name of a file"),
    ]:
        with pytest.raises(OutputError, match=said):
            check_output_file(file, inputs, overwrite)
    assert not (tmp_path / "new").exists() and own.read_bytes() == b"xxx" + MARK


def test_a_tree_is_replaced_only_where_it_is_no_input_ours_and_asked_for(tmp_path):
    (tmp_path / "out" / "stats").mkdir(parents=True)
    (tmp_path / "out" / "stats" / "reference.npz").write_bytes(b"x")
    (tmp_path / "out" / "other").write_bytes(b"x")
    written = ["stats", "*.csv"]
    check_output_tree(tmp_path / "out", ["*.csv"], [tmp_path / "out" / "other"], own=False, overwrite=False)
    check_output_tree(tmp_path / "out", written, [tmp_path / "out" / "other"], own=True, overwrite=True)
    for inputs, own, overwrite, said in [
        ([tmp_path / "out"], True, True, "which is an input"),
        ([tmp_path / "out" / "stats" / "reference.npz"], True, True, "holds the input"),
        ([], False, True, "which holds stats, expected a new or empty folder: they are not"),
        ([], True, False, "add --overwrite"),
    ]:
        with pytest.raises(OutputError, match=said):
            check_output_tree(tmp_path / "out", written, inputs, own, overwrite)


@pytest.mark.parametrize("place", ["file/below", "/proc/below", "x" * 300, "a\0b", "loop/below"])
def test_a_folder_that_cannot_be_written_is_found_out_before(tmp_path, place):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for check, path in [(check_output_folder, tmp_path / place), (check_output_file, tmp_path / place / "x.png")]:
        with pytest.raises(OutputError, match="got output .*, expected a folder that can be written to"):
            check(path)
    with pytest.raises(OutputError):
        check_output_file(tmp_path / place)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "loop"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_an_image_says_who_wrote_it(tmp_path, suffix):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8))
    save_image(image, tmp_path / "deep" / f"a{suffix}")
    image.save(tmp_path / f"b{suffix}")
    assert is_marked(tmp_path / "deep" / f"a{suffix}") and not is_marked(tmp_path / f"b{suffix}")
    with Image.open(tmp_path / "deep" / f"a{suffix}") as again, Image.open(tmp_path / f"b{suffix}") as plain:
        assert np.array_equal(np.asarray(again), np.asarray(plain))


# generate, view


def test_generate_keeps_what_is_not_its_own(student, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "00001.png").write_bytes(b"my photo")
    (out / "notes.txt").write_text("mine")
    call = ("generate", student, "rose", "octopus", "-o", out)
    for more in ((), ("--overwrite",)):
        assert "00001.png, which exists" in refused(capsys, *call, *more)
    assert sorted(file.name for file in out.iterdir()) == ["00001.png", "notes.txt"]
    (out / "00001.png").rename(out / "7.png")
    run(*call)
    first = content(out)
    assert len(first) == 5
    assert "add --overwrite" in refused(capsys, "generate", student, "rose", "-o", out)
    file = out / "images.jsonl"
    assert "the input" in refused(capsys, "generate", student, "--prompts-file", file, "-o", out, "--overwrite")
    assert content(out) == first
    run("generate", student, "rose", "-o", out, "--overwrite")
    names = ["00000.png", "7.png", "images.jsonl", "notes.txt"]
    assert sorted(file.name for file in out.iterdir()) == names  # 00001.png was its own
    assert (out / "7.png").read_bytes() == b"my photo" and len(file.read_text().splitlines()) == 1


@pytest.mark.parametrize("command", [("view", "-o"), ("generate", "--grid")])
def test_sheets_keep_what_is_not_their_own(student, tmp_path, capsys, command):
    sheet = tmp_path / "sheet.png"
    sheet.write_bytes(b"my photo")
    name, flag = command
    output = ("-o", tmp_path / "images") if name == "generate" else ()
    for more in ((), ("--overwrite",)):
        assert "without stepdistill's mark" in refused(capsys, name, student, "rose", *output, flag, sheet, *more)
    assert "ends in .png" in refused(capsys, name, student, "rose", *output, flag, tmp_path / "sheet.xyz")
    assert content(tmp_path) == {sheet: b"my photo"}
    sheet.unlink()
    steps = () if name == "generate" else ("--teacher-steps", 2)
    run(name, student, "rose", *output, flag, sheet, *steps)
    shutil.rmtree(tmp_path / "images", ignore_errors=True)
    assert "add --overwrite" in refused(capsys, name, student, "rose", *output, flag, sheet)
    run(name, student, "rose", *output, flag, sheet, *steps, "--overwrite")


@pytest.mark.parametrize("linked", [False, True])
def test_a_grid_is_no_image_under_another_spelling(student, tmp_path, capsys, linked):
    images = tmp_path / "images"
    images.mkdir()
    if linked:
        (tmp_path / "link").symlink_to(images)
    grid = tmp_path / ("link" if linked else "images/../images") / "00000.png"
    with pytest.raises(SystemExit):
        run("generate", student, "rose", "-o", images, "--grid", grid)
    assert "an image has that name" in capsys.readouterr().err and not content(images)


# convert


def test_convert_keeps_its_input_and_what_is_not_its_own(student, tmp_path, capsys):
    mine = shutil.copytree(student, tmp_path / "mine")
    before, other = content(mine), tmp_path / "other.safetensors"
    for more in ((), ("--overwrite",)):
        assert "the input" in refused(capsys, "convert", mine, mine / WEIGHTS, "--to", "kohya", *more)
        assert "the input" in refused(capsys, "convert", mine / WEIGHTS, mine / WEIGHTS, "--to", "kohya", *more)
    other.write_bytes(b"my weights")
    assert "without stepdistill's mark" in refused(capsys, "convert", mine, other, "--to", "kohya", "--overwrite")
    assert content(mine) == before and other.read_bytes() == b"my weights"
    other.unlink()
    (tmp_path / "other.safetensors.part").write_bytes(b"a download")
    run("convert", mine, other, "--to", "kohya")
    assert (tmp_path / "other.safetensors.part").read_bytes() == b"a download"
    first = other.read_bytes()
    assert "add --overwrite" in refused(capsys, "convert", mine, other, "--to", "comfyui")
    assert other.read_bytes() == first
    run("convert", mine, other, "--to", "diffusers", "--overwrite")
    assert other.read_bytes() != first


def test_a_fused_student_replaces_an_earlier_one_alone(student, tmp_path, capsys):
    base = tmp_path / "base"
    (base / "unet").mkdir(parents=True)
    (base / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"the base")
    before = content(base)
    for target in (base, student, student.parent):
        assert "expected a" in refused(capsys, "convert", student, target, "--to", "fused", "--overwrite")
    assert content(base) == before


# eval


@pytest.fixture
def images(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def test_other_processes_do_not_look_at_a_folder_that_the_first_empties(images, tmp_path, monkeypatch):
    """They saw a report without the stores of its evaluation, called it a file of others, and left the first alone."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "eval.json").write_text("{}")
    args = argparse.Namespace(output=tmp_path / "out", ref=None, prompts=None, clip=None)
    with pytest.raises(OutputError, match="which holds eval.json"):
        _open(args, [images], overwrite=True)
    monkeypatch.setenv("RANK", "1")
    _open(args, [images], overwrite=True)
    assert (tmp_path / "out" / "eval.json").exists()


def test_evaluations_keep_their_inputs_and_what_is_not_their_own(images, tmp_path, capsys):
    out, score = tmp_path / "out", ("eval", "score", images, "--features", "pixels", "--metrics", "kid", "--ref")
    before = content(images)
    assert "which is an input" in refused(capsys, *score, images, "-o", images)
    (out / "grids").mkdir(parents=True)
    (out / "grids" / "mine.png").write_bytes(b"mine")
    for more in ((), ("--overwrite",)):
        assert "which holds grids" in refused(capsys, *score, images, "-o", out, *more)
    assert content(out) == {out / "grids" / "mine.png": b"mine"} and content(images) == before
    shutil.rmtree(out)
    (out).mkdir()
    (out / "notes.txt").write_text("mine")
    run(*score, images, "-o", out)
    written = content(out)
    stats = out / "stats" / "reference.npz"
    assert "holds the input" in refused(capsys, *score, stats, "-o", out)
    assert content(out) == written
    run(*score, images, "-o", out)  # goes on
    half = shutil.copytree(images, tmp_path / "half", ignore=shutil.ignore_patterns("1.png"))
    with pytest.raises(SystemExit):
        run(*score, half, "-o", out)
    assert "another" in capsys.readouterr().err
    run(*score, half, "-o", out, "--overwrite")
    assert json.loads((out / "eval.json").read_text())["reference"]["n"] == 39
    assert (out / "notes.txt").read_text() == "mine"


def test_statistics_and_pages_keep_what_is_not_their_own(images, tmp_path, capsys):
    ref, page, table = tmp_path / "ref.npz", tmp_path / "page.html", tmp_path / "table.csv"
    make = ("eval", "ref", images, "--features", "pixels", "-o", ref)
    np.savez(ref, mu=np.zeros(3), sigma=np.eye(3))
    assert "without stepdistill's mark" in refused(capsys, *make, "--overwrite")
    ref.unlink()
    (tmp_path / "ref.work").mkdir()
    (tmp_path / "ref.work" / "mine").write_text("mine")
    assert "ref.work, which holds mine" in refused(capsys, *make)
    shutil.rmtree(tmp_path / "ref.work")
    run(*make)
    assert "add --overwrite" in refused(capsys, *make)
    assert "the input" in refused(capsys, "eval", "ref", ref, "-o", ref, "--overwrite")
    run(*make, "--overwrite")
    out = tmp_path / "out"
    score = ("eval", "score", images, "--features", "pixels", "--metrics", "kid", "--ref", ref, "-o", out)
    run(*score)
    compare = ("eval", "compare", out, "-o", page, "--csv", table)
    table.write_text("a,b\n1,2\n")
    assert "without stepdistill's mark" in refused(capsys, *compare, "--overwrite")
    table.unlink()
    run(*compare)
    assert "add --overwrite" in refused(capsys, *compare)
    run(*compare, "--overwrite")
    assert "the input" in refused(capsys, "eval", "compare", out, "-o", out / "report.html", "--overwrite")


def test_a_curve_keeps_what_is_not_its_own(tmp_path, capsys):
    (tmp_path / "curve.json").write_text("{}")
    call = ("doctor", tmp_path / "run", "--save-curve", tmp_path / "curve.json", "--overwrite")
    assert "without stepdistill's mark" in refused(capsys, *call)
    assert issubclass(OutputError, StepdistillError)


# train, data make, precompute


@pytest.fixture
def config(tmp_path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "# mine\nfamily: {type: stepdistill.families.sd.StableDiffusion, pretrained_teacher_model: tiny-sd}\n"
        "method: {type: stepdistill.methods.regression.Regression}\n"
        "data: {type: stepdistill.data.TeacherSamples, source: {type: stepdistill.data.Prompts, prompts: [rose]}, "
        f"folder: {tmp_path / 'samples'}, count: 2, num_inference_steps: 1}}\n"
        "train: {output_dir: out, report_to: none, overwrite_output_dir: true, max_train_steps: 1}\n"
    )
    return file


@pytest.mark.parametrize("name", ["README.md", "config.yaml", "samples", "scheduler", WEIGHTS, "checkpoint-500"])
def test_a_run_replaces_no_files_of_others(config, tmp_path, capsys, name):
    out = tmp_path / "out"
    (out / name).mkdir(parents=True) if "." not in name else out.mkdir()
    mine = out / name if "." in name else out / name / "mine"
    mine.write_bytes(b"mine")
    resume = "train.resume_from_checkpoint=latest"  # which starts at the beginning where there is no checkpoint
    for more in ((), () if name.startswith("checkpoint") else (resume,)):
        said = refused(capsys, "train", config, f"train.output_dir={out}", *more, "--dry-run")
        assert (f"which holds {name}, expected" in said) and content(out) == {mine: b"mine"}


def test_a_run_replaces_no_input(config, student, tmp_path, capsys):
    base = tmp_path / "base"
    StableDiffusion(pretrained_teacher_model="tiny-sd").load().save_pretrained(base)
    mine, before = shutil.copytree(student, tmp_path / "mine"), content(base)
    for words in (
        [f"family.pretrained_teacher_model={base}", f"train.output_dir={base}"],
        [f"lora.init_from={mine}", f"train.output_dir={mine}"],
        [f"lora.init_from={mine / WEIGHTS}", f"train.output_dir={mine}"],
    ):
        assert "input" in refused(capsys, "train", config, *words, "--dry-run")
    assert content(base) == before and content(mine) == {
        mine / k.relative_to(student): v for k, v in content(student).items()
    }


@pytest.mark.parametrize(
    ("command", "key"),
    [
        *(("train", "train.output_dir"), ("train", "data.folder")),
        *(("data make", "data.folder"), ("precompute", "train.cache_dir")),
    ],
)
def test_what_cannot_be_written_ends_a_run_at_once(config, tmp_path, capsys, monkeypatch, command, key):
    monkeypatch.setattr(Family, "load", lambda *_: pytest.fail("the teacher is loaded"))
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "below", Path("/proc") / "below", tmp_path / ("x" * 300)):
        refused(capsys, *command.split(), config, f"{key}={place}")


def test_an_overwritten_run_leaves_nothing(config, tmp_path):
    out = tmp_path / "out"
    words = [f"train.output_dir={out}", "lora.rank=2", "train.train_batch_size=2"]
    run("train", config, *words)
    for name in ("eval.json", "samples", "best", "comfyui_workflow.json", "unet"):
        assert not (out / name).exists()
        (out / name).write_text("of an earlier run") if "." in name else (out / name).mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "mine.safetensors").write_bytes(b"mine")
    run("train", config, *words)
    names = {"README.md", "checkpoint-1", "config.yaml", "distill_config.json", "metrics.jsonl", WEIGHTS, "scheduler"}
    assert {file.name for file in out.iterdir()} == names | {"notes.txt", "mine.safetensors"}
