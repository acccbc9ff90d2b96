"""One step of DMD2, VSD and DisBack on real networks: what is updated, what is read, what is drawn, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, awake, backbone, batch, context, latent_shape, pipeline, tokens
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from stepdistill.core.errors import ConfigError
from stepdistill.core.schedule import Rectified
from stepdistill.data import Prompts
from stepdistill.families.base import Family
from stepdistill.methods.base import Batch, Method, StepContext
from stepdistill.methods.disback import DisBack
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.gan import Gan
from stepdistill.methods.vsd import VSD, ClipTerm
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.clip import clip
from stepdistill.networks.roles import TEACHER, Ema, Lora, Tap
from stepdistill.networks.taps import Head, features_before
from stepdistill.training.checks import check_needs
from stepdistill.training.distill import distill
from stepdistill.training.recipe import Run, TrainSpec

DMD = DMD2(num_inference_steps=2, guidance_scale=3.0, critic_steps=2)
GAN = replace(DMD, gan=Gan())
METHODS = {
    "dmd2": DMD,
    "gan": GAN,
    "teacher's": replace(DMD, gan=Gan(features="teacher")),
    "vsd": VSD(),
}


def scene(method: Method, name: str = "sd", asleep: tuple[str, ...] = ()) -> tuple[Backbone, Batch, StepContext]:
    """A backbone with the method's roles awake, a batch, and a play."""
    pipe = pipeline(name)
    bone = backbone(name, pipe)
    for role, kind in method.roles().items():
        bone.add(role, kind)
        if role not in asleep:
            awake(bone, role)
    return bone, batch(name, pipe), context(name, pipe, bone)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_each_update_reaches_all_of_its_roles_and_the_student_only_in_its_turn(method, name):
    bone, part, context = scene(method, name)
    seen = []
    for step in range(3):
        for update in method.updates(replace(context, step=step), part, step):
            update.loss.backward()
            for role in update.roles:
                assert all(p.grad is not None and p.grad.any() for p in bone.parameters_of(role).values()), role
            others = set(bone.declared) - set(update.roles)
            assert all(p.grad is None for role in others for p in bone.parameters_of(role).values())
            bone.zero_grad(set_to_none=True)
            seen.append((step, update.roles))
    fake = ("fake", "head") if "head" in method.roles() else ("fake",)
    turns = (0, 2) if isinstance(method, DMD2) else (0, 1, 2)
    assert seen == [(s, r) for s in range(3) for r in ([("student",)] if s in turns else []) + [fake]]


def test_only_the_last_call_of_the_student_has_a_graph():
    """O20: the steps before it are simulated."""
    _, part, context = scene(DMD)
    with_graph = []

    def denoiser(role):
        def call(x_t, t, cond):
            if role == "student":
                with_graph.append(torch.is_grad_enabled())
            return context.denoiser(role)(x_t, t, cond)

        return call

    class Last(StepContext):
        def shared(self, purpose):
            return 0.99

    next(DMD.updates(Last(**vars(replace(context, denoiser=denoiser))), part, 0))
    assert with_graph == [False, True]


@pytest.mark.parametrize("critic_steps", [1, 3, 5])
def test_the_fake_score_takes_k_steps_for_one_of_the_student_after_its_warm_up(critic_steps):
    method = replace(DMD, critic_steps=critic_steps, warmup_steps=4)
    _, part, context = scene(method)
    roles = [[u.roles[0] for u in method.updates(context, part, s)] for s in range(4 + 2 * critic_steps)]
    assert all(found == ["fake"] for found in roles[:4])
    assert [s for s, found in enumerate(roles) if "student" in found] == [4, 4 + critic_steps]
    assert all(found[-1] == "fake" for found in roles)


def test_a_sleeping_fake_score_is_the_teacher_bit_for_bit():
    """O1 through networks, where both sides are one base with adapters."""
    method = replace(DMD, guidance_scale=1.0)
    for found in (method, VSD(guidance_scale=7.5)):
        bone, part, context = scene(found, asleep=("fake",))
        update = next(found.updates(context, part, 0))
        update.loss.backward()
        assert update.loss == 0 and not any(p.grad.any() for p in bone.parameters_of("student").values())


@pytest.mark.parametrize("method", [DMD, VSD()], ids=["dmd2", "vsd"])
def test_prompts_alone_never_touch_data(method):
    _, part, context = scene(method)
    blind = replace(part, latents=None, noise=None)
    poisoned = replace(part, latents=part.latents * float("nan"), noise=part.noise * float("nan"))
    losses = [[u.loss.item() for u in method.updates(context, p, 0)] for p in (blind, poisoned, part)]
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) == 2
    check_needs(Prompts(prompts=("rose",)), method)


def test_a_term_switched_off_changes_no_other_draw():
    """The score and the fake score's terms are the same, to the bit, with and without the adversarial one."""
    logs = []
    for method in (DMD, GAN, replace(GAN, gan=Gan(generator_weight=0.3, r1_weight=1.0, features="teacher"))):
        _, part, context = scene(method)
        logs.append([dict(u.logs) for u in method.updates(context, part, 0)])
    for found in logs[1:]:
        assert found[0]["loss"] == logs[0][0]["loss"] and found[1]["loss_fake"] == logs[0][1]["loss_fake"]
        assert "loss_gan" in found[0] and "loss_head" in found[1]


def test_each_term_draws_for_itself():
    """No two purposes share noise or times, so that the terms' errors are independent."""
    method = replace(GAN, gan=Gan(r1_weight=1.0), num_inference_steps=4)
    _, part, context = scene(method)
    asked: list[str] = []

    class Listening(StepContext):
        def noise(self, batch, purpose):
            asked.append(purpose)
            return StepContext.noise(self, batch, purpose)

        def draw(self, batch, purpose):
            asked.append(purpose)
            return StepContext.draw(self, batch, purpose)

    for _ in method.updates(Listening(**vars(context)), part, 0):
        pass
    twice = {purpose for purpose in asked if asked.count(purpose) > 1}
    assert twice == {"gan real t", "gan real eps"}  # R1 compares the same noised data with its neighbour


@pytest.mark.parametrize("shared", [0.0, 0.99])
def test_an_empty_prompt_is_learned_in_its_share_of_steps(shared):
    method = VSD(proportion_empty_prompts=0.1)
    _, part, context = scene(method)
    seen = {}

    def denoiser(role):
        def call(x_t, t, cond):
            seen[role] = cond["states"]
            return context.denoiser(role)(x_t, t, cond)

        return call

    class Fixed(StepContext):
        def shared(self, purpose):
            return shared

    method.fake_loss(Fixed(**vars(replace(context, denoiser=denoiser))), part, part.latents)
    null = context.null["states"].expand_as(part.cond["states"])
    assert torch.equal(seen["fake"], null) is (shared == 0.0)
    assert not torch.equal(part.cond["states"], null)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    """A small random CLIP with all that `from_pretrained` wants."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shape, "vocab_size": len(tokens()), "max_position_embeddings": 77}
    vision = {**shape, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokens().save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return str(folder)


def test_the_clip_term_pulls_below_its_threshold_only(clip_folder):
    """O21: the gradient reaches the student through decoder and CLIP; above the threshold it is exactly that of VSD."""
    bone, part, context = scene(VSD())
    part = replace(part, prompts=("red apple", "cat face"))
    found = {}
    for name, term in {
        "none": None,
        "above": ClipTerm(pretrained_clip_model=clip_folder, threshold=-1.0),
        "below": ClipTerm(pretrained_clip_model=clip_folder, threshold=1.0),
        "weightless": ClipTerm(pretrained_clip_model=clip_folder, threshold=1.0, decay_steps=1),
    }.items():
        method = VSD(clip=term)
        update = next(method.updates(context, part, int(name == "weightless")))
        update.loss.backward()
        found[name] = torch.cat([p.grad.flatten() for p in bone.parameters_of("student").values()])
        bone.zero_grad(set_to_none=True)
        assert ("clip" in update.logs) is (term is not None)
    assert torch.equal(found["none"], found["above"]) and torch.equal(found["none"], found["weightless"])
    pull = found["below"] - found["none"]
    assert pull.norm() > 1e-3 * found["none"].norm() and pull.isfinite().all()


def test_clip_sees_what_its_own_processor_makes(clip_folder):
    images = torch.rand(2, 3, 32, 32)
    ours = clip(clip_folder, torch.device("cpu"))(images, ["red apple", "cat face"])
    model, words = CLIPModel.from_pretrained(clip_folder).eval(), tokens()(["red apple", "cat face"], padding=True)
    plain = CLIPImageProcessor(do_resize=False, do_rescale=False, do_center_crop=False)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(words["input_ids"]),
            attention_mask=torch.tensor(words["attention_mask"]),
            pixel_values=torch.stack([torch.as_tensor(v) for v in plain(list(images.numpy())).pixel_values]),
        )
    torch.testing.assert_close(ours, (out.image_embeds * out.text_embeds).sum(1), atol=1e-5, rtol=0)


def test_disback_follows_its_waypoints_back_to_the_teacher():
    """O23: the student rests while the way is recorded; then each target is another network, the last the teacher."""
    method = DisBack(matching=replace(DMD, critic_steps=1), waypoints=3, recording_steps=2, backtracking_steps=1)
    assert [method.target(step) for step in range(6, 10)] == ["waypoint_2", "waypoint_1", TEACHER, TEACHER]
    bone, part, context = scene(method, asleep=tuple(method.roles()))
    rates = {"student": 1e-2, "fake": 1e-2}
    made = {role: torch.optim.Adam(bone.parameters_of(role).values(), lr=lr) for role, lr in rates.items()}

    def flat(role: str) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in bone.parameters_of(role).values()])

    first, recorded = flat("student").clone(), []
    for step in range(8):
        before = flat("student").clone()
        for update in method.updates(replace(context, step=step), part, step):
            update.loss.backward()
            for role in update.roles:
                made[role].step()
            bone.average(update.roles, step)
            bone.zero_grad(set_to_none=True)
        recorded.append(flat("fake").clone())
        assert torch.equal(flat("student"), before) is (step < 6)
    assert torch.equal(flat("waypoint_1"), recorded[1]) and torch.equal(flat("waypoint_2"), recorded[3])
    assert not torch.equal(recorded[1], recorded[3]) and not torch.equal(flat("student"), first)

    gradients = []
    for target in ("waypoint_2", "waypoint_1", TEACHER):
        next(method.matching.towards(target, context, part, 0)).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in bone.parameters_of("student").values()]))
        bone.zero_grad(set_to_none=True)
    assert not any(torch.equal(gradients[i], gradients[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    twin = replace(DMD, guidance_scale=1.0)  # where the target is the fake score itself there is nothing to follow
    bone.load_state("waypoint_2", bone.state("fake"))
    assert next(twin.towards("waypoint_2", context, part, 0)).loss == 0


def test_a_copy_stops_where_it_is_told():
    bone = backbone("sd", pipeline("sd"))
    bone.add("fake", Lora())
    bone.add("kept", Ema("fake", 0.0, until=3))
    awake(bone, "fake")
    bone.average(["fake"], 2)
    kept = {key: value.clone() for key, value in bone.state("kept").items()}
    assert all(torch.equal(value, bone.state("fake")[key]) for key, value in kept.items())
    awake(bone, "fake", 1.0)
    bone.average(["fake"], 3)
    assert all(torch.equal(value, kept[key]) for key, value in bone.state("kept").items())


def whole(name: str, net: nn.Module, tap: Tap, x: torch.Tensor, call) -> torch.Tensor:
    """The features as a plain hook behind the module before the tap sees them, in a whole pass."""
    found = []
    last = {
        "sd": "mid_block",
        "sdxl": "mid_block",
        "flux": "transformer_blocks.1",
        "klein": "transformer_blocks.1",
        "wan": "blocks.0",
        "z_image": "layers.0",
    }
    last = last.get(name, "transformer_blocks.0")
    handle = net.get_submodule(last).register_forward_hook(lambda m, args, out: found.append(out))
    with torch.no_grad():
        call()
    handle.remove()
    if last == "mid_block":
        return found[0]
    two = name in ("sd3", "flux", "klein", "qwen_image")
    tokens = found[0][1] if two else found[0]  # of two streams the image's is the second
    *frames, height, width = x.shape[2:]
    sides = torch.Size((*frames, height // tap.patch, width // tap.patch))
    tokens = tokens[:, -sides.numel() :] if tap.image == "last" else tokens[:, : sides.numel()]
    return tokens.transpose(1, 2).unflatten(2, sides)


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_those_of_a_whole_pass_which_ends_early(name):
    family: Family = FAMILIES[name]
    pipe = pipeline(name)
    net, part, t = family.network(pipe), batch(name, pipe), torch.full((2,), 300.0)
    tap, after = family.tap(net), []
    x = torch.randn(2, *latent_shape(name)[:-2], 4, 8)  # not square: rows and columns must not be exchanged

    def call():
        return family.call(net, x, t, part.cond)

    expected = whole(name, net, tap, x, call)
    ends = {"sd": "conv_out", "sdxl": "conv_out", "z_image": "all_final_layer.2-1", "krea2": "final_layer"}
    net.get_submodule(ends.get(name, "proj_out")).register_forward_hook(lambda *_: after.append(1))
    (found,) = features_before(net, (tap,), x, call)
    assert torch.equal(found, expected) and found.shape[1] == tap.channels and not after
    assert found.shape[2:] == (*x.shape[2:-2], 4 // tap.patch, 8 // tap.patch)
    call()
    assert after == [1]  # the hook is gone


@pytest.mark.parametrize(("channels", "side"), [(320, 8), (112, 4), (64, 32), (6, 2)])
def test_a_head_gives_one_logit_at_any_size(channels, side):
    head = Head(Tap("", channels, 1, side))
    for rows in (side, 2 * side):
        assert head(torch.randn(3, channels, rows, side)).shape == (3, 1)


def test_a_tap_that_is_never_reached_is_an_error():
    with pytest.raises(RuntimeError, match="never reached"):
        features_before(nn.ModuleDict({"a": nn.Linear(1, 1)}), [Tap("a", 1, 1, 1)], torch.zeros(1), lambda: None)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DMD2(critic_steps=0), "critic_steps is 0"),
        (lambda: DMD2(timesteps=(249, 999)), "descending"),
        (lambda: DMD2(timesteps=()), "descending"),
        (lambda: DMD2(t_range=(980, 20)), "t_range"),
        (lambda: DMD2(eta=0.5), "eta is 0.5"),
        (lambda: VSD(t_range=(5, 5)), "t_range"),
        (lambda: Gan(loss_type="hinge", divergence="jeffreys"), "softplus"),
        (lambda: DisBack(waypoints=0), "waypoints is 0"),
        (lambda: DisBack(matching=DMD2(warmup_steps=5)), "warmup_steps is 5"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_times_that_the_schedule_does_not_have_are_refused():
    table, flow = FAMILIES["sd"].schedule(pipeline("sd").scheduler), Rectified(3.0)
    for times in ((1000.0,), (999.0, 499.5)):
        with pytest.raises(ValueError, match="table's entries"):
            DMD2(timesteps=times).check(table)
    with pytest.raises(ValueError, match="1000 sigma"):
        DMD2(timesteps=(1001.0,)).check(flow)
    with pytest.raises(ValueError, match="table's entries"):
        VSD(t_range=(20.0, 1000.0)).check(table)
    DMD2(timesteps=(399.0,)).check(table)
    DMD2(timesteps=(999.5,)).check(flow)


def test_other_numbers_of_steps_start_where_the_student_does():
    table, flow = FAMILIES["sd"].schedule(pipeline("sd").scheduler), Rectified(3.0)
    early = DMD2(timesteps=(799.0,))
    assert early.sampler(table).timesteps == (799.0,) == VSD(timestep=799.0).sampler(table).timesteps
    assert early.sampler(table, 4).timesteps == (799.0, 599.0, 399.0, 199.0)
    assert early.sampler(flow, 2).timesteps == (799.0, 399.5)
    given = DMD2(timesteps=(999.0, 300.0))
    assert given.sampler(table, 2).timesteps == given.sampler(table).timesteps == (999.0, 300.0)
    for steps in (1, 2, 4, 5, 8):  # the times of the schedulers
        assert DMD2().sampler(table, steps) == VSD().sampler(table, steps)


def test_an_adversarial_term_without_images_is_refused():
    with pytest.raises(ConfigError, match="latents"):
        check_needs(Prompts(prompts=("rose",)), GAN)


def test_times_are_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(Family, "load", lambda self: pytest.fail("loaded"))
    for name, times, words in (("tiny-sd", (1200.0,), "table's entries"), ("tiny-sd3", (1200.0,), "1000 sigma")):
        with pytest.raises(ConfigError, match=words):
            distill(
                Run(
                    family=replace(FAMILIES[name.removeprefix("tiny-")], pretrained_teacher_model=name),
                    method=DMD2(timesteps=times),
                    data=Prompts(prompts=("rose",)),
                    train=TrainSpec(output_dir=str(tmp_path / "out")),
                )
            )
