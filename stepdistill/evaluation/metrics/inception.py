"""The Inception network that FID is defined on: ported from TensorFlow, its 2048 features after the last pool.

Szegedy et al. 2015, https://arxiv.org/abs/1512.00567, as trained on 2015-12-05. The network is torchmetrics', which is
torch-fidelity's; BatchNorm is folded into its convolutions, and its activations lie channels last.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from stepdistill.core.errors import ConfigError, WrongWeights, problem
from stepdistill.core.files import file_digest, hash_of
from stepdistill.evaluation.metrics.features import BATCH, Extractor
from stepdistill.evaluation.metrics.identity import (
    DTYPES,
    FID_WEIGHTS,
    INCEPTION,
    RANDOM_INCEPTION,
    Dtype,
    Identity,
)
from stepdistill.evaluation.metrics.resize import Resize, to_299
from stepdistill.networks.efficientnet import fold_norm


def inception(
    file: Path,
    resize: Resize = "clean",
    device: str | torch.device = "cpu",
    dtype: Dtype = "fp32",
    batch: int = BATCH,
    allow_unknown_weights: bool = False,
) -> Extractor:
    """Features on the weights of a file.

    Args:
        file: as torch-fidelity and pytorch-fid publish it, about 96 MB.
        resize: how images of any size become 299 x 299.
        batch: images that go through the network at once.
        allow_unknown_weights: takes a file of another hash; distances on it are `fd`.

    Raises WrongWeights for a file of another hash or with other tensors.
    """
    digest = file_digest(file)
    if not digest.startswith(FID_WEIGHTS) and not allow_unknown_weights:
        got, why = f"{file} with sha256 {digest[:8]}...", "FID is defined on these weights alone"
        todo = "copy the file again, or pass --allow-unknown-weights: distances are then named fd, not fid"
        raise WrongWeights(problem(got, f"{FID_WEIGHTS}...", why, todo))
    return _extractor(_read(file), (INCEPTION, digest, str(file)), resize, device, dtype, batch)


def random_inception(
    seed: int,
    resize: Resize = "clean",
    device: str | torch.device = "cpu",
    dtype: Dtype = "fp32",
    batch: int = BATCH,
) -> Extractor:
    """Features on weights drawn from a seed, for tests without a download: of no meaning as a distance of images."""
    state = random_state(seed)
    return _extractor(state, (RANDOM_INCEPTION, hash_of(state), f"seed {seed}"), resize, device, dtype, batch)


def network(state: Mapping[str, Tensor]) -> nn.Module:
    """Normalised images (N, 3, 299, 299) to (N, 2048, 1, 1), in eval mode, BatchNorm folded.

    Args:
        state: the published file's tensors; the classifier `fc` may be left out.

    Raises WrongWeights for missing, odd or misshapen tensors.
    """
    net = _bare()
    try:
        net.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")}, assign=True)
    except RuntimeError as error:
        why = str(error).splitlines()[1].strip()
        todo = "torchvision's Inception is another network; copy the file of torch-fidelity or pytorch-fid"
        raise WrongWeights(problem("other tensors than this network's", f"those of {INCEPTION}", why, todo)) from error
    net.eval().requires_grad_(False)
    for module in list(net.modules()):
        if "bn" in dict(module.named_children()):
            fold_norm(module, "conv", "bn")
    return net


def random_state(seed: int) -> dict[str, Tensor]:
    """Convolutions as He et al. 2015, https://arxiv.org/abs/1502.01852, draw them; BatchNorms that change nothing."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, like in _bare().state_dict().items():
        match name.rsplit(".", 2)[-2:]:
            case ["conv", "weight"]:
                state[name] = torch.randn(like.shape, generator=generator) * (2 / like[0].numel()) ** 0.5
            case ["bn", "weight" | "running_var"]:
                state[name] = torch.ones(like.shape)
            case _:
                state[name] = torch.zeros(like.shape, dtype=like.dtype)
    return state


def _bare() -> nn.Sequential:
    """The layers up to the last pool, without weights."""
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        class Bare(NoTrainInceptionV3):
            """Its constructor downloads, or unpickles, what it is given; here that is nothing."""

            def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:
                pass

        with torch.device("meta"):
            host = Bare("inception-v3-compat", ["2048"], cast(str, nothing))
    except ImportError as error:
        got, expected = f"Inception features without their network ({error})", "torchmetrics and torch-fidelity"
        todo = "pip install 'stepdistill[fid]', or choose other features"
        raise ConfigError(problem(got, expected, "they provide the network", todo)) from error
    return nn.Sequential(OrderedDict((name, layer) for name, layer in host.named_children() if name != "fc"))


def _read(file: Path) -> Mapping[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        content = f"a {type(state).__name__}"
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        state, content = None, (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values()):
        return state
    expected, why = "named tensors, as torch.save writes a state dict", "a pickle of anything else could run code"
    todo = "copy the file of torch-fidelity or pytorch-fid"
    raise WrongWeights(problem(f"{file} ({content})", expected, why, todo))


def _extractor(
    state: Mapping[str, Tensor],
    weights: tuple[str, str, str],
    resize: Resize,
    device: str | torch.device,
    dtype: Dtype,
    batch: int,
) -> Extractor:
    """The extractor on tensors; `weights` are their network's name, sha256 and path."""
    middle = 127.5 if resize == "pytorch-fid" else 128  # as that tool scales, `2 u / 255 - 1`
    arch, digest, path = weights
    identity = Identity(
        arch=arch,
        weights_sha256=digest,
        weights_path=path,
        dim=2048,
        layer="pool3",
        resize=resize,
        input_norm=f"(u - {middle}) / {middle}",
        dtype=dtype,
        batch=batch,
    )
    net: Any = network(state).to(device, DTYPES[dtype])
    net.to(memory_format=torch.channels_last)

    def pool3(images: Tensor) -> Tensor:
        x = (to_299(images, resize) - middle) / middle
        return net(x.to(DTYPES[dtype], memory_format=torch.channels_last)).flatten(1)

    return Extractor(identity, pool3, torch.device(device))
