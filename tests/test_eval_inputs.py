"""What an evaluation reads and hands on: images, prompts, CLIP's view of both, folders for other evaluators."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from images import encoded, noise
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor

from stepdistill.core.errors import DataError
from stepdistill.evaluation.exports import GenEval, T2ICompBench
from stepdistill.evaluation.images import Images
from stepdistill.evaluation.metrics import image_scores
from stepdistill.evaluation.metrics.image_scores import clip_scores
from stepdistill.evaluation.records import prompt_of, prompts_digest, read_records
from stepdistill.networks.clip import Clip


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def folder(place: Path, images: dict[str, Image.Image]) -> Path:
    for name, image in images.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(place / name)
    return place


def zipped(file: Path, place: Path) -> Path:
    """A zip of a folder, last name first."""
    with zipfile.ZipFile(file, "w") as archive:
        for each in sorted(place.rglob("*"), reverse=True):
            archive.write(each, each.relative_to(place))
    return file


def read(images: Images, size: int = 64) -> tuple[list[int], list[str], Tensor]:
    numbers, names, pixels = list(zip(*images.batches(size), strict=True))[1:]
    return sum(numbers, []), sum(names, []), torch.cat(pixels)


FIVE = {"b.png": noise(8, 8), "a/2.bmp": noise(8, 8, 1), "a/10.PNG": noise(8, 8, 2), "c.webp": noise(8, 8, 3)}
FIVE["z.jpg"] = noise(8, 8, 4)


# images: where they lie


def test_a_folder_and_a_zip_of_it_are_read_by_name(tmp_path):
    place = folder(tmp_path / "images", FIVE)
    (place / "notes.txt").write_text("no image")
    folder(place, {".thumbs/hidden.png": noise(8, 8), "__MACOSX/b.png": noise(8, 8)})
    names = ["a/10.PNG", "a/2.bmp", "b.png", "c.webp", "z.jpg"]
    for source in (place, zipped(tmp_path / "images.zip", place)):
        images = Images(source)
        assert len(images) == 5
        numbers, found, pixels = read(images, size=2)
        assert numbers == [0, 1, 2, 3, 4] and found == names and images.skipped == []
        assert pixels.dtype == torch.uint8 and pixels.shape == (5, 3, 8, 8)
        for i, name in enumerate(names[:3]):  # those without loss
            assert torch.equal(pixels[i], as_tensor(FIVE[name]))
        assert [len(part.names) for part in images.batches(2)] == [2, 2, 1]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_row_by_row(tmp_path, save):
    x = np.random.RandomState(0).randint(0, 256, (5, 4, 6, 3)).astype(np.uint8)
    save(tmp_path / "x.npz", labels=np.arange(5), arr_0=x, other=x[::-1])
    np.save(tmp_path / "x.npy", x)
    for name in ("x.npz", "x.npy"):
        numbers, names, pixels = read(Images(tmp_path / name), size=2)
        assert numbers == [0, 1, 2, 3, 4] and names[4] == f"{name}[4]"
        assert torch.equal(pixels, torch.from_numpy(x).permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", ["x.npz", "x.npy"])
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, name):
    x = np.zeros((2000, 32, 32, 3), dtype=np.uint8)  # 6.1 MB
    (np.savez if name == "x.npz" else np.save)(tmp_path / name, x)
    tracemalloc.start()
    seen = sum(len(part.names) for part in Images(tmp_path / name).batches(16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == 2000 and peak < 1.5e6


def test_the_digest_is_of_names_and_bytes(tmp_path):
    place = folder(tmp_path / "one", FIVE)
    same = zipped(tmp_path / "two.zip", place)
    assert Images(place).sha256() == Images(same).sha256() == Images(place, eval_res=4).sha256()
    seen = {Images(place).sha256()}
    (place / "b.png").rename(place / "bb.png")  # in the same place of the order
    seen.add(Images(place).sha256())
    noise(8, 8, 9).save(place / "bb.png")
    seen.add(Images(place).sha256())
    np.save(tmp_path / "x.npy", np.zeros((2, 4, 4, 3), dtype=np.uint8))
    np.save(tmp_path / "y.npy", np.ones((2, 4, 4, 3), dtype=np.uint8))
    seen |= {Images(tmp_path / name).sha256() for name in ("x.npy", "y.npy")}
    assert len(seen) == 5


# images: what becomes of the pixels


def test_the_middle_is_cut_out_and_resized_as_the_protocol_has_it(tmp_path):
    """An offset of 3.5 becomes 4, and 2.5 becomes 2, as in torchvision's center_crop; then Lanczos."""
    images = {"a.png": noise(8, 15), "b.png": noise(13, 8, 1), "c.png": noise(9, 9, 2)}
    place = folder(tmp_path, images)
    squares = [images["a.png"].crop((4, 0, 12, 8)), images["b.png"].crop((0, 2, 8, 10)), images["c.png"]]
    want = [as_tensor(square.resize((6, 6), Image.Resampling.LANCZOS)) for square in squares]
    assert torch.equal(read(Images(place, eval_res=6))[2], torch.stack(want))


@pytest.mark.parametrize("kind", ["folder", "zip", "npy", "npz"])
def test_batches_keep_their_numbers_whatever_is_wanted(tmp_path, kind):
    """A batch has its own images, whether others are read or not, and one without any is there, too."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    place = folder(tmp_path / "all", {f"{i}.png": Image.fromarray(each) for i, each in enumerate(pixels)})
    np.save(tmp_path / "all.npy", pixels)
    np.savez(tmp_path / "all.npz", pixels)
    source = {"folder": place, "npy": tmp_path / "all.npy", "npz": tmp_path / "all.npz"}.get(kind)
    every = list(Images(source or zipped(tmp_path / "all.zip", place)).batches(3))
    assert [(batch.k, batch.numbers) for batch in every] == [(0, [0, 1, 2]), (1, [3, 4, 5]), (2, [6])]
    some = list(Images(source or tmp_path / "all.zip").batches(3, {1, 2}))
    assert [batch.k for batch in some] == [1, 2]
    for one, two in zip(every[1:], some, strict=True):
        assert torch.equal(one.images, two.images) and one.names == two.names


def test_a_batch_of_nothing_readable_is_empty(tmp_path):
    place = folder(tmp_path / "all", {f"{i:03}.png": noise(4, 4, i) for i in range(100)})
    (place / "099.png").write_bytes(b"")
    *_, last = Images(place).batches(33)
    assert (last.k, last.numbers, last.images.shape[0]) == (3, [], 0)


def test_grey_and_transparent_images_become_rgb(tmp_path):
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (0, 0, 2, 4))
    place = folder(tmp_path, {"grey.png": Image.new("L", (4, 4), 7), "half.png": half})
    grey, seen = read(Images(place))[2]
    assert (grey == 7).all()
    assert seen[:, 0].T.tolist() == [[0, 0, 255], [0, 0, 255], [255, 255, 255], [255, 255, 255]]


def test_an_unreadable_image_is_named_and_too_many_are_refused(tmp_path, caplog):
    place = folder(tmp_path / "images", {f"{i:03}.png": noise(4, 4, i) for i in range(100)})
    (place / "007.png").write_bytes(encoded(noise(4, 4))[:60])
    for source in (place, zipped(tmp_path / "images.zip", place)):
        images = Images(source)
        for _ in range(2):  # the second pass counts anew
            caplog.clear()
            numbers, names, pixels = read(images, size=30)
            assert len(pixels) == 99 and 7 not in numbers and "007.png" not in names
            assert [name for name, _ in images.skipped] == ["007.png"] and "truncated" in images.skipped[0][1]
            assert [record.getMessage()[:20] for record in caplog.records] == ["1 of 100 images in " + str(source)[0]]
            assert "007.png: OSError" in caplog.text
    (place / "050.png").write_bytes(b"")
    with pytest.raises(DataError, match="2 unreadable of 100 .* such as 050.png .*expected at most 1%"):
        read(Images(place))


def test_a_broken_zip_member_is_skipped(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for i in range(100):
            archive.writestr(f"{i:03}.png", encoded(noise(4, 4, i)))
    whole = Images(tmp_path / "x.zip").sha256()
    content = bytearray((tmp_path / "x.zip").read_bytes())
    content[content.index(b"IDAT") + 8] ^= 255  # of 000.png: its checksum no longer fits
    (tmp_path / "x.zip").write_bytes(content)
    images = Images(tmp_path / "x.zip")
    assert len(read(images)[0]) == 99
    assert images.skipped[0][0] == "000.png"
    assert images.sha256() != whole


def test_jpeg_is_warned_of_once(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    list(Images(folder(tmp_path, FIVE)).batches())
    assert [record.getMessage() for record in caplog.records] == [
        f"1 of 5 images in {tmp_path} are JPEG: its compression changes FID"
    ]


X = np.zeros((3, 4, 4, 3), dtype=np.uint8)


def cut(file: Path) -> None:
    """An npz whose array ends in its last image, though the zip is whole."""
    np.save(file.with_suffix(".npy"), X)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("arr_0.npy", file.with_suffix(".npy").read_bytes()[:-5])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("gone", lambda file: None, "gone, which does not exist, expected a folder"),
        ("x.tar", lambda file: file.write_bytes(b""), "x.tar, expected a folder, .zip, .npz or .npy"),
        ("empty", lambda file: file.mkdir(), "got 0 images .*expected two or more"),
        ("one", lambda file: folder(file, {"a.png": noise(4, 4)}), "got 1 images .*no covariance"),
        ("one.npy", lambda file: np.save(file, X[:1]), "got 1 images"),
        ("x.zip", lambda file: file.write_bytes(b"no archive"), "BadZipFile"),
        ("x.npy", lambda file: file.write_bytes(b"no array"), "a complete, readable file"),
        (
            "short.npy",
            lambda file: (np.save(file, X), file.write_bytes(file.read_bytes()[:-5])),
            "a complete, readable",
        ),
        ("short.npz", cut, "EOFError: arr_0.npy ends in image 2 of 3"),
        (
            "junk.npz",
            lambda file: zipfile.ZipFile(file, "w").writestr("arr_0.npy", b"junk"),
            "a complete, readable file",
        ),
        ("none.npz", lambda file: zipfile.ZipFile(file, "w").close(), "with no array"),
        (
            "stats.npz",
            lambda file: np.savez(file, mu=np.zeros(2), sigma=np.eye(2)),
            "mu.npy float64 .*as the reference",
        ),
        ("float.npz", lambda file: np.savez(file, X / 255), "arr_0.npy float64 \\(3, 4, 4, 3\\), expected a uint8"),
        ("first.npz", lambda file: np.savez(file, X.transpose(0, 3, 1, 2)), "\\(3, 3, 4, 4\\), expected a uint8"),
        ("fortran.npz", lambda file: np.savez(file, np.asfortranarray(X)), "in C order"),
        ("fortran.npy", lambda file: np.save(file, np.asfortranarray(X)), "in C order"),
        ("pickle.npy", lambda file: np.save(file, np.array([{}]), allow_pickle=True), "readable file|uint8 array"),
        ("pickle.npz", lambda file: np.savez(file, np.array([{}])), "arr_0.npy object"),
        (
            "sizes",
            lambda file: folder(file, {"a.png": noise(4, 6), "b.png": noise(5, 6)}),
            "a.png with 6 x 4 pixels and b.png with 6 x 5 .*choose an eval_res",
        ),
    ],
)
def test_odd_sources_are_refused(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(DataError, match=message):
        read(Images(tmp_path / name))


def test_a_side_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="eval_res=0"):
        Images(folder(tmp_path, FIVE), eval_res=0)


# prompts


def lines(file: Path, *records: object) -> Path:
    file.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return file


def test_prompts_of_each_kind_of_file(tmp_path):
    want = ["a red cat", 'two, "blue" dogs']
    meta = [{"tag": "colors", "include": [{"class": "cat", "count": 1}], "prompt": want[0]}, {"prompt": want[1]}]
    files = [
        lines(tmp_path / "a.txt", want[0], "", f"  {want[1]} "),
        lines(tmp_path / "a.jsonl", meta[0], "", meta[1]),
        lines(tmp_path / "b.jsonl", {"caption": want[0], "text": "other"}, {"text": want[1]}),
        lines(tmp_path / "a.csv", "id,caption", f"1,{want[0]}", '2,"two, ""blue"" dogs"'),
    ]
    for file in files:
        assert [prompt_of(record) for record in read_records(file)] == want
    assert read_records(files[1]) == meta
    assert read_records(files[0])[1] == {"prompt": want[1]}
    assert read_records(files[3])[0] == {"id": "1", "caption": want[0]}


def test_the_digest_of_prompts_is_of_their_order_and_bounds():
    digests = [prompts_digest(each) for each in (["a", "b"], ["b", "a"], ["a\nb"], ["a", "b", ""], ["ä", "b"])]
    assert len(set(digests)) == 5 and digests[0] == prompts_digest(("a", "b"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", ["", " "], "no prompt in .*a.txt"),
        ("a.csv", ["caption"], "no prompt in .*a.csv"),
        ("a.parquet", ["x"], "expected a .txt, .jsonl or .csv file"),
        ("a.jsonl", [{"prompt": "x"}, "{"], "line 2: "),
        ("a.jsonl", [{"prompt": "x"}, {"title": "y"}], "row 2: got a record with \\['title'\\]"),
        ("a.jsonl", [{"prompt": ["x"]}], "row 1: got a record with prompt \\['x'\\]"),
        ("a.jsonl", [{"prompt": "x"}, {"prompt": " ", "text": "y"}], "row 2: .*not blank"),
        ("a.csv", ["id,caption", "1,x", "2"], "row 2: got a record with caption None"),
        ("a.csv", ["caption", "a, b"], "line 2 with more cells"),
    ],
)
def test_odd_prompt_files_are_refused(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read_records(lines(tmp_path / name, *content))


def test_a_file_of_prompts_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="a readable file"):
        read_records(tmp_path / "gone.txt")


# folders for other evaluators


def test_geneval_folders(tmp_path):
    record, images = {"tag": "counting", "include": [], "prompt": "two cats"}, [noise(4, 6, i) for i in range(2)]
    export = GenEval(tmp_path / "geneval")
    for sample in (0, 1, 1):  # done again
        file = export.add(12, sample, record, as_tensor(images[sample]))
        assert file == tmp_path / f"geneval/00012/samples/000{sample}.png"
        assert torch.equal(as_tensor(Image.open(file)), as_tensor(images[sample]))
    assert json.loads((tmp_path / "geneval/00012/metadata.jsonl").read_text()) == record
    found = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file())
    assert found == [f"geneval/00012/{name}" for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")]


def test_t2i_compbench_names_are_read_back_by_its_evaluators(tmp_path):
    """The prompt ends at the first underscore, the number is after the last one; no two numbers are equal."""
    export = T2ICompBench(tmp_path, per_prompt=2)
    prompts = ["a cat, it's 1.5 m long", "a_b/c\\d\n e?", "é" * 300]
    for number, prompt in enumerate(prompts):
        for sample in (0, 1):
            export.add(number, sample, {"prompt": prompt}, as_tensor(noise(4, 4, number)))
    assert [file.name for file in tmp_path.iterdir()] == ["samples"]
    names = sorted((file.name for file in (tmp_path / "samples").iterdir()), key=lambda x: x.split("_")[-1])
    assert [int(name.split("_")[-1].split(".")[0]) for name in names] == list(range(6))
    assert [name.split("_")[0] for name in names[::2]] == [prompts[0], "a b c d e", "é" * 122]
    assert max(len(name.encode()) for name in names) == 255
    assert torch.equal(as_tensor(Image.open(tmp_path / "samples" / names[2])), as_tensor(noise(4, 4, 1)))


GOOD = {"prompt": "x", "tag": "y"}
RGB = torch.zeros(3, 4, 4, dtype=torch.uint8)


def test_an_export_that_is_cut_short_leaves_no_file_beside_the_images(tmp_path, monkeypatch):
    def stop(part: Path, file: Path) -> None:
        raise OSError("the disk is full")

    exports = GenEval(tmp_path / "a"), T2ICompBench(tmp_path / "b", 2)
    for export in exports:
        export.add(0, 0, GOOD, RGB)
    before = {file for file in tmp_path.rglob("*.*") if file.parent.name == "samples"}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        for export in exports:
            with pytest.raises(OSError, match="full"):
                export.add(0, 1, GOOD, RGB)
    assert {file for file in tmp_path.rglob("*.*") if file.parent.name == "samples"} == before
    for export in exports:
        export.add(0, 1, GOOD, RGB)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("add", "error", "message"),
    [
        (lambda to: GenEval(to).add(0, 0, {"prompt": "x"}, RGB), DataError, "`prompt` and `tag`"),
        (lambda to: GenEval(to).add(-1, 0, GOOD, RGB), ValueError, "got prompt -1"),
        (lambda to: GenEval(to).add(0, 0, GOOD, RGB.float()), TypeError, "float32, expected uint8"),
        (lambda to: GenEval(to).add(0, 0, GOOD, RGB[:1]), ValueError, "\\(1, 4, 4\\), expected \\(3, H, W\\)"),
        (lambda to: T2ICompBench(to, 0), ValueError, "per_prompt=0"),
        (lambda to: T2ICompBench(to, 2).add(0, 2, GOOD, RGB), ValueError, "expected 0 to 1"),
        (lambda to: T2ICompBench(to, 10).add(100_000, 0, GOOD, RGB), ValueError, "six digits"),
        (lambda to: T2ICompBench(to, 2).add(0, -1, GOOD, RGB), ValueError, "sample -1"),
        (lambda to: T2ICompBench(to, 2).add(0, 0, {"tag": "x"}, RGB), DataError, "a record with \\['tag'\\]"),
        (lambda to: T2ICompBench(to, 2).add(0, 0, {"prompt": "/_?"}, RGB), DataError, "valid in a file name"),
        (lambda to: T2ICompBench(to, 2).add(0, 0, GOOD, RGB[None]), ValueError, "expected \\(3, H, W\\)"),
    ],
)
def test_odd_exports_are_refused_and_leave_nothing(tmp_path, add, error, message):
    with pytest.raises(error, match=message):
        add(tmp_path)
    assert list(tmp_path.iterdir()) == []


# CLIPScore


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Clip:
    """A small random CLIP whose processor fits it, with 77 places for tokens."""
    return Clip(str(tiny.clip(tmp_path_factory.mktemp("clip"))), torch.device("cpu"))


def by_hand(clip: Clip, images: Tensor, prompts: list[str]) -> Tensor:
    """100 cos of what the model's own processor and tokenizer make of each."""
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    pixels = CLIPImageProcessor(**size)(list(images), return_tensors="pt").pixel_values
    words = clip.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        found = clip.model(**words, pixel_values=pixels)
    return 100 * (found.image_embeds * found.text_embeds).sum(1)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (40, 61), (90, 33), (41, 40), (20, 24)])
def test_scores_are_cosines_of_what_the_processor_makes(clip, monkeypatch, height, width):
    """Its torchvision form may round a level differently."""
    monkeypatch.setattr(image_scores, "BATCH", 3)
    smooth = [noise(6, 6, i).resize((width, height), Image.Resampling.BICUBIC) for i in range(8)]
    images, prompts = torch.stack([as_tensor(image) for image in smooth]), ["red apple", "cat face", "dog", "ox"] * 2
    want = by_hand(clip, images, prompts)
    assert (want < 0).any() and (want > 0).any()
    got = clip_scores(clip, images, prompts)
    assert got.shape == (8,) and not got.requires_grad
    torch.testing.assert_close(got, want.clamp(min=0), rtol=0, atol=1e-3 if height == width == 32 else 0.3)


def test_the_prefix_goes_before_each_prompt(clip):
    images = torch.stack([as_tensor(noise(32, 32, i)) for i in range(4)])
    prompts = ["red apple", "cat face", "blue heart", "dog"]
    got = clip_scores(clip, images, prompts, prefix="green ")
    assert torch.equal(got, clip_scores(clip, images, [f"green {prompt}" for prompt in prompts]))
    assert not torch.equal(got, clip_scores(clip, images, prompts))


def test_a_long_prompt_is_cut_short_and_float_images_are_refused(clip):
    """As torchmetrics does not: its processor divides float images by 255, whatever they hold."""
    images, long = torch.stack([as_tensor(noise(32, 32, i)) for i in range(2)]), "red apple " * 200
    assert clip.tokenizer(long)["input_ids"][77:] != []
    assert torch.equal(clip_scores(clip, images, [long, "x"]), clip_scores(clip, images, [long + "cat face", "x"]))
    with pytest.raises(TypeError, match="to_uint8"):
        clip_scores(clip, images / 255, ["x", "y"])
    with pytest.raises(ValueError, match="\\(2, 32, 32, 3\\), expected \\(N, 3, H, W\\)"):
        clip_scores(clip, images.permute(0, 2, 3, 1), ["x", "y"])
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        clip_scores(clip, images, ["x"])


# refusals

REFUSE = """
import json, sys
from stepdistill.cli.main import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 2, end.code
heavy = ("torch", "torchmetrics", "transformers", "diffusers", "accelerate")
print([name for name in heavy if name in sys.modules])
"""


def test_bad_input_is_refused_before_torch_is_loaded(tmp_path):
    few = folder(tmp_path / "few", {f"{i}.png": noise(8, 8, i) for i in range(3)})
    enough = folder(tmp_path / "enough", {f"{i}.png": noise(8, 8, i) for i in range(40)})
    (tmp_path / "none").mkdir()
    good, broken, empty, prompts = (tmp_path / name for name in ("good.npz", "broken.npz", "empty.npz", "prompts.txt"))
    np.savez(good, mu=np.zeros(2), sigma=np.eye(2))
    np.savez(empty, other=np.zeros(2))
    broken.write_bytes(good.read_bytes()[:100])
    prompts.write_text("a cat\n" * 41)
    out, score = ["-o", tmp_path / "out"], ["eval", "score", enough, "--ref"]
    refused = {
        "3 images in": ["eval", "score", few, "--ref", good, *out],
        "0 images in": ["eval", "score", tmp_path / "none", "--ref", good, *out],
        "nowhere, which does not exist": ["eval", "score", tmp_path / "nowhere", "--ref", good, *out],
        "twice": ["eval", "score", enough, enough, "--ref", good, *out],
        "reference": [*score, tmp_path / "gone.npz", *out],
        "broken.npz: no reference statistics": [*score, broken, *out],
        "empty.npz: no reference statistics": [*score, empty, *out],
        "got no reference": [*score, "teacher", *out],
        "metrics ['fvd']": [*score, good, "--metrics", "fvd", *out],
        "protocol 'mine'": [*score, good, "--protocol", "mine", *out],
        "41 prompts for 40 images": [*score, good, "--clip", "some/clip", "--prompts-file", prompts, *out],
        "both or neither": [*score, good, "--clip", "some/clip", *out],
        "ends in .npz": ["eval", "ref", enough, "-o", tmp_path / "stats.npy"],
        "none, expected two": ["eval", "ref", tmp_path / "none", "-o", tmp_path / "stats.npz"],
        "39 images a row": ["eval", "run", "tiny-sd", "--num-images", 39, *out],
        "gone.txt": ["eval", "run", "tiny-sd", "--prompts-file", tmp_path / "gone.txt", *out],
        "metrics ['fvd', 'is']": ["eval", "run", "tiny-sd", "--metrics", "fvd,is", *out],
        "few": ["eval", "compare", few, "-o", tmp_path / "page.html"],
    }
    words = json.dumps([list(map(str, each)) for each in refused.values()])
    done = subprocess.run([sys.executable, "-c", REFUSE, words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("stepdistill: ")]
    assert len(lines) == len(refused)
    assert not [(part, line) for part, line in zip(refused, lines, strict=True) if part not in line]
    assert done.stdout.strip() == "[]" and not (tmp_path / "out").exists()
