"""Run the notebooks and store their outputs in them: `python docs/generate/run_notebooks.py`.

The site shows these outputs. What goes to stderr, such as progress bars, is left out, and no path of a machine stays.
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parent.parent.parent


def run(file: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in its own folder."""
    notebook = nbformat.read(file, as_version=4)
    folder = {"metadata": {"path": file.parent}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=folder).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            printed = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
            stream = [nbformat.v4.new_output("stream", text=printed.replace(f"{ROOT}/", ""))] if printed else []
            cell.outputs = stream + [output for output in cell.outputs if output.output_type != "stream"]
            for output in cell.outputs:
                if png := output.get("data", {}).get("image/png"):
                    output.data = {"image/png": _small(png), "text/plain": output.data["text/plain"]}
    return notebook


def _small(png: str) -> str:
    """The same image in 128 colours: a third of the bytes."""
    made = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(128).save(made, "PNG", optimize=True)
    return base64.b64encode(made.getvalue()).decode()


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or sorted((ROOT / "docs" / "start").glob("*.ipynb"))):
        nbformat.write(run(path.resolve()), path)
