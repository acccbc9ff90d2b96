"""A run of Distilled Decoding, as a config describes it, its checks, and how a config is told from a pipeline's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stepdistill.config.load import load_config, top_keys
from stepdistill.config.schema import places
from stepdistill.config.template import template
from stepdistill.core.errors import ConfigError, problem
from stepdistill.decoding.janus import Janus
from stepdistill.decoding.method import DistilledDecoding
from stepdistill.decoding.pairs import TokenPairs
from stepdistill.networks.roles import LoraSpec
from stepdistill.training.checks import check_roles
from stepdistill.training.folder import check_data_folders, check_output_dir
from stepdistill.training.recipe import Run, TrainSpec

USED = {  # settings of training; the others have no effect here, and are refused
    *("output_dir", "seed", "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("lr_scheduler", "lr_warmup_steps", "optimizer", "optimizers", "max_grad_norm"),
    *("dataloader_num_workers", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
    *("overwrite_output_dir", "report_to", "tracker_project_name", "mixed_precision"),
    "gradient_checkpointing",
}


@dataclass(frozen=True, kw_only=True)
class DecodingRun:
    """A whole run.

    Args:
        teacher: the autoregressive model.
        method: Distilled Decoding.
        data: pairs of noise and the teacher's tokens.
        lora: rank and target modules of the LoRA on the language model.
        train: training settings. Those of pipelines alone are refused.
    """

    teacher: Janus
    method: DistilledDecoding = field(default_factory=DistilledDecoding)
    data: TokenPairs
    lora: LoraSpec = field(default_factory=LoraSpec)
    train: TrainSpec

    @property
    def inputs(self) -> list[str]:
        """The files and folders that the run reads; some may be hub ids."""
        return [place for part in (self.teacher, self.lora, self.data) for place in places(part)]

    def resolved(self) -> DecodingRun:
        """The run itself."""
        return self


def read_run(path: Path | str | None, overrides: Sequence[str] = ()) -> Run | DecodingRun:
    """The run of a config: of Distilled Decoding where it has `teacher` at its top, else of a pipeline.

    See `load_config` for the arguments and errors.
    """
    return load_config(DecodingRun if "teacher" in top_keys(path, overrides) else Run, path, overrides)


def decoding_template() -> str:
    """A commented config of Distilled Decoding, without the settings of training that it has no use for."""
    hidden = [f"train.{one.name}" for one in dataclasses.fields(TrainSpec) if one.name not in USED]
    return template(DecodingRun, {}, [*hidden, "lora.init_from"])


def check_decoding_run(run: DecodingRun) -> None:
    """Raise ConfigError for the first problem that can be detected before anything is loaded."""
    check_settings(run)
    check_output_dir(run)
    check_data_folders(run)


def check_settings(run: DecodingRun) -> None:
    """Raise ConfigError for a setting that has no effect, and for a teacher that is not there."""
    for one in dataclasses.fields(TrainSpec):
        value, default = getattr(run.train, one.name), one.default
        if one.default_factory is not dataclasses.MISSING:
            default = one.default_factory()
        if one.name not in USED and value not in (default, None):
            got, why = f"train.{one.name}={value}", "it has no effect on the training of a decoder"
            raise ConfigError(problem(got, "its default", why, "leave it out"))
    check_training_precision(run.train.mixed_precision or "no")
    for role, source in run.lora.starts().items():
        key = "lora.init_from" if run.lora.init_from else f"lora.roles.{role}.init_from"
        got, why = f"{key}={source}", "a student of Distilled Decoding has layers beside its LoRA"
        raise ConfigError(problem(got, "none", why, "resume with train.resume_from_checkpoint, or leave it out"))
    if run.method.whole and run.lora != LoraSpec():
        got, why = "settings of a LoRA with method.whole=true", "the language model is trained itself"
        raise ConfigError(problem(got, "no `lora`", why, "leave one of them out"))
    if run.data.proportion_empty_prompts:
        got, why = f"data.proportion_empty_prompts={run.data.proportion_empty_prompts}", "pairs belong to their prompts"
        raise ConfigError(problem(got, "0", why, "set it in data.source, whose pairs are then drawn without words"))
    check_roles(run)
    run.teacher.location()


def check_training_precision(name: str) -> None:
    """Raise ConfigError for a precision that a decoder is not trained in."""
    if name not in ("no", "bf16"):
        got, why = f"mixed precision {name}", "the states of a language model may exceed its range"
        raise ConfigError(problem(got, "bf16 or no", why, "set train.mixed_precision"))
