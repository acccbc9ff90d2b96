"""Wan: noise levels from a scheduler's config alone, five dimensions, frames, and teachers that are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from oracles.planted import Bug, bug_tests
from torch import Tensor, nn

from stepdistill.core.denoise import guided, without_prompt
from stepdistill.core.errors import ConfigError
from stepdistill.core.pixels import clips_of, filmstrip, frames_of
from stepdistill.core.prediction import Estimate
from stepdistill.core.schedule import Rectified
from stepdistill.core.solvers import Sampler
from stepdistill.families import shift_terminal as levels
from stepdistill.families.shift_terminal import shift_terminal
from stepdistill.methods.base import Batch, StepContext
from stepdistill.methods.dmd2 import DMD2
from stepdistill.networks.rewards.custom import Custom

WAN = tiny.FAMILIES["wan"]
GRIDS = [(shift, n) for shift in (1.0, 3.0, 5.0, 8.0) for n in (1, 2, 3, 4, 5, 8, 50)]


def visited(config: dict, n: int) -> list[float]:
    """What the scheduler of a saved config visits, whose pipeline gives it a number of steps and no more."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(json.loads(json.dumps(dict(config))))
    scheduler.set_timesteps(n)
    assert scheduler.sigmas[-1] == 0
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize(("shift", "n"), GRIDS)
def test_the_config_alone_gives_the_trained_levels(shift, n):
    """Of the student, and of the teacher's solver, whose grid they are."""
    pipe, times = tiny.pipeline("wan"), Rectified(shift).starts(n)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    for eta in (0.0, 1.0):
        scheduler, call = WAN.scheduler(pipe, Sampler(times, eta=eta))
        assert call == {"num_inference_steps": n} and scheduler.config["stochastic_sampling"] == (eta == 1)
        assert visited(scheduler.config, n) == pytest.approx(times, rel=1e-6)
    solver, call = WAN.solver(pipe, n)
    assert call == {"num_inference_steps": n} and visited(solver.config, n) == pytest.approx(times, rel=1e-6)
    if n > 1:  # the plain scheduler ends at a useless step near 0
        plain = FlowMatchEulerDiscreteScheduler(shift=shift)
        plain.set_timesteps(n)
        assert abs(plain.timesteps[-1].item() - times[-1]) > 5


@pytest.mark.parametrize("times", [(1000.0,), (1000.0, 900.0), (1000.0, 757.0, 522.0), (1000.0, 900.0, 300.0)])
def test_up_to_three_levels_may_be_any(times):
    assert visited(shift_terminal(times), len(times)) == pytest.approx(times, rel=1e-6)


@pytest.mark.parametrize(
    "times", [(999.0,), (999.0, 500.0), (1000.0, 937.5, 833.33, 700.0), (1000.0, 900.0, 890.0, 1.0)]
)
def test_other_levels_are_refused(times):
    with pytest.raises(ConfigError, match="up to three that begin at 1000, or evenly spaced ones with a shift"):
        shift_terminal(times)


def test_the_shift_is_that_of_the_teacher_s_scheduler():
    """The hub's Wan has a UniPC scheduler, whose shift has another name."""
    flow = UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    assert WAN.schedule(flow).shift == 3.0
    assert WAN.schedule(FlowMatchEulerDiscreteScheduler(shift=5.0)).shift == 5.0
    with pytest.raises(ConfigError, match="use_dynamic_shifting"):
        WAN.schedule(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


# frames


def test_frames_of_pixels_and_of_latents():
    pipe = tiny.pipeline("wan")
    assert WAN.latent_shape(pipe, 32, 48) == (4, 3, 8, 12)
    assert replace(WAN, num_frames=1).latent_shape(pipe, 32, 32) == (4, 1, 8, 8)
    for frames, expected in ((4, "3 or 5"), (2, "1 or 3"), (10, "9 or 11")):
        with pytest.raises(ConfigError, match=f"num_frames {frames}, expected {expected}"):
            replace(WAN, num_frames=frames).latent_shape(pipe, 32, 32)
    for height, width in ((32, 40), (24, 32)):
        with pytest.raises(ConfigError, match="multiples of 16"):
            WAN.latent_shape(pipe, height, width)
    pipe.vae_scale_factor_temporal = 1
    with pytest.raises(ConfigError, match="temporal factor of 1"):
        WAN.latent_shape(pipe, 32, 32)


def test_latents_are_those_of_the_pipeline_and_an_image_is_the_first_frame():
    """The decoder is the pipeline's own; the code of an image alone is the first latent frame of a video."""
    pipe, generator = tiny.pipeline("wan"), torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    video = torch.rand(2, 3, 5, 32, 32, generator=generator) * 2 - 1
    latents = WAN.encode(pipe, video)
    assert latents.shape == (2, 4, 3, 8, 8)
    still = replace(WAN, num_frames=1)
    assert torch.equal(still.encode(pipe, video[:, :, 0]), still.encode(pipe, video[:, :, :1]))
    assert torch.allclose(still.encode(pipe, video[:, :, 0]), latents[:, :, :1], atol=1e-6)
    with torch.no_grad():
        ours = WAN.decode(pipe, latents)
    call = {"prompt": ["a", "b"], "latents": latents, "height": 32, "width": 32, "output_type": "pt"}
    pipe.scheduler = Still()
    theirs = pipe(**call, num_inference_steps=1, guidance_scale=1.0, **WAN.arguments())[0]
    assert torch.allclose(clips_of(ours / 2 + 0.5), theirs, atol=1e-6)
    with pytest.raises(ConfigError, match="samples of 1 frames, expected 5"):
        WAN.encode(pipe, video[:, :, 0])


class Still(FlowMatchEulerDiscreteScheduler):
    """Leaves the latents as they are."""

    def step(self, model_output, timestep, sample, return_dict=True, **kwargs):
        return (sample,)


def test_clips_are_frames_in_their_order():
    video = torch.arange(2 * 3 * 7 * 4 * 6).reshape(2, 3, 7, 4, 6)
    clips = clips_of(video)
    assert clips.shape == (2, 7, 3, 4, 6) and torch.equal(clips[1, 5], video[1, :, 5])
    assert torch.equal(frames_of(video)[7 + 5], video[1, :, 5])
    strip = filmstrip(clips, 3)
    assert strip.shape == (2, 3, 4, 18) and torch.equal(strip[1, :, :, 6:12], video[1, :, 3])
    assert torch.equal(filmstrip(clips[:, :1]), video[:, :, 0]) and torch.equal(strip[0, :, :, 12:], video[0, :, 6])
    image = torch.rand(2, 3, 4, 6)
    assert all(torch.equal(of(image), image) for of in (clips_of, frames_of, filmstrip))


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """The mean of each image, and how long its prompt is."""
    return images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])


def test_a_reward_of_a_video_is_the_mean_over_its_frames():
    score = Custom(function=f"{__name__}.brightness").load(torch.device("cpu"))
    video = torch.rand(2, 3, 5, 4, 4)
    expected = video.mean((1, 2, 3, 4)) + torch.tensor([1.0, 3.0])
    assert torch.allclose(score(video, ["a", "bcd"]), expected)


# five dimensions


class Elementwise:
    """A role that acts on each number alone; fixed but for the student's weight."""

    def __init__(self, role: str, schedule: Rectified) -> None:
        self.schedule, self.scale = schedule, nn.Parameter(torch.tensor({"student": 0.7, "fake": 0.5}.get(role, 0.9)))

    def __call__(self, x_t: Tensor, t: Tensor, cond) -> Estimate:
        alpha_t, sigma_t = (value.reshape(-1, *[1] * (x_t.ndim - 1)) for value in self.schedule(t))
        x0 = torch.tanh(self.scale * x_t) + cond["shift"].reshape(alpha_t.shape)
        return Estimate(x0, (x_t - alpha_t * x0) / sigma_t)


def updates_of(shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """Loss and student's gradient of each update of DMD2 on samples of a shape."""
    schedule = Rectified(5.0)
    roles = {role: Elementwise(role, schedule) for role in ("student", "fake", "teacher")}
    context = StepContext(
        schedule=schedule,
        null={"shift": torch.zeros(1)},
        denoiser=lambda role: roles[role],  # pyright: ignore[reportArgumentType]
        module=lambda role: nn.Module(),
        decode=lambda latents: latents,
        seed=0,
        step=0,
        device=torch.device("cpu"),
    )
    part, seen = Batch((0, 1), {"shift": torch.tensor([0.1, 0.2])}, shape), []
    for update in DMD2(num_inference_steps=3, guidance_scale=3.0).updates(context, part, 0):
        roles[update.roles[0]].scale.grad = None
        update.loss.backward()
        seen.append((update.loss.detach(), roles[update.roles[0]].scale.grad))
    return seen


def test_dmd2_of_a_video_is_that_of_its_numbers_in_four_dimensions():
    for (loss, grad), (flat, own) in zip(updates_of((4, 3, 8, 8)), updates_of((4, 24, 8)), strict=True):
        assert torch.equal(loss, flat) and torch.equal(grad, own) and grad.abs() > 1e-4


def test_guidance_keeps_what_the_null_lacks():
    """The image of image to video: both halves of the guided call see it, and the prompt's half alone the prompt."""
    seen = []

    def denoise(x_t, t, cond):
        seen.append(dict(cond))
        return Estimate(x_t, x_t)

    image, states = torch.randn(2, 4, 1, 8, 8), torch.randn(2, 6, 5)
    null = {"states": torch.zeros(1, 6, 5)}
    guided(denoise, null, 3.0)(torch.randn(2, 4, 3, 8, 8), torch.ones(2), {"states": states, "image": image})
    assert torch.equal(seen[0]["image"], torch.cat([image, image]))
    assert torch.equal(seen[0]["states"], torch.cat([torch.zeros(2, 6, 5), states]))


# teachers


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    tiny.pipeline("wan").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("model_index.json", {"boundary_ratio": 0.875}, "boundary_ratio 0.875, expected None: it has two networks"),
        ("transformer/config.json", {"in_channels": 36}, "in_channels 36, expected 4"),
        ("vae/config.json", {"latents_mean": None}, "without latents_mean, expected one with: the family scales each"),
        ("vae/config.json", {"in_channels": 12}, "in_channels 12, expected 3"),
    ],
)
def test_teachers_of_other_kinds_are_refused(teacher, tmp_path, file, changes, match):
    place = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    config = json.loads((place / file).read_text())
    (place / file).write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError, match=match):
        replace(WAN, pretrained_teacher_model=str(place)).check_files()


def test_an_image_family_refuses_an_autoencoder_with_a_scale_for_each_channel(tmp_path):
    tiny.pipeline("sd3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"latents_mean": [0.0] * 4}))
    family = replace(tiny.FAMILIES["sd3"], pretrained_teacher_model=str(tmp_path))
    with pytest.raises(ConfigError, match="with latents_mean, expected one without: the family scales latents by one"):
        family.check_files()


# planted bugs


def four_levels() -> None:
    for shift in (1.0, 5.0):
        times = Rectified(shift).starts(4)
        assert visited(shift_terminal(times), 4) == pytest.approx(times, rel=1e-6)


def off_the_grid() -> None:
    with pytest.raises(ConfigError):
        shift_terminal((1000.0, 937.5, 833.33, 700.0))


NOTICED = (ConfigError, pytest.fail.Exception)
BUGS = {
    "m without the shift": Bug(shift_terminal, "_shifted(shift, 1 / TABLE)", "1 / TABLE", four_levels),
    "the last entry is 0": Bug(shift_terminal, "(1 - _shifted(shift, m))", "1", four_levels),
    "the grid has n intervals": Bug(shift_terminal, "  d = (1 - m) / (n - 1)", "  d = (1 - m) / n", four_levels),
    "nothing is visited": Bug(levels._visits, "<= OFF * ours", "< 1e9", off_the_grid),
    "frames stay behind": Bug(clips_of, "pixels.transpose(1, 2)", "pixels", test_clips_are_frames_in_their_order),
    "all is dropped": Bug(
        without_prompt, "in null else value", "in null else 0 * value", test_guidance_keeps_what_the_null_lacks
    ),
}
test_the_oracles_pass_on_the_code_as_it_is, test_a_bug_is_noticed = bug_tests(BUGS, *NOTICED)
