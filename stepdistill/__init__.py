"""stepdistill: turn a 20-50-step diffusion pipeline into a 1-8-step one."""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["__version__", "base_first", "distill", "load_student", "negative_prompt"]

HOMES = {
    "base_first": "stepdistill.students.draw.base_first",
    "distill": "stepdistill.training.distill",
    "load_student": "stepdistill.students.load",
    "negative_prompt": "stepdistill.students.draw.negative_prompt",
}


def __getattr__(name: str) -> object:
    """The functions of `HOMES`, imported on first use: `stepdistill --help` must not wait for torch."""
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module 'stepdistill' has no attribute {name!r}")
