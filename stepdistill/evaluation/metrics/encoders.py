"""Features of encoders other than Inception: DINOv2, CLIP, the pipeline's VAE, and pixels.

Networks from transformers and the VAE are named by the hash of their tensors in float32 (`hash_of`): it is the same
for a folder, a hub id, and either file format.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from transformers import AutoImageProcessor, CLIPModel, Dinov2Model

from stepdistill.core.files import hash_of
from stepdistill.evaluation.metrics.features import BATCH, Extractor
from stepdistill.evaluation.metrics.identity import DTYPES, NO_WEIGHTS, Dtype, Identity
from stepdistill.networks.clip import image_embeddings, pretrained

DINO_SIDE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINO_SIZES = {384: "s", 768: "b", 1024: "l", 1536: "g"}  # by width
CLIP_SIZES = {(768, 32, 224): "b32", (1024, 14, 224): "l14", (1024, 14, 336): "l14-336"}  # by width, patch, side
POOLED = 8  # the side of pooled latents and pixels
VAE_BATCH = 8  # an encoder's first activations take 128 MiB an image of 512 pixels


def dinov2(name: str, device: str | torch.device = "cpu", dtype: Dtype = "fp32", batch: int = BATCH) -> Extractor:
    """DINOv2's class token after the last LayerNorm.

    Oquab et al. 2023, https://arxiv.org/abs/2304.07193; FD-DINOv2 is the Frechet distance on it, Stein et al. 2023,
    https://arxiv.org/abs/2306.04675. Images of any shape become 224 x 224 by antialiased bicubic interpolation.

    Args:
        name: a folder or hub id. Its config names the `arch`, whatever it is called.

    Raises OSError where there is none, WrongWeights for another model's.
    """
    net: Any = pretrained(Dinov2Model, name)
    width = net.config.hidden_size
    identity = Identity(
        arch=f"dinov2-{DINO_SIZES.get(width, width)}",
        weights_sha256=hash_of(net.state_dict()),
        weights_path=name,
        dim=width,
        layer="class token, layer-normed",
        resize=f"bicubic{DINO_SIDE}",
        input_norm="(u / 255 - ImageNet mean) / ImageNet std",
        dtype=dtype,
        batch=batch,
    )
    net.to(device, DTYPES[dtype])

    def class_token(images: Tensor) -> Tensor:
        x = _bicubic(images, DINO_SIDE, IMAGENET_MEAN, IMAGENET_STD)
        return net(pixel_values=x.to(net.dtype)).pooler_output

    return Extractor(identity, class_token, torch.device(device))


def clip_images(name: str, device: str | torch.device = "cpu", dtype: Dtype = "fp32", batch: int = BATCH) -> Extractor:
    """CLIP's image embeddings as they are, not normalised.

    Radford et al. 2021, https://arxiv.org/abs/2103.00020; CMMD is a kernel distance on them, Jayasumana et al. 2024,
    https://arxiv.org/abs/2401.09603. Images of any shape become the model's square by antialiased bicubic
    interpolation.

    Args:
        name: a folder or hub id with model and image processor. Its config names the `arch`, whatever it is called.

    Raises OSError where there is none, WrongWeights for another model's.
    """
    net: Any = pretrained(CLIPModel, name)
    processor = AutoImageProcessor.from_pretrained(name)
    mean, std, vision = list(processor.image_mean), list(processor.image_std), net.config.vision_config
    shape = vision.hidden_size, vision.patch_size, vision.image_size
    identity = Identity(
        arch=f"clip-{CLIP_SIZES.get(shape, 'x'.join(map(str, shape)))}",
        weights_sha256=hash_of(net.state_dict()),
        weights_path=name,
        dim=net.config.projection_dim,
        layer="image embedding",
        resize=f"bicubic{vision.image_size}",
        input_norm=f"(u / 255 - {mean}) / {std}",
        dtype=dtype,
        batch=batch,
    )
    net.to(device, DTYPES[dtype])

    def embedding(images: Tensor) -> Tensor:
        x = _bicubic(images, vision.image_size, mean, std)
        return image_embeddings(net, x.to(net.dtype))

    return Extractor(identity, embedding, torch.device(device))


def vae_latents(vae: AutoencoderKL, device: str | torch.device = "cpu", batch: int = VAE_BATCH) -> Extractor:
    """The mean that a pipeline's own autoencoder encodes, averaged to 8 x 8 and flattened: needs no download.

    Images keep their size. A VAE in half precision, or on another device, is copied and not changed.

    Raises ValueError when called on images whose latents are smaller than 8 x 8.
    """
    device = torch.device(device)
    fits = vae.dtype == torch.float32 and vae.device == device
    net: Any = vae if fits else deepcopy(vae)
    net.to(device, torch.float32)
    identity = Identity(
        arch="vae",
        weights_sha256=hash_of(net.state_dict()),
        weights_path="the pipeline's",
        dim=net.config["latent_channels"] * POOLED**2,
        layer="encoder mean",
        resize=f"pool{POOLED}",
        input_norm="u / 127.5 - 1",
        dtype="fp32",
        batch=batch,
    )

    def pooled_mean(images: Tensor) -> Tensor:
        latents = net.encode(images / 127.5 - 1).latent_dist.mode()
        if min(latents.shape[2:]) < POOLED:
            raise ValueError(
                f"vae features got images of {tuple(images.shape[2:])}, whose latents are {tuple(latents.shape[2:])}, "
                f"expected {POOLED} x {POOLED} or more: they are averaged to that size; use larger images, or pixels"
            )
        return adaptive_avg_pool2d(latents, POOLED).flatten(1)

    return Extractor(identity, pooled_mean, device)


def pixel_features(device: str | torch.device = "cpu", batch: int = BATCH) -> Extractor:
    """Colours averaged over an 8 x 8 grid, and each channel's mean and standard deviation: 198 numbers in [0, 1]."""
    identity = Identity(
        arch="pixels",
        weights_sha256=NO_WEIGHTS,
        weights_path="",
        dim=3 * POOLED**2 + 6,
        layer="grid, means, standard deviations",
        resize=f"area{POOLED}",
        input_norm="u / 255",
        dtype="fp32",
        batch=batch,
    )

    def statistics(images: Tensor) -> Tensor:
        x = images / 255
        return torch.cat(
            [adaptive_avg_pool2d(x, POOLED).flatten(1), x.mean((2, 3)), x.std((2, 3), correction=0)], dim=1
        )

    return Extractor(identity, statistics, torch.device(device))


def _bicubic(images: Tensor, side: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 to normalised (N, 3, side, side)."""
    x = interpolate(images.float(), (side, side), mode="bicubic", antialias=True).clamp(0, 255)
    return (x / 255 - x.new_tensor(mean).reshape(3, 1, 1)) / x.new_tensor(std).reshape(3, 1, 1)
