"""Notebooks as pages: their text, their code, and the outputs that are stored in them. Nothing is run here."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def page(file: Path) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook, and its images by the name that the Markdown calls them by."""
    parts, images = [], {}
    for cell in json.loads(file.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{file.stem}-{len(images) + 1}.png"
                images[name] = base64.b64decode(data["image/png"])
                parts.append(f"![{_words(data)}]({name})")
            elif text := "".join(output.get("text", data.get("text/plain", []))).strip():
                parts.append(f"```{{ .text .output }}\n{text}\n```")
    title, *rest = parts
    download = f"This page is a notebook: [download {file.name}]({file.name}){{ download }}."
    return "\n\n".join([title, download, *rest]) + "\n", images


def _words(data: Mapping[str, Any]) -> str:
    """What an image shows, which matplotlib does not know: the notebook's text says it."""
    return "".join(data.get("text/plain", "")).strip("<>").partition(" with ")[0]
