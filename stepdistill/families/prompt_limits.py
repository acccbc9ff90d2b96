"""Warnings about prompts that are longer than a tokenizer's limit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline

from stepdistill.families.base import Family

logger = logging.getLogger(__name__)


def lost(tokenizer: Any, limit: int, prompt: str) -> str:  # noqa: ANN401
    """The part of a prompt beyond `limit` tokens, special tokens included."""
    whole = tokenizer(prompt).input_ids
    if len(whole) <= limit:
        return ""
    bare = tokenizer(prompt, add_special_tokens=False).input_ids
    return tokenizer.decode(bare[limit - (len(whole) - len(bare)) :]).strip()


def warn_of_cut(family: Family, pipe: DiffusionPipeline, prompts: Sequence[str]) -> bool:
    """Warn once for each tokenizer that truncates any of the prompts. Returns whether one does."""
    texts, warned = list(dict.fromkeys(prompts)), False
    for name, limit in family.limits(pipe).items():
        tokenizer = pipe.components[name]
        long = [text for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True) if len(ids) > limit]
        cut = [(text, end) for text in long if (end := lost(tokenizer, limit, text))]
        if cut:
            logger.warning(
                "%d of %d prompts are longer than the %d tokens of %s and are truncated: %r loses %r. The images will "
                "not show what is truncated",
                *(len(cut), len(texts), limit, name, cut[0][0][:60], cut[0][1][:200]),
            )
            warned = True
    return warned
