"""Everything that a config and a command take: each class of a config, and each argument."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from inspect import isabstract

from stepdistill.config.registry import every
from stepdistill.config.schema import Factory, fields, structures
from stepdistill.data.base import Source
from stepdistill.data.bundled.teacher_spec import TeacherSpec
from stepdistill.families.base import Family
from stepdistill.methods.base import Method
from stepdistill.networks.rewards.base import Reward
from stepdistill.networks.roles import LoraSpec
from stepdistill.training.recipe import Run, TrainSpec


def config_classes() -> list[type]:
    """Every class of the library that a config may have, with the terms of a method and the like."""
    rooms = {
        Family: "families",
        Method: "methods",
        Source: "data",
        Reward: "networks.rewards",
    }  # others make some for themselves
    heirs = [
        cls for base, room in rooms.items() for cls in every(base) if cls.__module__.startswith(f"stepdistill.{room}.")
    ]
    classes = [*heirs, Run, LoraSpec, TrainSpec, TeacherSpec]
    for cls in classes:  # grows on the way
        for hint in fields(cls).values():
            inner = (part for part in structures(hint) if not isabstract(part) and part is not Factory)
            classes += [part for part in dict.fromkeys(inner) if part not in classes]
    return classes


def arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument with a value, of every command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from arguments(command)
        elif action.nargs != 0:
            yield action
