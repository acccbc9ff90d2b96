"""A small Janus with random weights and a student of it, shared by the tests of Distilled Decoding."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import JanusForConditionalGeneration

from stepdistill.data.bundled import build
from stepdistill.data.bundled.build_tokens import janus_config, janus_processor
from stepdistill.decoding.janus import Janus
from stepdistill.decoding.method import DistilledDecoding
from stepdistill.decoding.session import fresh_heads
from stepdistill.decoding.write import write_decoding_student

PROMPTS = ["red apple", "a big brown dog face", "rose"]  # they differ in length


def small_janus(place: Path) -> Path:
    """A folder of a Janus, 64 tokens of 32 codes in 4 dimensions."""
    processor = janus_processor(build.drawing_texts(), 600)
    torch.manual_seed(0)
    config = janus_config(len(processor.tokenizer), 32, 1, codes=32, dim=4)
    model: Any = JanusForConditionalGeneration(config)
    for name, parameter in model.named_parameters():  # far from 0, so that prompts and tokens matter
        if "embed" in name or "generation" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return place


def untrained_student(janus: Path, place: Path, **settings: Any) -> Path:
    """The folder of a student whose layers are random, so that its tokens depend on noise, prompt and calls."""
    teacher = Janus(pretrained_teacher_model=str(janus), **{"guidance_scale": 3.0, **settings}).load()
    heads, network = fresh_heads(teacher), deepcopy(teacher.model.model.language_model)
    torch.manual_seed(1)
    for parameter in (*heads.parameters(), *network.layers.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    write_decoding_student(place, teacher, DistilledDecoding(keeps=(0, 21, 42)), network, heads)
    return place
