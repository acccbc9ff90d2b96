"""The tables of README and documentation, made from the files of `eval/results/`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from tables.cells import excess_cell
from tables.extraction import extraction_page
from tables.matrix import matrix
from tables.multistep import differences_page
from tables.render_decoding import decoding_page
from tables.render_sizes import sizes_page
from tables.render_tuning import feedback_page, hyper_sd_page, new_images_page
from tables.render_video import video_page

STEPS = {"teachers": (1, 2, 4, 8), "consistency": (1, 2, 4, 8), "distribution": (1, 2, 4), "reflow": (1, 2, 4)}
STEPS |= {"multistep": (1, 2, 4, 8)}
# steps whose other figures are shown
DETAILED = {"teachers": 4, "consistency": 4, "distribution": 1, "reflow": 1, "multistep": 4}
LARGE_AT_1024 = {"z_image": "Z-Image", "qwen_image": "Qwen-Image", "krea2": "Krea 2"}
MEMORY = {
    **{"sd15": "SD 1.5", "sdxl": "SDXL", "sd3": "SD 3 medium", "pixart": "PixArt-Sigma"},
    **{"wan13b": "Wan 2.1 1.3B, 5 frames of 256 x 256", "wan13b_480p": "Wan 2.1 1.3B, 81 frames of 480 x 832"},
    **{"wan5b": "Wan 2.2 5B, 81 frames of 480 x 832", "wan14b": "Wan 2.1 14B, 81 frames of 480 x 832"},
    "ltx": "LTX-Video 2B, 161 frames of 512 x 704",
    **{"flux2_klein": "FLUX.2 klein 4B", "flux2_klein_1024": "FLUX.2 klein 4B, 1024 x 1024"},
    **{name: f"{title}, 1024 x 1024" for name, title in LARGE_AT_1024.items()},
}
EARLY = {"distribution": 799.0}  # one step may do better from an earlier time, for any method: shown for all
AWAY = {  # distances of negative prompts' images, in features
    "to_teacher": "distance to the teacher's images of the concept",
    "to_drawings": "distance to drawings",
    "moved": "change of the images that did not show it",
}


def documents(root: Path) -> list[Path]:
    """The files of a checkout that may show tables."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def render(text: str, results: Path) -> str:
    """The text with each `<!-- table NAME -->` ... `<!-- end -->` block made anew from its file."""

    def block(match: re.Match[str]) -> str:
        name = match[1]
        table = _overview(results) if name == "overview" else RENDERERS[name](_rows(results, name))
        return f"<!-- table {name} -->\n{table}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", block, text, flags=re.DOTALL)


def _rows(results: Path, name: str) -> Mapping[str, Any]:
    return json.loads((results / f"{name}.json").read_text())


def _overview(results: Path) -> str:
    lines = ["| | network evaluations | excess [95 %] | diversity | training |", "| --- | --- | --- | --- | --- |"]
    chosen = json.loads((Path(__file__).parent / "overview.json").read_text())  # file and row by label
    for label, (name, key) in chosen.items():
        row = _rows(results, name)[key]
        trained = f"{row['train_seconds'] / 60:.1f} min" if "train_seconds" in row else "none"
        lines.append(f"| {label} | {row['nfe']:.0f} | {excess_cell(row)} | {row['diversity']:.2f} | {trained} |")
    return "\n".join(lines)


def _teachers(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| teacher | parameters | trained | distance to data (data to itself) | diversity over data's | floor F |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for key, row in rows.items():
        if key.endswith("/full"):
            trained = f"{row['training']['steps']} steps, {row['training']['seconds'] / 60:.0f} min"
            lines.append(
                f"| {row['teacher']} | {row['parameters'] / 1e6:.2f} M | {trained} | {row['fd_to_data']:.0f} "
                f"({row['fd_data_to_data']:.0f}) | {row['diversity_of_data']:.2f} | {row['floor']:.0f} |"
            )
    return "\n".join(lines + ["", _by_steps("teachers", {k: v for k, v in rows.items() if not k.endswith("/full")})])


def _by_steps(table: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a way to sample, a column a number of steps, and what else was measured at one of these."""
    names = list(dict.fromkeys(key.rpartition("/")[0] for key in rows))
    heads = {str(n): f"{n} step{'s' * (n > 1)}" for n in STEPS[table]}
    others = [f"at {heads[str(DETAILED[table])]}: paired", "diversity", "nfe"]
    if table in EARLY:
        heads |= {f"1 from {EARLY[table]:g}": f"1 step from {EARLY[table]:g}"}
    timed = any("train_seconds" in row for row in rows.values())
    others += ["trained"] * timed
    lines = [f"| {' | '.join(['excess [95 %]', *heads.values(), *others])} |"]
    lines += ["| --- " * (len(heads) + len(others) + 1) + "|"]
    for name in names:
        cells = []
        for steps in heads:
            row = rows.get(f"{name}/{steps}")
            cells.append(excess_cell(row) if row else "")
        row = rows.get(f"{name}/{DETAILED[table]}")
        cells += [f"{row['paired']:.1f}", f"{row['diversity']:.2f}", f"{row['nfe']:.0f}"] if row else [""] * 3
        if timed:
            cells += [f"{row['train_steps']} steps, {row['train_seconds'] / 60:.1f} min" if row else ""]
        lines.append(f"| {name.replace('/', ': ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _distribution(rows: Mapping[str, Mapping[str, Any]]) -> str:
    plain = {key: row for key, row in rows.items() if "/unguided/" in key}
    table = _by_steps("distribution", {key: row for key, row in rows.items() if key not in plain})
    teachers = [f"{key.split('/')[0]} {excess_cell(row)} in {key.split('/')[2]} steps" for key, row in plain.items()]
    return f"{table}\n\nThe teachers themselves, without guidance: {'; '.join(teachers)}." if teachers else table


def _multistep(rows: Mapping[str, Mapping[str, Any]]) -> str:
    compared = {key: row for key, row in rows.items() if "than" in row}
    table = _by_steps("multistep", {key: row for key, row in rows.items() if key not in compared})
    return f"{table}\n\n{differences_page(compared)}" if compared else table


def _reflow(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| S / transport cost, 32 steps | w | teacher | student | transport cost | parameters |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for key, row in rows.items():
        if key.endswith("/paths"):
            teacher, learned = (each["straightness"] / each["cost"] for each in (row["teacher"], row["student"]))
            costs = f"{row['teacher']['cost']:.2f} to {row['student']['cost']:.2f}"
            size = f"{row['student']['parameters'] / 1e6:.2f} of {row['teacher']['parameters'] / 1e6:.2f} M"
            name = key.removesuffix("/paths").replace("/", ": ")
            lines.append(f"| {name} | {row['guidance_scale']:g} | {teacher:.3f} | {learned:.3f} | {costs} | {size} |")
    return "\n".join([_by_steps("reflow", rows), "", *lines])


def _guidance(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| w | R^2 | excess over two passes [95 %] | paired | nfe | seconds / two passes | extra parameters |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for key, row in sorted(rows.items(), key=lambda each: (each[0].rpartition("/")[0], each[1]["guidance_scale"])):
        scale = f"{row['guidance_scale']:g}" + (", not in training" if row["unseen"] else "")
        near = "the same" if row["r2"] is None else f"{row['r2']:.3f}"
        name = key.rpartition("/")[0].replace("/", ": ")
        cost = f"{row['nfe']:.0f} of {row['two_passes']['nfe']:.0f} | {row['time_ratio']:.2f}"
        more = f"{row['extra']:.1%}" if "extra" in row else "a LoRA"
        lines.append(f"| {name}, {scale} | {near} | {excess_cell(row)} | {row['paired']:.1f} | {cost} | {more} |")
    return "\n".join(lines)


def _negative(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a pair, a column a setting: what is shown of the concept. Then means of what else changes, by student."""
    some = next(iter(rows.values()))
    heads = [key if key.startswith("nag") else f"scale {key}" for key in some["settings"]]
    heads = ["plain", *heads[1:], *(f"{key}, another word" for key in some["other"])]
    shown, means = (
        [f"| {title} | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
        for title in ("shown of the concept, %", "mean over all pairs")
    )
    for name in dict.fromkeys(key.rpartition("/")[0] for key in rows):
        label, cells = name.replace("/", ": "), []
        for key, row in rows.items():
            if key.startswith(f"{name}/"):
                cells.append([*row["settings"].values(), *row["other"].values()])
                values = " | ".join(f"{100 * cell['shown']:.1f}" for cell in cells[-1])
                shown += [f"| {label}, {key.rpartition('/')[2].replace(':', ', not')} | {values} |"]
        percentages = [100 * mean(row[i]["shown"] for row in cells) for i in range(len(heads))]
        means += [f"| {label}: shown, % | {' | '.join(f'{each:.1f}' for each in percentages)} |"]
        for kind, title in AWAY.items():
            averages = [mean(row[i][kind] for row in cells if kind in row[i]) for i in range(len(heads))]
            means += [f"| {label}: {title} | {' | '.join(f'{each:.1f}' for each in averages)} |"]
        plain = mean(row[0]["seconds_per_image"] for row in cells)
        times = [mean(row[i]["seconds_per_image"] for row in cells) / plain for i in range(len(heads))]
        means += [f"| {label}: seconds / plain | {' | '.join(f'{each:.2f}' for each in times)} |"]
    return "\n".join([*shown, "", *means])


def _hybrid(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| | steps, by the teacher | diversity [95 %] | gain over the student [95 %] | excess [95 %] | paired |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for key in sorted(rows, key=lambda key: (key.split("/")[:2], rows[key]["steps"], rows[key]["base_steps"])):
        row, (teacher, method, way) = rows[key], key.split("/")
        more = _signed(row["gain"], row["gain_ci95"]) if way != "student" else ""
        diversity = f"{row['diversity']:.3f} [{row['diversity_ci95'][0]:.3f}, {row['diversity_ci95'][1]:.3f}]"
        cells = [f"{row['steps']}, {row['base_steps']}", diversity, more, excess_cell(row), f"{row['paired']:.1f}"]
        lines.append(f"| {teacher}: {method}, {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _transfer(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| | strength | on the teacher [95 %] | on the student [95 %] | ratio [95 %] |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for key, row in rows.items():
        teacher, style, method, _ = key.split("/")
        moved = [_signed(row[name], row[f"{name}_ci95"]) for name in ("on_teacher", "on_student")]
        share, (low, high) = row["share"], row["share_ci95"]
        name, count = f"{teacher}: {style}", f"{row['steps']} step{'s' * (row['steps'] > 1)}"
        cells = [f"{name}; {method}, {count}", f"{row['strength']:g}", *moved, f"{share:.2f} [{low:.2f}, {high:.2f}]"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _control(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| distance to the control, x 1,000 [95 %] | without the ControlNet | with it | share of the teacher's gain |"
    ]
    lines += ["| --- | --- | --- | --- |"]
    for key, row in rows.items():
        teacher, method, count = key.split("/")
        for who, name in (
            ("teacher", teacher),
            ("student", f"{teacher}: {method}, {count} step{'s' * (count != '1')}"),
        ):
            spans = [(1000 * row[k], *(1000 * end for end in row[f"{k}_ci95"])) for k in (f"{who}_without", who)]
            cells = [f"{value:.1f} [{low:.1f}, {high:.1f}]" for value, low, high in spans]
            share = f"{row['share']:.2f} [{row['share_ci95'][0]:.2f}, {row['share_ci95'][1]:.2f}]" * (who == "student")
            lines.append(f"| {name} | {' | '.join(cells)} | {share} |")
    return "\n".join(dict.fromkeys(lines))


def _signed(value: float, span: Sequence[float]) -> str:
    return f"{value:+.3f} [{span[0]:+.3f}, {span[1]:+.3f}]"


def _watch(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| run | collapse monitor |", "| --- | --- |"]
    for key, row in rows.items():
        heard = f"warns at step {row['fired']}: {', '.join(row['signs'])}" if "fired" in row else "no warning"
        lines.append(f"| {key.replace('/', ': ', 1)} | {heard} |")
    return "\n".join(lines)


def _memory(rows: Mapping[str, Mapping[str, Any]]) -> str:
    heads = ("GiB", "base", "student", "fake score", "optimizers", "gradients", "activations")
    lines = [f"| {' | '.join((*heads, 'predicted', 'measured', 'ratio'))} |", "| --- " * (len(heads) + 3) + "|"]
    for key, row in sorted(rows.items(), key=lambda each: each[1]["predicted"]["peak"]):
        said = row["predicted"]
        weights, _, states = zip(*(said["parts"][name] for name in ("base", "student", "fake")), strict=True)
        sizes = (*weights, sum(states), said["gradients"], said["activations"], said["peak"])
        cells = [f"{size / 2**30:.2f}" for size in sizes]
        measured = row.get("measured")
        cells += [f"{measured['peak'] / 2**30:.2f}", f"{row['ratio']:.3f}"] if measured else ["", ""]
        lines.append(f"| {MEMORY[key]}, {said['parameters'] / 1e9:.2f} B | {' | '.join(cells)} |")
    return "\n".join(lines)


def _lcm_quality(race: Mapping[str, Any]) -> str:
    """A line a student, a column a number of steps, and what our student's excess is of it."""
    heads = [*(f"{n} step{'s' * (n > 1)}" for n in race["steps"]), "at 4 steps: ours / this"]
    lines = [f"| excess [95 %] | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    for side in ("ours", *race["ratios"]):
        for k, seed in enumerate(race["seeds"]):
            cells = [excess_cell(race["excess"][f"{side}/{seed}/{n}"]) for n in race["steps"]]
            name, share = (side, "") if side == "ours" else (f"plain loop, {side}", f"{race['ratios'][side][k]:.2f}")
            lines.append(f"| {name}, seed {seed} | {' | '.join(cells)} | {share} |")
    return "\n".join(lines)


def _quickstart(report: Mapping[str, Any]) -> str:
    lines = ["| | calls | nfe | excess [95 %] |", "| --- | --- | --- | --- |"]
    for row in report["rows"]:
        delta, sure = row["metrics"].get("delta_vs_teacher"), "0"
        if delta is not None:
            sure = excess_cell({"excess": delta["fd"]["value"], "ci95": delta["fd"]["ci95"]})
        lines.append(f"| {row['name']} | {row['cost']['calls']:.0f} | {row['cost']['nfe']:.0f} | {sure} |")
    return "\n".join(lines)


def _lcm_study(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Excess by steps, and gaps by share of the grid, on states of noised data and of trajectories."""
    heads = [f"{n} step{'s' * (n > 1)}" for n in STEPS["consistency"]]
    lines = [f"| excess [95 %] | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    for label in dict.fromkeys(key.rpartition("/")[0] for key in rows):
        row = [rows.get(f"{label}/{n}") for n in STEPS["consistency"]]
        if any(row):
            lines.append(f"| {label} | {' | '.join(excess_cell(each) if each else '' for each in row)} |")
    gaps = {key.rpartition("/")[0]: row for key, row in rows.items() if key.endswith("/gap")}
    shares = sorted({key.partition("/")[2] for row in gaps.values() for key in row if "/" in key})
    lines += ["", f"| gap, noised data / trajectory | {' | '.join(shares)} |", "| --- " * (len(shares) + 1) + "|"]
    for label, row in gaps.items():
        pairs = [[row.get(f"{kind}/{share}") for kind in ("data", "trajectory")] for share in shares]
        cells = [" / ".join("" if gap is None else f"{gap:.3f}" for gap in pair) for pair in pairs]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


RENDERERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "quickstart": _quickstart,
    "teachers": _teachers,
    "consistency": partial(_by_steps, "consistency"),
    "distribution": _distribution,
    "multistep": _multistep,
    "reflow": _reflow,
    "extraction": extraction_page,
    "guidance": _guidance,
    "negative": _negative,
    "watch": _watch,
    "families": matrix,
    "hybrid": _hybrid,
    "transfer": _transfer,
    "control": _control,
    "decoding": decoding_page,
    "feedback": feedback_page,
    "hyper_sd": hyper_sd_page,
    "new_images": new_images_page,
    "sizes": sizes_page,
    "video": video_page,
    "memory": _memory,
    "lcm_quality": _lcm_quality,
    "lcm_study": _lcm_study,
}
