"""Checks of runs on videos, before anything is loaded."""

from __future__ import annotations

from stepdistill.core.errors import ConfigError, problem
from stepdistill.data import Clips, ImageSource, InvertedImages, Source, TeacherSamples, Trajectories, inside
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.training.recipe import Run
from stepdistill.training.setup import Session


def provided(source: Source) -> set[str]:
    """What methods may ask of a source: images give latents too, latents with their noise are pairs."""
    have = set(source.provides)
    have |= {"latents"} if "images" in have else set()
    return have | ({"pairs"} if {"latents", "noise"} <= have else set())


def check_clip_frames(run: Run) -> None:
    """Clips are for families of videos, and have as many frames as theirs; latents of videos are of clips."""
    frames = run.family.arguments().get("num_frames")
    still = isinstance(run.data, ImageSource) and not isinstance(run.data, Clips)
    if still and (frames or 1) > 1 and "latents" in run.method.needs:
        got = f"images from {type(run.data).__name__} with family.num_frames {frames}"
        why = f"{type(run.method).__name__} trains on latents of videos"
        raise ConfigError(problem(got, "clips", why, "use stepdistill.data.Clips, or set family.num_frames to 1"))
    for source in inside(run.data):
        if isinstance(source, Clips) and source.num_frames != frames:
            family = type(run.family).__name__
            got = f"num_frames {source.num_frames} of {type(source).__name__} with family {family}"
            expected = "images" if frames is None else f"{frames}, as family.num_frames says"
            why = "this family makes images" if frames is None else "all videos of a run have one number of frames"
            todo = "use an image source" if frames is None else "make the two numbers equal"
            raise ConfigError(problem(got, expected, why, todo))
        rate = run.family.arguments().get("frame_rate")
        if isinstance(source, Clips) and rate and source.frame_rate != rate:
            got, why = f"data.frame_rate {source.frame_rate}", "the network is told the times of frames in seconds"
            raise ConfigError(problem(got, f"{rate:g}, as family.frame_rate says", why, "make the two numbers equal"))


def check_clip_lengths(run: Run) -> None:
    """Some clip is long enough."""
    for source in inside(run.data):
        if isinstance(source, Clips):
            source.check_lengths()


def check_first_frames(run: Run) -> None:
    """A family that continues images has one for each sample and each validation prompt; others have none."""
    prompts, images = len(run.train.validation_prompts), len(run.train.validation_images)
    if not isinstance(run.family, ImageToVideo):
        if images:
            got, why = f"train.validation_images with family {type(run.family).__name__}", "it takes prompts alone"
            raise ConfigError(problem(got, "a family that continues an image", why, "remove them"))
        return
    name = type(run.family).__name__
    for source in inside(run.data):
        alone = isinstance(source, TeacherSamples) and "images" not in source.source.provides
        if alone or isinstance(source, InvertedImages | Trajectories):
            got, why = f"a {type(source).__name__} source with family {name}", "it is made from prompts alone"
            expected = "clips, images, or stepdistill.data.TeacherSamples around them"
            raise ConfigError(problem(got, expected, why, "use another data source"))
    if "latents" not in provided(run.data):
        got, why = f"a {type(run.data).__name__} source with family {name}", "the videos begin with them"
        raise ConfigError(problem(got, "images or clips", why, "use an image source, such as ImageFolder"))
    if prompts != images:
        got, why = f"{images} train.validation_images for {prompts} prompts", "each video begins with an image"
        raise ConfigError(problem(got, str(prompts), why, "set one for each of train.validation_prompts, in order"))
    rewards = (*run.method.trained_rewards, run.method.held_out)
    if any(reward is not None for reward in rewards):
        got, why = f"rewards with family {name}", "they are measured on samples of prompts alone"
        raise ConfigError(problem(got, "none", why, "remove them, or train text to video"))


def check_first_frame_size(session: Session) -> None:
    """Images that a family continues have the size of its videos."""
    if isinstance(session.run.family, ImageToVideo):
        height, width = session.batches.size
        for source in inside(session.run.data):
            if isinstance(source, ImageSource) and source.shapes != [(height, width)]:
                got = f"a {type(source).__name__} source of sizes {source.shapes}"
                why, todo = "a video has the size of the image that it begins with", "set resolution of the data"
                todo = f"{todo} to [{height}, {width}], or train.resolution to that of the data"
                raise ConfigError(problem(got, f"{height} x {width}, that of the videos", why, todo))
