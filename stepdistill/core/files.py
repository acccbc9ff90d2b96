"""Atomic file writes, and digests of files and tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO, TYPE_CHECKING

from stepdistill.core.outputs import MARK

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 2**20


@contextmanager
def written_whole(path: Path, part: Path | None = None) -> Iterator[Path]:
    """Write a file or folder atomically: what the block writes to the yielded path replaces `path` at its end.

    If the block raises, `path` stays as it was, and what was written is removed.

    Args:
        path: the file or folder; missing parents are created.
        part: temporary path on the same disk; None takes `path` with a suffix of its own. Pass another one if several
            processes write `path` at once.
    """
    part = part or path.with_name(f"{path.name}.stepdistill.part")  # a browser's downloads end in .part
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(part)
    try:
        yield part
        if part.is_dir():  # a folder cannot be renamed onto one that holds anything
            remove(path)
        part.replace(path)
    except BaseException:
        remove(part)
        raise


def write_text(path: Path, text: str, part: Path | None = None) -> None:
    """Write text and a final newline atomically."""
    with written_whole(path, part) as place:
        place.write_text(text + "\n", encoding="utf-8")


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file with sorted metadata, so that equal contents give equal bytes."""
    from safetensors.torch import save_file  # it loads torch, which commands that only read do not need

    save_file(tensors, path, metadata | {"generator": MARK.decode()})
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the tensors begin behind the header"
        file.seek(8)
        file.write(text.ljust(size))


def is_single_file(where: str) -> bool:
    """Whether a model's place is one .safetensors file, and no folder or hub id."""
    return where.endswith(".safetensors") and not Path(where).is_dir()


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there and as far as the disk allows."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def file_digest(file: Path | IO[bytes]) -> str:
    """sha256 of a file, read block by block from where it stands if it is open."""
    if isinstance(file, Path):
        with file.open("rb") as stream:
            return file_digest(stream)
    digest = sha256()
    while block := file.read(BLOCK):
        digest.update(block)
    return digest.hexdigest()


def hash_of(state: Mapping[str, Tensor]) -> str:
    """sha256 of names, types, shapes and bytes of all tensors, in the order of names."""
    import torch  # which commands that only read do not need

    digest = sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
