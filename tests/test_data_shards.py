"""Tar shards and `datasets`: random access gives what sequential reading gives."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from images import encoded, noise
from PIL import Image
from webdataset.compat import WebDataset

from stepdistill.core.errors import DataError
from stepdistill.data import HubDataset, Shards, check_source
from stepdistill.data.tarindex import expand_braces

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
            members[f"{n}{k}__seg__png"] = encoded(noise(4, 4))  # suffix seg.png: not the image
            members[f"{n}{k}__{kind}"] = encoded(noise(9, 8 + k, n), {"jpg": "jpeg"}.get(kind, kind))
            members[f"{n}{k}__{('txt', 'json', 'caption')[k]}"] = caption
        members["stray__cls"] = b"3"
        shard(path / f"s-{n:03d}.tar", **members)
    return str(path / "s-{000..001}.tar")


def test_random_access_equals_webdataset(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pattern = two_shards(tmp_path)
    source = Shards(train_shards_path_or_url=pattern, resolution=8)
    streamed = [s for s in WebDataset(pattern, shardshuffle=False) if "cls" not in s]
    assert len(source) == len(streamed) == 6
    for i in reversed(range(6)):
        kind = next(kind for kind in ("jpg", "png", "webp") if kind in streamed[i])
        with source.open(i) as file:
            assert file.read() == streamed[i][kind]
        assert source.name(i).endswith(f" sample {streamed[i]['__key__']}")
        assert source.captions(i) == (f"c{i // 3}{i % 3}",)
        decoded = Image.open(io.BytesIO(streamed[i][kind])).convert("RGB")
        assert source.image(i).tobytes() == decoded.tobytes()
        assert source.size(i) == (9, 8 + i % 3)
    assert "2 samples have no image and are left out, the first is stray of" in caplog.text
    by_glob = Shards(train_shards_path_or_url=str(tmp_path / "s-*.tar"), resolution=8, max_train_samples=4)
    assert [by_glob.name(i) for i in range(len(by_glob))] == [source.name(i) for i in range(4)]
    assert check_source(source, strict=True, workers=1).startswith("Shards: 6 samples, 6 usable")


def test_a_shard_is_indexed_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
            check_source(Shards(train_shards_path_or_url=str(where), resolution=8))

    fails("expected local tar files", "https://host/{00..10}.tar")
    fails("expected local tar files", "pipe:cat a.tar")
    fails(r"b-1\.tar, which does not exist", tmp_path / "b-{1..2}.tar")
    fails("which does not exist", tmp_path / "*.tar")
    fails("'y' of .* without a caption", shard(tmp_path / "a.tar", x__png=png, x__txt=b"", y__png=png))
    fails("none with an image", shard(tmp_path / "b.tar", x__txt=b"one"))
    columns = shard(tmp_path / "c.tar", x__png=png, x__json=b'{"caption": "x"}')
    fails(r"columns \['caption'\], expected the columns \['text'\]", columns)
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
    report = check_source(source)
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
    datasets.DatasetDict({"train": table()}).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    table().to_parquet(tmp_path / "folder" / "train.parquet")
    for name in ("saved", "splits", "folder", "folder/train.parquet"):
        source = HubDataset(dataset_name=str(tmp_path / name), resolution=8)
        assert [source.captions(i) for i in range(len(source))] == [("a",), ("b",), ("c",)], name
        for i in range(3):
            assert source.image(i).tobytes() == noise(8, 8, i).tobytes()
    assert len(HubDataset(dataset_name=str(tmp_path / "saved"), resolution=8, max_train_samples=2)) == 2


def test_data_sets_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table(broken=True).save_to_disk(tmp_path / "saved")
    source = HubDataset(dataset_name=str(tmp_path / "saved"), resolution=8)
    assert "row 1: UnidentifiedImageError" in check_source(source)
    with pytest.raises(DataError, match=r"columns \['image', 'text', 'number'\], expected the columns \['label'\]"):
        len(replace(source, caption_column="label"))
    with pytest.raises(DataError, match="does not hold images"):
        len(replace(source, image_column="number"))
    datasets.DatasetDict({"train": table()}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="a data set with a split 'test'"):
        len(replace(source, dataset_name=str(tmp_path / "splits"), split="test"))
    shutil.rmtree(tmp_path / "saved")
    (tmp_path / "saved").mkdir()
    with pytest.raises(DataError, match="from datasets for"):
        len(replace(source))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'stepdistill\[data\]'"):
        len(replace(source))
