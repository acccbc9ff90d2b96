"""The table of new images: a few-step model that is fine-tuned on drawings, with a training assistant and without.

The drawings are those that the teacher was trained on, from which a strongly guided teacher and its students have moved
away. Distances are therefore to drawings: what is learnt brings an image nearer, and what is lost takes it away.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from stepdistill.config.dump import config_digest
from stepdistill.config.load import load_config
from stepdistill.core.cost import Cost
from stepdistill.evaluation.stored_features import StoredFeatures
from stepdistill.families.base import Family
from stepdistill.students.contract import read_contract
from stepdistill.students.draw.call import teacher_call
from stepdistill.training.recipe import Run
from tables.benchmark import Results, data_features, drawings, extractor, figures, judged, prompts, reference
from tables.feedback import drawn_by
from tables.recipes import recipes, seconds, trained, warm_start

DRAWINGS, SEED = 1024, 2  # seeds 0 and 1 are those of the comparison
STARTED = ("alone", "assisted")


def measure_new_images(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """The few-step model before, after plain fine-tuning, and after the same with the assistant on."""
    ref = StoredFeatures({"reference": data_features(0), "floor": data_features(1)}, prompts(), {})
    for method in STARTED:
        file = recipes(name, "new_images").get(method)
        if file is None or (rows and method not in rows):
            continue
        run = load_config(Run, file, [])
        data: Any = run.data
        assert run.start_from is not None
        warm_start(run)
        write_drawings(Path(data.train_data_dir))
        before, family = Path(run.start_from), run.family
        pipe, steps, full = family.load(), len(read_contract(before).timesteps), run.train.teacher_steps
        call = teacher_call(family, pipe, steps, run.teacher_guidance_scale, f"teacher, {steps} steps")
        results.once(f"{name}/teacher, few", partial(figures, pipe, call, ref), steps=steps)
        drawn = reference(name, run, work).features["floor"]  # the teacher at full steps, with the seeds of all rows
        cost = Cost(calls=full, rows=2 * full * len(drawn), batches=1)
        results.once(f"{name}/teacher, full", partial(judged, drawn, cost, ref), steps=full)
        results.once(f"{name}/before", partial(near_drawings, family, before, ref), start=before.name)
        out = trained(file)
        facts = {"config": config_digest(run), "train_seconds": round(seconds(out))}
        if run.train.assistant:
            facts["assistant_seconds"] = round(seconds(Path(run.train.assistant)))
        results.once(f"{name}/{method}", partial(near_drawings, family, out, ref), **facts)


def near_drawings(family: Family, folder: Path, ref: StoredFeatures) -> dict[str, Any]:
    """Distance to drawings, over that of other drawings, and diversity of a student in its contract's steps."""
    images, cost = drawn_by(family, folder, ref)
    return judged(extractor()(images), cost, ref)


def write_drawings(folder: Path) -> None:
    """The drawings as a folder of images with captions, where it is missing."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    captions, lines = prompts(DRAWINGS), []
    for i, pixels in enumerate(drawings(SEED, captions)):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{i:05d}.png")
        lines.append(json.dumps({"file_name": f"{i:05d}.png", "text": captions[i]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
