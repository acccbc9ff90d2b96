"""The Python code in a student's card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepdistill.core.files import is_single_file
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.students.contract import Contract, GuidanceAdapters, MultiContract, teacher
from stepdistill.students.draw.animation import frame_rate_of


def snippet(contract: Contract, address: Path | str) -> str:
    """Code that generates an image or a video, with Diffusers alone if possible.

    Args:
        address: the student's folder or hub id.
    """
    if contract.adapters is not None:
        return _adapter_snippet(contract, contract.adapters, address)
    if contract.lora is not None and not teacher(contract).loads_lora:
        return _loaded_snippet(contract, address)
    scheduler, net, name = contract.scheduler["_class_name"], contract.network, teacher(contract).network_name
    call = "".join(f"    {key}={value!r},\n" for key, value in (contract.call | _asked(contract)).items())
    seeded = "    generator=torch.manual_seed(0),\n"
    stock = [] if contract.first_noise else [scheduler]
    lines = [
        *([f"from stepdistill.families.schedulers import {scheduler}"] if contract.first_noise else []),
        *_loading(contract, address, *stock, *([net.class_name] if net else [])),
        f"pipe.{name} = {net.class_name}.from_pretrained(student, subfolder={name!r}).to(pipe.device, pipe.dtype)"
        if net
        else "pipe.load_lora_weights(student)",
        f'pipe.scheduler = {scheduler}.from_pretrained(student, subfolder="scheduler")',
        "",
        *_saved(contract, f'pipe(\n{_begun(contract)}    prompt="red apple",\n{call}{seeded})'),
    ]
    return "\n".join(lines)


def _adapter_snippet(contract: Contract, adapters: GuidanceAdapters, address: Path | str) -> str:
    low, high = contract.guidance_range or (adapters.guidance_scale,) * 2
    setting = f"call.guidance_scale = {adapters.guidance_scale:g}  # from {low:g} to {high:g}"
    return _loaded_snippet(contract, address, f"{setting}; the pipeline's own guidance scale stays 1")


def _loaded_snippet(contract: Contract, address: Path | str, *settings: str) -> str:
    """Code for a student that plain Diffusers cannot load."""
    asked = "".join(f"{key}={value!r}, " for key, value in _asked(contract).items())
    first = 'load_image("first.png"), ' if isinstance(teacher(contract), ImageToVideo) else ""
    lines = [
        "import stepdistill",
        *_loading(contract, address),
        "call = stepdistill.load_student(pipe, student)",
        *settings,
        "",
        *_saved(contract, f'pipe({first}prompt="red apple", **call, {asked}generator=torch.manual_seed(0))'),
    ]
    return "\n".join(lines)


def _frames(contract: Contract | MultiContract) -> int:
    """Of a video; 0 for the pipelines of images."""
    return teacher(contract).arguments().get("num_frames", 0)


def _animated(contract: Contract | MultiContract) -> str:
    """Arguments with which a list of frames is saved as an animation."""
    return f"save_all=True, append_images=frames[1:], duration={round(1000 / frame_rate_of(teacher(contract)))}, loop=0"


def _asked(contract: Contract | MultiContract) -> dict[str, Any]:
    """What the call needs so that frames are images; the pipelines of images give them anyway."""
    return {"output_type": "pil"} if _frames(contract) else {}


def _begun(contract: Contract) -> str:
    """A line with the image that a video begins with, the call's first argument."""
    if not isinstance(teacher(contract), ImageToVideo):
        return ""
    height, width = contract.resolution
    return f'    load_image("first.png"),  # of {width} x {height} pixels\n'


def _saved(contract: Contract, call: str) -> list[str]:
    """The lines that make a call of the pipeline, and save its image or its video."""
    frames = _frames(contract)
    if frames < 2:
        return [f"image = {call}.{'frames[0]' if frames else 'images'}[0]", 'image.save("student.png")']
    return [
        f"frames = {call}.frames[0]",
        f'frames[0].save("student.webp", {_animated(contract)})',
        "# or as an mp4 file, with the packages imageio and imageio-ffmpeg:",
        f'# diffusers.utils.export_to_video(frames, "student.mp4", fps={frame_rate_of(teacher(contract)):g})',
    ]


def multi_snippet(contract: MultiContract, address: Path | str) -> str:
    """Code that generates two images or videos, each with the student of its prompt."""
    asked = "".join(f", {key}={value!r}" for key, value in _asked(contract).items())
    frames = _frames(contract)
    name = "frames" if frames else "image"
    file = f'webp", {_animated(contract)}' if frames > 1 else 'png"'
    lines = [
        "import stepdistill",
        *_loading(contract, address),
        "students = stepdistill.load_student(pipe, student)",
        "",
        'prompts = ["red apple", "cat face"]',
        "generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]",
        f"for prompt, {name} in zip(prompts, students(prompts, generator=generators{asked})):",
        f'    {name}{"[0]" if frames else ""}.save(f"{{prompt}}.{file})',
    ]
    return "\n".join(lines)


def _loading(contract: Contract | MultiContract, address: Path | str, *imported: str) -> list[str]:
    """The lines that import, name the student, and load its base model."""
    family = teacher(contract)
    where, pipeline = family.location(), family.pipeline_class.__name__
    names = ("revision", "variant") if not is_single_file(where) else ()
    given = {name: vars(family)[name] for name in names} | {"config": family.single_file_config}
    args = [repr(where), *(f"{name}={value!r}" for name, value in given.items() if value is not None)]
    args += [f"{name}=None" for name in contract.base_without]
    load = "from_single_file" if is_single_file(where) else "from_pretrained"
    lines = [
        "import torch",
        f"from diffusers import {', '.join(sorted([pipeline, *imported]))}",
        *(["from diffusers.utils import load_image"] if isinstance(family, ImageToVideo) else []),
        "",
        f"student = {str(address)!r}",
        f"pipe = {pipeline}.{load}({', '.join(args)})",
        f'pipe.to("cuda" if torch.cuda.is_available() else "cpu", torch.{contract.dtype})',
    ]
    for lora in family.teacher_loras:  # parts of the teacher, below the student
        lines += [f"pipe.load_lora_weights({lora!r})", "pipe.fuse_lora()", "pipe.unload_lora_weights()"]
    return lines
