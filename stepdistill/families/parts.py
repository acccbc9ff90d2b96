"""What a family needs of each part of its teacher, compared with the teacher's files before weights are read."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, Transformer2DModel
from diffusers.loaders import FromSingleFileMixin
from diffusers.loaders.single_file_utils import SingleFileComponentError, infer_diffusers_model_type
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPVisionModel

from stepdistill.config.schema import locate
from stepdistill.core.errors import ConfigError, StepdistillError, problem

# what Diffusers and Transformers raise for files that are missing, cut, or JSON of another form
UNREADABLE = (OSError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError, ImportError)
UNREADABLE += (SafetensorError, SingleFileComponentError)
SAVED = "a pipeline as `pipe.save_pretrained(folder)` writes it"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a family needs of the parts of its teacher.

    Args:
        optional: components that a pipeline of the family may lack.
        relatives: classes of pipelines that have the same parts, besides those for other tasks of the same model.
        network: what settings of the denoiser's config must be.
        vae: what those of the autoencoder's must be.
        width: the setting of it that is the width of a prompt's embedding, and the text encoders whose widths add up
            to it.
        places: latents of one channel that the network takes as one token's channels.
        shifts_latents: whether the pipeline subtracts its autoencoder's `shift_factor`.
        image_channels: whether the network takes an encoded image and its mask as further channels, and, where its
            config has an `image_dim`, tokens of an image encoder.
        scales_channels: whether its config has a mean and a standard deviation for each channel of its latents.
        counts_patches: whether its config counts the channels of a patch of pixels, not of a pixel.
        pipeline: what settings of the pipeline's index must be, and why.
        package: one that the pipeline fails without; it comes with the extra `video`.
        single_file: what Diffusers calls the single files of the family.
        prefixes: of the names of tensors, one for each part that a single file must hold.
        beside_file: networks that Diffusers does not read out of a single file; they are read from the place of its
            configs.
    """

    optional: frozenset[str] = frozenset()
    relatives: tuple[str, ...] = ()
    network: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    width: tuple[str, tuple[str, ...]]
    places: int = 1
    shifts_latents: bool = False
    scales_channels: bool = False
    image_channels: bool = False
    counts_patches: bool = False
    pipeline: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    package: str | None = None
    single_file: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    beside_file: tuple[str, ...] = ()


@contextmanager
def reading(teacher: str) -> Iterator[None]:
    """Raise ConfigError for what cannot be read of a teacher inside."""
    try:
        yield
    except StepdistillError:
        raise
    except UNREADABLE as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        todo = "check the name, revision and variant, and the network connection"
        if Path(teacher).exists():
            todo = "check that all files are there and whole, or save the pipeline again"
        raise ConfigError(problem(f"teacher {teacher}", "a complete pipeline", why, todo)) from error


def check_single_file(file: str, pipeline: type[DiffusionPipeline], needs: Needs) -> None:
    """Raise ConfigError where a `.safetensors` file does not hold a pipeline of this class; its header is read."""
    expected, todo = f"a checkpoint of a {pipeline.__name__}", "give the pipeline as a folder or hub id"
    if not issubclass(pipeline, FromSingleFileMixin):
        why = f"Diffusers reads no single file into a {pipeline.__name__}"
        raise ConfigError(problem(f"the single file {file}", "a pipeline folder or hub id", why, todo))
    try:
        with safe_open(file, "pt") as stored:
            shapes = {key: stored.get_slice(key).get_shape() for key in stored.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise ConfigError(problem(f"{file}, which is no safetensors file", expected, str(error), todo)) from error
    if any(".lora" in key or key.startswith("lora") for key in shapes):
        why = "it holds changes to a model, and not the model"
        todo = "name its base in family.pretrained_teacher_model, and the LoRA in family.teacher_loras"
        raise ConfigError(problem(f"the LoRA {file}", expected, why, todo))
    kind = infer_diffusers_model_type({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    missing = [prefix for prefix in needs.prefixes if not any(key.startswith(prefix) for key in shapes)]
    if kind not in needs.single_file or missing:
        got = f"{file} with {len(shapes)} tensors such as {', '.join(sorted(shapes)[:2]) or 'none'}"
        # whatever Diffusers does not know it takes for "v1"
        why = f"Diffusers takes it for {kind!r}" if kind != "v1" else "Diffusers does not know the names of its tensors"
        if kind in needs.single_file:
            why = f"it has no tensor whose name begins with {missing[0]}"
        todo = "choose the family of this model in family.type, or " + todo
        raise ConfigError(problem(got, expected, why, todo))


def check_marks(file: str, scheduler: Any) -> None:  # noqa: ANN401
    """Raise ConfigError where a single file says of itself another prediction type than its scheduler has.

    Diffusers does not read these marks, and gives the file the scheduler of the original model.
    """
    with safe_open(file, "pt") as stored:
        marks = {"v_pred", "ztsnr"} & set(stored.keys())
    wanted = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}
    for mark in sorted(marks):
        key, value = wanted[mark]
        if scheduler.config.get(key) != value:
            got, expected = f"{file}, which is marked as {mark}, and a scheduler without", f"{key} {value}"
            why = "the teacher would be read as another model than it was trained as"
            todo = "set family.single_file_config to a pipeline folder or hub id with that scheduler"
            raise ConfigError(problem(got, expected, why, todo))


def check_folder(
    where: str, revision: str | None, variant: str | None, pipeline: type[DiffusionPipeline], network: str, needs: Needs
) -> dict[str, Any]:
    """The config of the denoiser in a pipeline folder or hub id.

    Raises ConfigError where this does not have the parts of a pipeline of this class.

    Args:
        network: name of the denoiser among the parts.
    """
    if needs.package and find_spec(needs.package) is None:
        got, why = f"a {pipeline.__name__} without the package {needs.package}", "Diffusers cleans its prompts by it"
        raise ConfigError(problem(got, "both", why, "pip install 'stepdistill[video]'"))
    index: Any = pipeline.load_config(where, revision=revision)
    _check_class(where, index.get("_class_name"), pipeline, needs)
    for key, (value, why) in needs.pipeline.items():
        has = index.get(key, inspect.signature(pipeline.__init__).parameters[key].default)
        if has != value:
            raise ConfigError(problem(f"{where} with {key} {has!r}", repr(value), why, "choose another teacher"))
    types = pipeline._get_signature_types()
    parts, _ = pipeline._get_signature_keys(pipeline)
    texts = [name for name in types if name in parts and name.startswith(("text_encoder", "tokenizer"))]
    there = {name for name, part in index.items() if is_part(part) and part[0] is not None}
    missing = [n for n in (network, "vae", "scheduler", *texts) if n not in there and n not in needs.optional]
    if Path(where).is_dir():
        missing += [name for name in sorted(there) if not any((Path(where) / name).glob("*config.json"))]
        _check_variant(Path(where), variant)
    if missing:
        why, todo = f"a {pipeline.__name__} needs it", "save the whole pipeline, or copy the missing part into it"
        raise ConfigError(problem(f"{where} without {missing[0]}", SAVED, why, todo))
    for name in (network, "vae", *texts):
        if name in there and not name.startswith("tokenizer"):
            _check_type(where, name, _class_of(index[name]), types[name])
    return _checked_configs(where, revision, {name: index[name] for name in there}, network, needs)


def is_part(entry: Any) -> bool:  # noqa: ANN401
    """Whether an entry of a pipeline's index is a part, [library, class], and not a setting that is a list."""
    return isinstance(entry, list | tuple) and len(entry) == 2 and all(isinstance(x, str | None) for x in entry)


def _check_class(where: str, name: Any, pipeline: type[DiffusionPipeline], needs: Needs) -> None:  # noqa: ANN401
    if name == pipeline.__name__ or name in needs.relatives:
        return
    # it imports the pipelines of all models, in half a second
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING, _get_task_class

    if _get_task_class(AUTO_TEXT2IMAGE_PIPELINES_MAPPING, name, throw_error_if_not_exist=False) is not pipeline:
        why = "the family says how the network is called and what its parts mean"
        todo = f"choose the family of a {name} in family.type, or another teacher"
        raise ConfigError(problem(f"a {name} in {where}", f"a {pipeline.__name__}", why, todo))


def _check_variant(folder: Path, variant: str | None) -> None:
    if variant is None or any(any(folder.rglob(f"*.{variant}{end}*")) for end in (".", "-")):
        return
    got, why = f"family.variant {variant!r}", f"no file in {folder} is named so"
    todo = "leave family.variant out, or name the one that the files have"
    raise ConfigError(problem(got, "a variant of the teacher's files, such as fp16", why, todo))


def whole_network(where: str, variant: str | None, name: str, part: list[str]) -> nn.Module:
    """Network `name` of a pipeline folder. Raises ConfigError if its files lack tensors, of which Diffusers and
    Transformers only warn: they draw them at random."""
    kept = variant if variant and any((Path(where) / name).glob(f"*.{variant}*")) else None
    net, info = _class_of(part).from_pretrained(where, subfolder=name, variant=kept, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        got = f"{where} whose {name} lacks {len(missing)} of {len(net.state_dict())} tensors, such as {missing[0]}"
        why, todo = "they would be random numbers", "copy the part again, from where it is whole"
        raise ConfigError(problem(got, "all tensors of the network", why, todo))
    return net


def _class_of(part: list[str]) -> Any:  # noqa: ANN401
    """The class of a part of a model_index.json."""
    library, name = part
    # a pipeline's own classes stand under the pipeline's name
    return locate(f"{library if library in ('diffusers', 'transformers') else f'diffusers.pipelines.{library}'}.{name}")


def _check_type(where: str, name: str, cls: type, expected: tuple[type, ...]) -> None:
    # a tiny autoencoder has the latents of the one that it imitates, in the network's scale; and Diffusers reads a
    # Transformer2DModel of old as the class that came out of it
    if not issubclass(cls, (*expected, AutoencoderTiny if name == "vae" else Transformer2DModel)):
        wanted, why = " or ".join(kind.__name__ for kind in expected), "the family reads other outputs of it"
        todo = "choose the family of this pipeline in family.type, or another teacher"
        raise ConfigError(problem(f"a {cls.__name__} as {name} of {where}", f"a {wanted}", why, todo))


def _config_of(where: str, revision: str | None, name: str, cls: Any) -> dict[str, Any]:  # noqa: ANN401
    """The config of a network of Diffusers, with the defaults of its class."""
    defaults = {key: parameter.default for key, parameter in inspect.signature(cls.__init__).parameters.items()}
    return defaults | cls.load_config(where, subfolder=name, revision=revision)


def _checked_configs(
    where: str, revision: str | None, parts: Mapping[str, list[str]], network: str, needs: Needs
) -> dict[str, Any]:
    net, vae = (_config_of(where, revision, name, _class_of(parts[name])) for name in (network, "vae"))
    wanted = dict(needs.network)
    channels = vae.get("latent_channels", vae.get("z_dim"))
    if channels is not None:
        further = channels + vae["scale_factor_temporal"] if needs.image_channels else 0
        wanted["in_channels"] = needs.places * channels + further
    if needs.image_channels and net["image_dim"] is not None:
        wanted["image_dim"] = _image_width(where, revision, parts)
    setting, encoders = needs.width
    if isinstance(net[setting], int) and all(name in parts for name in encoders):
        wanted[setting] = sum(_width(where, revision, name, _class_of(parts[name])) for name in encoders)
    todo = "choose the family of this model in family.type, or another teacher"
    inputs, latents = "it takes other inputs than the family's", "the family's pipeline takes its latents otherwise"
    for name, config, settings, why in ((network, net, wanted, inputs), ("vae", vae, needs.vae, latents)):
        for key, value in settings.items():
            if config.get(key) != value:
                got = f"a {name} of {where} with {key} {config.get(key)!r}"
                raise ConfigError(problem(got, repr(value), why, todo))
    colours = 3 * (vae.get("patch_size") or 1) ** 2 if needs.counts_patches else 3
    for key in ("in_channels", "out_channels"):
        if vae.get(key, colours) != colours:
            got, why = f"a vae of {where} with {key} {vae[key]}", "images have red, green and blue"
            raise ConfigError(problem(got, str(colours), why, todo))
    numbers = [(network, net, "sample_size"), ("vae", vae, "scaling_factor")]
    numbers += [("vae", vae, "shift_factor")] if needs.shifts_latents else []
    for part, config, key in numbers:
        if not isinstance(config.get(key, 1), int | float):  # some families have no such key
            got, why = f"a {part} of {where} with {key} {config[key]!r}", "the latents' size or scale is read there"
            raise ConfigError(problem(got, "a number", why, f"set it in the config.json of the {part}"))
    if (vae.get("latents_mean") is not None) != needs.scales_channels:
        has, lacks = ("without", "with") if needs.scales_channels else ("with", "without")
        scales = "each channel of its latents" if needs.scales_channels else "latents by one factor"
        got, why = f"an autoencoder of {where} {has} latents_mean", f"the family scales {scales}"
        raise ConfigError(problem(got, f"one {lacks}", why, todo))
    return net


def _image_width(where: str, revision: str | None, parts: Mapping[str, list[str]]) -> int:
    """Of the tokens that a network attends to. Raises ConfigError for a teacher without an image encoder."""
    for name in ("image_encoder", "image_processor"):
        if name not in parts:
            why, todo = (
                "its network attends to tokens of the image",
                "save the whole pipeline, or copy the part into it",
            )
            raise ConfigError(problem(f"{where} without {name}", SAVED, why, todo))
    cls = _class_of(parts["image_encoder"])
    if cls is not CLIPVisionModel:
        got, why = f"a {cls.__name__} as image_encoder of {where}", "the family reads other outputs of it"
        raise ConfigError(problem(got, "a CLIPVisionModel", why, "choose another teacher"))
    return _width(where, revision, "image_encoder", cls)


def _width(where: str, revision: str | None, name: str, cls: Any) -> int:  # noqa: ANN401
    config = cls.config_class.from_pretrained(where, subfolder=name, revision=revision)
    return config.get_text_config().hidden_size
