"""Weights of rewards: safetensors files of other libraries, and the networks of Transformers that they fit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stepdistill.core.errors import MissingWeights, WrongWeights, problem
from stepdistill.core.files import file_digest
from stepdistill.networks.rewards.base import TODO

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@cache
def weights_digest(place: str) -> str:
    """sha256 of a file of weights."""
    return file_digest(Path(place))


@contextmanager
def weights_in(place: str) -> Iterator[dict[str, Tensor]]:
    """The tensors of a safetensors file in float32, as long as a network is made of them. No pickle is read.

    Raises:
        MissingWeights: there is no such file.
        WrongWeights: it is no complete safetensors file, or the block raises KeyError for a tensor that does not fit.
    """
    path = Path(place)
    if path.suffix != ".safetensors":
        raise WrongWeights(problem(place, "a .safetensors file", "a pickle may run any code when it is read", TODO))
    if not path.is_file():
        raise MissingWeights(problem(f"{place}, which is not there", "a file", "the reward's weights are in it", TODO))
    try:
        yield {name: tensor.float() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        why = "an incomplete copy cannot be loaded"
        raise WrongWeights(problem(f"{place} ({error})", "a complete file", why, "copy it again")) from error
    except KeyError as error:
        got, why = f"{place}, in which {error.args[0]} is missing or does not fit", "its network cannot be built"
        raise WrongWeights(problem(got, "the weights of this reward", why, TODO)) from error


def renamed(tensors: Mapping[str, Tensor], names: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Tensors under new names, without those that have none.

    Args:
        names: regular expressions of whole names, with what `re.Match.expand` makes of the first that fits.
    """
    new: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        fits = (match.expand(other) for pattern, other in names if (match := re.fullmatch(pattern, name)))
        if (other := next(fits, None)) is not None:
            new[other] = tensor
    return new


def depth_of(tensors: Mapping[str, Tensor], layers: str) -> int:
    """The number of layers, whose names are the regular expression `layers` and a number."""
    return len({match[1] for name in tensors if (match := re.match(rf"{layers}(\d+)\.", name))})


def network_of(
    kind: type[PreTrainedModel],
    config: PretrainedConfig,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    **given: bool,
) -> Any:  # noqa: ANN401
    """A frozen network on a device, with exactly these tensors. Raises KeyError for one that does not fit.

    Args:
        given: to its constructor, beside the config.
    """
    how = {"output_loading_info": True, "ignore_mismatched_sizes": True, **given}
    network, info = cast(Any, kind).from_pretrained(None, config=config, state_dict=dict(tensors), **how)
    for name in sorted(str(name) for part in ("missing", "unexpected", "mismatched") for name in info[f"{part}_keys"]):
        raise KeyError(name)
    return network.eval().requires_grad_(False).to(device)


def linear(layers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The vector (width,) and the bias () that linear layers without activations between them come to.

    Raises KeyError where there is no layer, or one lacks a tensor.

    Args:
        layers: their tensors, `N.weight` and `N.bias`, where the layers are in the order of N.
    """
    if not layers:
        raise KeyError("the head")
    vector, bias = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for number in sorted({int(name.partition(".")[0]) for name in layers}, reverse=True):
        weight, shift = (layers[f"{number}.{part}"].double() for part in ("weight", "bias"))
        vector, bias = vector @ weight, bias + vector @ shift
    return vector[0].float(), bias[0].float()
