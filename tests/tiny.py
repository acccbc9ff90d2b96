"""Tiny random pipelines and batches, shared by the tests."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tiny_krea2
import tiny_z_image
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    ControlNetModel,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaControlNetModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3ControlNetModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tiny_klein import FAMILY as KLEIN
from tiny_klein import klein
from tiny_qwen_image import qwen_image
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from stepdistill.data.bundled import build
from stepdistill.families.base import Family
from stepdistill.families.flux import Flux
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.families.krea2 import Krea2
from stepdistill.families.ltx import LTX
from stepdistill.families.ltx_image import LTXImageToVideo
from stepdistill.families.pixart_alpha import PixArtAlpha
from stepdistill.families.pixart_sigma import PixArtSigma
from stepdistill.families.qwen_image import QwenImage
from stepdistill.families.sana import Sana
from stepdistill.families.sd import StableDiffusion
from stepdistill.families.sd3 import StableDiffusion3
from stepdistill.families.sdxl import StableDiffusionXL
from stepdistill.families.wan import Wan
from stepdistill.families.wan_concat import WanConcatImageToVideo
from stepdistill.families.wan_image import WanImageToVideo
from stepdistill.methods.base import Batch, StepContext
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.layers import rebuilt
from stepdistill.networks.roles import LoraSpec

FAMILIES: dict[str, Family] = {
    "sd": StableDiffusion(pretrained_teacher_model="tiny-sd"),
    "sd3": StableDiffusion3(pretrained_teacher_model="tiny-sd3", max_sequence_length=16),
    "sdxl": StableDiffusionXL(pretrained_teacher_model="stabilityai/stable-diffusion-xl-base-1.0"),
    "flux": Flux(pretrained_teacher_model="black-forest-labs/FLUX.1-dev", max_sequence_length=12),
    "pixart_alpha": PixArtAlpha(pretrained_teacher_model="PixArt-alpha/PixArt-XL-2-512x512", max_sequence_length=12),
    "pixart_sigma": PixArtSigma(
        pretrained_teacher_model="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", max_sequence_length=12
    ),
    "sana": Sana(
        pretrained_teacher_model="Efficient-Large-Model/Sana_600M_512px_diffusers",
        max_sequence_length=12,
        human_instruction=False,
    ),
    "qwen_image": QwenImage(pretrained_teacher_model="Qwen/Qwen-Image", max_sequence_length=24),
    "wan": Wan(
        pretrained_teacher_model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        num_frames=5,
        sample_size=(32, 32),
        max_sequence_length=12,
    ),
    "ltx": LTX(
        pretrained_teacher_model="Lightricks/LTX-Video",
        num_frames=5,
        frame_rate=4,
        sample_size=(32, 32),
        max_sequence_length=12,
        shift=3.0,
    ),
    "klein": KLEIN,
    "z_image": tiny_z_image.FAMILY,
    "krea2": Krea2(pretrained_teacher_model="krea/Krea-2-Raw", max_sequence_length=12),
}
SIDE = 32  # of images, in pixels
# families that continue an image: the first latent frame is held, or the image is further channels of the input
CONTINUING: dict[str, ImageToVideo] = {
    "wan_image": WanImageToVideo(
        pretrained_teacher_model="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        num_frames=5,
        sample_size=(32, 32),
        max_sequence_length=12,
    ),
    "wan_concat": WanConcatImageToVideo(
        pretrained_teacher_model="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", num_frames=5, sample_size=(32, 32)
    ),
    "ltx_image": LTXImageToVideo(**vars(FAMILIES["ltx"])),
}


VIDEOS = ("wan", "ltx")
FLOWS = ("sd3", "flux", "sana", "klein", "qwen_image", *VIDEOS, "z_image", "krea2")
ONE_STREAM = ("z_image", "krea2")  # image and prompt are one sequence, and there is no place for guidance adapters
ADAPTED = tuple(name for name in FAMILIES if name not in ONE_STREAM)


def latent_shape(name: str) -> tuple[int, ...]:
    """The shape of one sample's latents in a family's random pipeline."""
    if name in VIDEOS or name in CONTINUING:
        return (4, 3, 8, 8)
    return (16, 8, 8) if name == "klein" else (4, 8, 8)


@cache
def tokens():
    return build.tokenizer(build.drawing_texts())


def pipeline(name: str, seed: int = 0) -> DiffusionPipeline:
    """A random pipeline of a family, with latents of 8 x 8 and images of 32 pixels."""
    torch.manual_seed(seed)
    vae = build.vae((16, 16, 16))
    match name:
        case "sd":
            return build.sd(tokens(), vae, (32, 32), 32)
        case "sdxl":
            return sdxl(vae)
        case "sd3":
            return build.sd3(tokens(), vae, 64, 2, patch=2)
        case "flux":
            return flux(vae)
        case "sana":
            return sana()
        case "klein":
            return klein()
        case "qwen_image":
            return qwen_image()
        case "wan":
            return wan()
        case "wan_image":
            return wan_image()
        case "wan_concat":
            return wan_concat()
        case "ltx":
            return ltx()
        case "ltx_image":
            return ltx_image()
        case "z_image":
            return tiny_z_image.z_image(vae)
        case "krea2":
            return tiny_krea2.krea2()
    return pixart(name, vae)


def sdxl(vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    """SDXL's shape: no attention at the first level, two blocks of it at the second, text and size conditions."""
    width = 32
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(build.text_config(tokens(), width)),
        text_encoder_2=CLIPTextModelWithProjection(build.text_config(tokens(), width)),
        tokenizer=tokens(),
        tokenizer_2=tokens(),
        unet=UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(1, 2),
            use_linear_projection=True,
            cross_attention_dim=2 * width,
            norm_num_groups=16,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=width + 6 * 8,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            timestep_spacing="leading",
        ),
    )


def t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    """A T5 that knows the letters."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in map(chr, range(97, 123)))]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    shape = {"d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **shape)).eval(), tokenizer


def flux(vae: AutoencoderKL, told: bool = True) -> FluxPipeline:
    """Flux's shape: two blocks of two streams, two of one; a dynamic shift; dev is told a guidance scale."""
    encoder, letters = t5(32)
    return FluxPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(build.text_config(tokens(), 32)),
        tokenizer=tokens(),
        text_encoder_2=encoder,
        tokenizer_2=letters,
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=told,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def pixart(name: str, vae: AutoencoderKL, side: int = 8) -> DiffusionPipeline:
    """PixArt's shape: it predicts a variance, too, and is told the image's size where `side` is 128."""
    encoder, letters = t5(32)
    kind = PixArtAlphaPipeline if name == "pixart_alpha" else PixArtSigmaPipeline
    return kind(
        vae=vae,
        text_encoder=encoder,
        tokenizer=letters,
        transformer=PixArtTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=12,
            num_layers=2,
            cross_attention_dim=48,
            caption_channels=32,
            sample_size=side,
            norm_num_groups=16,
            use_additional_conditions=side == 128 and name == "pixart_alpha",
        ),
        scheduler=DPMSolverMultistepScheduler(),
    )


def wan(**more: Any) -> WanPipeline:
    """Wan's shape, with latents of 4 x 3 x 8 x 8 for five frames of 32 pixels."""
    letters = t5(32)[1]
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return WanPipeline(
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[0.9, 1.1, 1.3, 0.7],
            scale_factor_temporal=2,
            scale_factor_spatial=4,
        ).eval(),
        text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=len(letters), **shape)).eval(),
        tokenizer=letters,
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        **more,
    )


def wan_image() -> WanImageToVideoPipeline:
    """Wan 2.2's TI2V, which is told the time of each token: the network of text to video."""
    parts = {name: part for name, part in wan().components.items() if name != "transformer_2"}
    return WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None, expand_timesteps=True)


def wan_concat(clip: bool = True, **more: Any) -> WanImageToVideoPipeline:
    """Wan 2.1's image to video: a mask and an encoded image as further channels; tokens of a CLIP's vision tower."""
    parts = {name: part for name, part in wan().components.items() if name != "transformer_2"}
    changes: dict[str, Any] = {"in_channels": 4 + 2 + 4}
    encoder = processor = None
    if clip:
        shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        encoder = CLIPVisionModel(CLIPVisionConfig(image_size=8, patch_size=4, **shape)).eval()
        processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
        changes |= {"image_dim": 8, "added_kv_proj_dim": 24}
    parts["transformer"] = rebuilt(parts["transformer"], **changes)
    return WanImageToVideoPipeline(**parts, image_encoder=encoder, image_processor=processor, **more)


def ltx(timed: bool = False, scaling: float = 0.8) -> LTXPipeline:
    """LTX-Video's shape, with latents of 4 x 3 x 8 x 8 for five frames of 32 pixels; a dynamic shift, as on the hub.

    Args:
        timed: whether the autoencoder is told a time, as since version 0.9.1.
        scaling: factor of the latents; 1 in the published ones.
    """
    encoder, letters = t5(32)
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8,),
        down_block_types=("LTXVideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("conv",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=timed,
        patch_size=2,
        scaling_factor=scaling,
    ).eval()
    vae.latents_mean[:] = torch.tensor([0.1, -0.2, 0.3, 0.0])
    vae.latents_std[:] = torch.tensor([0.9, 1.1, 1.3, 0.7])
    return LTXPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=letters,
        transformer=LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            num_layers=2,
            caption_channels=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift_terminal=0.1, base_shift=0.95, max_shift=2.05
        ),
    )


def ltx_image(timed: bool = False) -> LTXImageToVideoPipeline:
    return LTXImageToVideoPipeline(**ltx(timed, 1.0).components)


def sana(sprint: bool = False) -> SanaPipeline:
    """SANA's shape; or that of the base of SANA-Sprint, with time in [0, 1] and normalised queries and keys."""
    letters = {name: i for i, name in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"))}
    letters |= {chr(97 + i): 6 + i for i in range(26)}
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return SanaPipeline(
        vae=AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.4,
        ),
        text_encoder=Gemma2Model(Gemma2Config(vocab_size=len(letters), **shape, **heads)),
        tokenizer=GemmaTokenizer(vocab=letters),
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=8,
            qk_norm="rms_norm_across_heads" if sprint else None,
            timestep_scale=0.001 if sprint else 1.0,
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, algorithm_type="dpmsolver++"
        ),
    )


def controlnet(name: str, pipe: DiffusionPipeline, size: float = 0.3, **other: object) -> nn.Module:
    """A random ControlNet of a family's tiny base, whose outputs matter; with `size` 0 they are zeros.

    Args:
        other: settings that differ from the base's.
    """
    torch.manual_seed(1)
    net: Any = FAMILIES[name].network(pipe)
    config = dict(net.config)
    heads = {key: config.get(key) for key in ("num_attention_heads", "attention_head_dim")}
    match name:
        case "sd" | "sdxl":
            kept = ControlNetModel.from_unet(net, conditioning_embedding_out_channels=(16, 16, 16)).config
            made = ControlNetModel.from_config({**kept, **other})
        case "sd3":
            keys = ("sample_size", "patch_size", "in_channels", "joint_attention_dim", "caption_projection_dim")
            kept = {key: config[key] for key in (*keys, "pooled_projection_dim", "pos_embed_max_size")}
            made = SD3ControlNetModel(**{**kept, **heads, "num_layers": 1, **other})
        case "flux":
            keys = ("in_channels", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds", "axes_dims_rope")
            kept = {key: config[key] for key in keys}
            made = FluxControlNetModel(**{**kept, **heads, "num_layers": 1, "num_single_layers": 1, **other})
        case "sana":
            keys = ("in_channels", "caption_channels", "sample_size", "patch_size", "cross_attention_head_dim")
            kept = {key: config[key] for key in (*keys, "num_cross_attention_heads", "cross_attention_dim")}
            made = SanaControlNetModel(**{**kept, **heads, "num_layers": 1, **other})
    generator = torch.Generator().manual_seed(1)
    for key, p in made.named_parameters():
        if key.endswith("weight") and not p.any():  # at the start of training
            output = re.match(r"controlnet_(\w+_)?blocks?\.", key)
            p.data = (size if output else 1.0) * torch.randn(p.shape, generator=generator)
    return made.eval().requires_grad_(False)


def clip(place: Path) -> Path:
    """A folder with a small random CLIP, whose processor fits it, with 77 places for tokens."""
    tokenizer = build.tokenizer(build.drawing_texts())
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**shape, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    vision = {**shape, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, initializer_factor=10.0)
    CLIPModel(config).save_pretrained(place)
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(place)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(place)
    return place


def backbone(name: str, pipe: DiffusionPipeline, rank: int = 4, alpha: float = 6.0) -> Backbone:
    net = FAMILIES[name].network(pipe)
    family = FAMILIES[name]
    spec = LoraSpec(rank=rank, alpha=alpha)
    places = {"tap": family.tap(net), "sites": family.sites(net) if name in ADAPTED else None, "taps": family.taps(net)}
    return Backbone(net, spec, family.lora_targets(net), **places)


def awake(bone: Backbone, role: str, size: float = 0.05) -> None:
    """Give a LoRA that starts at zero an effect."""
    generator = torch.Generator().manual_seed(len(role))
    for key, p in bone.parameters_of(role).items():
        if "lora_B" in key:
            p.data = size * torch.randn(p.shape, generator=generator)


def batch(name: str, pipe: DiffusionPipeline, size: int = 2, first: int = 0) -> Batch:
    prompts = ["red apple", "cat face", "rose", "octopus"][:size]
    index, shape = tuple(range(first, first + size)), latent_shape(name)
    latents, noise = (
        torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(base + i)) for i in index])
        for base in (100, 200)
    )
    return Batch(index, FAMILIES[name].condition(pipe, prompts), shape, latents, noise)


def context(name: str, pipe: DiffusionPipeline, bones: dict[str, Backbone] | Backbone, step: int = 0) -> StepContext:
    """A `StepContext` over one shared backbone, or over one backbone for each role."""
    family = FAMILIES[name]
    schedule = family.schedule(pipe.scheduler)

    def bone(role: str) -> Backbone:
        return bones if isinstance(bones, Backbone) else bones[role]

    return StepContext(
        schedule=schedule,
        null=family.unconditional(pipe),
        denoiser=lambda role: Denoiser(bone(role), role, schedule, family.kind(pipe), family.call),
        module=lambda role: bone(role).others[role],
        decode=lambda latents: family.decode(pipe, latents),
        seed=0,
        step=step,
        device=torch.device("cpu"),
    )


@dataclass
class FakeTeacher:
    """What a source asks of a teacher, by one function of all but the number of steps and the guidance scale."""

    make: Callable
    shape: tuple[int, ...] = (1, 2, 2)
    digest: str = "teacher"
    takes_images: bool = False

    def sample(self, prompts, noise, steps, guidance_scale, images=None):
        return self.make(prompts, noise)

    def invert(self, prompts, pixels, noise, steps):
        return self.make(prompts, pixels, noise)

    def trajectories(self, prompts, noise, scales, kept, steps):
        return self.make(prompts, noise, scales, kept)
