"""A run of Distilled Decoding, as a config describes it, and its checks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from stepdistill.config.schema import places
from stepdistill.core.errors import ConfigError, problem
from stepdistill.decoding.janus import Janus
from stepdistill.decoding.method import DistilledDecoding
from stepdistill.decoding.pairs import TokenPairs
from stepdistill.networks.roles import LoraSpec
from stepdistill.training.folder import check_data_folders, check_output_dir
from stepdistill.training.recipe import TrainSpec

USED = {  # settings of training; the others have no effect here, and are refused
    *("output_dir", "seed", "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("lr_scheduler", "lr_warmup_steps", "optimizer", "optimizers", "max_grad_norm", "allow_tf32"),
    *("dataloader_num_workers", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
    *("overwrite_output_dir", "report_to", "tracker_project_name", "validation_prompts", "validation_seed"),
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


def check_decoding_run(run: DecodingRun) -> None:
    """Raise ConfigError for the first problem that can be detected before anything is loaded."""
    for one in dataclasses.fields(TrainSpec):
        value, default = getattr(run.train, one.name), one.default
        if one.default_factory is not dataclasses.MISSING:
            default = one.default_factory()
        if one.name not in USED and value != default and value not in ("no", None):
            got, why = f"train.{one.name}={value}", "it has no effect on the training of a decoder"
            raise ConfigError(problem(got, "its default", why, "leave it out"))
    run.teacher.location()
    check_output_dir(run)
    check_data_folders(run)
