"""The control image of a call: the pipeline must have a ControlNet."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from stepdistill.core.errors import DataError, StudentError, problem
from stepdistill.core.image_files import flatten
from stepdistill.students.draw.call import PipelineCall
from stepdistill.students.draw.pipeline import StudentPipeline


def controlled(student: StudentPipeline, call: PipelineCall, image: Image.Image, scale: float = 1.0) -> PipelineCall:
    """The call with a control image, the same for all prompts.

    Args:
        image: of the size of the images that the call generates.
        scale: factor of the ControlNet's outputs, `controlnet_conditioning_scale` of Diffusers.

    Raises:
        StudentError: the image has another size. Diffusers would stretch it.
    """
    controls = student.family.controls
    assert controls is not None
    for contract in student.contracts:
        height, width = (call.arguments.get(side, contract.call[side]) for side in ("height", "width"))
        if image.size != (width, height):
            got, expected = f"a control image of {image.width} x {image.height} pixels", f"{width} x {height}"
            why = "the generated images have this size, and Diffusers would stretch the control image"
            todo = "crop or resize it, or generate images of its size by --width and --height"
            raise StudentError(problem(got, expected, why, todo))
    return call.plus(**{controls.image: image, "controlnet_conditioning_scale": scale})


def read_control(file: Path) -> Image.Image:
    """A control image in RGB. Raises DataError for a file that is no image."""
    try:
        with Image.open(file) as image:
            return flatten(image)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        why, todo = f"it cannot be read ({error})", "name a file such as edges.png"
        raise DataError(problem(f"the control image {file}", "an image file", why, todo)) from error
