"""Kinds of values that many fields of a config have. `config.load` refuses what is none; NaN and infinity are none."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator

from stepdistill.core.outputs import expanded

Place: TypeAlias = Annotated[str, AfterValidator(expanded)]  # a path, hub id or name; `~` is the home folder
Count: TypeAlias = Annotated[int, Ge(1)]
Whole: TypeAlias = Annotated[int, Ge(0)]
Seed: TypeAlias = Annotated[int, Ge(0), Le(2**32 - 1)]  # NumPy takes no larger one
Tokens: TypeAlias = Annotated[int, Ge(1), Le(512)]  # of a prompt; Diffusers refuses more for SD3 and Flux
Amount: TypeAlias = Annotated[float, Ge(0)]  # a guidance scale, a weight, a time
Positive: TypeAlias = Annotated[float, Gt(0)]
Share: TypeAlias = Annotated[float, Ge(0), Le(1)]
Decay: TypeAlias = Annotated[float, Ge(0), Lt(1)]  # of a running average
