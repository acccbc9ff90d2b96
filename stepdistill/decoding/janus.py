"""The teacher: Janus, an autoregressive model of text and image tokens, https://arxiv.org/abs/2410.13848.

`JanusForConditionalGeneration.generate` draws tokens from a global generator. Here a token is a function of its noise
and of the tokens before it, by the map of `flowmap`, so that a student can learn the whole.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import DynamicCache, JanusForConditionalGeneration, JanusProcessor

from stepdistill.config.kinds import Amount, Count, Place, Positive
from stepdistill.core.errors import ConfigError, DataError, problem
from stepdistill.data.bundled import bundled
from stepdistill.decoding.flowmap import FlowMap
from stepdistill.decoding.folder.pipeline import pixels_of_vectors, read_prompts
from stepdistill.families.location import is_hub_id
from stepdistill.families.parts import reading
from stepdistill.students.base_model import network_hash

# its own default: a config may name another attention, whose code transformers would download
ATTENTION = {"attn_implementation": "sdpa"}


@dataclass(frozen=True, kw_only=True)
class Janus:
    """The teacher and how its tokens are drawn, which is what a student learns.

    Args:
        pretrained_teacher_model: a folder or hub id of transformers' Janus, such as `deepseek-community/Janus-Pro-1B`,
            or the bundled `tiny-ar`.
        revision: branch, tag or commit of a hub id.
        guidance_scale: w of the logits `uncond + w (cond - uncond)`; 1 is without guidance.
        temperature: of the logits.
        top_k: tokens that keep their probability, the most probable ones; none for all.
        max_sequence_length: tokens of a prompt at most, with its ends. Longer ones are an error.
    """

    pretrained_teacher_model: Place
    revision: str | None = None
    guidance_scale: Amount = 5.0
    temperature: Positive = 1.0
    top_k: Count | None = None
    max_sequence_length: Count = 256

    def location(self) -> str:
        """A path or hub id. Raises ConfigError for what can be neither."""
        name, path = self.pretrained_teacher_model, bundled(self.pretrained_teacher_model)
        if not (path / "config.json").exists() and (path.exists() or not is_hub_id(name)):
            what = "holds no model" if path.exists() else "does not exist"
            got = f"teacher.pretrained_teacher_model {name!r}, which {what}"
            why, todo = "there is nothing to distil without the teacher", "check the path: it is read from here"
            raise ConfigError(problem(got, "the folder of a Janus, a hub id such as owner/name, or tiny-ar", why, todo))
        return str(path) if path.exists() else name

    def load(self) -> TokenTeacher:
        """The model, in float32, and its processor. Raises ConfigError."""
        where, chosen = self.location(), dict[str, Any]({"revision": self.revision} if self.revision else {})
        with reading(self.pretrained_teacher_model):
            loaded: Any = JanusForConditionalGeneration.from_pretrained(
                where, dtype=torch.float32, output_loading_info=True, **ATTENTION, **chosen
            )
            model, report = loaded
            processor = JanusProcessor.from_pretrained(where, **chosen)
        lacking = [key for kind in ("missing_keys", "mismatched_keys") for key in report[kind]]
        if lacking:
            got, why = f"{where}, which lacks {len(lacking)} tensors, such as {lacking[0]}", "they would be random"
            raise ConfigError(problem(got, "a whole Janus", why, "use another folder or revision"))
        return TokenTeacher(self, drawing_parts(model), processor)


def drawing_parts(model: JanusForConditionalGeneration) -> JanusForConditionalGeneration:
    """The model, frozen, without what only reads images or writes text."""
    del model.model.vision_model, model.model.aligner, model.lm_head
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class PromptIds:
    """Token ids (B, P) of prompts, padded on the left, and their mask; the last one begins the image."""

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class TokenTeacher:
    """A loaded teacher.

    Raises:
        DataError: of its codebook, see `FlowMap`.
    """

    settings: Janus
    model: JanusForConditionalGeneration
    processor: JanusProcessor

    @cached_property
    def codes(self) -> Tensor:
        """The codes (V, d) that the decoder sees, of length 1; the language model has another table of the tokens."""
        # on the CPU: other devices round otherwise, and the digest must not depend on where a teacher is
        weight = self.model.model.vqmodel.quantize.embedding.weight
        return normalize(weight.cpu(), dim=-1).to(weight.device)

    def check_codes(self) -> None:
        """Raise DataError for a code of length 0, and for what `FlowMap` refuses."""
        dead = (self.codes == 0).all(1).nonzero()
        if len(dead):
            got, why = f"code {dead[0].item()} of length 0", "it has no direction: it was never used"
            raise DataError(problem(got, "codes of length 1, as the decoder sees them", why, "drop it"))
        _ = self.map

    @cached_property
    def map(self) -> FlowMap:
        """From noise to tokens."""
        return FlowMap(self.codes, top_k=self.settings.top_k)

    @property
    def places(self) -> int:
        """n, the tokens of an image."""
        rows, columns = self.model.model.vqmodel.quantize.quant_state_dims
        return rows * columns

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d) of an image's noise."""
        return self.places, self.codes.shape[1]

    @property
    def takes_images(self) -> bool:
        """It draws from prompts alone."""
        return False

    @property
    def digest(self) -> str:
        """Of the weights, as they were read, the vocabulary and the settings that tokens depend on."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        kept = replace(self.settings, pretrained_teacher_model="", revision=None)
        inner = self.model.model
        parts = (inner.language_model, inner.generation_embeddings, inner.generation_aligner, inner.generation_head)
        hashes = [network_hash(part, torch.float32) for part in (*parts, inner.vqmodel)]
        words = sorted(self.processor.tokenizer.get_vocab().items())
        return sha256(repr((kept, self.map.taus, hashes, self.processor.chat_template, words)).encode()).hexdigest()

    def to(self, device: torch.device | str) -> TokenTeacher:
        """The same on a device. One that has been asked for its codes has them where it was."""
        model: Any = self.model
        model.to(device)
        return replace(self)

    def read(self, prompts: Sequence[str]) -> PromptIds:
        """Prompts as the model is asked for images. Raises ConfigError for one that is too long."""
        try:
            ids, mask = read_prompts(self.processor, prompts, self.settings.max_sequence_length)
        except ValueError as error:
            why, todo = "its end would not be seen", "shorten it, or raise teacher.max_sequence_length"
            raise ConfigError(f"{error}: {why}; {todo}") from error
        most = self.model.config.get_text_config().max_position_embeddings - self.places
        if ids.shape[1] > most:
            got, why = f"a prompt of {ids.shape[1]} tokens", f"{self.places} tokens of the image come after it"
            raise ConfigError(problem(got, f"at most {most} by the model's positions", why, "shorten it"))
        return PromptIds(ids.to(self.model.device), mask.to(self.model.device))

    def unconditional(self, prompts: PromptIds) -> PromptIds:
        """The prompts with all words padded, which the model attends to, as `generate` has them."""
        tokens, start = self.processor.tokenizer, self.processor.image_start_token
        ends = (prompts.ids == tokens.bos_token_id) | (prompts.ids == tokens.convert_tokens_to_ids(start))
        return PromptIds(prompts.ids.masked_fill(~ends, tokens.pad_token_id), prompts.mask)

    def text(self, prompts: PromptIds) -> Tensor:
        """Embeddings (B, P, width)."""
        return self.model.get_input_embeddings()(prompts.ids)

    @torch.no_grad()
    def logits(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """Guided logits (B, n, V) of each place after tokens (B, n), of which the last is not looked at."""
        asked, mask, text = self._asked(prompts)
        states = self._states(*self._continued(text, mask, tokens[:, :-1].repeat(len(asked), 1)), None)
        return self._guided(states[:, -tokens.shape[1] :])

    @torch.no_grad()
    def steps(self, prompts: Sequence[str], given: Tensor | None = None) -> Generator[Tensor, Tensor, None]:
        """Guided logits (B, V) of one place after another; the token of each is sent in.

        It is a generator that takes: `logits = next(steps)`, then `logits = steps.send(tokens)` with tokens (B,).

        Args:
            given: tokens (B, m) that the image begins with, which are read in one call; the places after them follow.
        """
        asked, mask, text = self._asked(prompts)
        given = torch.zeros(len(prompts), 0, dtype=torch.long, device=mask.device) if given is None else given
        embeddings, mask = self._continued(text, mask, given.repeat(len(asked), 1))
        cache = DynamicCache()
        for _ in range(given.shape[1], self.places):
            states = self._states(embeddings, mask, cache)
            tokens = yield self._guided(states[:, -1])
            embeddings = self.model.prepare_embeddings_for_image_generation(tokens[:, None].repeat(len(asked), 1))
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)

    @torch.no_grad()
    def draw(
        self, prompts: Sequence[str], eps: Tensor, given: Tensor | None = None, until: int | None = None
    ) -> Tensor:
        """Tokens (B, until) of noise (B, n, d).

        Args:
            given: tokens (B, m) that the image begins with.
            until: the number of tokens, of which the given ones are the first; none is for all.
        """
        eps = eps.to(self.codes.device)
        steps, tokens = self.steps(prompts, given), [] if given is None else list(given.unbind(1))
        first = len(tokens)
        for i in range(first, self.places if until is None else until):
            logits = next(steps) if i == first else steps.send(tokens[-1])
            tokens.append(self.map(eps[:, i], logits))
        return torch.stack(tokens, 1)

    def log_likelihood(self, prompts: Sequence[str], tokens: Tensor) -> Tensor:
        """The mean of `log p(q_i | q_<i)` over the places, (B,), under the law that tokens are drawn from."""
        logits = self.logits(prompts, tokens)
        if self.settings.top_k is not None:
            least = logits.topk(self.settings.top_k, -1).values[..., -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        return torch.log_softmax(logits, -1).gather(2, tokens[..., None])[..., 0].mean(1)

    @torch.no_grad()
    def pixels(self, values: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1], not clamped, of codes or other vectors (B, n, d)."""
        return pixels_of_vectors(self.model.model.vqmodel, values)

    def _asked(self, prompts: Sequence[str]) -> tuple[range, Tensor, Tensor]:
        """The passes of guidance, their mask and embeddings, the conditional rows first."""
        each = [self.read(prompts)]
        if self.settings.guidance_scale != 1:
            each.append(self.unconditional(each[0]))
        return range(len(each)), torch.cat([one.mask for one in each]), torch.cat([self.text(one) for one in each])

    def _continued(self, text: Tensor, mask: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings and mask of prompts and the tokens (B, m) after them."""
        image = self.model.prepare_embeddings_for_image_generation(tokens)
        return torch.cat([text, image], 1), torch.cat([mask, torch.ones_like(tokens, dtype=mask.dtype)], 1)

    def _states(self, embeddings: Tensor, mask: Tensor, cache: DynamicCache | None) -> Tensor:
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -embeddings.shape[1] :]
        # by position: transformers has renamed the argument of the cache
        model = self.model.model.language_model
        return model(None, mask, places, cache, embeddings, use_cache=cache is not None).last_hidden_state

    def _guided(self, states: Tensor) -> Tensor:
        logits, w = self.model.model.generation_head(states).float(), self.settings.guidance_scale
        if w != 1:
            cond, uncond = logits.chunk(2)
            logits = uncond + w * (cond - uncond)
        return logits / self.settings.temperature
