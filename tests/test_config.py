"""A config is refused with every problem named, or becomes exactly the instance that its text says."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Le

from stepdistill.config.dump import config_digest, config_to_yaml
from stepdistill.config.kinds import Place
from stepdistill.config.load import load_config
from stepdistill.config.schema import Factory
from stepdistill.core.errors import ConfigError, StepdistillError, problem

HERE = __name__


def gathered(*args: object, **kwargs: object) -> tuple:
    return args, kwargs


class Spacing(Enum):
    LEADING = "leading"
    TRAILING = "trailing"


@dataclass(frozen=True, kw_only=True)
class Noise(ABC):
    """An abstract part."""

    @abstractmethod
    def scale(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class Table(Noise):
    shift: float = 3.0
    steps: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"shift is {self.shift}: expected a positive number")

    def scale(self) -> float:
        return self.shift


@dataclass(frozen=True, kw_only=True)
class Mixed(Noise):
    parts: tuple[Noise, ...]
    named: dict[str, Noise] = field(default_factory=dict)
    pair: tuple[Noise, Ema] | None = None

    def scale(self) -> float:
        return sum(part.scale() for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class Unfinished(Noise):
    pass


@dataclass(frozen=True, kw_only=True)
class Ema:
    decay: float = 0.95


@dataclass(frozen=True, kw_only=True)
class Swap:
    every: int = 10


@dataclass(frozen=True, kw_only=True)
class Lora:
    rank: int = 64
    alpha: float | None = None
    roles: dict[str, Lora] | None = None


@dataclass(frozen=True, kw_only=True)
class Train:
    output_dir: Path
    learning_rate: float = 1e-4
    max_train_steps: int = 1000
    allow_tf32: bool = False
    compile: bool | None = None
    seed: int = 0
    guidance_scale: float | tuple[float, float] = 7.5
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    revision: str | None = None
    resume: int | str | None = None
    place: Place | None = None
    places: tuple[Place, ...] = ()
    validation_prompts: tuple[str, ...] = ()
    report_to: frozenset[str] = frozenset({"tensorboard"})
    spacing: Spacing = Spacing.TRAILING
    share: Annotated[float, Ge(0), Le(1)] = 0.0
    optimizer: Factory = Factory("torch.optim.AdamW")
    optimizers: dict[str, Factory] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Run:
    noise: Noise
    train: Train
    lora: Lora = Lora()
    average: Ema | Swap | None = None
    seed: int = 0


GOOD = f"""
noise: {{type: {HERE}.Table, shift: 2}}
train:
  output_dir: runs/a
"""


@pytest.fixture
def write(tmp_path: Path):
    def file(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return file


def trained(write, line: str, *overrides: str) -> Any:
    """The run of a config whose `train` node has one more line."""
    return load_config(Run, write(f"{GOOD}  {line}\n"), overrides)


def refused(path: Path | None, *overrides: str) -> list[str]:
    """The lines of the error, without the heading."""
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path, overrides)
    return str(caught.value).split("\n  ")[1:]


def test_errors_are_one_family() -> None:
    assert issubclass(ConfigError, StepdistillError)
    assert issubclass(ConfigError, ValueError)
    assert problem("3", "4", "four fit", "add one") == "got 3, expected 4: four fit; add one"


def test_a_config_becomes_the_instance(write) -> None:
    run = load_config(Run, write(GOOD), [])
    assert run == Run(noise=Table(shift=2.0), train=Train(output_dir=Path("runs/a")))
    assert type(run.noise.shift) is float


def test_nested_types_are_built_from_the_leaves_up(write) -> None:
    table = f"type: {HERE}.Table"
    text = f"""
noise:
  type: {HERE}.Mixed
  parts: [{{{table}, shift: 1}}, {{type: {HERE}.Mixed, parts: [{{{table}, shift: 4}}]}}]
  named: {{low: {{{table}}}}}
train: {{output_dir: a, optimizers: {{fake: {{type: torch.optim.SGD, momentum: 0.9}}}}}}
lora: {{rank: 8, roles: {{fake: {{rank: 2}}}}}}
average: {{type: {HERE}.Swap, every: 3}}
"""
    run = load_config(Run, write(text), [])
    inner = Mixed(parts=(Table(shift=4),))
    assert run.noise == Mixed(parts=(Table(shift=1), inner), named={"low": Table()})
    assert run.lora == Lora(rank=8, roles={"fake": Lora(rank=2)})
    assert run.average == Swap(every=3)
    assert run.train.optimizers == {"fake": Factory("torch.optim.SGD", {"momentum": 0.9})}


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: '1e-4'", "learning_rate", 1e-4),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("max_train_steps: 1e5", "max_train_steps", 100_000),
        ("guidance_scale: [2, 14]", "guidance_scale", (2.0, 14.0)),
        ("guidance_scale: 1e0", "guidance_scale", 1.0),
        ("revision: '1e4'", "revision", "1e4"),
        ("resume: '100'", "resume", "100"),
        ("resume: 100", "resume", 100),
        ("compile: null", "compile", None),
        ("validation_prompts: [a cat, 'a: dog']", "validation_prompts", ("a cat", "a: dog")),
        ("report_to: [wandb, none]", "report_to", frozenset({"wandb", "none"})),
        ("spacing: leading", "spacing", Spacing.LEADING),
        ("mixed_precision: bf16", "mixed_precision", "bf16"),
        ("seed: ${seed}", "seed", 0),
    ],
)
def test_values_keep_their_type(write, line: str, name: str, value: object) -> None:
    run = trained(write, line, "seed=0")
    got = vars(run.train)[name]
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("line", "path", "words"),
    [
        ("learning_rate: true", "train.learning_rate", "got True (bool), expected float"),
        ("learning_rate: fast", "train.learning_rate", "got 'fast' (str), expected float"),
        ("max_train_steps: 1.5", "train.max_train_steps", "got 1.5 (float), expected int"),
        ("max_train_steps: true", "train.max_train_steps", "got True (bool), expected int"),
        ("max_train_steps: null", "train.max_train_steps", "got None (NoneType), expected int"),
        ("allow_tf32: 1", "train.allow_tf32", "got 1 (int), expected bool"),
        ("allow_tf32: 'true'", "train.allow_tf32", "got 'true' (str), expected bool"),
        ("guidance_scale: [2, true]", "train.guidance_scale", "expected float | tuple[float, float]"),
        ("learning_rate: .nan", "train.learning_rate", "finite number"),
        ("learning_rate: '-inf'", "train.learning_rate", "finite number"),
        ("guidance_scale: [.inf, 1]", "train.guidance_scale", "finite number"),
        ("guidance_scale: [1, 2, 3]", "train.guidance_scale", "expected float | tuple[float, float]"),
        ("revision: 0123", "train.revision", "got 83 (int), expected str | null"),
        ("revision: 12", "train.revision", "put text in quotes"),
        ("mixed_precision: no", "train.mixed_precision", "put text in quotes"),
        ("mixed_precision: fp8", "train.mixed_precision", "'no', 'fp16' or 'bf16'"),
        ("validation_prompts: a cat", "train.validation_prompts", "write a list: [a cat]"),
        ("validation_prompts: [a cat, 3]", "train.validation_prompts", "[1] Input should be a valid string"),
        ("share: 1.5", "train.share", "less than or equal to 1"),
        ("optimizer: torch.optim.AdamW", "train.optimizer", "expected a mapping for Factory"),
        ("optimizer: {weight_decay: 0.1}", "train.optimizer", "the dotted path of a class or function"),
        ("optimizer: {type: torch.optim.AdmW}", "train.optimizer", "did you mean AdamW?"),
        ("optimizer: {type: torch.optim.AdamW, weight_decy: 0}", "train.optimizer", "mean weight_decay?"),
        ("optimizer: {type: torch.optim.AdamW, weight_decay: true}", "train.optimizer", "expected a number"),
    ],
)
def test_wrong_types_are_refused_by_path(write, line: str, path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        trained(write, line)
    assert f"\n  {path}: " in str(caught.value)
    assert words in str(caught.value)
    assert "1 problem" in str(caught.value)


def test_every_problem_is_reported_at_once(write) -> None:
    text = f"""
trian: {{}}
noise: {{type: {HERE}.Table, shift: -1}}
train: {{learning_rat: 1, max_train_steps: true, rank: 4, optimizer: {{type: torch.optim.AdmW}}}}
lora: {{rank: 4.5, roles: {{fake: {{alpha: x}}}}}}
"""
    lines = refused(write(text), "--nothing", "1")
    starts = [line.split(":")[0] for line in lines]
    assert starts == [
        "--nothing",
        "trian",
        "noise",
        "train.learning_rat",
        "train.rank",
        "train.output_dir",
        "train.max_train_steps",
        "train.optimizer",
        "lora.rank",
        "lora.roles.fake.alpha",
    ]
    said = dict(zip(starts, lines, strict=True))
    assert "did you mean train?" in said["trian"]
    assert "Run has: noise, train, lora, average, seed" in said["trian"]
    assert said["noise"] == "noise: shift is -1.0: expected a positive number"
    assert "did you mean learning_rate? Train has: output_dir, learning_rate" in said["train.learning_rat"]
    assert "did you mean lora.rank?" in said["train.rank"]
    assert "missing; Train needs it (Path)" in said["train.output_dir"]


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ("{}", f"got no `type`, expected `type:` and the dotted path of a Noise, such as {HERE}.Table"),
        ("3", "got 3, expected a mapping for Noise"),
        ("null", "got None, expected a mapping for Noise"),
        (f"{{type: {HERE}.Tabel}}", "did you mean Table?"),
        (f"{{type: {HERE}.Lora}}", "expected a dataclass that is a Noise"),
        (f"{{type: {HERE}.Unfinished}}", "it lacks scale; define"),
        ("{type: torch.optim.AdamW}", "expected a dataclass that is a Noise"),
        ("{type: Table}", "expected package.module.Name"),
        ("{type: 3}", "expected package.module.Name"),
        ("{type: stepdistill.methds.base.Method}", "no module stepdistill.methds; did you mean methods?"),
        ("{type: nowhere_at_all.Table}", "no module nowhere_at_all"),
    ],
)
def test_a_type_must_lead_to_a_finished_subclass(write, node: str, words: str) -> None:
    (line,) = refused(write(f"noise: {node}\ntrain: {{output_dir: a}}\n"))
    assert line.startswith("noise: ")
    assert words in line


def test_a_tuple_of_objects_has_its_length(write) -> None:
    table = f"{{type: {HERE}.Table}}"
    text = f"noise: {{type: {HERE}.Mixed, parts: [], pair: [%s]}}\ntrain: {{output_dir: a}}\n"
    assert load_config(Run, write(text % f"{table}, {{decay: 0.5}}")).noise.pair == (Table(), Ema(decay=0.5))
    (line,) = refused(write(text % table))
    assert line.startswith("noise.pair: got [")
    assert "expected tuple[Noise, Ema] | null" in line
    (line,) = refused(write(text % f"{table}, {{decay: x}}"))
    assert line.startswith("noise.pair[1].decay: got 'x' (str), expected float")


def test_a_module_that_lacks_a_package_says_which(write, tmp_path, monkeypatch) -> None:
    (tmp_path / "needy.py").write_text("import package_that_is_absent\n")
    monkeypatch.syspath_prepend(tmp_path)
    (line,) = refused(write("noise: {type: needy.Table}\ntrain: {output_dir: a}\n"))
    assert "needy needs package_that_is_absent, which is not installed" in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1,\n", "is not YAML"),
        ("- a\n", "expected keys"),
        ("a: 1\na: 2\n", "duplicate key"),
        ("x: ${y}", "${"),
        ("x: ${", "a `${path.of.a.key}` of this config"),
        (f"x: {'1' * 5000}", "is not YAML"),
        ("x: !!bool x", "is not YAML"),
        ("x: !!int ''", "is not YAML"),
        ("x: !!timestamp x", "is not YAML"),
        ("- " * 500 + "1", "is not YAML"),
        ("average: {type: test_config.Swap, every: !!binary aGk=}", "average.every: got b'hi' (bytes), expected int"),
        (f"average: {{type: test_config.Swap, every: {10**30}}}", "average.every: got 1"),
        (f"average: {{type: test_config.Swap, every: {-(10**30)}}}", "average.every: got -1"),
    ],
)
def test_files_that_are_no_config(write, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match="config.yaml") as caught:
        load_config(Run, write(text), [])
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["!!bool x", "!!int ''", "!!timestamp x", "!!set {a}", "[1"])
def test_overrides_that_do_not_parse(write, text: str) -> None:
    with pytest.raises(ConfigError, match=r"train.seed: got .*, which does not parse"):
        load_config(Run, write("train: {output_dir: a}\n"), [f"train.seed={text}"])


def test_missing_and_binary_files(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="expected a YAML file"):
            load_config(Run, path, [])
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ConfigError, match="image.yaml"):
        load_config(Run, tmp_path / "image.yaml", [])


def test_overrides_by_path_by_leaf_and_alone(write) -> None:
    path = write(GOOD)
    given = [
        "train.learning_rate=2e-4",
        "--max_train_steps",
        "7",
        "--shift=5",
        "--allow_tf32",
        "lora.roles.fake.rank=3",
    ]
    run = load_config(Run, path, given)
    assert run.train.learning_rate == 2e-4
    assert run.train.max_train_steps == 7
    assert run.noise == Table(shift=5.0)
    assert run.train.allow_tf32 is True
    assert run.lora == Lora(roles={"fake": Lora(rank=3)})
    assert load_config(Run, path, ["--allow_tf32", "false"]).train.allow_tf32 is False
    assert load_config(Run, path, ["--compile", "--max_train_steps", "7"]).train.compile is True
    assert load_config(Run, path, ["--train.seed", "-4", "seed=2", "seed=3"]) == load_config(
        Run, path, ["train.seed=-4", "seed=3"]
    )
    assert load_config(Run, None, [f"noise.type={HERE}.Table", "--output_dir", "a"]).train.output_dir == Path("a")


def test_an_override_replaces_the_class_before_its_keys_are_looked_up(write) -> None:
    run = load_config(Run, write(GOOD), ["--every", "3", f"average.type={HERE}.Swap"])
    assert run.average == Swap(every=3)


def test_overrides_of_text_are_taken_as_they_stand(write) -> None:
    path = write(GOOD)
    for text in ("1e4", "no", "0123", "a: b", "[x"):
        assert load_config(Run, path, ["--revision", text]).train.revision == text
        assert load_config(Run, path, [f"train.revision={text}"]).train.revision == text
    assert load_config(Run, path, ["--revision", "null"]).train.revision is None
    assert load_config(Run, path, ["--mixed_precision", "no"]).train.mixed_precision == "no"
    prompts = load_config(Run, path, ["train.validation_prompts=[a cat, 'x=1']"]).train.validation_prompts
    assert prompts == ("a cat", "x=1")


def test_a_path_may_begin_with_the_home_folder(write, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/else/me")
    run = trained(write, "places: [~/a, b~, org/name]", "train.place=~/c", "--output_dir", "~/d")
    assert run.train.place == "/else/me/c" and run.train.places == ("/else/me/a", "b~", "org/name")
    assert run.train.output_dir == Path("/else/me/d")
    assert trained(write, "revision: ~/a", "--place", "null").train == replace(
        run.train, place=None, places=(), revision="~/a", output_dir=Path("runs/a")
    )


def test_an_ambiguous_leaf_lists_its_paths(write) -> None:
    (line,) = refused(write(GOOD), "--seed", "3")
    assert line == "--seed: several paths end in this name; write one of train.seed=, seed="
    (line,) = refused(write(GOOD), "--learning_rat=3")
    assert "did you mean learning_rate?" in line


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seed"], "seed: got no `=`"),
        (["--max_train_steps"], "--max_train_steps: got no value"),
        (["--max_train_steps", "--allow_tf32"], "--max_train_steps: got no value"),
        (["train.guidance_scale=[1,"], "does not parse"),
        ([f"train.guidance_scale={'1' * 5000}"], "does not parse"),
        (["train.guidance_scale=[4.0, 5.0]", "train.guidance_scale.low.low=1"], "does not parse: Index 'low'"),
        (["train.guidanc_scale=1"], "did you mean guidance_scale?"),
        (["=3"], "=3: got no `=`"),
    ],
)
def test_overrides_that_say_nothing(write, overrides: list[str], words: str) -> None:
    (line,) = refused(write(GOOD), *overrides)
    assert words in line


def test_resolved_yaml_loads_to_an_equal_instance(write) -> None:
    run = Run(
        noise=Mixed(parts=(Table(shift=1 / 3), Mixed(parts=())), named={"low": Table(steps=(8, 4))}),
        train=Train(
            output_dir=Path("runs/ä"),
            learning_rate=1e-5,
            guidance_scale=(2.0, 1e300),
            revision="1e4",
            resume="007",
            validation_prompts=(
                "yes",
                "???",
                "a ${b} \\ c",
                "null",
                "two\nlines",
                "x: y",
                " #",
                "-" * 200,
                "",
            ),
            report_to=frozenset({"wandb", "tensorboard"}),
            spacing=Spacing.LEADING,
            optimizer=Factory("torch.optim.AdamW", {"betas": (0.9, 0.95), "weight_decay": 1e-2}),
            optimizers={"fake": Factory("torch.optim.SGD")},
        ),
        lora=Lora(roles={"fake": Lora(rank=3)}),
        average=Swap(every=2),
    )
    text = config_to_yaml(run)
    assert load_config(Run, write(text), []) == run
    assert config_to_yaml(load_config(Run, write(text), [])) == text


def test_type_is_written_only_where_there_is_a_choice() -> None:
    text = config_to_yaml(Run(noise=Table(), train=Train(output_dir=Path("a")), average=Ema()))
    assert text.count("type:") == 3
    assert f"noise:\n  type: {HERE}.Table\n" in text
    assert f"average:\n  type: {HERE}.Ema\n" in text
    assert "optimizer:\n    type: torch.optim.AdamW\n" in text


def test_sets_are_written_in_order() -> None:
    names = {"wandb", "tensorboard", "comet", "swanlab", "trackio"}
    text = config_to_yaml(Run(noise=Table(), train=Train(output_dir=Path("a"), report_to=frozenset(names))))
    assert [word for word in text.replace("-", " ").split() if word in names] == sorted(names)


def test_digest_names_the_content() -> None:
    run = Run(noise=Table(), train=Train(output_dir=Path("a")))
    same = Run(noise=Table(shift=3.0), train=Train(output_dir=Path("a")))
    other = Run(noise=Table(shift=3.0000001), train=Train(output_dir=Path("a")))
    assert config_digest(run) == config_digest(same) != config_digest(other)
    assert len(config_digest(run)) == 12


def test_a_factory_is_checked_when_made_and_called_later() -> None:
    made = Factory(f"{HERE}.gathered", {"a": 1})
    assert made("x", a=5, c=3) == (("x",), {"a": 1, "c": 3})
    with pytest.raises(ConfigError, match=r"unknown lrr; did you mean lr\?"):
        Factory("torch.optim.AdamW", {"lrr": 1e-3})
    with pytest.raises(ConfigError, match="expected a class or function"):
        Factory("math.pi")
