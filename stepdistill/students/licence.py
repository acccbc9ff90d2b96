"""The licence of a model, and whether it excludes commercial use."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from huggingface_hub import ModelCard
from yaml import YAMLError

from stepdistill.families.base import Family

logger = logging.getLogger(__name__)


def licence_of(where: str) -> str | None:
    """The licence in the model card of a folder or hub id; None if there is no card or no licence in it."""
    readme = Path(where) / "README.md"
    if Path(where).exists() and not readme.exists():
        return None
    try:
        # a local card is a file; anything else is a hub id
        data = ModelCard.load(str(readme) if readme.exists() else where, ignore_metadata_errors=True).data
    except (OSError, ValueError, YAMLError) as error:
        logger.warning("cannot read the licence in the model card of %s: %s", where, error)
        return None
    licence = data.get("license_name") if data.get("license") == "other" else data.get("license")
    return ", ".join(licence) if isinstance(licence, list) else licence


def is_non_commercial(licence: str) -> bool:
    """Whether the identifier or name of a licence excludes commercial use, or allows research only."""
    words = re.sub(r"[\s_]+", "-", licence.lower())
    return re.search(r"(^|[^a-z])nc($|[^a-z])|non-?commercial|research|academic", words) is not None


def warn_of_licence(family: Family) -> None:
    """Warn if the licence of the teacher, which applies to its students, excludes commercial use."""
    warn_of_terms(family.pretrained_teacher_model, licence_of(family.location()))


def warn_of_terms(model: str, licence: str | None) -> None:
    """Warn if the licence of a model that a student is derived from excludes commercial use."""
    if licence is not None and is_non_commercial(licence):
        logger.warning(
            "the licence of the teacher %s is %s, which excludes commercial use: a student is derived from its "
            "teacher, so that licence applies to it",
            model,
            licence,
        )
