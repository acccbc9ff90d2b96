"""README and documentation say what was measured and what is there."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from tables import multistep, render

from stepdistill import methods
from stepdistill.decoding.run import read_run
from stepdistill.evaluation.metrics.frechet import feature_diversity, frechet
from stepdistill.evaluation.metrics.stats import Stats
from stepdistill.evaluation.stored_features import StoredFeatures

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_result_files():
    """Each is shown once in the documentation; the README may show it, too, or in its place."""
    measured = {file.stem for file in (ROOT / "eval" / "results").glob("*.json")}
    shown: dict[bool, list[str]] = {True: [], False: []}
    for file in render.documents(ROOT):
        text = file.read_text()
        shown[file.name == "README.md"] += re.findall(r"<!-- table (\w+) -->", text)
        assert render.render(text, ROOT / "eval" / "results") == text, f"{file}: python eval/tables.py --render"
    assert all(len(names) == len(set(names)) for names in shown.values()), shown
    assert {*shown[True], *shown[False]} - {"overview"} == measured & set(render.RENDERERS)


def test_a_stale_table_is_noticed(tmp_path):
    row = {"excess": 12.3, "ci95": [10.0, 15.0], "paired": 1.0, "diversity": 0.9, "nfe": 4.0}
    row |= {"train_steps": 240, "train_seconds": 150}
    (tmp_path / "consistency.json").write_text(json.dumps({"tiny-sd/lcm/4": row}))
    stale = "before\n<!-- table consistency -->\nold figures\n<!-- end -->\nafter\n"
    made = render.render(stale, tmp_path)
    assert made.startswith("before\n") and made.endswith("after\n") and "old" not in made
    assert "| tiny-sd: lcm |  |  | 12 [10, 15] |  | 1.0 | 0.90 | 4 | 240 steps, 2.5 min |" in made
    assert render.render(made, tmp_path) == made


def test_hybrids_and_styles_are_told_with_their_intervals():
    row = {"excess": 174.8, "ci95": [155.0, 194.6], "paired": 48.04, "diversity": 0.949, "steps": 4, "base_steps": 1}
    row |= {"diversity_ci95": [0.94, 0.958], "gain": 0.058, "gain_ci95": [0.049, -0.067]}
    alone = {**row, "base_steps": 0, "diversity": 0.891}
    made = render.RENDERERS["hybrid"]({"tiny-sd/m/late": row, "tiny-sd/m/student": alone}).split("\n")
    assert made[2].startswith("| tiny-sd: m, student | 4, 0 | 0.891 [0.940, 0.958] |  | 175 [155, 195] | 48.0 |")
    assert "late | 4, 1 | 0.949 [0.940, 0.958] | +0.058 [+0.049, -0.067] |" in made[3]
    row = {"on_teacher": -0.2, "on_student": -0.1, "share": 0.5, "strength": 1.0, "steps": 1}
    row |= {f"{key}_ci95": [row[key] - 0.01, row[key] + 0.01] for key in ("on_teacher", "on_student", "share")}
    made = render.RENDERERS["transfer"]({"tiny-sd/grey, learnt on m/m/1": row}).split("\n")[2]
    cells = "1 | -0.200 [-0.210, -0.190] | -0.100 [-0.110, -0.090] | 0.50 [0.49, 0.51]"
    assert made == f"| tiny-sd: grey, learnt on m; m, 1 step | {cells} |"


def test_what_an_option_changes_is_told_with_intervals():
    ours, others, taught = (torch.randn(60, 3, generator=torch.manual_seed(k)) * (1 + k) for k in range(3))
    ref = StoredFeatures({"floor": taught, "reference": taught + 1}, ["a", "b", "c"] * 20, {})
    row = multistep.difference(ours, others, ref)
    index = torch.arange(60) % 3
    spread = [feature_diversity(each, index) for each in (ours, others, taught)]
    assert row["diversity"] == pytest.approx(spread[0] / spread[2])
    assert row["gain"] == pytest.approx((spread[0] - spread[1]) / spread[2])
    near, far = (frechet(Stats.of(each), Stats.of(taught + 1)) for each in (ours, others))
    assert row["excess_change"] == pytest.approx(near - far)
    assert all(row[f"{key}_ci95"][0] < row[key] < row[f"{key}_ci95"][1] for key in ("gain", "excess_change"))
    page = multistep.differences_page({"tiny-sd/anchor/than four": row | {"than": "four"}}).split("\n")[2]
    assert page.startswith(f"| tiny-sd: anchor, beside four | {row['diversity']:.3f} [")
    assert page.endswith(f"{round(row['excess_change_ci95'][1])}] |")


def test_every_method_cites_its_paper():
    found = [m.name for m in pkgutil.iter_modules(methods.__path__) if m.name != "base"]
    assert found
    for name in found:
        module = importlib.import_module(f"stepdistill.methods.{name}")
        classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
        assert any("References:" in (c.__doc__ or "") for c in classes), name


def test_every_config_builds():
    files = [f for f in sorted((ROOT / "configs").rglob("*.yaml")) if f.parent.name not in ("accelerate", "teachers")]
    assert files
    for file in files:
        run = read_run(file)
        assert run.train.output_dir.startswith("runs/"), file


def test_linked_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
