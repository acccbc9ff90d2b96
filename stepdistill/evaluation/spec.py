"""Settings of an evaluation; nothing here loads torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stepdistill.core.errors import ConfigError, problem
from stepdistill.evaluation.protocol import PROTOCOLS, Protocol

if TYPE_CHECKING:
    from stepdistill.evaluation.metrics.resize import Resize

PICKED = ("kid", "paired")
METRICS = ("fd", *PICKED, "prdc", "vendi", "diversity", "cmmd", "pixels", "lpips")
SEED_A, SEED_B = 1, 2  # seeds of the reference's noise, and of the noise of every row


@dataclass(frozen=True)
class Weights:
    """Files and folders (or hub ids) that the user gave; None is looked for where its tools put it."""

    inception: str | None = None
    clip: str | None = None
    dinov2: str | None = None


@dataclass(frozen=True, kw_only=True)
class EvalSpec:
    """How images are measured, wherever they come from.

    Args:
        reference: `teacher`, statistics (.npz), or images (a folder, .zip, .npz or .npy).
        protocol: a name of `PROTOCOLS`; it says what is None below.
        features: name of the extractor.
        resize: how images are brought to the extractor's size.
        eval_res: side in pixels that all images are cropped and resized to before.
        clips: whether existing images are clips; what is drawn is what the family draws.
        metrics: of `METRICS`.
        clip: folder or hub id of the CLIP of the CLIP score; None leaves the score out.
        weights: files of extractors.
        allow_unknown_weights: measure with Inception weights that are not FID's, as `fd`.
        feature_batch: images that the extractor takes at once, and that make a unit; clips of a unit, which is in
            memory as a whole.
        feature_dtype: of the extractor.
        device: of everything; None is the first accelerator, or the CPU.
    """

    output_dir: Path
    reference: str = "teacher"
    protocol: str = "none"
    features: str | None = None
    resize: Resize | None = None
    eval_res: int | None = None
    clips: bool = False
    metrics: tuple[str, ...] = PICKED
    clip: str | None = None
    weights: Weights = field(default_factory=Weights)
    allow_unknown_weights: bool = False
    feature_batch: int = 64
    feature_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    device: str | None = None

    def __post_init__(self) -> None:
        odd = [name for name in self.metrics if name not in METRICS]
        if odd:
            todo = "remove them; the CLIP score comes with --clip"
            raise ConfigError(problem(f"metrics {odd}", f"some of {list(METRICS)}", "no other metric is known", todo))
        if self.protocol not in PROTOCOLS:
            got, why = f"protocol {self.protocol!r}", "a protocol is the set of settings behind published figures"
            raise ConfigError(problem(got, f"one of {list(PROTOCOLS)}", why, "choose one, or remove the option"))
        _whole(self, 1, "feature_batch", "eval_res")

    @property
    def under(self) -> Protocol:
        """The protocol."""
        return PROTOCOLS[self.protocol]

    @property
    def side(self) -> int | None:
        """What images are cropped and resized to before anything else."""
        return self.under.eval_res if self.eval_res is None else self.eval_res


@dataclass(frozen=True, kw_only=True)
class EvalRun(EvalSpec):
    """What is drawn, and how it is measured.

    Args:
        teacher: a pipeline folder, hub id, `.safetensors` file or bundled name.
        students: student folders or hub ids.
        family: module of stepdistill.families; None reads it from the students, or the pipeline.
        prompts: a file; None is the bundled set.
        num: images a row; None is the protocol's number, or one of each prompt. Prompts are taken in turn.
        seed: of every row's noises.
        reference_seed: of the teacher's images that all are compared with.
        sizes: heights and widths in pixels; none are the students', or the native one.
        steps: of the students, and of the teacher beside them; none are the students' own numbers.
        guidance: scales of the students; none are their own.
        lora: a further LoRA, such as a style, and its strength: the teacher has it, and every student.
        lora_strengths: of that LoRA beside the students, each a row; none is the teacher's.
        teacher_steps: of the teacher at its best; None is what is usual for its kind.
        teacher_guidance: of the teacher; None as above.
        batch: images drawn at once, of a unit.
        dtype: of the pipeline.
        save_images: every image as PNG.
        columns: images of a row in the sheets.
        latency: repetitions of one image alone, timed; 0 for none.
        export: folders that other benchmarks score.
    """

    teacher: str
    students: tuple[str, ...] = ()
    family: str | None = None
    prompts: Path | None = None
    num: int | None = None
    seed: int = SEED_B
    reference_seed: int = SEED_A
    sizes: tuple[tuple[int, int], ...] = ()
    steps: tuple[int, ...] = ()
    guidance: tuple[float, ...] = ()
    lora: tuple[str, float] | None = None
    lora_strengths: tuple[float, ...] = ()
    teacher_steps: int | None = None
    teacher_guidance: float | None = None
    batch: int = 8
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    save_images: bool = False
    columns: int = 8
    latency: int = 0
    export: Literal["geneval", "t2i-compbench", "vbench"] | None = None

    def __post_init__(self) -> None:
        EvalSpec.__post_init__(self)
        _whole(self, 1, "num", "teacher_steps", "batch", "columns")
        _whole(self, 0, "latency", "seed", "reference_seed")
        if len(set(self.steps)) < len(self.steps) or min(self.steps, default=1) < 1:
            got = f"steps {list(self.steps)}"
            raise ConfigError(problem(got, "different numbers, 1 or more", "each becomes a row", "correct them"))
        if len(set(self.sizes)) < len(self.sizes):
            got = f"sizes {[list(size) for size in self.sizes]}"
            raise ConfigError(problem(got, "different ones", "each becomes a report", "correct them"))
        scales = [w for w in (*self.guidance, self.teacher_guidance) if w is not None]
        if not all(math.isfinite(w) for w in scales) or len(set(self.guidance)) < len(self.guidance):
            got = f"guidance {scales}"
            raise ConfigError(problem(got, "different finite scales", "each becomes a row", "correct them"))
        if self.lora is None and self.lora_strengths:
            got, why = f"lora_strengths {list(self.lora_strengths)} without a LoRA", "nothing has these strengths"
            raise ConfigError(problem(got, "both or neither", why, "name the LoRA, or leave them out"))
        if self.reference == "teacher" and self.seed == self.reference_seed:
            why = "the teacher would be compared with its own images"
            raise ConfigError(
                problem(f"seed {self.seed} for rows and reference", "two seeds", why, "choose another seed")
            )


def _whole(spec: EvalSpec, least: int, *names: str) -> None:
    for name in names:
        value = vars(spec)[name]
        if value is not None and value < least:
            raise ConfigError(
                problem(f"{name}={value}", f"{least} or more", "smaller values are not possible", "correct it")
            )
