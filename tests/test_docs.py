"""The documentation: generated pages are complete, what it shows runs. Links are checked by `mkdocs build --strict`."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import method_pages
import nbformat
import pytest
import reference_pages
import run_notebooks
import yaml
from notebook_pages import page

from stepdistill.cli import main as cli
from stepdistill.cli.dialect import spelled
from stepdistill.config.load import load_config
from stepdistill.config.schema import dotted, fields
from stepdistill.training.recipe import Run

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
METHODS = method_pages.all_methods()
NOTEBOOKS = sorted((DOCS / "start").glob("*.ipynb"))


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return method_pages.pages() | reference_pages.pages()


def test_every_method_has_a_page_of_its_own_with_equation_papers_and_config(pages):
    assert len({method_pages.page_of(cls) for cls in METHODS}) == len(METHODS) > 10
    for cls in METHODS:
        text = pages[method_pages.page_of(cls)]
        assert text.startswith(f"# {cls.__name__}\n") and "## Equation" in text, cls
        urls = [paper.url for part in method_pages.options(cls) for paper in method_pages.papers(part)]
        assert urls, f"{cls}: its docstring has no References"
        assert not [url for url in urls if url not in text or url not in pages["methods/papers.md"]], cls
        (config,) = re.findall(r"```yaml\nmethod:\n(.*?)```", text, re.DOTALL)
        assert set(yaml.safe_load(config)) - {"type"} == set(fields(cls)), cls


def test_every_recipe_is_on_its_page_and_on_its_method_s(pages):
    recipes = method_pages.read_recipes()
    assert len(recipes) == len(list((ROOT / "configs/recipes").glob("*.yaml"))) > 10
    for recipe in recipes:
        assert f"## {recipe.file.stem} " in pages["methods/recipes.md"]
        text = pages[method_pages.page_of(type(recipe.run.method))]
        assert recipe.numbers and all(f"| `{key}` |" in text for key, _, _ in recipe.numbers), recipe.file


def test_settings_of_the_paper_index_are_accepted(tmp_path):
    parts = [(cls, part) for cls in METHODS for part in method_pages.options(cls)]
    cited = [(cls, paper) for cls, part in parts for paper in method_pages.papers(part) if paper.settings]
    assert len(cited) > 8
    quickstart = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    for cls, paper in cited:
        method = {"type": dotted(cls), **yaml.safe_load(f"{{{paper.settings}}}")}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(quickstart | {"method": method}))
        assert isinstance(load_config(Run, tmp_path / "run.yaml").method, cls), paper


def test_every_command_has_its_help(pages):
    listed = dict(reference_pages.commands(cli._parser()))
    assert ("stepdistill", "data", "make") in listed
    assert not [words for words in listed if f"# {' '.join(words)}\n" not in pages["reference/commands.md"]]


def shown_commands() -> list[tuple[str, str]]:
    """The lines of shell blocks that call stepdistill."""
    found = []
    for file in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]:
        for block in re.findall(r"```(?:bash|shell|console)\n(.*?)```", file.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if call := re.search(r"(?:^|&& |-m )stepdistill (.*)", line):
                    found.append((str(file.relative_to(ROOT)), call[1]))
    return found


def test_shown_commands_are_understood(capsys):
    shown = shown_commands()
    assert len(shown) > 10
    wrong = []
    for file, line in shown:
        words, renamed = spelled(shlex.split(line.replace("...", "x").partition(" >")[0], comments=True))
        try:
            args, rest = cli._parser().parse_known_args(words)
        except SystemExit as end:
            wrong += [(file, line, capsys.readouterr().err)] if end.code else []
        else:
            if renamed or (rest and "config" not in args):
                wrong.append((file, line, renamed or rest))
    assert not wrong


@pytest.mark.slow
def test_the_method_that_the_documentation_shows_runs(tmp_path):
    text = (DOCS / "extend" / "method.md").read_text()
    files = dict(re.findall(r"Save this as `([\w.]+)`:\n\n```\w+\n(.*?)```", text, re.DOTALL))
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    _, config = files
    done = subprocess.run(
        [sys.executable, "-m", "stepdistill", "train", str(tmp_path / config), "train.max_train_steps=2"]
        + [f"train.output_dir={tmp_path / 'out'}", "train.report_to=none"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "distill_config.json").read_text())["proof"]["difference"] < 1e-4


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_hold_the_outputs_of_a_whole_run(file):
    cells = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert file.stat().st_size < 300_000
    text, images = page(file)
    assert images and all(f"]({name})" in text for name in images)


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_run(file, tmp_path, monkeypatch):
    quick = f"train.max_train_steps=2 train.eval_samples=40 train.output_dir={tmp_path / 'out'}"
    monkeypatch.setenv("STEPDISTILL_NOTEBOOK_OVERRIDES", quick)
    monkeypatch.setenv("STEPDISTILL_NOTEBOOK_STEPS", "2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = run_notebooks.run(file)
    shown = [output for cell in done.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 3
