"""Loading a student folder, of one student or several, into a plain pipeline of its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from stepdistill.students.contract import is_multi
from stepdistill.students.several import load
from stepdistill.students.single import folder_of, load_one


def load_student(pipe: DiffusionPipeline, folder_or_hub_id: str | Path, adapter_name: str = "student") -> Any:  # noqa: ANN401
    """Load a student's LoRA, or guidance adapters, and its scheduler into a plain pipeline of its base.

    Adapters that are active there, such as a style, stay so, at the strength that they have. A student that is a
    network of its own takes the place of the pipeline's, with whatever was on that.

    Returns:
        Keyword arguments of the pipeline's call: `pipe(prompt, **load_student(pipe, folder))`. Of guidance adapters
        they are a `networks.guidance_adapters.GuidedCall`, on which the scale is set. For a folder of several students
        `stepdistill.students.several.Students`, which draw instead: `load_student(pipe, folder)(prompts)`.

    Raises:
        StudentError: there is no student, or it does not fit the pipeline.
    """
    folder = folder_of(folder_or_hub_id)
    return load(pipe, folder, adapter_name) if is_multi(folder) else load_one(pipe, folder, adapter_name)
