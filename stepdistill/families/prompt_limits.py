"""What a tokenizer cuts off a prompt, said before it is drawn or trained on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline

from stepdistill.families.base import Family

logger = logging.getLogger(__name__)


def lost(tokenizer: Any, limit: int, prompt: str) -> str:  # noqa: ANN401
    """The end of a prompt that is beyond `limit` tokens, those that begin and end a text included."""
    whole = tokenizer(prompt).input_ids
    if len(whole) <= limit:
        return ""
    bare = tokenizer(prompt, add_special_tokens=False).input_ids
    return tokenizer.decode(bare[limit - (len(whole) - len(bare)) :]).strip()


def warn_of_cut(family: Family, pipe: DiffusionPipeline, prompts: Sequence[str]) -> bool:
    """One warning for each tokenizer that leaves out the end of any of the prompts; whether there was any."""
    texts, warned = list(dict.fromkeys(prompts)), False
    for name, limit in family.limits(pipe).items():
        cut = [(text, end) for text in texts if (end := lost(pipe.components[name], limit, text))]
        if cut:
            logger.warning(
                "%d of %d prompts are longer than the %d tokens of %s, which leaves out their end: of %r it leaves "
                "out %r; the images will not show it",
                *(len(cut), len(texts), limit, name, cut[0][0][:60], cut[0][1][:200]),
            )
            warned = True
    return warned
