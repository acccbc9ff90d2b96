"""`stepdistill eval run` of one-step decoders and their teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from stepdistill.core.errors import ConfigError, EvaluationError, problem
from stepdistill.data.bundled import bundled
from stepdistill.decoding.contract import DecoderContract, read_decoder
from stepdistill.decoding.janus import Janus, TokenTeacher
from stepdistill.decoding.rows import DecoderRows
from stepdistill.decoding.with_teacher import contract_teacher
from stepdistill.evaluation.inputs import check_draws, labels
from stepdistill.evaluation.records import prompt_of
from stepdistill.evaluation.run import bundled_records, check_kind, evaluate_rows, joined, records_of
from stepdistill.evaluation.spec import EvalRun
from stepdistill.families.location import is_hub_id
from stepdistill.students.contract import DECODER, kind_of
from stepdistill.students.load import folder_of


def draws_decoders(spec: EvalRun) -> bool:
    """Whether the students are one-step decoders, or, without any, the teacher is an autoregressive image model.

    Raises EvaluationError for students of both kinds, StudentError for one without a contract.
    """
    kinds = {place: kind_of(folder_of(place)) == DECODER for place in spec.students}
    if len(set(kinds.values())) > 1:
        tokens, others = ([place for place, known in kinds.items() if known == which] for which in (True, False))
        got = f"decoders {tokens} and students of pipelines {others}"
        why = "one teacher cannot be the reference of both"
        raise EvaluationError(problem(got, "students of one kind", why, "evaluate them separately"))
    return all(kinds.values()) if kinds else is_janus(spec.teacher)


def is_janus(place: str) -> bool:
    """Whether a folder, a hub id or a bundled name is that of a Janus."""
    path = bundled(place)
    if not path.is_dir() and (path.exists() or not is_hub_id(place)):
        return False
    try:
        config, _ = PretrainedConfig.get_config_dict(str(path) if path.is_dir() else place)
    except OSError:  # a pipeline has no config.json
        return False
    return config.get("model_type") == "janus"


def evaluate_decoders(spec: EvalRun) -> dict[str, Any]:
    """Draw a Janus and every one-step decoder of it, measure them, and write the report; started again it goes on.

    Returns and raises as `stepdistill.evaluation.run.evaluate` does.
    """
    records, contracts = check_decoders(spec)
    _, device = joined(spec)
    teacher = janus_of(spec.teacher, contracts).to(device)
    for record in records:
        teacher.read([prompt_of(record)])
    return evaluate_rows(spec, DecoderRows(spec, teacher, contracts), records)


def check_decoders(spec: EvalRun) -> tuple[list[dict[str, object]], dict[str, DecoderContract]]:
    """The prompts and the contracts of the students, by place.

    Raises StepdistillError for what can be known before the teacher is loaded.
    """
    check_draws(spec)
    check_options(spec)
    check_kind(spec, clips=False)
    is_bundled = bundled(spec.teacher) != Path(spec.teacher)
    records = records_of(spec, bundled_records() if is_bundled else [])
    labels(spec.students)  # each once
    contracts = {place: read_decoder(folder_of(place)) for place in spec.students}
    check_one_teacher(contracts)
    return records, contracts


def check_options(spec: EvalRun) -> None:
    """Raise ConfigError for an option that has no effect on decoders, or on their teacher."""
    weights = "a decoder has its teacher's guidance in its weights"
    theirs = "the teacher is drawn as the students learned it, token by token"
    for option, given, why in (
        ("--guidance-scale", spec.guidance, weights),
        ("--teacher-steps", spec.teacher_steps is not None, theirs),
        ("--teacher-guidance-scale", spec.teacher_guidance is not None, theirs),
        ("--steps", spec.steps and not spec.students, "it is the students', and there is none"),
        ("--sizes", spec.sizes, "it draws one size"),
        ("--lora", spec.lora, "nothing there takes a LoRA"),
        ("--family", spec.family, "families are of diffusion pipelines"),
        ("--features vae", spec.features == "vae", "the decoder's own tokens are no features"),
        (f"--dtype {spec.dtype}", spec.dtype != "fp32", "in half precision noise leads to other tokens"),
    ):
        if given:
            got = f"{option} for an autoregressive image model"
            raise ConfigError(problem(got, "none", why, "leave it out"))


def check_one_teacher(contracts: Mapping[str, DecoderContract]) -> None:
    """Raise EvaluationError for students of several teachers, or of one that was drawn in several ways."""
    ways = {place: contract.teacher | {"sha256": contract.base_hash[:12]} for place, contract in contracts.items()}
    names = {name for way in ways.values() for name in way} - {"pretrained_teacher_model", "revision"}
    unlike = [name for name in sorted(names) if len({way.get(name) for way in ways.values()}) > 1]
    if unlike:
        told = {place: ", ".join(f"{name} {way.get(name)}" for name in unlike) for place, way in ways.items()}
        got = f"students of teachers that differ: {'; '.join(f'{place} with {text}' for place, text in told.items())}"
        why, todo = "one teacher cannot be the reference of both", "evaluate them separately"
        raise EvaluationError(problem(got, "students of one teacher and its settings", why, todo))


def janus_of(place: str, contracts: Mapping[str, DecoderContract]) -> TokenTeacher:
    """The teacher, drawn as its students learned it, and without students by its defaults.

    Raises ConfigError for none, or for another than the students'.
    """
    first = next(iter(contracts.values()), None)
    if first is None:
        return Janus(pretrained_teacher_model=place).load()
    return contract_teacher(first, None if place == first.base_model else place)
