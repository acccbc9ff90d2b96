"""Pictures: what the pixels are, which crop and bucket, and where they are stored."""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch import Tensor

from stepdistill.data import HubDataset, ImageFolder, ImageSource, Shards, Stream, check, loader, sample_rng
from stepdistill.data.images import bucket_shapes
from stepdistill.data.tarindex import expand_braces
from stepdistill.errors import DataError


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


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


def test_a_picture_of_the_right_size_comes_through_unchanged(tmp_path: Path) -> None:
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
    assert pixels(source, 3).unique().tolist() == pytest.approx([128 / 127.5 - 1])
    assert check(source, strict=True).startswith("ImageFolder: 5 samples, 5 usable")


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


def test_pictures_go_to_the_nearest_aspect_and_batches_have_one_shape(tmp_path: Path) -> None:
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


def test_captions_from_a_table_or_beside_the_pictures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
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
    assert "1 pictures have no row" in caplog.text and "a.png" in caplog.text
    (tmp_path / "metadata.jsonl").unlink()
    assert ImageFolder(train_data_dir=str(tmp_path), resolution=8).digest() == before
    noise(8, 9).save(tmp_path / "a.png")
    assert ImageFolder(train_data_dir=str(tmp_path), resolution=8).digest() != before
    assert len(ImageFolder(train_data_dir=str(tmp_path), resolution=8, max_train_samples=1)) == 1


@pytest.mark.parametrize(
    ("table", "content", "message"),
    [
        (None, "", r"a\.png without a caption \(1 of 2 pictures\)"),
        ("metadata.csv", "file_name,caption\na.png,x\n", r"columns \['file_name', 'caption'\]"),
        ("metadata.csv", "image,text\na.png,x\n", r"expected \['file_name'\] among them"),
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
        check(ImageFolder(train_data_dir=str(tmp_path), resolution=8))


def test_missing_empty_and_wholly_broken_folders(tmp_path: Path) -> None:
    source = ImageFolder(train_data_dir=str(tmp_path / "data"), resolution=8)
    with pytest.raises(DataError, match="no such folder"):
        len(source)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="no jpg, jpeg, png, webp file below"):
        len(source)
    folder(tmp_path / "data", a=noise(8, 8))
    (tmp_path / "data" / "a.png").write_text("broken")
    with pytest.raises(DataError, match=r"1 of 1 samples unusable, first .*a\.png: Unidentified"):
        check(source)


def test_check_reports_what_is_there(tmp_path: Path) -> None:
    place = folder(tmp_path, a=noise(8, 8), b=noise(20, 10), c=noise(30, 40))
    (place / "b.txt").write_text("")
    source = ImageFolder(train_data_dir=str(place), resolution=16, proportion_empty_prompts=1.0)
    assert check(source, workers=1).splitlines() == [
        "ImageFolder: 3 samples, 3 usable",
        "  pictures: shorter side 8 to 30 (median 10) px; 2 smaller than the crop",
        "  shapes (3 x H x W): 3x16x16: 3",
        "  captions: 3 for 3 samples, 0 to 2 (median 2) words, 1 empty",
    ]


# shards


def shard(path: Path, **members: bytes) -> Path:
    """A tar with members `{key}__{suffix}`, in the order given."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def two_shards(path: Path) -> str:
    for n in range(2):
        members: dict[str, bytes] = {}
        for k, kind in enumerate(("jpg", "png", "webp")):
            caption = json.dumps({"text": f"c{n}{k}", "id": k}).encode() if k == 1 else f"c{n}{k}\n".encode()
            members[f"{n}{k}__{kind}"] = encoded(noise(9, 8 + k, n), {"jpg": "jpeg"}.get(kind, kind))
            members[f"{n}{k}__{('txt', 'json', 'caption')[k]}"] = caption
        members["stray__cls"] = b"3"
        shard(path / f"s-{n:03d}.tar", **members)
    return str(path / "s-{000..001}.tar")


def test_random_access_equals_webdataset(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pattern = two_shards(tmp_path)
    source = Shards(train_shards_path_or_url=pattern, resolution=8)
    streamed = [s for s in webdataset.WebDataset(pattern, shardshuffle=False) if "cls" not in s]
    assert len(source) == len(streamed) == 6
    for i in reversed(range(6)):
        kind = next(kind for kind in ("jpg", "png", "webp") if kind in streamed[i])
        with source.open(i) as file:
            assert file.read() == streamed[i][kind]
        assert source.name(i).endswith(f" sample {streamed[i]['__key__']}")
        assert source.captions(i) == (f"c{i // 3}{i % 3}",)
        decoded = Image.open(io.BytesIO(streamed[i][kind])).convert("RGB")
        assert source.picture(i).tobytes() == decoded.tobytes()
    assert "2 samples have no picture and are left out, first stray of" in caplog.text
    by_glob = Shards(train_shards_path_or_url=str(tmp_path / "s-*.tar"), resolution=8, max_train_samples=4)
    assert [by_glob.name(i) for i in range(len(by_glob))] == [source.name(i) for i in range(4)]
    assert check(source, strict=True, workers=1).startswith("Shards: 6 samples, 6 usable")


def test_a_shard_is_indexed_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard(tmp_path / "a.tar", x__png=encoded(noise(8, 8)), x__txt=b"one")
    source = Shards(train_shards_path_or_url=str(path), resolution=8)
    assert len(source) == 1
    index = tmp_path / "a.tar.index.json"
    assert index.exists() and not list(tmp_path.glob("*.tmp"))
    scanned: list[object] = []
    whole = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *args: scanned.append(args) or whole(*args))
    assert replace(source).captions(0) == ("one",) and not scanned
    png = encoded(noise(8, 8))
    monkeypatch.undo()
    shard(path, x__png=png, x__txt=b"two", y__png=png, y__txt=b"three")
    assert [replace(source).captions(i) for i in range(2)] == [("two",), ("three",)]
    index.write_text("{")
    assert len(replace(source)) == 2


def test_the_index_of_a_folder_that_cannot_be_written_goes_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard(tmp_path / "a.tar", x__png=encoded(noise(8, 8)), x__txt=b"one")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.tar.index.json").mkdir()  # stands for a read-only folder, which root could write to
    assert len(Shards(train_shards_path_or_url=str(path), resolution=8)) == 1
    assert len(list((tmp_path / "cache/stepdistill/index").glob("*.json"))) == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_shards_that_cannot_be_used(tmp_path: Path) -> None:
    png = encoded(noise(8, 8))

    def fails(message: str, where: object) -> None:
        with pytest.raises(DataError, match=message):
            check(Shards(train_shards_path_or_url=str(where), resolution=8))

    fails("expected local tar files", "https://host/{00..10}.tar")
    fails("expected local tar files", "pipe:cat a.tar")
    fails(r"b-1\.tar, where there is no file", tmp_path / "b-{1..2}.tar")
    fails("where there is no file", tmp_path / "*.tar")
    fails("'y' of .* without a caption", shard(tmp_path / "a.tar", x__png=png, x__txt=b"", y__png=png))
    fails("none with a picture", shard(tmp_path / "b.tar", x__txt=b"one"))
    columns = shard(tmp_path / "c.tar", x__png=png, x__json=b'{"caption": "x"}')
    fails(r"columns \['caption'\], expected \['text'\]", columns)
    fails("x.png twice", shard(tmp_path / "d.tar", x__png=png, **{"x.png": png}))
    whole = shard(tmp_path / "e.tar", x__txt=b"one", x__png=encoded(noise(64, 64)))
    whole.write_bytes(whole.read_bytes()[:4000])
    fails("unexpected end of data", whole)
    packed = tmp_path / "f.tar"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(tmp_path / "a.tar")
    fails("an uncompressed tar file", packed)


def test_a_caption_that_is_missing_further_on_is_one_bad_sample(tmp_path: Path) -> None:
    png = encoded(noise(8, 8))
    table = {"x__png": png, "x__json": b'{"text": "one"}', "y__png": png, "y__json": b'{"label": "two"}'}
    source = Shards(train_shards_path_or_url=str(shard(tmp_path / "a.tar", **table)), resolution=8)
    report = check(source)
    assert "Shards: 2 samples, 1 usable" in report
    assert "sample y: no text under 'text' in its .json, which has ['label']" in report


def test_braces() -> None:
    assert expand_braces("a/{08..10}-{x,y}.tar") == [
        f"a/{n}-{letter}.tar" for n in ("08", "09", "10") for letter in "xy"
    ]
    assert expand_braces("plain.tar") == ["plain.tar"]


# datasets


def table(broken: bool = False) -> datasets.Dataset:
    images = [{"bytes": encoded(noise(8, 8, n)), "path": None} for n in range(3)]
    if broken:
        images[1] = {"bytes": b"broken", "path": None}
    columns = {"image": images, "text": ["a", "b", "c"], "number": [1, 2, 3]}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=True))


def test_every_form_of_a_data_set_gives_the_same_samples(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table()).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    table().to_parquet(tmp_path / "folder" / "train.parquet")
    for name in ("saved", "splits", "folder", "folder/train.parquet"):
        source = HubDataset(dataset_name=str(tmp_path / name), resolution=8)
        assert [source.captions(i) for i in range(len(source))] == [("a",), ("b",), ("c",)], name
        for i in range(3):
            torch.testing.assert_close(pixels(source, i), as_tensor(noise(8, 8, i)), rtol=0, atol=1e-6)
    assert len(HubDataset(dataset_name=str(tmp_path / "saved"), resolution=8, max_train_samples=2)) == 2


def test_data_sets_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(broken=True).save_to_disk(tmp_path / "saved")
    source = HubDataset(dataset_name=str(tmp_path / "saved"), resolution=8)
    assert "row 1: UnidentifiedImageError" in check(source)
    with pytest.raises(DataError, match=r"columns \['image', 'text', 'number'\], expected \['label'\]"):
        len(replace(source, caption_column="label"))
    with pytest.raises(DataError, match="does not hold pictures"):
        len(replace(source, image_column="number"))
    datasets.DatasetDict(train=table()).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="a data set with split 'test'"):
        len(replace(source, dataset_name=str(tmp_path / "splits"), split="test"))
    shutil.rmtree(tmp_path / "saved")
    (tmp_path / "saved").mkdir()
    with pytest.raises(DataError, match="from datasets for"):
        len(replace(source))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'stepdistill\[data\]'"):
        len(replace(source))
