"""A flow's shift that depends on the size of images, against the schedulers of the pipelines."""

from __future__ import annotations

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from oracles.planted import Bug, bug_tests
from tiny import FAMILIES, pipeline

from stepdistill.families import flow
from stepdistill.families.flow import dynamic_shift, size_shift

SETTINGS = {
    "Flux.1": {"max_image_seq_len": 4096, "max_shift": 1.15},
    "Qwen-Image": {"max_image_seq_len": 8192, "max_shift": 0.9},
    "linear": {"max_image_seq_len": 6400, "max_shift": 1.15, "time_shift_type": "linear"},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("tokens", [1024, 4096, 6000])
def test_the_grid_is_that_of_the_scheduler(name, tokens):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **SETTINGS[name])
    config = scheduler.config
    given = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    scheduler.set_timesteps(8, sigmas=[1 - i / 8 for i in range(8)], mu=calculate_shift(tokens, *given))
    ours = flow.Rectified(dynamic_shift(scheduler, tokens)).starts(8)
    assert ours == pytest.approx(scheduler.timesteps.tolist(), rel=1e-5)


def test_a_fixed_shift_is_one_for_all_sizes():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert size_shift(scheduler, 64) == size_shift(scheduler, None) == 3.0


def test_flux_follows_the_size_unless_a_shift_is_given():
    family, pipe = FAMILIES["flux"], pipeline("flux")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    small, large = (family.schedule_at(pipe, scheduler, (side, side)).shift for side in (64, 128))
    assert small == pytest.approx(dynamic_shift(scheduler, (64 // (2 * pipe.vae_scale_factor)) ** 2))
    assert large == pytest.approx(dynamic_shift(scheduler, (128 // (2 * pipe.vae_scale_factor)) ** 2))
    assert small < large < family.schedule(scheduler).shift == pytest.approx(dynamic_shift(scheduler, 4096))


def grids() -> None:
    for name in SETTINGS:
        test_the_grid_is_that_of_the_scheduler(name, 6000)


BUGS = {
    "a shift that stops growing": Bug(dynamic_shift, "(tokens - low)", "(min(tokens, high) - low)", grids),
    "from the wrong end": Bug(dynamic_shift, "mu = first + ", "mu = last + ", grids),
    "exponential whatever it says": Bug(dynamic_shift, '== "linear"', '== "none"', grids),
    "linear whatever it says": Bug(dynamic_shift, '== "linear"', '!= "none"', grids),
    "the largest size": Bug(size_shift, "tokens or 4096", "4096", test_flux_follows_the_size_unless_a_shift_is_given),
}
test_the_oracles_pass_on_the_code_as_it_is, test_a_bug_is_noticed = bug_tests(BUGS)
