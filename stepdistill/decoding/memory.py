"""Memory prediction of a run of Distilled Decoding, from the teacher's config and processor alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers import JanusProcessor

from stepdistill.data import Sample
from stepdistill.decoding.janus import Janus, TokenTeacher, drawing_parts
from stepdistill.decoding.method import TokenBatch, TokenContext
from stepdistill.decoding.run import DecodingRun, check_decoding_run, check_training_precision
from stepdistill.decoding.session import (
    DecodingSession,
    decoding_session,
    longest_prompt,
    random_heads,
    roles_of,
    round_base,
)
from stepdistill.families.parts import reading
from stepdistill.networks.meta import shell
from stepdistill.training.launcher import check_launcher
from stepdistill.training.memory.forecast import FEW, Prediction, Rehearsal, forecast
from stepdistill.training.optimizers import Optimizers
from stepdistill.training.resume import find_source


def dry_run_decoder(run: DecodingRun) -> str:
    """Predicted memory by role."""
    find_source(run)
    check_decoding_run(run)
    return str(predict_decoder(run))


def predict_decoder(run: DecodingRun) -> Prediction:
    """Predict a run's memory on this process's device, at its longest prompt and with no token known. No weights are
    read."""
    check_launcher(run.train)
    diffusers_logging.set_verbosity_error()  # it warns of layers to keep in float32, of which it then names none
    accelerator = Accelerator(mixed_precision=run.train.mixed_precision)
    check_training_precision(accelerator.mixed_precision)
    model, processor = outlined(run.teacher)
    loading = sum(p.nbytes for p in model.parameters())
    session = decoding_session(run, accelerator, TokenTeacher(run.teacher, drawing_parts(model), processor))
    round_base(session.backbone, session.base_dtype)
    return forecast(rehearse_decoder(session), frozen_parts(session), loading)


def outlined(teacher: Janus) -> tuple[Any, JanusProcessor]:
    """The whole model on the meta device, and its processor; of a hub id only configs and tokenizer are fetched."""
    where = teacher.location()
    with reading(teacher.pretrained_teacher_model):
        model = shell(where, "", "transformers.JanusForConditionalGeneration", teacher.revision)
        return model.float(), JanusProcessor.from_pretrained(where, revision=teacher.revision or "main")


def frozen_parts(session: DecodingSession) -> dict[str, nn.Module]:
    """What the run keeps beside the language model."""
    parts = dict(session.teacher.model.model.named_children())
    tokens = [part for name, part in parts.items() if name.startswith("generation")]
    return {"image tokens": nn.ModuleList(tokens), "vqmodel": parts["vqmodel"]}


def rehearse_decoder(session: DecodingSession) -> Rehearsal[TokenContext, TokenBatch]:
    """Single steps of the run, each the largest that there is; its roles are not declared."""
    run = session.run

    def context(step: int) -> TokenContext:
        return Fullest(**vars(session.context(step)))

    optimizers = Optimizers(session.backbone, run.train)
    roles = roles_of(session, random_heads)
    return Rehearsal(run.method, optimizers, context, batches_of(session), session.accelerator.device, roles)


class Fullest(TokenContext):
    """A context that draws the least number of known tokens for each image, which is the most work."""

    def draw(self, batch: TokenBatch, purpose: str) -> Tensor:
        return torch.zeros(len(batch.index), device=self.device)


def batches_of(session: DecodingSession) -> Iterator[list[TokenBatch]]:
    """The micro-batches of one step, of the longest prompt, with the pairs' shapes and no pairs."""
    spec, data = session.run.train, session.run.data
    prompt, tokens = longest_prompt(session.teacher, data.source), torch.zeros(session.teacher.places).long()
    rows = range(spec.train_batch_size)
    samples = [Sample(prompt=prompt, tokens=tokens, item=i) for i in rows]
    yield [session.batch_of(samples, rows) for _ in range(min(FEW, spec.gradient_accumulation_steps))]
