"""Exports of images in the folder layouts of GenEval and T2I-CompBench, and of clips in that of VBench.

Every file is written beside its place and then moved there, so that a run that was cut short leaves no broken image,
and one that is done again writes the same names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from stepdistill.core.errors import DataError, problem
from stepdistill.core.files import written_whole
from stepdistill.evaluation.records import prompt_of
from stepdistill.students.draw.animation import images_of_clip, save_animation

LONGEST = 255 - len("_000000.png")  # bytes of a file name that its prompt may take


class GenEval:
    """`00000/metadata.jsonl` and `00000/samples/0000.png` of each prompt.

    Ghosh et al. 2023, https://arxiv.org/abs/2310.11513.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, prompt_number: int, sample_number: int, record: Mapping[str, object], image: Tensor) -> Path:
        """Write an image, uint8 (3, H, W), and its prompt's record; returns the image's file.

        Raises TypeError, ValueError; DataError for a record that GenEval would not score.
        """
        if "tag" not in record or "prompt" not in record:
            got, why = f"a record with {list(record)}", "GenEval scores images by these fields"
            todo = "read the prompts from GenEval's evaluation_metadata.jsonl"
            raise DataError(problem(got, "one with `prompt` and `tag`", why, todo))
        _check_numbers(prompt_number, sample_number)
        place, part = self.folder / f"{prompt_number:05}", self.folder / f"{prompt_number:05}-{sample_number:04}.part"
        encoded = _image(image)
        _write(json.dumps(record).encode(), place / "metadata.jsonl", part)
        return _write(encoded, place / "samples" / f"{sample_number:04}.png", part)


class T2ICompBench:
    """`samples/<prompt>_<number>.png`, numbered through all prompts, as its evaluators sort and read them.

    Huang et al. 2023, https://arxiv.org/abs/2307.06350. A prompt ends at the first underscore of a name, so that those
    inside it, like what a file name cannot hold, become blanks.

    Args:
        per_prompt: images of each prompt; T2I-CompBench draws ten.
    """

    def __init__(self, folder: Path, per_prompt: int) -> None:
        if per_prompt < 1:
            raise ValueError(
                f"T2ICompBench got per_prompt={per_prompt}, expected 1 or more: files are numbered by it; use 10"
            )
        self.folder = folder
        self.per_prompt = per_prompt

    def add(self, prompt_number: int, sample_number: int, record: Mapping[str, object], image: Tensor) -> Path:
        """Write an image, uint8 (3, H, W); returns its file. Raises TypeError, ValueError, DataError."""
        _check_numbers(prompt_number, sample_number)
        number = prompt_number * self.per_prompt + sample_number
        if sample_number >= self.per_prompt or number > 999_999:
            raise ValueError(
                f"T2ICompBench got image {sample_number} of prompt {prompt_number}, expected 0 to "
                f"{self.per_prompt - 1} and six digits at most: each image needs its own number; pass a larger "
                "per_prompt or export in parts"
            )
        name = f"{_file_name(prompt_of(record))}_{number:06}.png"
        return _write(_image(image), self.folder / "samples" / name, self.folder / f"{number:06}.part")


class VBench:
    """`<prompt>-<number>.mp4`, the number counted from 0 for each prompt; VBench draws five.

    Huang et al. 2024, https://arxiv.org/abs/2311.17982. It finds a clip by its whole prompt, so that none is altered.
    Prompts of one's own have `vbench evaluate --mode=custom_input`, which needs no names.

    Args:
        frame_rate: frames a second of the clips.
    """

    def __init__(self, folder: Path, frame_rate: float) -> None:
        self.folder, self.frame_rate = folder, frame_rate

    def add(self, prompt_number: int, sample_number: int, record: Mapping[str, object], clip: Tensor) -> Path:
        """Write a clip, uint8 (F, 3, H, W); returns its file.

        Raises ValueError; DataError for a prompt that no file can be named by, OutputError without PyAV.
        """
        _check_numbers(prompt_number, sample_number)
        prompt = prompt_of(record)
        name = f"{prompt}-{sample_number}.mp4"
        if re.search(r"[\x00-\x1f/]", prompt) or len(f"{name}.stepdistill.part".encode()) > 255:
            why, todo = (
                "VBench finds a clip by its whole prompt",
                "shorten or correct it, and evaluate with custom_input",
            )
            raise DataError(problem(f"prompt {prompt!r}", "one that is valid as a file name", why, todo))
        return save_animation(images_of_clip(clip), self.folder / name, self.frame_rate)


def _check_numbers(prompt_number: int, sample_number: int) -> None:
    if prompt_number < 0 or sample_number < 0:
        raise ValueError(
            f"got prompt {prompt_number} and sample {sample_number}, expected 0 or more: files are named by them; "
            "number both from 0"
        )


def _file_name(prompt: str) -> str:
    """The prompt without what no file system takes, and no longer than a name may be."""
    plain = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|_\s]+', " ", prompt)
    plain = plain.encode()[:LONGEST].decode(errors="ignore").strip()
    if not plain:
        got = f"prompt {prompt!r}"
        raise DataError(
            problem(
                got, "at least one character that is valid in a file name", "files are named by the prompt", "remove it"
            )
        )
    return plain


def _image(image: Tensor) -> Image.Image:
    if image.dtype != torch.uint8:
        raise TypeError(
            f"got an image of {image.dtype}, expected uint8 in [0, 255]: [0, 1] and [0, 255] cannot be told apart "
            "safely; convert float images with to_uint8"
        )
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(
            f"got an image of shape {tuple(image.shape)}, expected (3, H, W), none of them 0: it is written as RGB; "
            "permute, or repeat a grey channel"
        )
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def _write(content: Image.Image | bytes, file: Path, part: Path) -> Path:
    """Write by way of `part`, which lies elsewhere: evaluators take whatever is beside the images for one."""
    with written_whole(file, part):
        if isinstance(content, bytes):
            part.write_bytes(content)
        else:
            content.save(part, "PNG")
    return file
