"""The image of a call that continues it as a video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepdistill.core.errors import DataError, StudentError, problem
from stepdistill.core.image_files import upright
from stepdistill.data.images import window
from stepdistill.families.base import Family
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.students.draw.call import PipelineCall


def check_first_frame(family: Family, file: Path | None) -> None:
    """Raise StudentError where a family that continues images has none, or another one has an image."""
    continues = isinstance(family, ImageToVideo)
    if continues and file is None:
        got, todo = "no image for a student of image to video", "pass it with --image"
        raise StudentError(problem(got, "one", "its videos begin with it", todo))
    if file is not None and not continues:
        got = f"--image {file} for a student of {type(family).__name__}"
        raise StudentError(problem(got, "none", "it takes prompts alone", "leave it out"))


def continued(call: PipelineCall, file: Path) -> PipelineCall:
    """The call with the image of a file, the same for all prompts.

    It is resized until it covers the size of the video, and its centre is cut out, as in training's validation:
    Diffusers would stretch it. Raises DataError for a file that is no image.
    """
    size = call.arguments["height"], call.arguments["width"]
    try:
        return call.plus(image=window(upright(file), size, 0.5, 0.5, "lanczos"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        why, todo = f"it cannot be read ({error})", "name a file such as first.png"
        raise DataError(problem(f"the image {file}", "an image file", why, todo)) from error


def covering(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image (3, h, w) in [0, 1] as (3, H, W), by the rule of `continued`, in floats: none is rounded to 8 bits."""
    planes = [window(Image.fromarray(plane.numpy()), size, 0.5, 0.5, "lanczos") for plane in image.float()]
    return torch.stack([torch.from_numpy(np.array(plane)) for plane in planes]).clamp(0, 1)
