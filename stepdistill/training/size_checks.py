"""Checks of the sizes that a run trains at."""

from __future__ import annotations

from stepdistill.core.errors import ConfigError, problem
from stepdistill.data import Latents, inside
from stepdistill.data.made import TeacherMade
from stepdistill.training.recipe import Run
from stepdistill.training.setup import Session
from stepdistill.training.sizes import listed_sizes


def check_size_list(run: Run) -> None:
    """Several sizes are for data that has none of its own."""
    resolution = run.train.resolution
    if resolution is None or len(listed_sizes(resolution)) < 2:
        return
    got, expected = f"train.resolution with {len(listed_sizes(resolution))} sizes", "one size"
    for source in inside(run.data):
        if isinstance(source, TeacherMade):
            got, why = f"{got} for a {type(source).__name__} source", "what the teacher makes before training has one"
            todo = "set one, or train on prompts alone (stepdistill.data.Prompts) with a method that needs no more"
            raise ConfigError(problem(got, expected, why, todo))
    if "images" in run.data.provides:
        got, why = f"{got} for a {type(run.data).__name__} source", "the sizes of images are those of their source"
        raise ConfigError(problem(got, expected, why, "move the list to data.resolution"))
    if isinstance(run.data, Latents):
        why, todo = "the stored latents have one", "remove train.resolution"
        raise ConfigError(problem(f"{got} for a Latents source", expected, why, todo))


def check_sizes_fit(session: Session) -> None:
    """The pipeline takes each size."""
    for size in (session.batches.size, *session.sizes.sizes):
        session.run.family.latent_shape(session.pipe, *size)
