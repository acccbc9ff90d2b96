"""Images of every format and shape, wherever a folder has them: training and evaluation read the same ones.

Both say what they leave out.
"""

from __future__ import annotations

import logging
import os
import random
import resource
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from images import encoded, noise
from PIL import Image

from stepdistill.core.errors import DataError
from stepdistill.core.image_files import IMAGE_SUFFIXES, flatten, left_out_lines
from stepdistill.core.random import sample_rng
from stepdistill.data import BadSample, FixedCrops, ImageFolder, Sample, Shards, Stream, check_source, loader
from stepdistill.data.images import header_size, resized_part
from stepdistill.evaluation import images as evaluated
from stepdistill.evaluation.images import Images
from stepdistill.evaluation.metrics.image_scores import _square
from stepdistill.training.cache.keys import _files_below

LOSSLESS = ("png", "bmp", "tif", "tiff")


def captioned(place: Path, **images: Image.Image) -> Path:
    """A folder of images by file name, `a_png` for `a.png`, each with its caption."""
    place.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        file = place / name.replace("_", ".")
        image.save(file)
        file.with_suffix(".txt").write_text(file.name)
    return place


def pixels(sample: Sample) -> torch.Tensor:
    assert sample.pixels is not None
    return sample.pixels


def names(source: ImageFolder) -> list[str]:
    return [os.path.relpath(source.name(i), source.train_data_dir) for i in range(len(source))]


# formats


def test_every_format_is_read_in_training_and_evaluation(tmp_path):
    image, place = noise(8, 8), tmp_path / "images"
    captioned(place, **{f"{suffix}_{suffix}": image for suffix in IMAGE_SUFFIXES})
    assert {"bmp", "gif", "tiff", "avif", "webp"} < set(IMAGE_SUFFIXES)
    source = ImageFolder(train_data_dir=str(place), resolution=8)
    assert names(source) == sorted(f"{suffix}.{suffix}" for suffix in IMAGE_SUFFIXES)
    (batch,) = Images(place).batches()
    assert batch.names == names(source)
    for i, name in enumerate(batch.names):
        trained = pixels(source.sample(i, random.Random(0)))
        assert torch.equal(((trained + 1) * 127.5).round().byte(), batch.images[i]), name
        if name.rpartition(".")[2] in LOSSLESS:
            assert np.array_equal(batch.images[i].permute(1, 2, 0).numpy(), np.asarray(image)), name
    assert check_source(source, strict=True).startswith(f"ImageFolder: {len(IMAGE_SUFFIXES)} samples")


@pytest.mark.parametrize("suffix", ["jpg", "webp", "avif", "tiff"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_size_in_the_header_is_that_of_the_upright_image(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = captioned(tmp_path) / f"a.{suffix}"
    noise(16, 40).save(file, exif=exif)
    (tmp_path / "a.txt").write_text("a")
    source = ImageFolder(train_data_dir=str(tmp_path), resolution=16, aspect_buckets=True, bucket_step=8)
    upright = source.image(0)
    with file.open("rb") as opened:
        assert header_size(opened) == (upright.height, upright.width) == ((40, 16) if orientation == 6 else (16, 40))


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for suffix in ("gif", "tiff", "webp"):
        frames[0].save(tmp_path / f"{suffix}.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
        (tmp_path / f"{suffix}.txt").write_text("two")
    source = ImageFolder(train_data_dir=str(tmp_path), resolution=8)
    for i in range(3):
        assert np.asarray(source.image(i))[0, 0].tolist() == pytest.approx([255, 0, 0], abs=1)


def test_floats_have_no_range_and_are_bad_samples():
    with pytest.raises(ValueError, match="floats, whose range is not known"):
        flatten(Image.fromarray(np.random.rand(4, 4).astype(np.float32)))


# links, and what is left out


@pytest.fixture
def linked(tmp_path) -> Path:
    """A folder with a link to another one, with loops, and with much that is no image."""
    place = captioned(tmp_path / "data", a_png=noise(8, 8), b_gif=noise(8, 8, 1))
    other = captioned(tmp_path / "elsewhere", c_png=noise(8, 8, 2))
    (place / "more").symlink_to(other)
    (other / "deep").mkdir()
    (other / "deep" / "back").symlink_to(other)  # seen from `data` it is a folder above
    (place / "itself").symlink_to(place)
    (place / "knot").symlink_to(place / "knot")
    (place / "gone.png").symlink_to(tmp_path / "nothing")
    (place / "x.heic").write_bytes(b"heic")
    (place / "README.md").write_text("words")
    (place / "orphan.txt").write_text("of no image")
    captioned(place / ".cache", d_png=noise(8, 8, 3))
    return place


LEFT_OUT = {
    ".cache": "hidden",
    "README.md": "not an image",
    "gone.png": "a link to nothing",
    "itself": "a link to a folder above it",
    "knot": "a link to nothing",
    "more/deep/back": "a link to a folder above it",
    "orphan.txt": "not an image",
    "x.heic": "an image format that is not read",
}


def test_links_are_followed_without_loops_and_the_rest_is_named(linked, caplog):
    source = ImageFolder(train_data_dir=str(linked), resolution=8)
    with caplog.at_level(logging.WARNING):
        assert names(source) == ["a.png", "b.gif", "more/c.png"]
    assert source.left_out() == LEFT_OUT and FixedCrops(source=source).left_out() == LEFT_OUT
    assert "an image format that is not read: 1 (x.heic)" in caplog.text and "README" not in caplog.text
    assert "a link to nothing: 2 (gone.png, knot)" in caplog.text and "hidden" not in caplog.text
    report = check_source(FixedCrops(source=source)).splitlines()
    assert report[0] == "FixedCrops: 3 samples, 3 usable"
    assert report[-6:] == [
        "  left out: 8",
        "    hidden: 1 (.cache)",
        "    not an image: 2 (README.md, orphan.txt)",
        "    a link to nothing: 2 (gone.png, knot)",
        "    a link to a folder above it: 2 (itself, more/deep/back)",
        "    an image format that is not read: 1 (x.heic)",
    ]
    assert source.digest()  # which looks at every file


def test_an_evaluation_reads_the_same_files_and_says_so(linked, caplog):
    images = Images(linked)
    assert [name for batch in images.batches() for name in batch.names] == ["a.png", "b.gif", "more/c.png"]
    assert "an image format that is not read: 1 (x.heic)" in caplog.text and "README" not in caplog.text
    with zipfile.ZipFile(linked.parent / "x.zip", "w") as archive:
        for name in ("a.png", "b.gif", "x.heic", "README.md", ".cache/d.png"):
            archive.write(linked / name, name)
    caplog.clear()
    assert len(Images(linked.parent / "x.zip")) == 2
    assert "an image format that is not read: 1 (x.heic)" in caplog.text and "d.png" not in caplog.text


def test_images_without_a_row_are_among_what_is_left_out(linked):
    (linked / "metadata.csv").write_text("file_name,text\nmore/c.png,see\n")
    source = ImageFolder(train_data_dir=str(linked), resolution=8)
    assert names(source) == ["more/c.png"]
    texts = dict.fromkeys(("a.txt", "b.txt", "more/c.txt"), "not an image")
    rowless = dict.fromkeys(("a.png", "b.gif"), "without a row in metadata.csv")
    assert source.left_out() == LEFT_OUT | texts | rowless
    (linked / "metadata.csv").write_text("file_name,text\nx.heic,see\n")
    with pytest.raises(DataError, match="'x.heic', .*: it is an image format that is not read"):
        len(ImageFolder(train_data_dir=str(linked), resolution=8))


def test_of_many_the_first_are_named():
    left_out = {f"{n}.heic": "not read" for n in range(100_000)} | {"a": "hidden"}
    lines = left_out_lines(left_out)
    assert lines["not read"] == "not read: 100000 (0.heic, 1.heic, 2.heic, 3.heic, 4.heic, ...)"
    assert lines["hidden"] == "hidden: 1 (a)"


def test_samples_of_a_shard_without_an_image_are_named(tmp_path):
    import io
    import tarfile

    members = {"a.gif": encoded(noise(8, 8), "gif"), "a.txt": b"a", "b.heic": b"heic", "b.txt": b"b"}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    source = Shards(train_shards_path_or_url=str(tmp_path / "x.tar"), resolution=8)
    assert len(source) == 1 and source.left_out() == {"x.tar b": "a sample without image"}
    assert check_source(source).splitlines()[-1] == "    a sample without image: 1 (x.tar b)"


def test_a_cache_sees_files_in_linked_folders(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "config.json").write_text("{}")
    (tmp_path / "configs" / "tokenizer").symlink_to(tmp_path / "tokenizer")
    assert list(_files_below(tmp_path / "configs")) == [tmp_path / "configs" / "tokenizer" / "config.json"]


# shapes that do not fit into memory


@contextmanager
def no_more_than(megabytes: int) -> Iterator[None]:
    """Memory that the process may take in addition."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def strip(height: int, width: int) -> Image.Image:
    """Waves, whose upscaling is smooth."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(x / 9 + y / 7 + c) for c in range(3)]
    return Image.fromarray(np.stack(waves, 2).round().astype(np.uint8))


@pytest.mark.parametrize("turned", [False, True])
def test_a_long_strip_takes_the_memory_of_its_window(tmp_path, turned):
    """Resized whole, 8 x 20000 pixels would be 512 x 1280000."""
    image = strip(8, 20000)
    captioned(tmp_path, a_png=image.transpose(Image.Transpose.TRANSPOSE) if turned else image)
    source = ImageFolder(train_data_dir=str(tmp_path), resolution=512, center_crop=True)
    with no_more_than(200):
        found = pixels(source.sample(0, random.Random(0)))
    assert found.shape == (3, 512, 512)
    part = image.crop((9990, 0, 10010, 8)).resize((1280, 512), Image.Resampling.LANCZOS).crop((384, 0, 896, 512))
    want = torch.from_numpy(np.array(part)).permute(2, 0, 1)
    want = want.transpose(1, 2) if turned else want
    assert (((found + 1) * 127.5).round() - want).abs().max() <= 2


@pytest.mark.parametrize("kind", ["NEAREST", "BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS"])
def test_a_part_is_what_is_cut_from_the_whole(monkeypatch, kind):
    resampling = Image.Resampling[kind]
    image, whole, part = strip(30, 200), (1400, 210), (330, 20, 530, 180)
    want = np.asarray(image.resize(whole, resampling).crop(part)).astype(int)
    assert np.array_equal(np.asarray(resized_part(image, whole, part, resampling)).astype(int), want)
    monkeypatch.setattr("stepdistill.data.images.LARGEST", 0)
    apart = np.abs(np.asarray(resized_part(image, whole, part, resampling)).astype(int) - want)
    assert apart.max() <= 1 or kind in ("NEAREST", "BOX") and (apart > 1).mean() < 0.01  # nearest and box have edges
    assert resized_part(image, whole, (1200, 0, 1400, 210), resampling).size == (200, 210)  # to the very end


def test_every_window_of_a_strip_is_reached(tmp_path):
    source = ImageFolder(train_data_dir=str(captioned(tmp_path, a_png=strip(8, 20000))), resolution=64)
    seen = {pixels(source.sample(0, sample_rng(0, position))).sum().item() for position in range(8)}
    assert len(seen) == 8


def test_evaluations_take_the_memory_of_the_window(tmp_path):
    captioned(tmp_path, a_png=strip(8, 20000), b_png=strip(20000, 8))
    clip = torch.from_numpy(np.array(strip(4, 20000))).permute(2, 0, 1)
    with no_more_than(200):
        (batch,) = Images(tmp_path, eval_res=64).batches()
        assert batch.images.shape == (2, 3, 64, 64) and batch.images.float().std() > 10
        assert _square(clip, 224).shape == (3, 224, 224)


@pytest.mark.parametrize(("mode", "megabytes"), [("RGB", 60), ("RGBA", 100)])
def test_a_large_image_is_copied_no_more_than_it_must(tmp_path, mode, megabytes):
    """3000 x 3000 pixels take 36 MB, and as much again where transparency is laid over white."""
    captioned(tmp_path, a_png=Image.new(mode, (3000, 3000), (255, 0, 0)))
    source = ImageFolder(train_data_dir=str(tmp_path), resolution=8)
    assert len(source) == 1
    with no_more_than(megabytes):
        assert pixels(source.sample(0, random.Random(0)))[:, 0, 0].tolist() == [1, -1, -1]


def test_transparency_lies_over_white():
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256))
    image = Image.fromarray(np.stack([colour, 255 - colour, colour, alpha], 2).astype(np.uint8))
    want = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert np.array_equal(np.asarray(flatten(image)), np.asarray(want))


@pytest.fixture
def bombed(tmp_path, monkeypatch) -> Path:
    """Seven good images and one that is larger than Pillow takes."""
    place = captioned(tmp_path / "data", **{f"{n}_png": noise(8, 8, n) for n in range(7)}, bomb_png=noise(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    return place


def test_decompression_bombs_are_bad_samples(bombed, monkeypatch):
    source = ImageFolder(train_data_dir=str(bombed), resolution=8, aspect_buckets=True, bucket_step=8)
    report = check_source(source)
    assert report.startswith("ImageFolder: 8 samples, 7 usable") and "bomb.png: DecompressionBombError" in report
    batches = loader(Stream(source, 4, seed=0), 0, [range(4)], 0, seed=0)
    assert {pixels(sample).shape for _ in range(4) for sample in next(batches)} == {(3, 8, 8)}
    monkeypatch.setattr(evaluated, "SKIPPED", 0.2)
    images = Images(bombed)
    assert sum(len(batch.names) for batch in images.batches()) == 7
    assert [name for name, _ in images.skipped] == ["bomb.png"]


def test_an_image_that_memory_does_not_hold_is_a_bad_sample(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise MemoryError

    captioned(tmp_path, a_png=noise(8, 8), b_png=noise(8, 12))
    monkeypatch.setattr(Image.Image, "resize", full)
    with pytest.raises(BadSample, match=r"a\.png: MemoryError"):
        ImageFolder(train_data_dir=str(tmp_path), resolution=16).sample(0, random.Random(0))
    with pytest.raises(DataError, match=r"1 unreadable of 2 images .*a\.png"):
        list(Images(tmp_path, eval_res=4).batches())
