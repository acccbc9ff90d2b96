"""Quantization of the frozen network; roles stay float32."""

from __future__ import annotations

from typing import Any

from diffusers import PipelineQuantizationConfig, TorchAoConfig
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from stepdistill.config.schema import Factory
from stepdistill.core.errors import ConfigError, problem


def quantized(factory: Factory, component: str) -> PipelineQuantizationConfig:
    """The argument of `from_pretrained` that quantises one component.

    Args:
        factory: makes a quantisation config of Diffusers, or one of torchao.
    """
    settings: Any = factory()
    config = settings if isinstance(settings, QuantizationConfigMixin) else TorchAoConfig(settings)
    return PipelineQuantizationConfig(quant_mapping={component: config})


def check_quantization(factory: Factory | None, single_file: bool, loras: bool) -> None:
    """Raise ConfigError for a teacher that cannot be quantised as it is read."""
    why, todo = "the weights are quantised as they are read", "save the pipeline as a folder, LoRAs fused in, first"
    if factory is not None and (single_file or loras):
        got = f"family.quantization of {'a single file' if single_file else 'a teacher with teacher_loras'}"
        raise ConfigError(problem(got, "a pipeline folder or hub id", why, todo))


def dense(tensor: Tensor) -> Tensor:
    """The values that a tensor of another library stands for; an ordinary one, or packed bits, as they are."""
    plain = type(tensor) in (Tensor, nn.Parameter) or not tensor.is_floating_point()
    return tensor if plain else tensor.dequantize()
