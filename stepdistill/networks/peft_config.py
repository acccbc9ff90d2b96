"""PEFT's configs of LoRAs: of a config's `lora` section, and of a file."""

from __future__ import annotations

from collections.abc import Sequence

from peft import LoraConfig
from torch import nn

from stepdistill.core.errors import ConfigError, problem
from stepdistill.networks.lora.tensors import Lora, lora_facts
from stepdistill.networks.roles import LoraSpec


def check_targets(net: nn.Module, spec: LoraSpec) -> None:
    """Raise ConfigError where a target of `spec` is no layer's name, nor the end of one: PEFT passes it over."""
    names = [f".{name}" for name, _ in net.named_modules()]
    odd = [target for target in spec.target_modules or () if not any(name.endswith(f".{target}") for name in names)]
    if odd:
        got, expected = f"lora.target_modules with {', '.join(odd)}", "names of layers, or their ends, such as to_q"
        why, todo = f"no layer of the {type(net).__name__} is called so", "correct or remove them"
        raise ConfigError(problem(got, expected, why, todo))


def peft_config(spec: LoraSpec, targets: Sequence[str]) -> LoraConfig:
    """The PEFT config of a spec; `targets` if the spec names none."""
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha or spec.rank,  # pyright: ignore[reportArgumentType]
        target_modules=list(spec.target_modules or targets),
        lora_dropout=0.0,
    )


def file_config(lora: Lora, network: str) -> LoraConfig:
    """The PEFT config of a file's layers in the pipeline's component `network`, each with its own rank and alpha."""
    facts = {key.removeprefix(f"{network}."): value for key, value in lora_facts(lora).items()}
    return LoraConfig(**facts)
