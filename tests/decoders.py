"""A small Janus with random weights and a student of it, shared by the tests of Distilled Decoding."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import JanusForConditionalGeneration, JanusProcessor

from stepdistill.data.bundled import build
from stepdistill.data.bundled.build_tokens import janus_config, janus_processor
from stepdistill.decoding.folder.heads import Heads
from stepdistill.decoding.folder.pipeline import OneStepPipeline
from stepdistill.decoding.janus import Janus, TokenTeacher
from stepdistill.decoding.method import DistilledDecoding
from stepdistill.decoding.session import fresh_heads
from stepdistill.decoding.write import write_decoding_student

PROMPTS = ["red apple", "a big brown dog face", "rose"]  # they differ in length
KEEPS = (0, 21, 42)


def janus_parts() -> tuple[Any, JanusProcessor]:
    """A Janus of 64 tokens with 32 codes in 4 dimensions, and its processor."""
    processor = janus_processor(build.drawing_texts(), 600)
    torch.manual_seed(0)
    config = janus_config(len(processor.tokenizer), 32, 1, codes=32, dim=4)
    model: Any = JanusForConditionalGeneration(config)
    for name, parameter in model.named_parameters():  # far from 0, so that prompts and tokens matter
        if "embed" in name or "generation" in name:
            torch.nn.init.normal_(parameter)
    return model, processor


def small_janus(place: Path) -> Path:
    """It as a folder."""
    for part in janus_parts():
        part.save_pretrained(place)
    return place


def lines_of(janus: Path, place: Path) -> list[str]:
    """The overrides that make a short run of it, in a folder."""
    place.mkdir(exist_ok=True)
    (place / "prompts.txt").write_text("\n".join(PROMPTS))
    return [
        f"teacher.pretrained_teacher_model={janus}",
        "teacher.guidance_scale=3",
        "data.source.type=stepdistill.data.Prompts",
        f"data.source.prompts_file={place / 'prompts.txt'}",
        f"data.folder={place / 'pairs'}",
        "data.count=70",
        "lora.rank=4",
        "lora.alpha=10",
        f"train.output_dir={place / 'run'}",
        *("train.max_train_steps=4", "train.train_batch_size=4", "train.report_to=none", "train.learning_rate=1e-2"),
        "train.checkpointing_steps=2",
    ]


def small_teacher(**settings: Any) -> TokenTeacher:
    """It as a teacher."""
    model, processor = janus_parts()
    return TokenTeacher(Janus(pretrained_teacher_model="small", **settings), model.eval(), processor)


def random_student(teacher: TokenTeacher) -> tuple[nn.Module, Heads]:
    """The parts of a student whose layers are random, so that its tokens depend on noise, prompt and calls."""
    heads, network = fresh_heads(teacher), deepcopy(teacher.model.model.language_model)
    torch.manual_seed(1)
    for parameter in (*heads.parameters(), *network.layers.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    return network, heads


def random_pipeline(teacher: TokenTeacher) -> OneStepPipeline:
    """Such a student."""
    return OneStepPipeline(*random_student(teacher), teacher.model.model.vqmodel, teacher.processor, KEEPS)


def untrained_student(janus: Path, place: Path, **settings: Any) -> Path:
    """The folder of such a student."""
    teacher = Janus(pretrained_teacher_model=str(janus), **{"guidance_scale": 3.0, **settings}).load()
    write_decoding_student(place, teacher, DistilledDecoding(keeps=KEEPS), *random_student(teacher))
    return place
