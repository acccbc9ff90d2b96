"""Images: what the pixels are, which crop and bucket, and where they are stored."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from images import noise
from PIL import Image
from torch import Tensor

from stepdistill.core.errors import DataError
from stepdistill.core.random import sample_rng
from stepdistill.data import FixedCrops, ImageFolder, ImageSource, Stream, check_source, loader
from stepdistill.data.images import bucket_shapes


def folder(path: Path, **images: Image.Image) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        image.save(path / f"{name}.png")
        (path / f"{name}.txt").write_text(f"the {name}\n")
    return path


def pixels(source: ImageSource, i: int, position: int = 0) -> Tensor:
    found = source.sample(i, sample_rng(0, position)).pixels
    assert found is not None
    return found


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


# pixels


def test_a_image_of_the_right_size_comes_through_unchanged(tmp_path: Path) -> None:
    image = noise(8, 8)
    source = ImageFolder(train_data_dir=str(folder(tmp_path, a=image)), resolution=8)
    found = pixels(source, 0)
    assert found.dtype == torch.float32 and found.min() >= -1 and found.max() <= 1
    torch.testing.assert_close(found, as_tensor(image), rtol=0, atol=1e-6)


def test_the_shorter_side_is_resized_and_the_middle_cut(tmp_path: Path) -> None:
    image = noise(16, 40)
    place = str(folder(tmp_path, a=image))
    source = ImageFolder(train_data_dir=place, resolution=8, center_crop=True, interpolation="bicubic")
    expected = image.resize((20, 8), Image.Resampling.BICUBIC).crop((6, 0, 14, 8))
    torch.testing.assert_close(pixels(source, 0), as_tensor(expected), rtol=0, atol=1e-6)


def test_crop_and_flip_depend_on_seed_and_position_alone(tmp_path: Path) -> None:
    image = noise(8, 12)
    place = str(folder(tmp_path, a=image, b=noise(8, 12, 1)))
    source = ImageFolder(train_data_dir=place, resolution=8, random_flip=True, proportion_empty_prompts=0.5)
    whole = as_tensor(image)
    windows = {(left, flip): whole[:, :, left : left + 8] for left in range(5) for flip in (False, True)}
    windows = {key: window.flip(-1) if key[1] else window for key, window in windows.items()}

    def drawn(source: ImageSource, i: int, position: int) -> tuple[int, bool]:
        found = pixels(source, i, position)
        table = windows if i == 0 else other
        return next(key for key, window in table.items() if torch.allclose(found, window, atol=1e-6))

    whole_b = as_tensor(noise(8, 12, 1))
    other = {(left, flip): whole_b[:, :, left : left + 8] for left in range(5) for flip in (False, True)}
    other = {key: window.flip(-1) if key[1] else window for key, window in other.items()}
    draws = [drawn(source, 0, position) for position in range(200)]
    assert set(draws) == set(windows), "every window and both orientations occur"
    assert 70 < sum(flip for _, flip in draws) < 130
    assert draws[:20] == [drawn(source, 1, position) for position in range(20)], "not on the item"
    unflipped = replace(source, random_flip=False, proportion_empty_prompts=0.0)
    assert [left for left, _ in draws[:20]] == [drawn(unflipped, 0, p)[0] for p in range(20)]


def test_orientation_transparency_and_depth(tmp_path: Path) -> None:
    image = noise(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 4, 8))
    clear.save(tmp_path / "b.png")
    clear.quantize(8).save(tmp_path / "c.png")
    Image.fromarray(np.full((8, 8), 128 * 256, dtype=np.uint16)).save(tmp_path / "d.png")
    image.convert("CMYK").save(tmp_path / "e.jpg")
    for name in "abcde":
        (tmp_path / f"{name}.txt").write_text("x")
    source = ImageFolder(train_data_dir=str(tmp_path), resolution=8)
    turned = as_tensor(image.transpose(Image.Transpose.ROTATE_270))
    torch.testing.assert_close(pixels(source, 0), turned, rtol=0, atol=1e-6)
    for i in (1, 2):
        blended = pixels(source, i)
        assert blended[:, 0, 7].tolist() == [1, 1, 1], "white where it was clear"
        assert blended[:, 0, 0].tolist() == [-1, -1, 1]
    assert pixels(source, 3).unique().tolist() == pytest.approx([128 / 127.5 - 1], abs=1e-6)
    assert check_source(source, strict=True).startswith("ImageFolder: 5 samples, 5 usable")


def test_fixed_crops_depend_on_the_item_alone_and_captions_do_not(tmp_path: Path) -> None:
    place = folder(tmp_path, **{name: noise(8, 40, ord(name)) for name in "abcd"})
    (place / "metadata.jsonl").write_text(
        "".join(f'{{"file_name": "{name}.png", "text": ["1", "2"]}}\n' for name in "abcd")
    )
    moving = ImageFolder(train_data_dir=str(place), resolution=8, random_flip=True)
    fixed = FixedCrops(source=moving)
    for source, kinds in ((moving, 30), (fixed, 1)):
        samples = [source.sample(2, sample_rng(0, position)) for position in range(30)]
        assert len({s.pixels.numpy().tobytes() for s in samples if s.pixels is not None}) >= kinds / 2
        assert (len({s.pixels.numpy().tobytes() for s in samples if s.pixels is not None}) == 1) == (kinds == 1)
        assert {s.prompt for s in samples} == {"1", "2"}
        assert all(s.item == 2 for s in samples)
    assert fixed.buckets() == moving.buckets() and fixed.digest() != moving.digest()


# buckets


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 64), (64, 16), (32, 8)])
def test_bucket_shapes(resolution: int, step: int) -> None:
    shapes = bucket_shapes(resolution, step)
    assert (resolution, resolution) in shapes and len(set(shapes)) == len(shapes)
    assert all(h % step == 0 and w % step == 0 and h * w <= resolution**2 for h, w in shapes)
    assert {(w, h) for h, w in shapes} == set(shapes)
    assert all(1 / 4 <= h / w <= 4 for h, w in shapes)
    with pytest.raises(DataError, match="divides the resolution"):
        bucket_shapes(resolution, 60)


def test_images_go_to_the_nearest_aspect_and_batches_have_one_shape(tmp_path: Path) -> None:
    wide, tall = {f"w{n}": noise(20, 40, n) for n in range(3)}, {f"t{n}": noise(40, 20, n) for n in range(3)}
    place = folder(tmp_path, **wide, **tall, s=noise(33, 32))
    (place / "x.png").write_text("broken")
    (place / "x.txt").write_text("broken")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(20, 40).save(place / "r.jpg", exif=exif)  # upright it is tall
    (place / "r.txt").write_text("turned")
    source = ImageFolder(train_data_dir=str(place), resolution=32, aspect_buckets=True, bucket_step=8)
    names = [Path(source.name(i)).stem for i in range(len(source))]
    shapes = {name: source.shapes[b] for name, b in zip(names, source.buckets(), strict=True)}
    assert shapes["w0"] == (24, 40) and shapes["t0"] == (40, 24) and shapes["s"] == (32, 32)
    assert shapes["r"] == (40, 24)
    assert shapes["x"] == (40, 24), "a broken one joins the fullest bucket, where others can stand in"
    batches = loader(Stream(source, 2, seed=0), 0, [range(2)], 0, seed=0)
    seen = {tuple(s.pixels.shape) for _ in range(12) for s in next(batches) if s.pixels is not None}
    assert seen == {(3, 24, 40), (3, 40, 24), (3, 32, 32)}


# folders


def test_captions_from_a_table_or_beside_the_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder(tmp_path / "sub", b=noise(8, 8))
    folder(tmp_path, a=noise(8, 8))
    folder(tmp_path / ".hidden", c=noise(8, 8))
    source = ImageFolder(train_data_dir=str(tmp_path), resolution=8)
    assert [source.captions(i) for i in range(len(source))] == [("the a",), ("the b",)]
    before = source.digest()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "sub/b.png", "label": ["x", "y"]}\n')
    with caplog.at_level(logging.WARNING):
        tabled = ImageFolder(train_data_dir=str(tmp_path), resolution=8, caption_column="label")
        assert [tabled.captions(i) for i in range(len(tabled))] == [("x", "y")]
    assert "1 images have no row" in caplog.text and "a.png" in caplog.text
    (tmp_path / "metadata.jsonl").unlink()
    assert ImageFolder(train_data_dir=str(tmp_path), resolution=8).digest() == before
    noise(8, 9).save(tmp_path / "a.png")
    assert ImageFolder(train_data_dir=str(tmp_path), resolution=8).digest() != before
    assert len(ImageFolder(train_data_dir=str(tmp_path), resolution=8, max_train_samples=1)) == 1


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        (None, "", r"a\.png without a caption \(1 of 2 images\)"),
        ("metadata.csv", "file_name,caption\na.png,x\n", r"columns \['file_name', 'caption'\]"),
        ("metadata.csv", "image,text\na.png,x\n", r"expected the columns \['file_name'\]"),
        ("metadata.csv", "file_name,text\nz.png,x\n", "row 1 with file_name 'z.png'"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": null}\n', r"row 1 \(a.png\) with text None"),
        ("metadata.jsonl", "\n", "no row in"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, table: str | None, content: str, message: str) -> None:
    folder(tmp_path, a=noise(8, 8), b=noise(8, 8))
    (tmp_path / "a.txt").unlink()
    if table:
        (tmp_path / table).write_text(content)
    with pytest.raises(DataError, match=message):
        check_source(ImageFolder(train_data_dir=str(tmp_path), resolution=8))


def test_missing_empty_and_wholly_broken_folders(tmp_path: Path) -> None:
    source = ImageFolder(train_data_dir=str(tmp_path / "data"), resolution=8)
    with pytest.raises(DataError, match="no such folder"):
        len(source)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="no jpg, jpeg, png, webp, bmp, gif, tif, tiff, avif file below"):
        len(source)
    folder(tmp_path / "data", a=noise(8, 8))
    (tmp_path / "data" / "a.png").write_text("broken")
    with pytest.raises(DataError, match=r"1 of 1 samples unusable, the first .*a\.png: Unidentified"):
        check_source(source)


def test_check_reports_what_is_there(tmp_path: Path) -> None:
    place = folder(tmp_path, a=noise(8, 8), b=noise(20, 10), c=noise(30, 40))
    (place / "b.txt").write_text("")
    source = ImageFolder(train_data_dir=str(place), resolution=16, proportion_empty_prompts=1.0)
    assert check_source(source, workers=1).splitlines() == [
        "ImageFolder: 3 samples, 3 usable",
        "  images: shorter side 8 to 30 (median 10) px; 2 smaller than the crop",
        "  shapes (3 x H x W): 3x16x16: 3",
        "  captions: 3 for 3 samples, 0 to 2 (median 2) words, 1 empty",
    ]
