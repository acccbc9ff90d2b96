"""The parts of a run of Distilled Decoding on one process."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stepdistill.core.errors import ConfigError
from stepdistill.core.random import noise_of
from stepdistill.data import Sample
from stepdistill.decoding.folder.heads import Heads
from stepdistill.decoding.folder.pipeline import pixels_of_vectors
from stepdistill.decoding.janus import TokenTeacher
from stepdistill.decoding.method import TokenBatch, TokenContext
from stepdistill.decoding.run import DecodingRun
from stepdistill.networks.backbone import Backbone
from stepdistill.training.batches import samples_by_step
from stepdistill.training.setup import begin, samples_of

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class DecodingSession:
    """A loaded teacher, and the roles on its language model."""

    run: DecodingRun
    accelerator: Accelerator
    teacher: TokenTeacher
    backbone: Backbone

    @property
    def digest(self) -> str:
        """Of the teacher."""
        return self.teacher.digest

    @property
    def global_batch(self) -> int:
        """Samples of a step, over all processes."""
        return self.run.train.global_batch(self.accelerator.num_processes)

    @cached_property
    def samples(self) -> str:
        """See `samples_of`."""
        return samples_of(self.run.data)

    def student(
        self, batch: TokenBatch, x: Tensor, kept: Tensor, roles: tuple[str, str] = ("student", "heads")
    ) -> tuple[Tensor, Tensor]:
        """The student's logits and values, see `method.Student`."""
        heads = self.backbone.others[roles[1]]
        assert isinstance(heads, Heads)
        with self.backbone.use(roles[0]) as net:
            return heads.one_call(net, self.teacher.model.get_input_embeddings()(batch.ids), batch.mask, x, kept)

    def context(self, step: int) -> TokenContext:
        """What the method may use in a step."""
        decode = partial(pixels_of_vectors, self.teacher.model.model.vqmodel)
        device = torch.device(self.accelerator.device)
        return TokenContext(self.student, self.teacher.codes, decode, self.run.train.seed, step, device)

    def steps(self, start: int) -> Generator[list[TokenBatch]]:
        """The micro-batches of each step from `start` on, without end."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        for step in samples_by_step(self.run.data, self.run.train, start, process, processes):
            yield [self.batch_of(samples, index) for samples, index in step]

    def batch_of(self, samples: Sequence[Sample], index: Sequence[int]) -> TokenBatch:
        """The micro-batch of samples, whose draws are those of `index`."""
        device, data = self.accelerator.device, self.run.data
        asked = self.teacher.read([sample.prompt for sample in samples])
        noise = torch.stack([noise_of(data.seed, sample.item, self.teacher.shape) for sample in samples])
        tokens = torch.stack([sample.tokens for sample in samples if sample.tokens is not None])
        return TokenBatch(tuple(index), asked.ids, asked.mask, noise.to(device), tokens.to(device))


def prepare_decoding(run: DecodingRun) -> DecodingSession:
    """Load the teacher, and declare the student's roles on its language model."""
    accelerator = begin(run.train)
    teacher = run.teacher.load()
    try:
        run.method.check(teacher.places)
    except ValueError as error:
        raise ConfigError(f"method: {error}") from error
    teacher.model.to(accelerator.device)
    net = teacher.model.model.language_model
    backbone = Backbone(net, run.lora, TARGETS, seed=run.train.seed)
    return DecodingSession(run, accelerator, teacher, backbone)


def bare_copy(net: nn.Module) -> nn.Module:
    """A copy of a language model without the table of its words, which a student shares with its teacher."""
    copied = deepcopy(net)
    copied.embed_tokens = nn.Identity()
    return copied


def fresh_heads(teacher: TokenTeacher) -> Heads:
    """Heads that write as the teacher does, and read codes as nearly as a linear map can."""
    inner, codes = teacher.model.model, teacher.codes
    head = inner.generation_head
    heads = Heads(head.proj_out.in_features, len(codes), codes.shape[1], head.proj_out.out_features)
    with torch.no_grad():
        heads.codebook.copy_(codes)
        heads.mark.weight.zero_()
        heads.logits[0].load_state_dict(head.proj_out.state_dict())
        heads.logits[2].load_state_dict(head.vision_head.state_dict())
        told = teacher.model.prepare_embeddings_for_image_generation(torch.arange(len(codes), device=codes.device))
        read = torch.linalg.lstsq(torch.cat([codes, torch.ones_like(codes[:, :1])], 1).cpu(), told.cpu()).solution
        heads.read.weight.copy_(read[:-1].T)
        heads.read.bias.copy_(read[-1])
    return heads
