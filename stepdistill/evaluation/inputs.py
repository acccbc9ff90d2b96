"""What an evaluation refuses in its inputs and its output folder; without torch, so that a command does it at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from stepdistill.core.errors import DataError, EvaluationError, problem
from stepdistill.core.files import remove
from stepdistill.core.image_files import images_below
from stepdistill.core.outputs import check_output_file, check_output_tree, present_in
from stepdistill.evaluation.metrics.stats_file import STATS_MARK, read_statistics
from stepdistill.evaluation.records import prompt_of, read_records
from stepdistill.evaluation.spec import EvalRun, EvalSpec
from stepdistill.evaluation.stored_clips import stored_items

LEAST = 40  # images: 20 blocks of two
TEACHER = "teacher"
FACTS = "facts.json"
WORK = "work"  # the folder of an evaluation's stores
SIZES, OVER_SIZES = "sizes", "sizes.json"  # the folder of evaluations at several sizes, and the summary of all
WRITTEN = (  # by an evaluation in its folder
    *(SIZES, OVER_SIZES, WORK, "eval.json", "rows.csv", "report.html", "per_sample.jsonl", "grids", "stats", "images"),
    *("geneval", "t2i-compbench", "vbench"),
)


def open_evaluation(folder: Path, inputs: Iterable[Path | str], overwrite: bool) -> None:
    """Check that an evaluation can be written to a folder, or continued in it.

    Args:
        inputs: files and folders that are read.
        overwrite: remove an earlier evaluation, so that nothing is continued.

    Raises:
        OutputError: the folder cannot be written to, is an input, or holds files of others.
    """
    begun = (f"{WORK}/*/{FACTS}", f"{SIZES}/*/{WORK}/*/{FACTS}")
    own = any(any(folder.glob(pattern)) for pattern in begun)
    check_output_tree(folder, WRITTEN, inputs, own=own, overwrite=True)
    for place in present_in(folder, WRITTEN) if overwrite else ():
        remove(place)


def check_score(places: Sequence[Path], spec: EvalSpec, prompts: Path | None) -> dict[str, Path]:
    """The sources of rows by their names.

    Raises EvaluationError, DataError for images, prompts or a reference that cannot be used.
    """
    if spec.reference == TEACHER:
        why, todo = "existing images are not compared with a teacher", "pass statistics or images with --ref"
        raise EvaluationError(problem("no reference", "--ref", why, todo))
    if (spec.clip is None) != (prompts is None):
        why, todo = (
            "the CLIP score compares each image with its prompt",
            "pass both --clip and --prompts-file, or neither",
        )
        raise EvaluationError(problem(f"CLIP {spec.clip} and prompts {prompts}", "both or neither", why, todo))
    sources = dict(zip(labels([str(place) for place in places]), places, strict=True))
    for place in places:
        n = len(stored_items(place, spec.clips).names)
        enough(n, f"in {place}")
        if prompts is not None:
            prompts_of_images(prompts, n)
    is_stats(Path(spec.reference), spec.clips)
    return sources


def open_statistics(images: Path, out: Path, overwrite: bool, clips: bool = False) -> Path:
    """Check that statistics of images can be written to a file. Returns the folder of what a run that is cut leaves.

    Raises EvaluationError, DataError, OutputError.
    """
    check_npz(out)
    work = out.with_suffix(".work")
    check_output_file(out, [images], overwrite, STATS_MARK)
    check_output_tree(work, ["*"], [images], (work / FACTS).exists(), overwrite=True)
    stored_items(images, clips)
    return work


def check_npz(file: Path) -> None:
    """Raise EvaluationError for a file of statistics that would not be known as one."""
    if file.suffix != ".npz":
        raise EvaluationError(problem(file, "a name that ends in .npz", "--ref recognises statistics by it", "add it"))


def prompts_of_images(prompts: Path, n: int) -> list[str]:
    """The prompts of a file for `n` images, in turn. Raises EvaluationError, DataError."""
    records = read_records(prompts)
    if len(records) > n:
        got, why = f"{len(records)} prompts for {n} images", "each image has one prompt"
        raise EvaluationError(problem(got, "at most one per image", why, "pass the prompts of these images"))
    return [prompt_of(records[i % len(records)]) for i in range(n)]


def check_draws(spec: EvalRun) -> None:
    """Raise EvaluationError, DataError for a file of prompts or a reference that cannot be used, or too few images."""
    records = read_records(spec.prompts) if spec.prompts else []
    n = spec.num or spec.under.n or len(records)
    if n:
        enough(n, "a row")
    if spec.reference != TEACHER:  # which the family draws, images or clips, is known later
        place = Path(spec.reference)
        is_stats(place, place.is_dir() and not images_below(place).images)


def is_stats(place: Path, clips: bool = False) -> bool:
    """Whether a reference is statistics, `mu` and `sigma` in an npz, and not images, or clips.

    Raises EvaluationError, DataError where it is neither.
    """
    if not place.exists():
        expected = f"`{TEACHER}`, statistics (.npz), or images (a folder, .zip, .npz or .npy)"
        why, todo = "rows are compared with it", "check the path"
        raise EvaluationError(problem(f"reference {place}, which does not exist", expected, why, todo))
    if place.suffix.lower() != ".npz":
        stored_items(place, clips)
        return False
    try:
        read_statistics(place)
    except ValueError as error:
        try:
            stored_items(place, clips)
        except DataError:
            raise EvaluationError(str(error)) from error
        return False
    return True


def enough(n: int, where: str) -> None:
    """Raise EvaluationError for too few images."""
    if n < LEAST:
        why = "the intervals need 20 blocks of at least two images"
        raise EvaluationError(problem(f"{n} images {where}", f"{LEAST} or more", why, "use more images"))


def labels(places: Sequence[str]) -> list[str]:
    """The last name of each path, or as much of its end as tells it from the others.

    Raises EvaluationError where one is there twice.
    """
    parts = [Path(place).resolve().parts if Path(place).exists() else Path(place).parts for place in places]
    if len(set(parts)) < len(parts):
        got = f"{', '.join(places)}"
        raise EvaluationError(problem(got, "each once", "its rows would appear twice", "leave one out"))
    deepest = max(map(len, parts), default=1)
    deep = next((k for k in range(1, deepest) if len({p[-k:] for p in parts}) == len(parts)), deepest)
    return ["/".join(p[-deep:]) for p in parts]
