"""The bundled teachers and data set of the quickstart, and the code that made them."""

from pathlib import Path


def bundled(name: str) -> Path:
    """The path of the bundled `name` (`tiny-sd`, `tiny-sd-samples`, ...); any other name is returned as a path."""
    path = Path(__file__).parent / name
    return path if name.startswith("tiny-") and "/" not in name and path.exists() else Path(name)
