"""Mutated recipes: each is accepted or refused by an error of ours, and what is accepted survives its own YAML."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepdistill.config.dump import config_to_yaml
from stepdistill.core.errors import StepdistillError
from stepdistill.decoding.run import DecodingRun, check_decoding_run, read_run
from stepdistill.training.checks import check_run

ROOT = Path(__file__).parents[1]
RECIPES = [*sorted((ROOT / "configs/recipes").glob("*.yaml")), *sorted((ROOT / "configs/tables").glob("*/*.yaml"))]
SCALARS = [
    *(
        "0",
        "-1",
        "1",
        "1e308",
        "-1e308",
        "1e-320",
        ".inf",
        "-.inf",
        ".nan",
        "9" * 30,
        "9" * 5000,
        "0x1f",
        "1_000",
        "0o7",
    ),
    *("true", "no", "null", "~", "''", "'1e-4'", "x", "ü\\0", "'\\u0000'", "2024-01-01", "12:30:45", "!!binary aGk="),
    *(
        "${",
        "${}",
        "${x",
        "${train}",
        "${train.seed}",
        "${oc.env:NOWHERE}",
        "${oc.env:HOME}",
        "${a:b}",
        "\\${x}",
        "???",
    ),
    *("'${'", "'${x'", "'${${}'", "'a ${train.seed} b'", "'${.x}'", "'${..seed}'", "'${oc.decode:\"[\"}'"),
    *("[]", "{}", "[1]", "[1, 2]", "[[1]]", "[x, y]", "{a: 1}", "{type: x}", "{type: torch.optim.SGD}", "{1: 2}"),
    *("{null: 1}", "{true: 1}", "{type: }", "{type: [1]}", "{type: 3}", "{'': 1}", "{a.b: 1}", "[null]", "[~, 1e308]"),
    *("stepdistill.data.Prompts", "{type: stepdistill.data.Prompts}", "{type: stepdistill.data.Prompts, prompts: [a]}"),
    *(
        "{type: os.system}",
        "{type: builtins.print}",
        "{type: stepdistill.methods.consistency.Consistency}",
        "!!set {a}",
    ),
    *("&a [*a]", "{type: math.pi}", "{type: stepdistill}", "{type: .}", "{type: a..b}", "{type: stepdistill.data.}"),
]
PLAIN = [  # values that some field may well take
    *("2", "3", "8", "0.5", "0.02", "3e-4", "7.5", "16", "'4'", "1e3", "[4]", "[8, 4]", "[0.1, 0.9]", "[20, 980]"),
    *("true", "false", "null", "linear", "cosine", "none", "bf16", "all", "[a cat]", "~/x", "tiny-sd3", "edge", "any"),
]
KEYS = [
    "type",
    "seed",
    "rank",
    "x",
    "a.b",
    "''",
    "1",
    "null",
    "true",
    "'${x}'",
    "a b",
    "'[0]'",
    "'a[0'",
    "train",
    "<<",
    "!!str a",
]
OVERRIDES = [
    "{key}={value}",
    "--{key}={value}",
    "--{key}",
    "{key}",
    "{key}.{key}={value}",
    "{key}[0]={value}",
    "{key}..={value}",
]


def paths(node: Any, at: tuple = ()) -> Iterator[tuple]:
    """The path of every node below the root."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield (*at, key)
        yield from paths(child, (*at, key))


def mutated(rng: random.Random, text: str) -> str:
    """A recipe with one to three nodes replaced, added or removed, or with some characters changed."""
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text))
            text = (
                text[:at]
                + rng.choice(["", "${", "}", "'", ":", "\t", "&", "*", "!", "\n", "\0", "é", "- ", "1e308"])
                + text[at + rng.randint(0, 2) :]
            )
        return text
    tree, marks = yaml.safe_load(text), {}
    for n in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(list(paths(tree)))
        node = tree
        for key in path[:-1]:
            node = node[key]
        what = rng.random()
        if what < 0.1:
            del node[path[-1]]
        else:
            marks[f"MARK{n}"] = rng.choice(rng.choice((SCALARS, PLAIN)))
            if what < 0.25 and isinstance(node, dict):
                marks[f"KEY{n}"] = rng.choice(KEYS)
                node[f"KEY{n}"] = f"MARK{n}"
            else:
                node[path[-1]] = f"MARK{n}"
    text = yaml.safe_dump(tree, sort_keys=False)
    for mark, value in marks.items():
        text = text.replace(mark, value)
    return text


def overrides(rng: random.Random, text: str) -> list[str]:
    """Some command-line overrides, of keys that there are and of others."""
    known = [".".join(map(str, path)) for path in paths(yaml.safe_load(text))]
    keys = [*known, *(name.rpartition(".")[2] for name in known), *KEYS]
    words = [
        rng.choice(OVERRIDES).format(key=rng.choice(keys), value=rng.choice(rng.choice((SCALARS, PLAIN))))
        for _ in range(rng.randint(0, 2))
    ]
    return words if rng.random() < 0.2 else []


def accepted(seed: int, file: Path) -> bool:
    """Whether mutant `seed` is accepted; any other exception than ours goes through."""
    rng = random.Random(seed)
    text = rng.choice(RECIPES).read_text()
    words = overrides(rng, text)
    file.write_text(mutated(rng, text), encoding="utf-8")
    try:
        run = read_run(file, words)
    except StepdistillError:
        return False
    with suppress(StepdistillError):
        check_decoding_run(run) if isinstance(run, DecodingRun) else check_run(run)
    file.write_text(config_to_yaml(run), encoding="utf-8")
    assert repr(read_run(file)) == repr(run)
    return True


@pytest.mark.parametrize("seed", range(5))
def test_a_mutated_recipe_is_accepted_or_refused_by_an_error_of_ours(tmp_path, seed):
    count = sum(accepted(80 * seed + i, tmp_path / "mutant.yaml") for i in range(80))
    assert 0 < count < 76


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_thousands_of_mutated_recipes(tmp_path, seed):
    for i in range(200):
        accepted(1000 + 200 * seed + i, tmp_path / "mutant.yaml")
