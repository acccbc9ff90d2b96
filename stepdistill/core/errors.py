"""Errors that a user can cause and fix. The commands print them as one block, without a traceback."""

from __future__ import annotations


class StepdistillError(Exception):
    """Base of every error that the input causes: a config, a data set, a folder, a diverging run."""


class ConfigError(StepdistillError, ValueError):
    """A config that cannot be built; its message lists every problem by path."""


class OutputError(StepdistillError):
    """An output that cannot be written, or that would replace an input or what this tool did not write."""


class DataError(StepdistillError):
    """A data source that is missing, empty, broken or not what the method needs."""


class CheckpointError(StepdistillError):
    """A checkpoint or student folder that is missing, incomplete or from another run."""


class StudentError(StepdistillError):
    """A student folder that plain Diffusers does not reproduce, or that does not fit the pipeline."""


class EvaluationError(StepdistillError):
    """Images, statistics or an evaluation that cannot be read, mixed or compared."""


class WrongWeights(StepdistillError):
    """A weights file or folder that is not the one that its features are defined on."""


class MissingWeights(StepdistillError):
    """Weights that were not found. The message lists the places that were searched, and the command exits with 3."""


class NonFiniteLoss(StepdistillError):
    """A loss that is NaN or infinite; its message names step, batch and term."""


def problem(got: object, expected: object, why: str, todo: str) -> str:
    """One sentence in the order of every error here: got, expected, why it matters, what to do."""
    return f"got {got}, expected {expected}: {why}; {todo}"
