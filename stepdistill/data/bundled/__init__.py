"""The bundled teachers and data set of the quickstart, what made them, and the tables about them."""

from pathlib import Path


def bundled(name: str) -> Path:
    """What is bundled under `name` (`tiny-sd`, `tiny-sd-samples`, ...); any other name is a path of the user's."""
    path = Path(__file__).parent / name
    return path if name.startswith("tiny-") and "/" not in name and path.exists() else Path(name)
