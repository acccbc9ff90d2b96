"""Seeds: no two purposes, images or runs share a draw, and a draw depends on its own key alone."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import pytest
import torch
from tiny import FAMILIES, awake, pipeline

from stepdistill.config.load import load_config
from stepdistill.core.errors import ConfigError
from stepdistill.core.random import IMAGES, VALIDATION, fresh_noise, noise_of, sample_rng, step_generator
from stepdistill.data import Prompts, Source
from stepdistill.methods.consistency import Consistency
from stepdistill.students.draw.call import generate, student_call
from stepdistill.training import sampling
from stepdistill.training.recipe import Run, TrainSpec
from stepdistill.training.setup import prepare
from stepdistill.training.watch import measure

NOISY = Consistency(end="clean", ema_decay=None)  # it adds fresh noise after each step
GUIDED = Consistency(end="edge", guidance_scale=1.0, sampling_guidance_scale=4.0)


def test_no_two_draws_are_one():
    """At seed 0, at neighbouring seeds and at the last number of a seed, the starting and the fresh noise of an image
    and the draws of training are all different."""
    keys = list(product(range(-1, 4), (0, 1, 2, 7_919, IMAGES - 1)))
    first = [(noise_of(seed, i, (4,)), torch.randn(4, generator=fresh_noise(seed, i))) for seed, i in keys]
    draws = [draw for pair in first for draw in pair]
    draws += [
        torch.randn(4, generator=step_generator(seed, step, i, purpose))
        for seed, step, i, purpose in product((0, 1), (0, 1), (0, 1), ("eps", "t"))
    ]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(draws)
    positions = [sample_rng(*key).random() for key in product(range(4), (*range(4), 10, 11))]
    assert len(set(positions)) == len(positions)


def test_a_draw_is_a_function_of_its_key():
    torch.manual_seed(0)
    before = torch.randn(2, generator=fresh_noise(1, 2)), noise_of(1, 2, (2,))
    torch.manual_seed(5)
    after = torch.randn(2, generator=fresh_noise(1, 2)), noise_of(1, 2, (2,))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("i", [-1, IMAGES])
def test_a_number_of_another_seed_is_refused(i):
    with pytest.raises(ValueError, match=r"expected a number in \[0, 1,000,003\)"):
        noise_of(0, i, (1,))


@pytest.mark.parametrize("source", ["TeacherSamples", "InvertedImages", "Trajectories"])
def test_samples_without_a_noise_of_their_own_are_refused_before_any_is_made(source):
    """The teacher would have worked for days when `noise_of` refused one."""
    config = [f"type=stepdistill.data.{source}", "source.type=stepdistill.data.Prompts", "source.prompts=[a cat]"]
    if source == "InvertedImages":
        folder = ("type=stepdistill.data.ImageFolder", "train_data_dir=x", "resolution=8")
        config[1:] = [f"source.{key}" for key in folder]
    assert load_config(Source, None, [*config, "folder=x", f"count={VALIDATION}"]).count == VALIDATION
    with pytest.raises(ConfigError, match="count: .* less than or equal to 900000"):
        load_config(Source, None, [*config, "folder=x", f"count={VALIDATION + 1}"])


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_is_drawn_by_its_seed_alone(name):
    """Whatever the global generator, the batch and the other prompts; its scheduler is as before."""
    pipe = pipeline(name)
    call = student_call(FAMILIES[name], NOISY, pipe, 2)
    step = call.scheduler.step

    def images(seed: int, numbers: list[int], batch: int):
        torch.manual_seed(batch)
        prompts = [["rose", "octopus", "rose"][i] for i in numbers]
        return generate(pipe, call, prompts, seed, batch, numbers=numbers, size=(32, 32))[0].float()

    three = images(0, [0, 1, 2], 3)
    assert torch.equal(three, images(0, [0, 1, 2], 3)) and call.scheduler.step == step
    assert (three - images(0, [0, 1, 2], 1)).abs().max() <= 1
    assert (three[[2, 1]] - images(0, [2, 1], 2)).abs().max() <= 1
    assert (three[0] - three[2]).abs().max() > 1 and (three - images(1, [0, 1, 2], 3)).abs().max() > 1


@pytest.fixture
def session(tmp_path):
    family = replace(FAMILIES["sd"], pretrained_teacher_model=str(tmp_path / "teacher"))
    pipeline("sd").save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("rose\nred apple\n")
    data = Prompts(prompts_file=str(tmp_path / "prompts.txt"))
    spec = TrainSpec(output_dir=str(tmp_path / "out"), report_to="none", max_train_steps=1, resolution=32)
    return prepare(Run(family=family, method=NOISY, data=data, train=spec))


@pytest.mark.parametrize("method", [NOISY, GUIDED], ids=["noisy", "guided"])
def test_validation_draws_what_evaluation_draws(session, method):
    """A student at zero is its teacher: the images of a run are those that its evaluation draws by the same seed,
    with the same guidance and fresh noise; where there is an average, they are the average's."""
    prompts, session = ["rose", "red apple"], replace(session, run=replace(session.run, method=method))
    for name, role in method.roles().items():
        session.backbone.add(name, role)
    if method.student_role() == "ema":
        awake(session.backbone, "student")
    latents = sampling.sample_student(session, prompts, [0, 1])
    call = student_call(session.run.family, method, session.pipe, 4)
    seed, numbers = session.run.train.validation_seed, range(VALIDATION, VALIDATION + 2)
    ours = (sampling.to_images(session, latents) * 255).round()
    theirs, _ = generate(session.pipe, call, prompts, seed, numbers=numbers, size=(32, 32))
    assert (ours - theirs.float()).abs().max() <= 1


def test_validation_noise_is_of_no_other_image(session):
    """Of no sample that a teacher makes by the same seed, no image of an evaluation; of no other level of the watch,
    and of no neighbouring seed."""
    rows = []
    for seed in (0, 1):
        spec = replace(session.run.train, validation_seed=seed)
        scene = replace(session, run=replace(session.run, train=spec))
        rows += [*sampling.validation_noise(scene, range(4))]
        watch = object.__new__(measure.Watch)
        watch.session, watch.prompts, watch.spec = scene, ["rose", "red apple"], spec
        with recorded_noise(measure) as seen:
            watch._errors(torch.zeros(2, *session.batches.shape), range(2), session.batches.size)
        assert len(seen) == len(measure.LEVELS)
        rows += [row for batch in seen for row in batch]
    rows += [noise_of(seed, i, session.batches.shape) for seed in range(3) for i in range(8)]
    assert len({tuple(row.flatten().tolist()) for row in rows}) == len(rows)


@contextmanager
def recorded_noise(module):
    """The noises that a module asks for inside."""
    seen, noise = [], module.validation_noise

    def recorded(session, ids, size=None):
        seen.append(noise(session, ids, size))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "validation_noise", recorded)
        yield seen
