"""`~` is the home folder in every path of a config and of a command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import pytest
from surface import arguments, config_classes

from stepdistill.cli.dialect import local_path
from stepdistill.cli.main import _parser
from stepdistill.config.kinds import Place
from stepdistill.config.schema import arms, fields
from stepdistill.core.outputs import expanded

OTHER_TEXT = {  # every field with text that is no path
    *("revision", "variant", "classes", "caption_column", "dataset_config_name", "split", "image_column", "prompts"),
    *("target_modules", "tracker_project_name", "validation_prompts", "hub_model_id"),
    *("roles", "optimizers", "control", "function", "negative_prompt"),
}


def test_every_path_of_a_config_is_a_place() -> None:
    places, texts = set(), set()
    for cls in config_classes():
        for name, hint in fields(cls).items():
            for arm in arms(hint):
                kinds = [arm, *(part for part in get_args(arm) if arm != Place)]
                places |= {name} if Place in kinds else set()
                texts |= {name} if str in kinds else set()
    assert texts == OTHER_TEXT
    assert len(places) == 23 and not places & texts


OTHER_WORDS = {  # every argument of text that is no path
    *("prompts", "--negative-prompt", "method", "family", "--family", "data", "--device"),
    *("--protocol", "--features", "--metrics", "--then"),
}


@pytest.mark.parametrize("text", ["~/x", "~/x:0.5", "~/x:y"])  # a LoRA may have a strength
def test_every_path_of_a_command_is_expanded(text, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/else/me")
    words, places = set(), set()
    for action in arguments(_parser()):
        try:
            value = str(action.type(text) if callable(action.type) else text)
        except argparse.ArgumentTypeError:
            continue  # a number
        if action.choices is None:
            (words if "~" in value else places).add((action.option_strings or [action.dest])[-1])
            assert "~" in value or "/else/me/x" in value
    assert words == OTHER_WORDS and len(places) > 20


@pytest.mark.parametrize("text", ["org/name", "a~", "~nobody-of-this-name/x", ""])
def test_other_words_stay(text) -> None:
    assert expanded(text) == text and local_path(text) == Path(text)
