"""The student's folder: a Diffusers pipeline with two files of code, which opens without this package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from stepdistill.core.files import write_text
from stepdistill.decoding.folder import heads as heads_code
from stepdistill.decoding.folder import pipeline as pipeline_code
from stepdistill.decoding.folder.heads import Heads
from stepdistill.decoding.folder.pipeline import OneStepPipeline
from stepdistill.decoding.janus import TokenTeacher

INDEX = "model_index.json"


def assemble(teacher: TokenTeacher, language_model: nn.Module, heads: Heads, keeps: Sequence[int]) -> OneStepPipeline:
    """The student as a pipeline, with the teacher's decoder and processor."""
    vqmodel, longest = teacher.model.model.vqmodel, teacher.settings.max_sequence_length
    return OneStepPipeline(language_model, heads, vqmodel, teacher.processor, keeps, max_sequence_length=longest)


def write_folder(out: Path, pipe: OneStepPipeline) -> None:
    """Write a pipeline that `DiffusionPipeline.from_pretrained(out, trust_remote_code=True)` opens.

    Diffusers looks for a part's code in the part's own folder, and for that of the pipeline by the name of its class.
    """
    pipe.save_pretrained(out)
    (out / "pipeline.py").write_text(Path(pipeline_code.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    shutil.copy(heads_code.__file__, out / "heads" / "heads.py")
    index = json.loads((out / INDEX).read_text())
    index |= {"_class_name": ["pipeline", OneStepPipeline.__name__], "heads": ["heads", Heads.__name__]}
    write_text(out / INDEX, json.dumps(index, indent=2))
