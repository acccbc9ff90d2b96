"""Where a teacher lies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from stepdistill.core.errors import ConfigError, problem
from stepdistill.data.bundled import bundled

BUNDLED_NAMES = ("tiny-sd", "tiny-sd3", "tiny-wan")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
FILES = (*PICKLES, ".gguf", ".safetensors", ".zip")  # a name that ends so is no hub id


def is_hub_id(name: str) -> bool:
    """Whether a name could be one on the Hub."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not name.startswith(".") and Path(name).suffix not in FILES


def teacher_location(name: str) -> str:
    """The path or hub id of the teacher. Raises ConfigError if it can be neither."""
    path = bundled(name)
    if path.is_dir() and not (path / "model_index.json").exists():
        raise ConfigError(
            problem(
                f"the folder {path} without a model_index.json",
                "a pipeline folder, as `pipe.save_pretrained(folder)` writes it",
                "the teacher is a whole Diffusers pipeline, with its text encoders, autoencoder and scheduler",
                "point family.pretrained_teacher_model at the folder that holds model_index.json",
            )
        )
    if not path.exists() and not is_hub_id(name):
        raise ConfigError(
            problem(
                f"family.pretrained_teacher_model {name!r}, which does not exist",
                f"a pipeline folder, a .safetensors file, a hub id such as owner/name, or one of {BUNDLED_NAMES}",
                "there is nothing to distil without the teacher",
                "check the path: it is read relative to the working directory",
            )
        )
    if path.is_file() and path.suffix != ".safetensors":
        why, todo = "no pipeline is read from it", "give the pipeline's folder, or its .safetensors file"
        if path.suffix in PICKLES:
            why = "it is a pickle, which can run any code when it is read"
            todo = "if you trust it, save it as a folder with Diffusers' `from_single_file` and `save_pretrained`"
        raise ConfigError(problem(f"the file {path}", "a pipeline folder or a .safetensors file", why, todo))
    return str(path) if path.exists() else name


def download(where: str, pipeline: type[DiffusionPipeline], **given: Any) -> str:  # noqa: ANN401
    """The folder of a pipeline: itself, or of a hub id the one in the cache, with the files that Diffusers would read.

    Args:
        given: as `from_pretrained` has them; the parts among them are not fetched.
    """
    return where if Path(where).is_dir() else str(pipeline.download(where, **given))
