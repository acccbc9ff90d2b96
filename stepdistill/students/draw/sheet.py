"""Rows of images on one sheet, and image files that say who wrote them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import ExifTags, Image, ImageDraw
from torch import Tensor

from stepdistill.core.errors import OutputError, problem
from stepdistill.core.outputs import MARK, check_output_file
from stepdistill.core.pixels import filmstrip

LEFT, LINE, GAP = 150, 14, 6  # pixels: of the labels, of a line of text, between images
LETTERS, LETTER = 16, 6  # of a caption's line, and the width of one
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # formats that hold who wrote them


@dataclass(frozen=True)
class SheetRow:
    """A row of images (n, 3, H, W) or clips (n, F, 3, H, W) uint8, and its text. Of a clip some frames are shown.

    Args:
        label: text on the left.
        captions: text above each image.
        title: text above the row.
    """

    label: str
    images: Tensor
    captions: Sequence[str] = ()
    title: str = ""


def image_sheet(rows: Sequence[SheetRow], scale: int = 1) -> Image.Image:
    """Draw the rows below one another, with the last images of all rows in one column.

    Args:
        scale: factor by which the images are enlarged.
    """
    rows = [replace(row, images=filmstrip(row.images)) for row in rows]
    height, width = (scale * side for side in rows[0].images.shape[-2:])
    captions = [["\n".join(_wrapped(caption, LETTERS)[:2]) for caption in row.captions] for row in rows]
    lines = [max((caption.count("\n") + 1 for caption in above), default=0) for above in captions]
    longest = max((len(line) for above in captions for caption in above for line in caption.split("\n")), default=0)
    cell, count = max(width, LETTER * longest) + GAP, max(len(row.images) for row in rows)
    titles = sum(LINE + GAP for row in rows if row.title)
    size = (LEFT + cell * count, titles + LINE * sum(lines) + len(rows) * (height + GAP))
    sheet, y = Image.new("RGB", size, "white"), 0
    pen = ImageDraw.Draw(sheet)
    for row, above, deep in zip(rows, captions, lines, strict=True):
        if row.title:
            pen.text((GAP, y + GAP // 2), row.title, fill="black")
            y += LINE + GAP
        first = count - len(row.images)
        for k, caption in enumerate(above, first):
            pen.multiline_text((LEFT + k * cell, y), caption, fill="black", spacing=2)
        y += LINE * deep
        middle = y + height // 2 - LINE // 2 * (row.label.count("\n") + 1)
        pen.multiline_text((GAP, middle), row.label, fill="black", spacing=2)
        for k, image in enumerate(row.images, first):
            pil = Image.fromarray(image.permute(1, 2, 0).numpy())
            sheet.paste(pil.resize((width, height), Image.Resampling.LANCZOS), (LEFT + k * cell, y))
        y += height + GAP
    return sheet


def image_grid(rows: Sequence[tuple[str, Tensor]], captions: Sequence[str], scale: int = 1) -> Image.Image:
    """A labelled row of images for each way to sample, with the same prompt and seed below each caption.

    Args:
        rows: label and images (columns, 3, H, W), or clips (columns, F, 3, H, W), uint8.
        scale: factor by which the images are enlarged.
    """
    above = [captions, *[()] * (len(rows) - 1)]
    return image_sheet([SheetRow(*row, text) for row, text in zip(rows, above, strict=True)], scale)


def check_image_file(file: Path, inputs: Iterable[Path | str] = (), overwrite: bool = False) -> None:
    """`stepdistill.core.outputs.check_output_file` of an image. Raises OutputError."""
    if file.suffix.lower() not in SUFFIXES:
        why, todo = "the suffix names the format", f"name it {file.with_suffix('.png').name}"
        raise OutputError(problem(f"output {file}", f"a name that ends in {', '.join(SUFFIXES)}", why, todo))
    check_output_file(file, inputs, overwrite)


def save_image(image: Image.Image, file: Path) -> None:
    """Write an image with the mark by which a later command knows it. The parents of `file` are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, exif=signature())


def signature() -> Image.Exif:
    """The mark as metadata of an image."""
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = MARK.decode()
    return exif


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], joined] if len(joined) <= width or not lines[-1] else [*lines, word]
    return lines
