"""Truths about the repository itself: who imports whom, what lies where, what is declared."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from omegaconf import OmegaConf

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "stepdistill"
SCRIPTS = ("train", "sample", "eval")
FILES = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "NOTICE", "mkdocs.yml"}
TOP = {*FILES, "stepdistill", "tests", "configs", "docs", *SCRIPTS}


def found(folder: Path, pattern: str) -> list[Path]:
    """The files of a glob, of which there must be some: a test over none proves nothing."""
    files = sorted(f for f in folder.glob(pattern) if f.is_file() and "__pycache__" not in f.parts)
    assert files, f"no {pattern} in {folder}"
    return files


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert listed.stdout, "git tracks no file"
    return listed.stdout.splitlines()


def imports(path: Path, part: ast.AST | None = None) -> set[str]:
    """Dotted names that a file, or a part of it, imports; `from a import b` counts as `a` and as `a.b`."""
    names = set()
    for node in ast.walk(part or ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parent.parts
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *filter(None, [node.module])])
            names |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
    return names


def literals(path: Path) -> Iterator[str]:
    """Identifiers and strings of a file, docstrings aside."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    prose = [node.value for node in nodes if isinstance(node, ast.Expr)]
    for node in nodes:
        match node:
            case ast.Name(id=text) | ast.Attribute(attr=text) | ast.alias(name=text):
                yield text
            case ast.Constant(value=str(text)) if node not in prose:
                yield text


def sources() -> list[Path]:
    """The library and the scripts, tests aside."""
    return found(PACKAGE, "**/*.py") + [file for name in SCRIPTS for file in found(ROOT / name, "**/*.py")]


def test_no_method_is_named_outside_methods():
    files = [f for f in found(PACKAGE / "methods", "*.py") if f.stem not in ("__init__", "base")]
    stems = [f.stem for f in files]
    bodies = [node for f in files for node in ast.parse(f.read_text()).body]
    classes = sorted(node.name for node in bodies if isinstance(node, ast.ClassDef))
    assert stems and classes, "stepdistill/methods holds nothing but its base"
    named = re.compile(rf"\bmethods\.({'|'.join(stems)})\b|\b({'|'.join(classes)})\b")
    for file in set(sources()) - set(files):
        assert not [name for name in imports(file) if named.search(name)], file
        assert not [text for text in literals(file) if named.search(text)], file


def test_top_level_holds_only_what_is_decided():
    top = {path.split("/")[0] for path in tracked()}
    assert {name for name in top if not name.startswith(".")} == TOP


def test_no_path_of_a_machine():
    roots = "work opt root home Users mnt media scratch tmp".split()
    pattern = rf"(^|[ \"'`(=:])/({'|'.join(roots)})/"
    assert re.search(pattern, f"open('/{roots[3]}/me/weights')"), "the pattern would find none"
    assert tracked()
    hits = subprocess.run(["git", "grep", "-InE", pattern], cwd=ROOT, capture_output=True, text=True)
    assert hits.returncode == 1, hits.stdout + hits.stderr  # 1: nothing found


def test_files_are_short():
    lines = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in found(PACKAGE, "**/*.py")}
    assert not {name: n for name, n in lines.items() if n > 300}
    assert lines["stepdistill/training/loop.py"] < 250


@pytest.mark.parametrize("folder", SCRIPTS)
def test_scripts_hold_no_class(folder: str):
    for file in found(ROOT / folder, "*.py"):
        assert not [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ClassDef)], file


@pytest.mark.parametrize("config", found(ROOT / "configs", "**/*.yaml"), ids=lambda f: str(f.relative_to(ROOT)))
def test_config_opens_with_its_command(config: Path):
    first = config.read_text().splitlines()[0]
    assert re.match(r"# ([A-Z_]+=\S+ )?(accelerate launch|python) ", first), first
    words = first.split()
    assert str(config.relative_to(ROOT)) in words, "the command does not name this file"
    files = [word for word in words if word.endswith((".py", ".yaml"))]
    assert len(files) >= 2, "a command is a script and a config"
    assert not [name for name in files if not (ROOT / name).is_file()]


@pytest.mark.parametrize("config", found(ROOT / "configs", "**/*.yaml"), ids=lambda f: str(f.relative_to(ROOT)))
def test_lines_of_a_config_fit(config: Path):
    assert not [line for line in config.read_text().splitlines()[1:] if len(line) > 120]  # the command stays one line


@pytest.mark.parametrize("config", found(ROOT / "configs/teachers", "*.yaml"), ids=lambda f: f.stem)
def test_teacher_config_names_the_bundled_folders(config: Path):
    values = OmegaConf.load(config)
    index = (
        "config.json" if values.pipeline == "janus" else "model_index.json"
    )  # a model of transformers, or a pipeline
    assert (ROOT / values.output_dir / index).is_file()
    assert (ROOT / values.get("vae_dir", values.output_dir)).is_dir()


@pytest.mark.parametrize("config", found(ROOT / "configs/accelerate", "*.yaml"), ids=lambda f: f.stem)
def test_accelerate_reads_its_launch_file(config: Path):
    read = load_config_from_file(str(config))  # refuses unknown keys
    assert read.num_processes % read.num_machines == 0
    assert (read.num_processes > 1) == (read.distributed_type == "MULTI_GPU")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [("one_process", 1), ("two_processes_cpu", 2)])
def test_launch_file_starts_its_processes(name: str, processes: int, tmp_path: Path):
    script = tmp_path / "sum_of_ranks.py"
    script.write_text(
        "import torch\nfrom accelerate import Accelerator\naccelerator = Accelerator()\n"
        "total = accelerator.reduce(torch.tensor([accelerator.process_index + 1]))\n"
        "print(f'{accelerator.process_index}/{accelerator.num_processes} {total.item()}\\n', end='')\n"
        "accelerator.end_training()\n"  # as `distill` does: leaving gloo's threads running aborts some exits
    )
    first, *_ = (ROOT / f"configs/accelerate/{name}.yaml").read_text().splitlines()
    words = first.removeprefix("# ").split()
    variables = dict(word.split("=") for word in words[: words.index("accelerate")])
    command = words[words.index("accelerate") : words.index("train/distill.py")]
    assert Path(command[0]).name == "accelerate"
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command[1:], str(script)],
        cwd=ROOT,
        env={**os.environ, **variables, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    total = processes * (processes + 1) // 2
    lines = [line for line in done.stdout.splitlines() if "/" in line]
    assert sorted(lines) == [f"{rank}/{processes} {total}" for rank in range(processes)]


def test_imports_are_declared():
    """What the top of a file imports is a dependency; what an extra brings is imported inside functions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def names(*lists: list[str]) -> set[str]:
        return {re.split(r"[^\w.-]", r)[0].lower().replace("_", "-") for one in lists for r in one}

    always = names(project["dependencies"])
    anywhere = always | names(*(extras[extra] for extra in extras if extra != "test"))
    assert always < anywhere
    distributions = packages_distributions()
    for file in sources():
        tree = ast.parse(file.read_text())
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for nodes, declared in ((top, always), ([tree], anywhere)):
            heads = {name.split(".")[0] for node in nodes for name in imports(file, node)}
            for head in heads - sys.stdlib_module_names - {"stepdistill", "tables"}:
                owners = {owner.lower().replace("_", "-") for owner in distributions.get(head, [])}
                assert owners & declared, f"{file}: pyproject.toml does not declare {head} for this place"


def test_ci_runs_the_readme_s_test_command():
    assert "pip install -e '.[test]' && pytest\n" in (ROOT / "README.md").read_text()
    steps, hooks = (ROOT / ".ci/run").read_text(), (ROOT / ".pre-commit-config.yaml").read_text()
    for command in ("ruff check .", "ruff format --check .", "pyright"):
        assert f"\nstep {command}\n" in steps
        assert f" entry: {command}\n" in hooks
    assert "\nstep pip install -e '.[test,docs]'\n" in steps
    assert "\nstep mkdocs build --strict\n" in steps
    assert "\nstep pytest\n" in steps
