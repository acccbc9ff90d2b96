"""The report of evaluations: what may share a column, the page by its structure, and as a browser lays it out."""

from __future__ import annotations

import base64
import csv
import json
import math
import re
import shutil
import subprocess
from collections import Counter
from copy import deepcopy
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from images import noise
from PIL import Image, ImageDraw

from stepdistill.core.errors import DataError
from stepdistill.evaluation.compare import compare_evaluations
from stepdistill.evaluation.report.chart import Point, against_clip, against_cost, front
from stepdistill.evaluation.report.fields import FIELDS
from stepdistill.evaluation.report.page import page
from stepdistill.evaluation.report.table import (
    comparison_key,
    digits,
    flat_rows,
    key_differences,
    number,
    read_evaluation,
    write_csv,
)

TEACHER = {
    "id": "tiny-sd",
    "steps": 25,
    "guidance": 7.5,
    "scheduler": "DDIMScheduler",
    "sha256": "4be21c0a9d3f5e68",
}
VOID = {"meta", "link", "img", "br", "hr", "input"}


def row(name: str, steps: int, fd: float, excess: tuple[float, float, float] | None, **more) -> dict:
    nfe = 2 * steps if more.get("role") == "teacher" else steps
    metrics = {
        "fd": {
            "value": fd,
            "ci95": [fd - 0.7, fd + 0.7],
            "bias_corrected": None,
            "mean_term": 3.1,
            "cov_term": fd - 3.1,
            "noise_floor": 9.7,
        },
        "kid": {"value": fd / 5000, "std": 0.0006, "subsets": 100, "subset_size": 100},
        "prdc": {"precision": 0.6, "recall": 0.5, "density": 0.9, "coverage": 0.8, "k": 5},
        "vendi": 12.3,
        "diversity": 1.02,
        "clip_score": {
            "value": 31.2 - fd / 30 + steps / 100,
            "stderr": 0.1,
            "model": "openai/clip-vit-base-patch32",
            "scale": 100,
        },
        "paired": {"features": 12.1, "psnr": 18.2, "ssim": 0.61, "lpips": 0.21},
    }
    if excess:
        value, low, high = excess
        metrics["delta_vs_teacher"] = {
            "fd": {"value": value, "ci95": [low, high]},
            "clip_score": {"value": -0.3, "ci95": [-0.4, -0.2]},
        }
    return {
        "name": name,
        "role": "student",
        "student": f"runs/{name}",
        "steps": steps,
        "guidance": 1.0,
        "seed": 2,
        "n": 1000,
        "n_skipped": 0,
        "metrics": metrics,
        "cost": {
            "calls": steps,
            "nfe": nfe,
            "seconds_per_image": 0.005 * nfe,
            "latency_ms": {"p50": 5.0 * nfe, "p90": 6.0 * nfe, "batch": 1},
            "peak_mem_mib": None,
            "speedup_vs_teacher": 50 / nfe,
        },
        "comparable": False,
        "comparable_reasons": ["n below protocol", "no published table uses these features"],
    } | more


def facts() -> dict:
    return {
        "schema": "stepdistill.eval/1",
        "created": "2026-11-22T12:00:00Z",
        "tool": {"stepdistill": "0.1.0", "torch": "2.14.1"},
        "host": {"device": "cpu", "world_size": 1},
        "teacher": TEACHER,
        "prompts": {"source": "prompts.txt", "n": 1000, "sha256": "77aa01d2e5c4b8f0"},
        "features": {"id": "efficientnet-lite0@2f9c9a3e/bicubic64", "arch": "efficientnet-lite0", "dim": 1280},
        "reference": {"kind": "teacher", "path": "ref.npz", "sha256": "9c0d17be44a1f23b", "n": 1000},
        "protocol": {"name": "coco30k-dmd2", "met": False, "deviations": ["n=1000 (protocol 30000)"]},
        "rows": [
            row("teacher, 25 steps", 25, 18.9, None, role="teacher", student=None, guidance=7.5),
            row("quickstart, 4 steps", 4, 19.2, (0.3, -0.2, 0.8)),
            row("quickstart, 2 steps", 2, 23.6, (4.7, 4.0, 5.4)),
            row("quickstart, 1 step", 1, 39.4, (20.5, 19.1, 21.9)),
            row("DDIM, 4 steps", 4, 61.8, (42.9, 41.0, 44.8), guidance=7.5),
        ],
        "exit_reason": "ok",
    }


def other() -> dict:
    """The same on other features, against an npz, without prompts or a teacher."""
    found = facts() | {"teacher": None, "prompts": None}
    found["features"] = {"id": "pixels@0/bicubic8", "arch": "pixels", "dim": 192}
    found["reference"] = {"kind": "npz", "path": "photos.npz", "sha256": "00ff", "n": None}
    found["protocol"] = {"name": "none", "met": False, "deviations": []}
    found["rows"] = [row("photographs", 1, 0.0125, None, role="images", guidance=None, cost={}) | {"steps": None}]
    found["rows"][0]["metrics"] |= {
        "fd": {"value": 0.0125, "ci95": [0.0118, 0.0132], "mean_term": 0.0021, "cov_term": 0.0104},
        "kid": {"value": 0.0031, "std": 0.0006, "subsets": 100, "subset_size": 100},
    }
    return found


def sheet(rows: int, columns: int = 6, side: int = 64) -> Image.Image:
    """A sheet of made-up images: blurred noise with captions."""
    image = Image.new("RGB", (150 + columns * (side + 6), 34 + rows * (side + 6)), "white")
    pen = ImageDraw.Draw(image)
    for i in range(rows * columns):
        line, column = divmod(i, columns)
        left, top = 150 + column * (side + 6), 34 + line * (side + 6)
        image.paste(noise(5, 5, seed=column).resize((side, side), Image.Resampling.BICUBIC), (left, top))
        pen.text((left, 8), f"prompt {column + 1}", fill="black")
        pen.text((6, top + side // 2), f"row {line + 1}" if line else "teacher", fill="black")
    return image


def folder(path: Path, contents: dict, grids: int = 1) -> Path:
    (path / "grids").mkdir(parents=True)
    sheet(9).save(path / "grids" / "of-an-earlier-run.png")
    contents = {"grids": [f"sheet-{k}.png" for k in range(grids)], **contents}
    (path / "eval.json").write_text(json.dumps(contents))
    for k in range(grids):
        sheet(5 - k).save(path / "grids" / f"sheet-{k}.png")
    return path


class Structure(HTMLParser):
    """Tags with their attributes, tables as lists of rows of cell texts, the text outside of styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open, "tags left open"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def one(tmp_path):
    return read_evaluation(folder(tmp_path / "evening", facts(), grids=2))


@pytest.fixture
def two(tmp_path, one):
    return [one, read_evaluation(folder(tmp_path / "photos", other()))]


# the table


def test_rows_are_flat_and_come_back_from_csv(tmp_path, two):
    rows = flat_rows(two)
    assert [found["evaluation"] for found in rows] == ["evening"] * 5 + ["photos"]
    assert all(tuple(found) == FIELDS for found in rows)
    student = rows[1]
    assert (student["key"], student["distance"], student["distance_low"], student["distance_high"]) == (
        "fd",
        19.2,
        18.5,
        19.9,
    )
    assert (student["excess"], student["excess_low"], student["excess_high"]) == (0.3, -0.2, 0.8)
    assert (student["latency_ms_p90"], student["coverage"], student["psnr"]) == (24.0, 0.8, 18.2)
    assert student["comparable_reasons"] == "n below protocol; no published table uses these features"
    assert rows[0]["excess"] is None and rows[5]["nfe"] is None
    write_csv(rows, tmp_path / "rows.csv")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["evening", "photos", "rows.csv"]  # no .part
    with (tmp_path / "rows.csv").open(newline="") as stream:
        back = list(csv.DictReader(stream))
    assert back == [{key: "" if value is None else str(value) for key, value in found.items()} for found in rows]


def test_a_failed_write_leaves_the_old_table(tmp_path, one):
    write_csv(flat_rows([one]), tmp_path / "rows.csv")
    before = (tmp_path / "rows.csv").read_bytes()
    with pytest.raises(ValueError, match="surprise"):
        write_csv([{"surprise": 1}], tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_bytes() == before


def test_identity_is_of_key_features_n_reference_and_protocol(one):
    row = one.facts["rows"][0]
    assert comparison_key(one.facts, row) == (
        "fd",
        "efficientnet-lite0@2f9c9a3e/bicubic64",
        1000,
        "9c0d17be44a1f23b",
        "coco30k-dmd2",
    )
    assert comparison_key(one.facts, {"n": 7}) == comparison_key(one.facts, row)._replace(
        n=7
    )  # the key of its neighbours
    assert comparison_key(one.facts, {"metrics": {"fid": {}}}).key == "fid"


@pytest.mark.parametrize(
    ("change", "label"),
    [
        (lambda found: found["features"].update(id="x"), "features"),
        (lambda found: found["rows"][0].update(n=999), "N"),
        (lambda found: found["reference"].update(sha256="x"), "reference"),
        (lambda found: found["protocol"].update(name="x"), "protocol"),
        (lambda found: [r["metrics"].update(fid=r["metrics"].pop("fd")) for r in found["rows"]], "metric"),
    ],
)
def test_each_difference_is_told(tmp_path, one, change, label):
    changed = deepcopy(one.facts)
    change(changed)
    told = key_differences([one, read_evaluation(folder(tmp_path / "changed", changed))])
    assert [text.split(":")[0] for text in told] == [label]
    assert "evening" in told[0] and "changed" in told[0]


def test_alike_evaluations_differ_in_nothing(tmp_path, one):
    again = deepcopy(one.facts) | {"created": "later"}
    again["rows"].append({"name": "failed", "role": "student", "n": 3, "metrics": {}})  # has nothing to compare
    assert key_differences([one, read_evaluation(folder(tmp_path / "again", again))]) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "schema None"),
        ('{"schema": "stepdistill.eval/2"}', "schema 'stepdistill.eval/2', expected 'stepdistill.eval/1'"),
        ('{"schema": "stepdistill.eval/1"}', "without a list of rows"),
        ('{"schema": "stepdistill.eval/1", "rows": [1]}', "without a list of rows"),
    ],
)
def test_foreign_folders_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "eval.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_evaluation(tmp_path)


# numbers


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([21.34, 3.456, 1234.5], "21.3"),  # three digits of the middle one
        ([1.0, 7.5, None], "1.0"),  # no more than there are
        ([50, 4], "50"),
        ([0.00412, 0.0006, None], "0.00412"),
        ([-0.301, 0.2, 0.6], "−0.301"),
        ([0.0], "0"),
        ([123456.7], "123457"),
    ],
)
def test_numbers_have_the_digits_that_matter(values, text):
    assert number(values[0], digits(values)) == text


def test_front_of_points_by_hand():
    points = [(50.0, 19.0), (4.0, 19.0), (4.0, 60.0), (2.0, 23.0), (1.0, 39.0), (1.0, 39.0), (3.0, 24.0)]
    assert front(points) == [4, 5, 3, 1]
    assert front([]) == [] and front([(1.0, 1.0)]) == [0]
    assert front([(4.0, 60.0), (4.0, 19.0)]) == front([(50.0, 19.0), (4.0, 19.0)]) == [1]
    assert front([(-31.0, 5.0), (-30.0, 4.0), (-29.0, 6.0)]) == [0, 1]


def vertices(svg: str, colour: str) -> list[list[float]]:
    """The corners of the first line of a colour; SVG counts y from above."""
    (path,) = re.findall(rf'<path d="([^"]*)"[^>]*fill: none; stroke: {colour};', svg)[:1]
    return [[float(part) for part in pair.split()] for pair in re.split("[ML]", path)[1:]]


POINTS = [
    Point(1, "teacher", 50, 19.0, None, (18.0, 20.0)),
    Point(2, "student", 4, 30.0, None, (28.0, 32.0)),
    Point(3, "student", 4, 60.0, (3.0, 5.0), (58.0, 62.0)),
    Point(4, "images", 1, 40.0),
]


def test_cost_plot_shows_front_intervals_and_numbers():
    svg = against_cost(POINTS, "fd", "a")
    corners = vertices(svg, "#999999")
    assert len(corners) == 3  # rows 4, 2, 1
    steps = [b[0] - a[0] for a, b in zip(corners, corners[1:], strict=False)]
    assert steps[1] / steps[0] == pytest.approx(math.log(12.5) / math.log(4), rel=1e-4)  # the axis is logarithmic
    assert corners[0][1] < corners[1][1] < corners[2][1]  # down to the lowest distance
    (top, bottom) = sorted(y for _, y in vertices(svg, "#444444"))
    scale = (corners[2][1] - corners[1][1]) / 11
    assert (bottom - top) / scale == pytest.approx(2, rel=1e-4)  # the teacher's interval
    assert len(re.findall('id="a-LineCollection_', svg)) == 4
    texts = re.findall(r">([^<>]+)</text>", svg)
    assert Counter(texts) >= Counter(["1", "2", "3", "4", "fd (lower is better)", "50"])
    assert svg == against_cost(POINTS, "fd", "a") != against_cost(POINTS, "fd", "b")


def test_clip_plot_has_its_front_on_the_right():
    corners = vertices(against_clip(POINTS[1:] + [Point(5, "student", 5, 20.0)], "fd", "a"), "#999999")
    assert len(corners) == 1  # row 5 has the highest score and the lowest distance
    corners = vertices(against_clip([*POINTS[1:], Point(5, "student", 5, 50.0)], "fd", "a"), "#999999")
    assert [round(x) for x, _ in corners] == sorted([round(x) for x, _ in corners], reverse=True)
    assert len(corners) == 2  # rows 5 and 2


def test_numbers_of_close_points_stand_apart():
    close = [Point(n, "student", 4, 20 + n / 1000) for n in (1, 2, 3, 4)]
    svg = against_cost([*close, Point(5, "teacher", 50, 90.0)], "fd", "a")
    places = re.findall(r'<text[^>]*fill: #1f5fa8" x="([\d.]+)" y="([\d.]+)"[^>]*>[1-4]</text>', svg)
    spots = [(float(x), float(y)) for x, y in places]
    assert len(spots) == 4
    assert min(math.dist(a, b) for i, a in enumerate(spots) for b in spots[:i]) > 10


# the page


def test_page_holds_all_it_shows(one):
    found = Structure(page([one], "Evening"))
    assert found.tags[0] == ("html", {"lang": "en"})
    assert not found.all("script") and not found.all("link") and not found.all("iframe")
    links = [value for _, attributes in found.tags for key, value in attributes.items() if re.search("src|href", key)]
    assert links and all(value.startswith(("#", "data:")) for value in links)
    ids = Counter(attributes["id"] for _, attributes in found.tags if "id" in attributes)
    assert set(ids.values()) == {1}
    assert {value[1:] for value in links if value.startswith("#")} <= set(ids)
    assert {value for a in found.tags for value in re.findall(r"url\(#(.*?)\)", str(a))} <= set(ids)
    images = found.all("img")
    assert [base64.b64decode(image["src"].partition(",")[2]) for image in images] == [
        file.read_bytes() for file in one.grids
    ]
    assert all("teacher's row first" in image["alt"] for image in images)
    assert all(th["scope"] in ("row", "col", "colgroup") for th in found.all("th"))
    assert len(found.all("caption")) == 3 and len(found.all("svg")) == 2
    assert page([one], "Evening") == page([one], "Evening")


def test_page_says_what_was_measured_in_order(one):
    text = Structure(page([one], "Evening")).text
    order = ["Evening", "What was measured", "Summary", "Distances and costs", "Plots", "Images", "Notes"]
    places = [re.search(rf"^{heading}$", text, re.M).start() for heading in order]
    assert places == sorted(places)
    for part in (
        "tiny-sd, 25 steps, guidance 7.5, DDIMScheduler",
        "prompts.txt, N 1000, sha256 77aa01d2e5c4",
        "coco30k-dmd2, not met: n=1000 (protocol 30000)",
        "cpu, world size 1",
        "Rows 1, 2, 3, 4, 5: n below protocol.",
        "Rows 1, 2, 3, 4, 5: no published table uses these features.",
        "the distance of a row minus the distance of the teacher with the same prompts and seeds. "
        "Its interval is a 20-block jackknife of the difference",
    ):
        assert part in text, part


def test_cells_are_where_their_headings_are(one):
    table = Structure(page([one], "Evening")).tables[1]
    assert table[0] == [
        "Row",
        "efficientnet-lite0@2f9c9a3e/bicubic64N 1000, protocol coco30k-dmd2reference 9c0d17be44a1",
        "openai/clip-vit-base-patch32",
        "Sampling",
        "Compares with published values",
    ]
    cells = dict(zip([*table[1], "compares"], table[3][1:], strict=True))
    assert cells == {
        "fd": "19.2[18.5, 19.9]",
        "Excess": "0.3[−0.2, 0.8]",
        "CLIP score": "30.6± 0.1",
        "Minus teacher's": "−0.3[−0.4, −0.2]",
        "Steps": "4",
        "Guidance": "1.0",
        "NFE": "4",
        "Seconds per image": "0.020",
        "Speed-up": "12.5",
        "compares": "no",
    }


def test_diversity_stands_beside_the_excess_with_its_interval(tmp_path):
    """With one, without one, and as a bare number, which files had before it had an interval."""
    found = facts()
    told = ({"value": 0.912, "ci95": [0.893, 0.931]}, {"value": 0.8, "ci95": None}, 0.75)
    for one, value in zip(found["rows"][1:], (*told, {"value": None, "ci95": [None, None]}), strict=True):
        one["metrics"]["diversity_vs_teacher"] = value
    path = folder(tmp_path / "e", found)
    html = Structure(page([read_evaluation(path)], "t"))
    table = html.tables[1]
    assert table[1][:3] == ["fd", "Excess", "Diversity / teacher's"]
    cells = [line[3] for line in table[2:]]
    assert cells == ["–", "0.912[0.893, 0.931]", "0.800", "0.750", "–"]
    assert "1 is the teacher's variety among images of one prompt" in html.text
    assert "Its images of one prompt vary 0.912 [0.893, 0.931] times as much as the teacher's. Its speed" in html.text
    compare_evaluations([path], tmp_path / "page.html", tmp_path / "rows.csv")
    assert "0.912<small>[0.893, 0.931]</small>" in (tmp_path / "page.html").read_text()
    with (tmp_path / "rows.csv").open(newline="") as stream:
        back = list(csv.DictReader(stream))
    names = [f"diversity_vs_teacher{end}" for end in ("", "_low", "_high")]
    assert [[line[name] for name in names] for line in back] == [
        ["", "", ""],
        ["0.912", "0.893", "0.931"],
        ["0.8", "", ""],
        ["0.75", "", ""],
        ["", "", ""],
    ]


def test_without_diversity_nothing_is_said_of_it(one):
    assert "Diversity / teacher's" not in page([one], "t") and "images of one prompt" not in page([one], "t")


@pytest.mark.parametrize(
    ("excess", "words"),
    [
        ((0.3, -0.2, 0.8), "0.3 [−0.2, 0.8], is not distinguishable from zero"),
        ((0.0, 0.0, 0.0), "is not distinguishable from zero"),
        ((0.3, 0.1, 0.5), "0.3 [0.1, 0.5]: it is farther from the reference than the teacher"),
        ((-0.3, -0.5, -0.1), "−0.3 [−0.5, −0.1]: it is closer to the reference than the teacher"),
        ((0.3, None, None), "0.3, without an interval: the difference may be chance"),
        (None, "No teacher was measured in the same evaluation"),
    ],
)
def test_summary_claims_no_more_than_the_interval(tmp_path, excess, words):
    found = facts()
    found["rows"] = [row("worse", 1, 9.9, (5.0, 4.0, 6.0)), row("best", 4, 4.2, excess)]
    if excess and excess[1] is None:
        found["rows"][1]["metrics"]["delta_vs_teacher"]["fd"]["ci95"] = None
    text = Structure(page([read_evaluation(folder(tmp_path / "e", found))], "t")).text
    assert "Lowest fd of 2 students (N 1000, features efficientnet-lite0@2f9c9a3e/bicubic64): best, 4.2" in text
    assert words in text and "12.5 times the teacher's" in text
    assert ("distinguishable" in text) == ("distinguishable" in words)


def test_names_are_text_and_not_tags(tmp_path):
    found = facts()
    bold = "<b>x</b> & $y$"
    found["rows"][1]["name"] = found["teacher"]["id"] = found["protocol"]["deviations"][0] = bold
    found["rows"][1]["comparable_reasons"] = [bold]
    found["rows"][1]["metrics"]["clip_score"]["model"] = bold
    html = page([read_evaluation(folder(tmp_path / "<i>", found))], "<u>")
    text = Structure(html)
    assert text.all("b") and not text.all("i") and not text.all("u") and "<b>x" not in html
    assert bold in text.text and "<i>" in text.text
    assert any(bold in cell for cell in text.tables[1][0])


def test_features_of_two_kinds_never_share_a_column(two):
    found = Structure(page(two, "Both"))
    (about, table, on_first, on_second, _) = found.tables
    assert about[0] == ["Evaluation", "evening", "photos"]
    assert table[1].count("fd") == 2
    for each, rows in ((on_first, 5), (on_second, 1)):
        assert each[1].count("KID") == 1 and len(each) == 2 + rows
    first, second = (i for i, heading in enumerate(table[1], start=1) if heading == "fd")
    filled = [(line[first] != "–", line[second] != "–") for line in table[2:]]
    assert filled == [(True, False)] * 5 + [(False, True)]
    assert (
        "pixels@0/bicubic8" in found.text
        and "Rows are in separate columns because they differ in features" in found.text
    )
    assert "The teachers differ" in found.text and "The prompts differ" in found.text
    assert "different hosts" not in found.text
    assert len(found.all("svg")) == 3  # two for the first, and no cost to plot of the second


def test_like_evaluations_share_a_column(tmp_path, one):
    again = read_evaluation(folder(tmp_path / "again", facts() | {"host": {"device": "cuda"}}))
    found = Structure(page([one, again], "Both"))
    assert found.tables[1][1].count("fd") == 1 and len(found.tables[1]) == 12
    assert "separate columns" not in found.text and "different hosts" in found.text


def test_scores_of_two_clip_models_never_share_a_column(tmp_path):
    found = facts()
    found["rows"][2]["metrics"]["clip_score"]["model"] = "another"
    scored = Structure(page([read_evaluation(folder(tmp_path / "e", found))], "t"))
    table = scored.tables[1]
    first, second = (i for i, heading in enumerate(table[1], start=1) if heading == "CLIP score")
    filled = [(line[first] != "–", line[second] != "–") for line in table[2:]]
    assert filled == [(True, False)] * 2 + [(False, True)] + [(True, False)] * 2
    assert len(scored.all("svg")) == 3


def without_images(html: str) -> str:
    return re.sub(r"base64,[\w+/=]+", "", html).lower()


def test_only_a_fid_is_called_one(tmp_path, two):
    assert "fid" not in without_images(page(two, "t"))
    found = json.loads(json.dumps(facts()).replace('"fd"', '"fid"'))
    html = without_images(page([read_evaluation(folder(tmp_path / "fid", found))], "t"))
    assert "fid against network evaluations" in html and not re.search(r"\bfd\b", html)


def test_little_is_enough(tmp_path):
    bare = facts() | {"teacher": None, "prompts": None, "exit_reason": "interrupted"}
    bare["rows"] = [{"name": "failed", "role": "student", "n": 1000, "metrics": {}, "n_skipped": 4}]
    found = Structure(page([read_evaluation(folder(tmp_path / "bare", bare, grids=0))], "t"))
    assert "No distance was measured." in found.text and not found.all("svg") and not found.all("img")
    assert "bare stopped early (interrupted)" in found.text and "Row 1: 4 images were skipped." in found.text
    bare["rows"] = []
    assert len(Structure(page([read_evaluation(folder(tmp_path / "none", bare, grids=0))], "t")).tables) == 1
    with pytest.raises(ValueError, match="no evaluation"):
        page([], "t")


# in a browser


def chromium(profile: Path, file: Path, *flags: str) -> str:
    """What a headless Chromium prints of a page."""
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("neither chromium nor google-chrome is installed")
    quiet = "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    done = subprocess.run(
        [binary, *f"--headless --no-sandbox --disable-gpu --hide-scrollbars {quiet}".split()]
        + [f"--user-data-dir={profile}", *flags, file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


MEASURE = """<script>addEventListener("load", () => {
  const root = document.documentElement, boxes = [...document.querySelectorAll(".box")];
  const sizes = [root.scrollWidth, innerWidth, boxes.filter(box => box.scrollWidth > box.clientWidth).length];
  (parent.document.body || document.body).setAttribute("data-sizes", sizes.join(" "));
});</script></body>"""


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_page_never_scrolls_sideways(tmp_path, two, width, height):
    html = page(two, "Both").replace("</body>", MEASURE)
    # a window has a least width, a frame has not
    frame = f'<body><iframe srcdoc="{escape(html)}" style="border:0" width="{width}" height="{height}"></iframe></body>'
    (tmp_path / "frame.html").write_text(frame)
    found = chromium(tmp_path / "profile", tmp_path / "frame.html", "--window-size=1400,900", "--dump-dom")
    wide, inner, scrolling = map(int, re.search(r'data-sizes="(\d+) (\d+) (\d+)"', found).groups())
    assert inner == width and wide <= inner
    assert scrolling  # the tables do, each in its box


def test_page_prints(tmp_path, two):
    (tmp_path / "page.html").write_text(page(two, "Both"))
    pdf = tmp_path / "page.pdf"
    chromium(tmp_path / "profile", tmp_path / "page.html", f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    assert pdf.read_bytes().startswith(b"%PDF-") and re.search(rb"/Type\s*/Page\b", pdf.read_bytes())
