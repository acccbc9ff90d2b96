"""stepdistill: turn a 20-50-step diffusion pipeline into a 1-8-step one."""

__version__ = "0.1.0"
__all__ = ["__version__", "distill", "load_student"]


def __getattr__(name: str) -> object:
    """`distill` and `load_student`, imported on first use: `stepdistill --help` must not wait for torch."""
    if name == "distill":
        from stepdistill.training.distill import distill

        return distill
    if name == "load_student":
        from stepdistill.students.load import load_student

        return load_student
    raise AttributeError(f"module 'stepdistill' has no attribute {name!r}")
