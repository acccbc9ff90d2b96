"""The command: what it hands on, what it prints, how it ends. The library behind it is a toy."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import runpy
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field, make_dataclass
from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from stepdistill import families, methods
from stepdistill.cli import main as cli
from stepdistill.cli.dialect import FREE, RENAMED, spelled
from stepdistill.cli.train import module_names
from stepdistill.config.dump import config_to_yaml
from stepdistill.config.load import load_config
from stepdistill.config.registry import find, heirs, offered
from stepdistill.config.schema import Factory, dotted, fields, leaves, locate
from stepdistill.config.template import template
from stepdistill.core.errors import ConfigError, DataError, NonFiniteLoss
from stepdistill.students.proof import FLOAT32  # it imports modules that a toy stands in for below

ROOT = Path(__file__).parents[1]

BASE = '''
from abc import ABC, abstractmethod
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class Part(ABC):
    """A part.

    Args:
        size: how large it is,
            in metres.
    """

    size: float

    @abstractmethod
    def area(self) -> float: ...
'''
ONE = '''
"""One part."""
from dataclasses import dataclass
from typing import Literal
from toy.base import Part

@dataclass(frozen=True, kw_only=True)
class Round(Part):
    """A round part,
    with no corner.

    Args:
        path: where it lies: here or there.
        colour: `red` or `blue`.
    """

    path: str
    colour: Literal["red", "blue"] = "blue"
    ends: tuple[float, ...] = (1.0, 1e-5)
    note: str | None = None

    def area(self) -> float:
        return 3.0
'''
TWO = """
from dataclasses import dataclass
from toy.base import Part

@dataclass(frozen=True, kw_only=True)
class Square(Part):
    def area(self) -> float:
        return 4.0

@dataclass(frozen=True, kw_only=True)
class Around(Part):
    inner: Part

    def area(self) -> float:
        return 5.0
"""


@dataclass(frozen=True, kw_only=True)
class Train:
    """The loop.

    Args:
        learning_rate: step size of the optimizer.
        output_dir: folder that is written.
    """

    output_dir: Path
    learning_rate: float = 1e-4
    seed: int = 0
    allow_tf32: bool = False
    optimizer: Factory = Factory("torch.optim.AdamW", {"weight_decay": 0.01})
    threshold: float = 1e300


@dataclass(frozen=True, kw_only=True)
class Lora:
    rank: int = 64


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A toy package of parts, and a record of calls in place of `run`, `data` and `student`."""
    for name, text in {"__init__": "", "base": BASE, "one": ONE, "two": TWO}.items():
        (tmp_path / "toy").mkdir(exist_ok=True)
        (tmp_path / "toy" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("toy", "toy.base", "toy.one", "toy.two"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    part = locate("toy.base.Part")
    lora = field(default_factory=lambda: Lora(rank=5))
    parts = [(key, part) for key in ("family", "method", "data")]
    run_class = make_dataclass("Run", [*parts, ("train", Train), ("lora", Lora, lora)], frozen=True, kw_only=True)
    calls: list[tuple[str, object]] = []

    def distill(run: object) -> Path:
        calls.append(("distill", run))
        return Path("out")

    def dry_run(run: object) -> str:
        calls.append(("dry_run", run))
        return "student 3 MB"

    def check(source: object) -> str:
        calls.append(("check", source))
        return "12 samples"

    def verify(folder: Path) -> dict[str, float]:
        words = folder.name.split("+")
        return {"diffusers": float(words[0]), "kohya": float(words[-1])}

    stubs = {
        "training.recipe": {"Run": run_class},
        "training.distill": {"distill": distill, "dry_run": dry_run},
        "decoding.run": {"read_run": partial(load_config, run_class), "DecodingRun": type("DecodingRun", (), {})},
        "decoding.train": {"distill_decoder": distill},
        "decoding.memory": {"dry_run_decoder": dry_run},
        "data": {"check_source": check},
        "students.verify": {"verify_formats": verify},
    }
    for name, members in stubs.items():
        module = types.ModuleType(f"stepdistill.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, f"stepdistill.{name}", module)
    return types.SimpleNamespace(Run=run_class, part=part, calls=calls, run=sys.modules["stepdistill.training.distill"])


@pytest.fixture
def path(tmp_path: Path) -> str:
    text = "".join(f"{key}: {{type: toy.two.Square, size: 2}}\n" for key in ("family", "method", "data"))
    (tmp_path / "mine.yaml").write_text(f"{text}train: {{output_dir: a}}\n")
    return str(tmp_path / "mine.yaml")


def ended(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    return caught.value.code


def test_help_comes_without_the_heavy_libraries() -> None:
    code = """
import sys, time
from stepdistill.cli.main import main
for command in [], ["train"], ["init"], ["data", "check"], ["verify"], ["convert"], ["multi"]:
    try:
        main([*command, "--help"])
    except SystemExit as ended:
        assert ended.code == 0
heavy = {"torch", "numpy", "diffusers", "transformers", "peft", "datasets", "accelerate"} & set(sys.modules)
assert not heavy, heavy
assert time.process_time() < 1, time.process_time()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: stepdistill") == 7
    assert done.stdout.count("example") >= 7
    assert "--learning-rate 1e-4" in done.stdout


def test_train_distils_the_resolved_config_and_leaves_the_screen_to_the_run(library, path, capsys) -> None:
    cli.main(["train", path, "--learning_rate", "1e-3", "train.seed=-3", "--allow_tf32=true"])
    ((what, run),) = library.calls
    assert what == "distill"
    assert (run.train.learning_rate, run.train.seed, run.train.allow_tf32) == (1e-3, -3, True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("place", [0, 1, 3, 4])
def test_dry_run_stops_before_distilling_wherever_it_stands(library, path, capsys, place: int) -> None:
    argv = [path, "--output_dir", "-1e-3", "train.seed=4"]
    cli.main(["train", *argv[:place], "--dry-run", *argv[place:]])
    ((what, run),) = library.calls
    assert what == "dry_run"
    assert (run.train.output_dir, run.train.seed) == (Path("-1e-3"), 4)
    assert capsys.readouterr().out.split() == [*config_to_yaml(run).split(), "student", "3", "MB"]


def test_only_the_first_process_prints_the_config(library, path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    cli.main(["train", path, "--dry-run"])
    assert capsys.readouterr().out == ""


def test_input_errors_are_one_block_with_status_2(library, path, capsys) -> None:
    assert ended("train", path, "--learning_rat", "3", "train.seed=x") == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[0] == f"stepdistill: {path}: 2 problems"
    assert lines[1].startswith("  --learning_rat: unknown; did you mean learning_rate?")
    assert lines[2].startswith("  train.seed: got 'x' (str), expected int")
    assert "Traceback" not in captured.err
    assert not library.calls


def test_an_error_of_the_run_is_told_from_a_defect(library, path, capsys, monkeypatch) -> None:
    def diverge(run: object) -> Path:
        raise NonFiniteLoss("step 3: loss is nan")

    monkeypatch.setattr(library.run, "distill", diverge)
    assert ended("train", path) == 2
    assert capsys.readouterr().err == "stepdistill: step 3: loss is nan\n"

    def defect(run: object) -> Path:
        raise ValueError("a defect")

    monkeypatch.setattr(library.run, "distill", defect)
    with pytest.raises(ValueError, match="a defect"):
        cli.main(["train", path])


def test_a_config_is_needed_and_other_commands_take_no_overrides(library, capsys) -> None:
    assert ended("train") == 2
    assert ended("train", "absent.yaml") == 2
    assert "expected a YAML file" in capsys.readouterr().err
    assert ended("verify", "0", "--seed", "3") == 2
    assert "unrecognized arguments: --seed 3" in capsys.readouterr().err


def test_data_check_hands_on_the_source_alone(library, path, capsys, monkeypatch) -> None:
    cli.main(["data", "check", path, "data.size=9"])
    ((what, source),) = library.calls
    assert what == "check"
    assert source.size == 9.0
    assert capsys.readouterr().out == "12 samples\n"

    def bad(source: object) -> str:
        raise DataError("sample 3: no caption")

    monkeypatch.setattr(sys.modules["stepdistill.data"], "check_source", bad)
    assert ended("data", "check", path) == 2
    assert capsys.readouterr().err == "stepdistill: sample 3: no caption\n"


def test_verify_fails_above_the_tolerance_and_for_nan(library, capsys, monkeypatch) -> None:
    monkeypatch.setattr("stepdistill.students.contract.kind_of", lambda folder: "lora")
    assert FLOAT32 == 1e-4  # as in training
    cli.main(["verify", "9e-5"])
    assert "9e-05" in capsys.readouterr().out
    assert ended("verify", "2e-4") == 1
    cli.main(["verify", "2e-4", "--tolerance", "1e-3"])
    assert ended("verify", "nan") == 1
    capsys.readouterr()
    assert ended("verify", "1e-6+2e-4") == 1  # one format is enough
    assert capsys.readouterr().out.splitlines()[1] == "largest difference with the kohya file: 0.0002"
    assert ended("verify", "1e-6+nan") == 1


@pytest.mark.parametrize("launcher", ["train/distill.py", "stepdistill"])
def test_launchers_are_the_same_command(library, path, monkeypatch, launcher: str) -> None:
    first = [] if launcher.endswith(".py") else ["train"]
    monkeypatch.setattr(sys, "argv", [launcher, *first, path, "--dry-run"])
    if first:
        runpy.run_module(launcher, run_name="__main__")
    else:
        runpy.run_path(str(ROOT / launcher), run_name="__main__")
    assert [what for what, _ in library.calls] == ["dry_run"]


def test_the_script_opens_with_its_command() -> None:
    first = (ROOT / "train" / "distill.py").read_text().splitlines()[0]
    assert first == '"""accelerate launch train/distill.py configs/quickstart.yaml'


def test_init_prints_a_config_that_loads_to_the_defaults(library, tmp_path, capsys) -> None:
    cli.main(["init", "one", "two.Square", "toy.two.Around"])
    text = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(text)
    run = load_config(library.Run, tmp_path / "printed.yaml")
    round_part, square, around = (locate(f"toy.{name}") for name in ("one.Round", "two.Square", "two.Around"))
    assert run.method == round_part(path=run.method.path, size=run.method.size)
    assert type(run.family) is square
    assert type(run.data) is around
    assert type(run.data.inner) is not around
    assert run.train == Train(output_dir=run.train.output_dir)
    assert run.lora == Lora(rank=5)


def test_init_explains_every_field_from_the_docstrings(library, capsys) -> None:
    cli.main(["init", "one", "two.Square", "one"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "# accelerate launch -m stepdistill train THIS_FILE"
    assert lines[lines.index("path: CHANGE-ME") - 1] == "# (required) where it lies: here or there."
    assert lines[lines.index("size: 1.0") - 1] == "# (required) how large it is, in metres."
    assert lines[lines.index("colour: blue") - 1] == "# `red` or `blue`."
    assert lines[lines.index("learning_rate: 0.0001") - 1] == "# step size of the optimizer."
    assert lines[lines.index("method:") - 1] == "# A round part, with no corner."
    assert lines[lines.index("method:") + 1] == "type: toy.one.Round"
    assert not any("Square(" in line for line in lines)


def test_init_alone_lists_methods_and_families(capsys) -> None:
    cli.main(["init"])
    lines = capsys.readouterr().out.splitlines()
    names = [("method", name) for name in module_names(methods)] + [("family", name) for name in module_names(families)]
    names.append(("method", "decoding"))
    assert [tuple(line.split()[:2]) for line in lines] == names
    assert all(len(line.split()) > 3 for line in lines)
    assert ended("init", "consistency") == 2
    assert "got no family" in capsys.readouterr().err


def test_init_names_the_classes_there_are(library, capsys) -> None:
    assert ended("init", "two", "one") == 2
    assert "two: expected a module with one Part, it has: two.Square, two.Around" in capsys.readouterr().err
    assert ended("init", "onne", "one") == 2
    assert "onne: unknown; did you mean one? toy has: one, two.Around, two.Square\n" in capsys.readouterr().err
    assert ended("init", "base", "one") == 2
    assert "base: unknown; toy has: one, two.Around, two.Square\n" in capsys.readouterr().err
    assert ended("init", "one.Rond", "one") == 2
    assert "did you mean Round?" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "package"), [("method", methods), ("family", families)])
def test_an_unknown_name_is_answered_with_all_that_init_takes_and_no_helper(key, package) -> None:
    from stepdistill.training.recipe import Run

    base = fields(Run)[key]
    for name in ("sdx", "schedulers", "parts", "loss"):
        with pytest.raises(ConfigError) as error:
            find(base, name)
        offers = str(error.value).partition(" has: ")[2].split(", ")
        assert offers == module_names(package)
    with pytest.raises(ConfigError, match="base: expected a module with one Method, .* Averaged .it lacks needs"):
        find(fields(Run)["method"], "base")


def test_an_unchosen_abstract_field_takes_a_subclass_and_names_the_others(library, tmp_path) -> None:
    find(library.part, "two.Square")
    text = template(library.Run, {})
    assert "type: toy.two.Square\n" in text
    assert "# or type: toy.two.Around\n" in text
    (tmp_path / "printed.yaml").write_text(text)
    assert set(vars(load_config(library.Run, tmp_path / "printed.yaml"))) == set(fields(library.Run))


def test_an_abstract_field_without_a_subclass_is_an_error(library) -> None:
    with pytest.raises(ConfigError, match="Part has no subclass that works without further classes"):
        template(library.Run, {})


def test_init_of_every_method_and_family_and_source_loads(tmp_path, capsys) -> None:
    from stepdistill.training.checks import check_needs
    from stepdistill.training.recipe import Run

    names: dict[str, list[str]] = {}
    for key, base in fields(Run).items():
        package = base.__module__.removesuffix(".base")
        if key in ("family", "method", "data"):
            for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
                importlib.import_module(f"{package}.{module.name}")
            names[key] = [dotted(cls) for cls in offered(base)]
    assert all(names.values())
    runs = [(method, family) for method in names["method"] for family in names["family"]]
    sources = [(names["method"][0], names["family"][0], source) for source in names["data"]]
    for argv in [*runs, *sources]:
        cli.main(["init", *argv])
        (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
        run = load_config(Run, tmp_path / "printed.yaml")
        made = (run.method, run.family, run.data)
        assert tuple(dotted(type(part)) for part in made[: len(argv)]) == argv
        (tmp_path / "resolved.yaml").write_text(config_to_yaml(run))
        assert load_config(Run, tmp_path / "resolved.yaml") == run
        if len(argv) == 2:  # the default source serves every method
            check_needs(run.data, run.method)


def test_init_offers_no_class_from_elsewhere() -> None:
    from stepdistill.data import Source
    from stepdistill.training.memory.predict import Unmade

    assert issubclass(Unmade, Source)
    assert Unmade not in offered(Source) and Unmade in heirs(Source)


@pytest.mark.parametrize("method", module_names(methods))
def test_init_takes_the_name_of_every_method_file(method, capsys) -> None:
    cli.main(["init", method, "sd"])
    assert f"type: stepdistill.methods.{method}." in capsys.readouterr().out


def test_init_of_a_decoder_loads(tmp_path, capsys) -> None:
    from stepdistill.decoding.run import DecodingRun, check_settings, read_run

    cli.main(["init", "decoding"])
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    run = read_run(tmp_path / "printed.yaml", ["teacher.pretrained_teacher_model=owner/name"])
    assert isinstance(run, DecodingRun)
    check_settings(run)
    assert "eval_samples" not in printed and "init_from" not in printed
    cli.main(["init"])
    assert "method  decoding         Distilled Decoding" in capsys.readouterr().out
    assert ended("init", "decoding", "sd") == 2
    assert "got family sd, expected METHOD alone" in capsys.readouterr().err


@pytest.mark.parametrize("family", module_names(families))
def test_init_takes_the_name_of_every_family_file(family, capsys) -> None:
    cli.main(["init", "dmd2", family])
    assert f"type: stepdistill.families.{family}." in capsys.readouterr().out


def commands(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command by name, with its parser."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for word, command in [pair for group in groups for pair in group.choices.items()]:
        yield from commands(command, f"{name} {word}".strip())
    if not groups:
        yield name, parser


COMMANDS = dict(commands(cli._parser()))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_flags_and_keys_that_exist(name) -> None:
    from stepdistill.training.recipe import Run

    parser, tree = COMMANDS[name], OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "quickstart.yaml"))
    keys = leaves(Run, tree)
    declared = {flag for command in COMMANDS.values() for flag in command._option_string_actions}
    assert parser.epilog and len(COMMANDS) > 10
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", f"{parser.epilog} {parser.description}"):
        known = declared if name.split()[0] not in FREE else declared | {f"--{key.rpartition('.')[2]}" for key in keys}
        assert flag in known or flag.replace("-", "_").replace("__", "--", 1) in known, flag
    for key in re.findall(r"(?<![\w.])((?:train|data|family|lora)\.\w+)", f"{parser.epilog}"):
        assert key in keys or key == "data.student", key


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_have_hyphens_and_no_earlier_spelling(name) -> None:
    flags = set(COMMANDS[name]._option_string_actions)
    assert not [flag for flag in flags if "_" in flag] and not flags & set(RENAMED)


@pytest.mark.parametrize("old", RENAMED)
def test_an_earlier_spelling_is_named(old, capsys) -> None:
    assert ended("eval", "run", "tiny-sd", f"{old}=1", "-o", "out") == 2
    assert f"{old} is called {RENAMED[old]}" in capsys.readouterr().err


def test_hyphens_and_underscores_are_the_same() -> None:
    words = ["generate", "runs/a", "--prompts_file", "a_b.txt", "--num_images_per_prompt=3", "cat_face"]
    assert spelled(words) == (
        ["generate", "runs/a", "--prompts-file", "a_b.txt", "--num-images-per-prompt=3", "cat_face"],
        None,
    )
    assert spelled(["train", "x.yaml", "--prompts", "a"])[1] is None  # a key of the config


def test_overrides_take_hyphens(library, path) -> None:
    cli.main(["train", path, "--learning-rate", "1e-3", "--output-dir=a-b_c"])
    ((_, run),) = library.calls
    assert run.train.learning_rate == 1e-3 and run.train.output_dir == Path("a-b_c")


@pytest.mark.parametrize("command", [["init", "consistency", "sd"], ["train", "configs/quickstart.yaml", "--dry-run"]])
def test_commands_print_no_warnings_of_libraries(command) -> None:
    run = [sys.executable, "-m", "stepdistill", *command]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout
    assert done.stderr == ""
