"""The table of Distilled Decoding: an autoregressive teacher token by token, and its student in one to three calls.

The measure is the log-likelihood of a token under the teacher: it is exact, and it sees whether tokens fit each other.
The gap is that between the teacher's own tokens and tokens that are drawn independently, each from its marginal law for
the prompt, which is the best that one call without the noise-to-token map could do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from stepdistill.config.dump import config_digest
from stepdistill.config.load import load_config
from stepdistill.core.cost import Cost, count_calls
from stepdistill.core.pixels import to_uint8
from stepdistill.core.random import noise_of
from stepdistill.decoding.folder.pipeline import OneStepPipeline
from stepdistill.decoding.janus import TokenTeacher
from stepdistill.decoding.load import load_decoder
from stepdistill.decoding.run import DecodingRun
from stepdistill.decoding.train import distill_decoder
from stepdistill.decoding.with_teacher import draw_with_teacher
from stepdistill.evaluation.metrics.frechet import feature_diversity, frechet
from stepdistill.evaluation.metrics.jackknife import mean_interval, ratio_of_means
from stepdistill.evaluation.metrics.stats import Stats
from stepdistill.evaluation.spec import SEED_A, SEED_B
from stepdistill.evaluation.stored_features import StoredFeatures
from stepdistill.students.contract import CONTRACT
from tables.benchmark import Results, data_features, extractor, judged, places, prompts, spans
from tables.recipes import recipes

BATCH = 64
PACES = {1: 10, BATCH: 3}  # batch sizes that are timed, and how often
TEACHER_STEPS = 8  # tokens that the teacher draws again before each later call, in a row of its own


@dataclass(frozen=True)
class TokenReference:
    """The teacher's tokens (N, n) under the seeds A and B, and what is compared with them."""

    teacher: TokenTeacher
    prompts: list[str]
    reference: Tensor
    own: Tensor

    @cached_property
    def features(self) -> StoredFeatures:
        """Of the images."""
        tokens = {"reference": self.reference, "floor": self.own}
        return StoredFeatures({key: self.seen(value) for key, value in tokens.items()}, self.prompts, {})

    @cached_property
    def independent(self) -> Tensor:
        """Tokens (N, n), each that of another image of seed A with the same prompt, so that none knows the others."""
        return shuffled(self.reference, places_of(self.prompts), torch.Generator().manual_seed(SEED_B))

    @cached_property
    def likelihood(self) -> Tensor:
        """Of the teacher's own tokens, (N,)."""
        return self.likelihood_of(self.own)

    @cached_property
    def likelihood_of_independent(self) -> Tensor:
        """Of the tokens of `independent`, (N,)."""
        return self.likelihood_of(self.independent)

    def likelihood_of(self, tokens: Tensor) -> Tensor:
        """Log-likelihood (N,) of a token in nats, the mean over an image."""
        rows = range(0, len(tokens), BATCH)
        found = [self.teacher.log_likelihood(self.prompts[i : i + BATCH], tokens[i : i + BATCH]) for i in rows]
        return torch.cat(found)

    def seen(self, tokens: Tensor) -> Tensor:
        """Features (N, D) of the images of tokens."""
        teacher = self.teacher
        images = [(teacher.pixels(teacher.codes[some]) / 2 + 0.5).clamp(0, 1) for some in tokens.split(BATCH)]
        return extractor()(to_uint8(torch.cat(images)))

    def judge(self, tokens: Tensor, cost: Cost) -> dict[str, Any]:
        """What the table says of tokens (N, n) for the prompts, drawn from the noises of seed B."""
        likelihood, none = self.likelihood_of(tokens), self.likelihood_of_independent
        row = judged(self.seen(tokens), cost, self.features) | spans(
            log_likelihood=mean_interval(likelihood),
            gap_closed=ratio_of_means(likelihood - none, self.likelihood - none),
        )
        return row | {"agreement": (tokens == self.own).float().mean().item()}


def measure_decoding(name: str, results: Results, work: Path, rows: Sequence[str]) -> None:
    """The teacher, independent tokens, and students in one to three calls, trained where they are missing."""
    for method, file in recipes(name, "decoding").items():
        if rows and method not in rows:
            continue
        run = load_config(DecodingRun, file, [])
        ref = token_reference(name, run.teacher.load(), work)
        facts = {"teacher": name, "hash": ref.teacher.digest[:16], "guidance": run.teacher.guidance_scale}
        results.once(f"{name}/teacher", partial(teacher_row, ref), **facts)
        independent = partial(ref.judge, ref.independent, Cost(calls=1, rows=len(ref.prompts), batches=1))
        results.once(f"{name}/independent", independent, **facts, steps=1)
        out = Path(run.train.output_dir)
        if not (out / CONTRACT).exists():
            distill_decoder(load_config(DecodingRun, file, ["train.resume_from_checkpoint=latest"]))
        facts |= {"config": config_digest(run), "train_steps": run.train.max_train_steps, "pairs": run.data.count}
        pipe = load_decoder(out)[0]
        most = len(pipe.config["keeps"])
        for steps, again in [*((k, 0) for k in range(1, most + 1)), (most, TEACHER_STEPS)]:
            key = f"{name}/{method}/{steps}" + (f", {again} by the teacher" if again else "")
            results.once(key, partial(student_row, ref, pipe, steps, again), **facts, steps=steps, teacher_steps=again)
        results.once(f"{name}/{method}/pace", partial(paces, ref, pipe), **facts)


def token_reference(name: str, teacher: TokenTeacher, work: Path) -> TokenReference:
    """The teacher's tokens, drawn once."""
    file, each = work / f"{name}-{teacher.digest[:8]}-tokens.safetensors", prompts()
    if not file.exists():
        drawn = {key: teacher_tokens(teacher, each, seed).int() for key, seed in (("a", SEED_A), ("b", SEED_B))}
        work.mkdir(parents=True, exist_ok=True)
        save_file(drawn, file)
    drawn = {key: value.long() for key, value in load_file(file).items()}
    return TokenReference(teacher, each, drawn["a"], drawn["b"])


def teacher_tokens(teacher: TokenTeacher, each: Sequence[str], seed: int) -> Tensor:
    """Tokens (N, n), image i of noise i."""
    rows = tqdm(range(0, len(each), BATCH), desc=f"teacher, seed {seed}")
    return torch.cat([teacher.draw(each[i : i + BATCH], noises(teacher.shape, seed, i, len(each))) for i in rows])


def noises(shape: tuple[int, int], seed: int, start: int, end: int) -> Tensor:
    """The noises of a batch from image `start` on."""
    return torch.stack([noise_of(seed, i, shape) for i in range(start, min(start + BATCH, end))])


def places_of(each: Sequence[str]) -> Tensor:
    """Which of the different prompts each is, (N,)."""
    return places(StoredFeatures({}, list(each), {}))


def shuffled(tokens: Tensor, group: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens (N, n) with the rows of each group (N,) in an order of its own at every place."""
    mixed = tokens.clone()
    for one in group.unique():
        rows = (group == one).nonzero()[:, 0]
        order = torch.rand(len(rows), tokens.shape[1], generator=generator).argsort(0)
        mixed[rows] = tokens[rows].gather(0, order)
    return mixed


def teacher_row(ref: TokenReference) -> dict[str, Any]:
    """The teacher itself: what its likelihood is, and how far it is from the drawings."""
    teacher, data, own = ref.teacher, data_features(0), ref.features.features["floor"]
    parts = [teacher.model.model.language_model, teacher.model.model.generation_head]
    each = places_of(ref.prompts)
    return {
        "n": len(ref.prompts),
        "seeds": [SEED_A, SEED_B],
        "calls": teacher.places,
        "nfe": teacher.places * (1 + (teacher.settings.guidance_scale != 1)),
        "parameters": sum(p.numel() for part in parts for p in part.parameters()),
        "floor": frechet(Stats.of(own), Stats.of(ref.features.features["reference"])),
        "fd_to_data": frechet(Stats.of(own), Stats.of(data)),
        "fd_data_to_data": frechet(Stats.of(data_features(1)), Stats.of(data)),
        "diversity_of_data": feature_diversity(own, each) / feature_diversity(data, each),
        **spans(log_likelihood=mean_interval(ref.likelihood)),
    }


def student_row(ref: TokenReference, pipe: OneStepPipeline, steps: int, again: int) -> dict[str, Any]:
    """A student in this number of calls, before each later one of which the teacher draws `again` tokens."""
    drawn, n, teacher = [], len(ref.prompts), ref.teacher
    with count_calls(pipe.language_model) as cost, count_calls(teacher.model.model.language_model) as more:
        for i in range(0, n, BATCH):
            some, noise = ref.prompts[i : i + BATCH], noises(teacher.shape, SEED_B, i, n)
            drawn.append(draw_with_teacher(pipe, teacher, some, noise, again, steps)[0])
            cost.batches += 1
    whole = replace(cost, calls=cost.calls + more.calls, rows=cost.rows + more.rows)
    return ref.judge(torch.cat(drawn), whole)


def paces(ref: TokenReference, pipe: OneStepPipeline) -> dict[str, Any]:
    """Seconds of an image, from prompt to tokens and to pixels: the teacher's own sampling with its cache, and the
    student's calls.

    They take turns, so that what else the machine does is in all of them.
    """
    row: dict[str, Any] = {"threads": torch.get_num_threads()}
    for kind, batch in product(("tokens", "pixels"), PACES):
        ways: dict[str, Callable[[Sequence[str], Tensor], object]] = {"teacher": partial(by_teacher, ref.teacher, kind)}
        for steps in range(1, 1 + len(pipe.config["keeps"])):
            ways[str(steps)] = partial(by_student, pipe, kind, steps)
        some, noise = ref.prompts[:batch], noises(ref.teacher.shape, SEED_B, 0, batch)
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(1 + PACES[batch]):
            for way, draw in ways.items():
                began = perf_counter()
                draw(some, noise)
                taken[way].append((perf_counter() - began) / batch)
        row[f"{kind}, batch {batch}"] = {way: median(each[1:]) for way, each in taken.items()}
    return row


def by_student(pipe: OneStepPipeline, kind: str, steps: int, some: Sequence[str], noise: Tensor) -> None:
    """A student's tokens or images."""
    call: Any = pipe
    call(list(some), num_inference_steps=steps, noise=noise, output_type={"pixels": "pt"}.get(kind, kind))


def by_teacher(teacher: TokenTeacher, kind: str, some: Sequence[str], noise: Tensor) -> None:
    """Tokens or images, drawn as `generate` draws them, by probability, which is faster than by the map."""
    steps, tokens = teacher.steps(some), []
    logits = next(steps)
    for i in range(teacher.places):
        tokens.append(torch.softmax(logits, -1).multinomial(1)[:, 0])
        logits = steps.send(tokens[-1]) if i + 1 < teacher.places else logits
    if kind == "pixels":
        teacher.pixels(teacher.codes[torch.stack(tokens, 1)])
