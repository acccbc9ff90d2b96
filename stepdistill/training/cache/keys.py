"""Cache keys, computed from the files of a pipeline without loading it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.config.schema import dotted
from stepdistill.core.files import file_digest, is_single_file, write_text
from stepdistill.core.image_files import files_below
from stepdistill.families.base import Family

logger = logging.getLogger(__name__)
WEIGHTS = (".safetensors", ".bin")
SETTINGS = (".json", ".txt", ".model")  # configs, vocabularies, sentencepiece
FILE = "files.json"


@dataclass(frozen=True)
class Keys:
    """Digests of all that embeddings (`text`) and latents (`vae`) depend on, besides the prompt and the image."""

    text: str = ""
    vae: str = ""


def family_keys(family: Family, folder: Path) -> Keys:
    """The keys of a family's caches.

    The embeddings' key covers the text encoders, the tokenizers, the family's own arguments, and the text part of
    `teacher_loras`; the latents' key covers the autoencoder. Both go by content: a copy elsewhere has the same. A
    single file counts whole, for both.

    Args:
        folder: of the caches. The digest of each file is kept there, until the file's size or date changes.
    """
    where = family.location()
    digests, arguments = _Digests(folder), _own_arguments(family)
    name = dotted(type(family))
    if is_single_file(where):
        one = [name, digests(Path(where)), *_beside(family, digests)]
        text, vae = [*one, arguments], one
    else:
        root = Path(where)
        if not root.exists():  # a hub id: the files that loading it reads, downloaded where they are not here yet
            pipeline: Any = family.pipeline_class
            root = Path(pipeline.download(where, revision=family.revision, variant=family.variant))
        index = json.loads((root / "model_index.json").read_text())
        flags = {key: value for key, value in index.items() if not key.startswith("_") and not isinstance(value, list)}
        parts = {key: value for key, value in index.items() if isinstance(value, list) and value[0] is not None}
        text, vae = (
            [name, *(f"{key} {parts[key]} {file}" for key in chosen for file in _listed(root, key, family, digests))]
            for chosen in ([key for key in parts if choice(family, key)] for choice in (_is_text, _sees_images))
        )
        text += [flags, arguments]
    digests.save()
    return Keys(_digest([*text, *_text_loras(family)]), _digest(vae))


def _digest(content: Sequence[object]) -> str:
    return sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()


def _is_text(family: Family, name: str) -> bool:
    return family.part_of(name) == "text" or name.startswith("tokenizer")


def _sees_images(family: Family, name: str) -> bool:
    return family.part_of(name) == "vae" or name == "image_processor"


def _own_arguments(family: Family) -> dict[str, Any]:
    """What the family's class asks for beyond where the teacher is, such as max_sequence_length."""
    common = {f.name for f in fields(Family)}
    return {f.name: getattr(family, f.name) for f in fields(family) if f.name not in common}


def _beside(family: Family, digests: _Digests) -> list[str]:
    """The configs that go with a single file: by content where they are a folder, else by name."""
    given = family.single_file_config
    if given is None or not Path(given).is_dir():
        return [str(given)]
    files = sorted(path for path in _files_below(Path(given)) if path.suffix in SETTINGS)
    return [f"{path.relative_to(given)} {digests(path)}" for path in files]


def _files_below(folder: Path) -> Iterator[Path]:
    return (folder / name for name, unusable in files_below(folder) if not unusable)


def _listed(root: Path, name: str, family: Family, digests: _Digests) -> list[str]:
    """Name and digest of each file that loading a component reads."""
    present = sorted(_files_below(root / name))
    settings = [path for path in present if path.suffix in SETTINGS and ".index." not in path.name]
    files = settings + _weights([path for path in present if path.suffix in WEIGHTS], family.variant)
    return [f"{path.relative_to(root)} {digests(path)}" for path in files]


def _weights(files: Sequence[Path], variant: str | None) -> list[Path]:
    """The weights that are loaded: those of the variant before the plain ones, safetensors before pickles."""
    kinds = [path.name.split(".")[1:-1] for path in files]  # model.fp16-00001-of-00002.safetensors: of fp16
    for of in ([variant] if variant else []) + [None]:
        chosen_kind = [
            not kind if of is None else any(f"{part}-".startswith(f"{of}-") for part in kind) for kind in kinds
        ]
        for suffix in WEIGHTS:
            chosen = [path for path, mine in zip(files, chosen_kind, strict=True) if mine and path.suffix == suffix]
            if chosen:
                return chosen
    return list(files)


def _text_loras(family: Family) -> Iterator[str]:
    """A digest of what each of the teacher's LoRAs changes in the text encoders; none where it is nothing."""
    for source in family.teacher_loras:
        lora = family.read_lora(source)
        text = {name: layer for name, layer in lora.items() if family.part_of(name.partition(".")[0]) == "text"}
        digest = sha256()
        for name, layer in sorted(text.items()):
            digest.update(f"{name} {layer.alpha} ".encode() + _bytes(layer.down) + _bytes(layer.up))
        if text:
            yield digest.hexdigest()


def _bytes(value: Tensor) -> bytes:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return f"{value.dtype} {tuple(value.shape)} ".encode() + flat.view(torch.uint8).numpy().tobytes()


class _Digests:
    """sha256 of files, each computed once: text encoders have gigabytes."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        self.known: dict[str, list[Any]] = {}
        self.changed = False
        if self.file.is_file():
            try:
                self.known = dict(json.loads(self.file.read_text()))
            except (OSError, ValueError) as error:
                logger.warning("cannot read %s (%s): computing the files' digests again", self.file, error)

    def __call__(self, path: Path) -> str:
        real = path.resolve()
        facts = real.stat()
        mark = [facts.st_size, facts.st_mtime_ns]
        known = self.known.get(str(real))
        if known is None or known[:2] != mark:
            known = self.known[str(real)] = [*mark, file_digest(real)]
            self.changed = True
        return known[2]

    def save(self) -> None:
        """Write them whole; several processes may do so, and the last one wins."""
        if not self.changed:
            return
        try:
            part = self.file.with_name(f"{FILE}.{os.getpid()}.part")
            write_text(self.file, json.dumps(self.known, indent=1), part)
        except OSError as error:
            logger.warning("cannot write %s (%s): the files' digests are computed again next time", self.file, error)
