"""`lora.init_from`: each role starts from a student or a LoRA file, at the rank that it has itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from oracles.planted import planted
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.config.load import load_config
from stepdistill.core.errors import ConfigError, StudentError
from stepdistill.data import Prompts
from stepdistill.families.base import Family
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.dmd2 import DMD2
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.lora.low_rank import cut, padded
from stepdistill.networks.lora.tensors import Lora as Tensors
from stepdistill.networks.lora.tensors import parse_lora
from stepdistill.networks.roles import Ema, Lora, LoraSpec, RoleLora
from stepdistill.students import load
from stepdistill.students.contract import WEIGHTS
from stepdistill.students.load import start_from
from stepdistill.students.write import write_student
from stepdistill.training import distill as distilling
from stepdistill.training.checks import check_run
from stepdistill.training.distill import distill, dry_run
from stepdistill.training.recipe import Run, TrainSpec

NAMES = ("sd", "sd3")  # with convolutions, and a flow
RANK, ALPHA = 4, 16.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of each family, and a student of it with alpha other than rank."""
    folder = tmp_path_factory.mktemp("start")
    for name in NAMES:
        tiny.pipeline(name).save_pretrained(folder / name)
        family = family_of(folder, name)
        pipe = family.load()
        backbone = tiny.backbone(name, pipe, RANK, ALPHA)
        backbone.add("student", Lora())
        tiny.awake(backbone, "student")
        options = {"role": "student", "method": Consistency(ema_decay=None), "resolution": (32, 32)}
        write_student(folder / f"{name}-student", family=family, pipe=pipe, backbone=backbone, **options)
    return folder


def family_of(place: Path, name: str) -> Family:
    return replace(tiny.FAMILIES[name], pretrained_teacher_model=str(place / name))


def started(place: Path, name: str, rank: int, alpha: float) -> tuple[Backbone, Tensors]:
    """Roles of a rank, of which `fake` and its average start from the student; and that student's LoRA."""
    family = family_of(place, name)
    backbone = tiny.backbone(name, family.load(), rank, alpha)
    for role in ("student", "fake"):
        backbone.add(role, Lora())
    backbone.add("ema", Ema("fake", 0.9))
    start_from(backbone, str(place / f"{name}-student"), family, "fake")
    return backbone, family.read_lora(place / f"{name}-student")


def products(backbone: Backbone, role: str, name: str, rank: int, alpha: float) -> dict[str, Tensor]:
    """What a role adds to each layer's weight."""
    prefix = f"{tiny.FAMILIES[name].network_name}."
    state = {prefix + key: value.clone() for key, value in backbone.state(role).items()}
    lora = parse_lora(state, {}, None).lora
    return {key: replace(layer, alpha=alpha).product() for key, layer in lora.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rank", "alpha"), [(RANK, ALPHA), (RANK, 3.0), (7, 5.0), (RANK + 1, RANK + 1.0)])
def test_at_no_lower_rank_a_role_adds_what_the_student_adds(place: Path, name: str, rank: int, alpha: float) -> None:
    same_product(place, name, rank, alpha)


def same_product(place: Path, name: str, rank: int, alpha: float) -> None:
    backbone, lora = started(place, name, rank, alpha)
    untouched = products(backbone, "student", name, rank, alpha)
    for role in ("fake", "ema"):
        found = products(backbone, role, name, rank, alpha)
        assert found.keys() == lora.keys()
        for key, product in found.items():
            torch.testing.assert_close(product, lora[key].product(), rtol=1e-5, atol=1e-6)
            assert product.any() and not untouched[key].any()
    for key, value in backbone.state("fake").items():
        dead = value[RANK:].flatten(1).norm(dim=1) == 0 if "lora_A" in key else torch.zeros(())
        assert not dead.any()


@pytest.mark.parametrize("name", NAMES)
def test_at_a_lower_rank_it_is_the_closest_and_the_loss_is_told(place: Path, name: str, caplog: Any) -> None:
    closest(place, name)
    assert "has a higher rank than lora.rank of 'fake'" in caplog.text and "of its energy" in caplog.text


def closest(place: Path, name: str) -> None:
    backbone, lora = started(place, name, 2, 3.0)
    for key, product in products(backbone, "fake", name, 2, 3.0).items():
        values = torch.linalg.svdvals(lora[key].product().double())
        error = (product - lora[key].product()).norm().item()
        assert error == pytest.approx(values[2:].norm().item(), rel=1e-3, abs=1e-5)


def test_what_is_padded_is_the_role_s_own_start(place: Path) -> None:
    """As fresh as it would have been without."""
    backbone, _ = started(place, "sd3", 7, 7.0)
    fresh = tiny.backbone("sd3", family_of(place, "sd3").load(), 7, 7.0)
    fresh.add("fake", Lora())
    theirs = fresh.state("fake")
    for key, value in backbone.state("fake").items():
        if "lora_A" in key:
            assert torch.equal(value[RANK:], theirs[key][RANK:])
        else:
            assert not value[:, RANK:].any()


BUGS: dict[str, tuple[Callable, str, str, Callable[[Path], None]]] = {
    "alpha left out": (padded, "lora.up * lora.scale", "lora.up", lambda place: same_product(place, "sd", 7, 5.0)),
    "not to the role's scale": (
        load.start_from,
        'config["lora_alpha"] / config["r"]',
        "1.0",
        lambda place: same_product(place, "sd", 7, 5.0),
    ),
    "averages left behind": (
        load.start_from,
        "[role, *backbone.copies_of(role)]",
        "[role]",
        lambda place: same_product(place, "sd3", 4, 16),
    ),
    "alpha left out of the cut": (cut, "lora.scale * r_up", "r_up", lambda place: closest(place, "sd")),
    "the first rows in place of the closest": (
        load._at_rank_of,
        "cut(layer, len(down))",
        "type(layer)(layer.down[: len(down)], layer.up[:, : len(down)], layer.scale * len(down))",
        lambda place: closest(place, "sd3"),
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_each_bug_is_noticed(place: Path, name: str) -> None:
    function, old, new, oracle = BUGS[name]
    with planted(function, old, new), pytest.raises((AssertionError, KeyError)):
        oracle(place)


# in a run


def run_of(place: Path, name: str, out: Path, lora: LoraSpec) -> Run:
    train = {"max_train_steps": 1, "train_batch_size": 2, "learning_rate": 0.0, "teacher_steps": 4}
    return Run(
        family=family_of(place, name),
        method=DMD2(timesteps=(999.0,), ema_decay=None),
        data=Prompts(prompts=("rose", "octopus")),
        lora=lora,
        train=TrainSpec(output_dir=str(out), resolution=32, report_to="none", **train),
    )


def test_every_role_starts_where_the_config_says(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The fake score from the base, unless it is given a start of its own."""
    seen: dict[str, dict[str, Tensor]] = {}
    student = str(place / "sd-student")
    fake = {"fake": RoleLora(init_from=student)}

    def stopped(session: Any, *_: Any) -> bool:
        for role in ("student", "fake"):
            seen[role] = {key: value.clone() for key, value in session.backbone.state(role).items()}
        return False

    monkeypatch.setattr(distilling, "training_loop", stopped)
    file = load_file(Path(student) / WEIGHTS)
    for lora, moved in (
        (LoraSpec(rank=RANK, alpha=ALPHA, init_from=student), {"student"}),
        (LoraSpec(rank=RANK, alpha=ALPHA, roles=fake), {"fake"}),
        (LoraSpec(rank=RANK, alpha=ALPHA, init_from=student, roles=fake), {"student", "fake"}),
        (LoraSpec(rank=RANK, alpha=ALPHA, init_from="x", roles={"student": RoleLora(init_from=student)}), {"student"}),
    ):
        run = run_of(place, "sd", tmp_path / str(len(seen)), lora)
        if lora.init_from != "x":
            distill(replace(run, train=replace(run.train, overwrite_output_dir=True)))
            for role, state in seen.items():
                same = all(torch.equal(value, file[f"unet.{key}"]) for key, value in state.items())
                zero = not any(value.any() for key, value in state.items() if "lora_B" in key)
                assert (same, zero) == (role in moved, role not in moved)
        assert lora.starts() == dict.fromkeys(moved, student)
        assert lora.without_starts().starts() == {} and lora.without_starts().rank == lora.rank
        assert {place for place in run.inputs if place == student} == {student}


def test_roles_of_other_ranks_start_from_one_file_and_train(place: Path, tmp_path: Path) -> None:
    student = str(place / "sd3-student" / WEIGHTS)
    roles = {"fake": RoleLora(rank=2, init_from=student)}
    run = run_of(place, "sd3", tmp_path / "out", LoraSpec(rank=6, init_from=student, roles=roles))
    assert dry_run(run) == dry_run(replace(run, lora=run.lora.without_starts()))
    out = distill(run)
    ours, theirs = (family_of(place, "sd3").read_lora(folder) for folder in (out, place / "sd3-student"))
    for key, layer in ours.items():  # the rate is 0
        assert len(layer.down) == 6
        torch.testing.assert_close(layer.product(), theirs[key].product(), rtol=1e-4, atol=1e-5)


def test_a_student_of_another_base_is_refused_and_its_file_alone_is_not(place: Path, tmp_path: Path) -> None:
    base = tmp_path / "other"
    tiny.pipeline("sd", seed=3).save_pretrained(base)
    for lora in (
        LoraSpec(rank=RANK, init_from=str(place / "sd-student")),
        LoraSpec(rank=RANK, roles={"fake": RoleLora(init_from=str(place / "sd-student"))}),
    ):
        run = run_of(place, "sd", tmp_path / "out", lora)
        run = replace(run, family=replace(run.family, pretrained_teacher_model=str(base)))
        with pytest.raises(StudentError, match=r"trained on .*/sd, expected a student of the weights .* name its file"):
            distill(run)
    start = str(place / "sd-student" / WEIGHTS)
    distill(replace(run, lora=LoraSpec(rank=RANK, roles={"fake": RoleLora(init_from=start)})))


def test_the_same_base_in_half_precision_is_the_same_base(place: Path) -> None:
    family = family_of(place, "sd3")
    backbone = tiny.backbone("sd3", family.load(), RANK, ALPHA)
    backbone.add("student", Lora())
    source = str(place / "sd3-student")
    hashes = load.read_contract(source).base_hash
    start_from(backbone, source, family, base=hashes | {"float32": "another"})
    with pytest.raises(StudentError, match="trained on"):
        start_from(backbone, source, family, base=dict.fromkeys(hashes, "another"))


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (LoraSpec(rank=2, target_modules=("to_q",)), "role 'fake' holds .* do not"),
        (LoraSpec(rank=2, roles={"critic": RoleLora(init_from="x")}), "lora.roles.critic"),
    ],
)
def test_other_layers_and_unknown_roles_are_refused(place: Path, tmp_path: Path, lora: LoraSpec, said: str) -> None:
    roles = lora.roles or {"fake": RoleLora(init_from=str(place / "sd-student"))}
    run = run_of(place, "sd", tmp_path / "out", replace(lora, roles=roles))
    for command in (dry_run, distill):
        with pytest.raises((StudentError, ConfigError), match=said):
            command(run)
    assert not (tmp_path / "out" / WEIGHTS).exists()


def test_a_file_of_another_family_is_refused_before_anything_is_loaded(place: Path, tmp_path: Path) -> None:
    file = shutil.copy(place / "sd3-student" / WEIGHTS, tmp_path / "sd3.safetensors")
    for lora in (LoraSpec(init_from=str(file)), LoraSpec(roles={"fake": RoleLora(init_from=str(file))})):
        with pytest.raises(StudentError, match="unmatched"):
            check_run(run_of(place, "sd", tmp_path / "out", lora))


def test_a_file_of_other_widths_is_refused(place: Path, tmp_path: Path) -> None:
    family = family_of(place, "sd3")
    backbone = tiny.backbone("sd3", family.load(), 7, 7.0)
    backbone.add("fake", Lora())
    file = tmp_path / "wide.safetensors"
    state = load_file(place / "sd3-student" / WEIGHTS)
    save_file({k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in state.items()}, file)
    with pytest.raises(StudentError, match=f"{file}.*size mismatch"):
        start_from(backbone, str(file), family, "fake")


def test_the_start_of_a_role_is_read_from_a_config() -> None:
    spec = load_config(LoraSpec, None, ["init_from=~/a", "roles.fake.init_from=b", "roles.fake.rank=3"])
    assert spec.starts() == {"student": str(Path.home() / "a"), "fake": "b"}
    assert spec.of("fake").rank == 3 and spec.of("student").rank == 64
