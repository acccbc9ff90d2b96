"""A student with a ControlNet of its base: the stock pipeline with both, and the call with a control image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image

from stepdistill.core.errors import DataError, StudentError, problem
from stepdistill.core.image_files import flatten
from stepdistill.families.control import ControlNets
from stepdistill.students.draw.call import PipelineCall
from stepdistill.students.draw.pipeline import StudentPipeline
from stepdistill.students.several import Students


def with_controlnet(student: StudentPipeline, place: str) -> StudentPipeline:
    """The student in the stock pipeline of its family that calls a ControlNet before the network in each step.

    Args:
        place: folder or hub id of a ControlNet of the base.

    Raises:
        StudentError: Diffusers has no such pipeline for the family.
        ConfigError: there is no ControlNet, or it is of another base.
    """
    controls = _controls(student)
    controlnet = controls.read(place)
    controls.check(student.pipe, student.family.network(student.pipe), controlnet)
    pipe = controls.pipeline_of(student.pipe, controlnet.to(student.pipe.device))
    loaded = student.loaded
    return replace(student, pipe=pipe, loaded=replace(loaded, pipe=pipe) if isinstance(loaded, Students) else loaded)


def controlled(student: StudentPipeline, call: PipelineCall, image: Image.Image, scale: float = 1.0) -> PipelineCall:
    """The call with a control image, the same for all prompts.

    Args:
        image: of the size of the images that the call generates.
        scale: factor of the ControlNet's outputs, `controlnet_conditioning_scale` of Diffusers.

    Raises:
        StudentError: the image has another size. Diffusers would stretch it.
    """
    for contract in student.contracts:
        height, width = (call.arguments.get(side, contract.call[side]) for side in ("height", "width"))
        if image.size != (width, height):
            got, expected = f"a control image of {image.width} x {image.height} pixels", f"{width} x {height}"
            why = "the generated images have this size, and Diffusers would stretch the control image"
            todo = "crop or resize it, or generate images of its size by --width and --height"
            raise StudentError(problem(got, expected, why, todo))
    return call.plus(**{_controls(student).image: image, "controlnet_conditioning_scale": scale})


def read_control(file: Path) -> Image.Image:
    """A control image in RGB. Raises DataError for a file that is no image."""
    try:
        with Image.open(file) as image:
            return flatten(image)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        why, todo = f"it cannot be read ({error})", "name a file such as edges.png"
        raise DataError(problem(f"the control image {file}", "an image file", why, todo)) from error


def _controls(student: StudentPipeline) -> ControlNets:
    controls, name = student.family.controls, student.family.pipeline_class.__name__
    if controls is None:
        why, todo = "Diffusers has no pipeline with a ControlNet for it", "leave the ControlNet out"
        raise StudentError(problem(f"a ControlNet for a {name}", "none", why, todo))
    return controls
