"""What a config says of single roles: LoRAs of another strength, optimizers, schedules, clipping and scaled losses."""

from __future__ import annotations

import pytest
import torch
from diffusers.optimization import get_scheduler
from oracles import close
from oracles.toy import SGD, TARGETS, Net, Turns, optimizers, pattern, step, weights
from torch import Tensor

from stepdistill.config.load import load_config
from stepdistill.config.schema import Factory
from stepdistill.core import distributed
from stepdistill.core.errors import ConfigError
from stepdistill.data import Prompts
from stepdistill.families.sd import StableDiffusion
from stepdistill.methods.dmd2 import DMD2
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.roles import Ema, Lora, LoraSpec, Role, RoleLora
from stepdistill.training.checks import check_run
from stepdistill.training.recipe import Run, TrainSpec

X = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.7, -1.1]])


def backbone(spec: LoraSpec, **roles: Role) -> Backbone:
    """A backbone of this net, whose trained roles have an effect."""
    torch.manual_seed(0)
    bone = Backbone(Net(), spec, TARGETS)
    for name, role in roles.items():
        bone.add(name, role)
        for key, p in bone.parameters_of(name).items():
            if isinstance(role, Lora) and "lora_B" in key:
                p.data = torch.randn(p.shape)
    return bone


def output(bone: Backbone, role: str) -> Tensor:
    with bone.use(role) as net:
        return net(X)


def by_hand(bone: Backbone, role: str, scale: float) -> Tensor:
    """The role's output with `scale B A` added to each layer that it has a LoRA on."""
    state, value = bone.state(role), X
    for name in TARGETS:
        weight = bone.net.state_dict().get(f"{name}.base_layer.weight", bone.net.state_dict().get(f"{name}.weight"))
        assert weight is not None
        if f"{name}.lora_A.weight" in state:
            weight = weight + scale * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        value = value @ weight.T
        value = torch.tanh(value) if name == "to_q" else value
    return value


SPEC = LoraSpec(
    rank=2,
    alpha=6.0,
    target_modules=("to_v",),
    roles={"student": RoleLora(rank=3, alpha=1.5), "fake": RoleLora(target_modules=("to_q",)), "low": RoleLora(rank=1)},
)


@pytest.mark.parametrize(
    ("role", "rank", "scale", "layers"),
    [
        ("student", 3, 0.5, ("to_v",)),
        ("ema", 3, 0.5, ("to_v",)),
        ("fake", 2, 3.0, ("to_q",)),
        ("low", 1, 6.0, ("to_v",)),
        ("other", 2, 3.0, ("to_v",)),
    ],
)
def test_a_role_has_its_own_strength_and_an_average_that_of_its_role(role, rank, scale, layers):
    """Strength is alpha / rank. What a role does not set, it takes from the section."""
    trained: dict[str, Role] = {name: Lora() for name in ("student", "fake", "low", "other")}
    bone = backbone(SPEC, **trained, ema=Ema("student", 0.0))
    bone.average(["student"], 0)
    state = bone.state(role)
    assert {key.split(".")[0] for key in state} == set(layers)
    assert {len(value) for key, value in state.items() if "lora_A" in key} == {rank}
    close(output(bone, role), by_hand(bone, role, scale), 1e-5)
    assert (output(bone, role) - by_hand(bone, role, 1.0)).abs().max() > 0.1
    config = bone.lora_config(role)
    assert config["lora_alpha"] / config["r"] == scale


@pytest.mark.parametrize("targets", [("no_such",), (TARGETS[0], "no_such"), (TARGETS[0][1:],)])
def test_a_target_that_is_no_layer_is_refused(targets):
    """PEFT passes it over where another target is a layer."""
    with pytest.raises(ConfigError, match=f"lora.target_modules with {targets[-1]}, .* no layer of the Net"):
        Backbone(Net(), LoraSpec(rank=2, target_modules=targets), ()).add("student", Lora())


def test_an_alpha_that_is_not_given_is_the_rank():
    assert LoraSpec(rank=8, roles={"fake": RoleLora(rank=2)}).of("fake").alpha is None
    bone = backbone(LoraSpec(rank=8, roles={"fake": RoleLora(rank=2)}), fake=Lora())
    close(output(bone, "fake"), by_hand(bone, "fake", 1.0), 1e-5)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0.0}])
def test_a_role_s_numbers_are_checked(wrong):
    with pytest.raises(ValueError, match="lora.*expected"):
        RoleLora(**wrong)


def test_a_role_takes_no_more_than_a_lora_s_shape_and_start():
    with pytest.raises(ConfigError, match="lora.roles.fake.arithmetic"):
        load_config(Run, None, ["lora.roles.fake.arithmetic=apart"])


@pytest.mark.parametrize(
    ("lora", "train", "words"),
    [
        (
            {"roles": {"critic": RoleLora(rank=2)}},
            {},
            r"lora.roles.critic with DMD2.*a LoRA of its own: \['student', 'fake'\]",
        ),
        ({"roles": {"ema": RoleLora(rank=2)}}, {}, "lora.roles.ema.*a copy of a role has the settings"),
        ({}, {"optimizers": {"teacher": SGD}}, r"train.optimizers.teacher.*no such role"),
        ({}, {"optimizers": {"ema": SGD}}, "train.optimizers.ema.*a copy of a role"),
        ({"roles": {"fake": RoleLora(rank=2)}}, {"optimizers": {"fake": SGD, "student": SGD}}, None),
    ],
)
def test_settings_of_roles_that_are_not_there_are_refused(tmp_path, lora, train, words):
    run = Run(
        family=StableDiffusion(pretrained_teacher_model="tiny-sd"),
        method=DMD2(),
        data=Prompts(prompts=("rose",)),
        lora=LoraSpec(**lora),
        train=TrainSpec(output_dir=str(tmp_path / "out"), **train),
    )
    if words is None:
        check_run(run)
    else:
        with pytest.raises(ConfigError, match=f"(?s){words}"):
            check_run(run)


# --- optimizer steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "warmup"), [("linear", 0), ("cosine", 4), ("constant_with_warmup", 5)])
def test_every_role_s_learning_rate_is_that_of_the_training_step(name, warmup):
    """Also of a role that steps every third time; an optimizer with a rate of its own scales it."""
    method, steps = Turns(k=3), 8
    slow = Factory("torch.optim.SGD", {"lr": 0.25})
    own = {"lr_scheduler": name, "lr_warmup_steps": warmup, "max_train_steps": steps, "optimizers": {"fake": slow}}
    team = optimizers(method, **own)
    clock = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    expected = get_scheduler(name, clock, num_warmup_steps=warmup, num_training_steps=steps)
    for number in range(steps):
        before = {role: weights(team, role) for role in ("student", "fake")}
        values = step(method, team, number)
        rate = float(expected.get_last_lr()[0])
        assert values["lr"] == rate  # the student's, in every step
        clock.step(), expected.step()
        for role, share in (("student", float(number % 3 == 0)), ("fake", 0.25)):
            close(before[role] - weights(team, role), torch.full_like(before[role], rate * share), 1e-6)


def test_an_average_moves_with_its_role_alone():
    method = Turns(k=3, ema_decay=0.75)
    team, expected = optimizers(method), None
    for number in range(5):
        expected = weights(team, "ema") if expected is None else expected
        step(method, team, number)
        if number % 3 == 0:
            expected = 0.75 * expected + 0.25 * weights(team, "student")
        close(weights(team, "ema"), expected, 1e-6)


def test_scaled_losses_are_clipped_at_their_own_size():
    """In float16: the gradient is divided by the scale, and then clipped; its logged norm is its own."""
    method = Turns(factor=0.5)
    team, plain = (optimizers(method, scale, max_grad_norm=2.0) for scale in (1024.0, None))
    n = weights(team, "student").numel()
    for each in (team, plain):
        before = weights(each, "student")
        values = step(method, each, 0)
        norm = 0.5 * n**0.5
        assert norm > 2.0 + 0.1  # so that clipping shows
        close(values["grad_norm/student"], norm, 1e-5)
        close(before - weights(each, "student"), torch.full_like(before, 2.0 / n**0.5), 1e-5)


def test_a_gradient_that_overflows_is_skipped_and_the_scale_falls():
    method = Turns(factor=3e37)
    team = optimizers(method, 1024.0, max_grad_norm=2.0)
    before = {role: weights(team, role) for role in ("student", "fake", "ema")}
    step(method, team, 0)  # a finite loss, whose gradient times the scale is not
    assert all(torch.equal(weights(team, role), value) for role, value in before.items())
    assert team.scaler.get_scale() == 256.0  # halved for each of two updates


def test_micro_batches_and_processes_are_averaged_before_clipping(monkeypatch):
    """Clipped one by one, two gradients of other lengths have another mean."""
    method = Turns()
    split, shared = (optimizers(method, max_grad_norm=2.0) for _ in range(2))
    before = weights(split, "student")
    gradients = [torch.cat([pattern(p, i).flatten() for p in split.params("student").values()]) for i in (1, 9)]
    mean = torch.stack(gradients).mean(0)
    expected = mean * 2.0 / mean.norm()
    apart = torch.stack([g / g.norm() for g in gradients]).mean(0)
    assert min(g.norm() for g in gradients) > 2.0 and (apart / apart.norm() * 2.0 - expected).abs().max() > 0.1

    step(method, split, 0, (1,), (9,))
    close(before - weights(split, "student"), expected, 1e-5)

    def average(tensors: list[Tensor]) -> None:
        for each in (each for each in tensors if each.ndim):
            each.add_(pattern(each, 9)).div_(2)  # with what the process of sample 9 has

    monkeypatch.setattr(distributed, "average", average)
    step(method, shared, 0, (1,))
    close(before - weights(shared, "student"), expected, 1e-5)
