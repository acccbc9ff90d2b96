"""The parts of a run of Distilled Decoding on one process."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stepdistill.core.errors import ConfigError
from stepdistill.core.random import noise_of
from stepdistill.data import Sample, Source
from stepdistill.decoding.folder.heads import Heads
from stepdistill.decoding.folder.pipeline import pixels_of_vectors
from stepdistill.decoding.janus import TokenTeacher
from stepdistill.decoding.method import TokenBatch, TokenContext
from stepdistill.decoding.run import DecodingRun, check_training_precision
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.roles import Role
from stepdistill.training.batches import samples_by_step
from stepdistill.training.launcher import DTYPES
from stepdistill.training.setup import begin, samples_of

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class DecodingSession:
    """A loaded teacher, and the roles on its language model.

    Args:
        dtype: of the arithmetic of the student's language model. Pairs are those of a teacher in float32, and codes,
            noise, heads and losses are in float32, too.
    """

    run: DecodingRun
    accelerator: Accelerator
    teacher: TokenTeacher
    backbone: Backbone
    dtype: torch.dtype

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

    def student(self, batch: TokenBatch, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The student's logits and values, see `method.Student`."""
        heads = self.backbone.others["heads"]
        assert isinstance(heads, Heads)
        text = self.teacher.model.get_input_embeddings()(batch.ids).float()
        with self.backbone.use("student") as net:
            return heads.one_call(Autocast(net, self.dtype), text, batch.mask, x, kept)

    def lower_precision(self) -> None:
        """Round the frozen weights that the student is trained on. The teacher draws no more tokens after this."""
        _ = self.digest  # of the weights as they were read
        round_base(self.backbone, self.base_dtype)

    @property
    def base_dtype(self) -> torch.dtype:
        """Of the frozen weights in training; a whole student has weights of its own, in float32."""
        return torch.float32 if self.run.method.whole else self.dtype

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


class Autocast(nn.Module):
    """A language model in the arithmetic of a precision, with its states in float32."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, *, inputs_embeds: Tensor, **inputs: Any) -> Any:  # noqa: ANN401
        """Its output."""
        with torch.autocast(inputs_embeds.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = self.net(inputs_embeds=inputs_embeds, **inputs)
        out.last_hidden_state = out.last_hidden_state.float()
        return out


def prepare_decoding(run: DecodingRun) -> DecodingSession:
    """Load the teacher, with a backbone around its language model."""
    accelerator = begin(run.train)
    check_training_precision(accelerator.mixed_precision)  # the launcher's, where the config names none
    teacher = run.teacher.load()
    teacher.model.to(accelerator.device)
    session = decoding_session(run, accelerator, teacher)
    teacher.check_codes()
    return session


def decoding_session(run: DecodingRun, accelerator: Accelerator, teacher: TokenTeacher) -> DecodingSession:
    """A backbone around the language model of a teacher in its place. Raises ConfigError."""
    try:
        run.method.check(teacher.places)
    except ValueError as error:
        raise ConfigError(f"method: {error}") from error
    backbone = Backbone(teacher.model.model.language_model, run.lora, TARGETS, seed=run.train.seed)
    return DecodingSession(run, accelerator, teacher, backbone, DTYPES[accelerator.mixed_precision])


def round_base(backbone: Backbone, dtype: torch.dtype) -> None:
    """Give the frozen weights of a backbone a precision, in place; not its buffers, which are angles of places."""
    roles = {p for name in backbone.declared for p in backbone.parameters_of(name).values()}
    for p in backbone.net.parameters():
        if p not in roles:
            p.data = p.data.to(dtype)


def roles_of(session: DecodingSession, heads: Callable[[TokenTeacher], Heads]) -> dict[str, Role]:
    """The roles of a run; `heads` makes those of a student."""
    return session.run.method.roles(partial(bare_copy, session.backbone.net), partial(heads, session.teacher))


def longest_prompt(teacher: TokenTeacher, source: Source) -> str:
    """The prompt of the most tokens. Raises ConfigError for one that is too long."""
    most, longest = 0, ""
    for i in range(len(source)):
        captions = source.captions(i)
        lengths = teacher.read(captions).mask.sum(1).tolist()
        most, longest = max((most, longest), *zip(lengths, captions, strict=True))
    return longest


def bare_copy(net: nn.Module) -> nn.Module:
    """A copy of a language model without the table of its words, which a student shares with its teacher."""
    copied = deepcopy(net)
    copied.embed_tokens = nn.Identity()
    return copied


def random_heads(teacher: TokenTeacher) -> Heads:
    """Heads of the shapes that the teacher asks for."""
    inner = teacher.model.model
    hidden, (codes, dim) = inner.generation_head.proj_out, inner.vqmodel.quantize.embedding.weight.shape
    return Heads(hidden.in_features, codes, dim, hidden.out_features)


def fresh_heads(teacher: TokenTeacher) -> Heads:
    """Heads that write as the teacher does, and read codes as nearly as a linear map can."""
    heads, codes, head = random_heads(teacher), teacher.codes, teacher.model.model.generation_head
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
