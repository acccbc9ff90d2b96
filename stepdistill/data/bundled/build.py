# pyright: reportArgumentType=false
# Diffusers annotates its constructors more narrowly than it calls them.
"""Small pipelines with random weights, built from configs alone: the shape of the bundled teachers, and of tests."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from stepdistill.data.bundled import emoji

LENGTH = 16  # tokens of a caption, both ends included


def byte_pairs(captions: Iterable[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE that is trained on `captions` (bit for bit repeatable)."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        sorted(captions),
        trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=alphabet,
            # every byte that may end a word, also one that training never sees; given here, because the trainer
            # would number them in an order that changes from process to process, and ties between merges with it
            special_tokens=[symbol + "</w>" for symbol in alphabet],
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    vocab = {token: i for i, token in enumerate(sorted(bpe.get_vocab(), key=bpe.get_vocab().__getitem__))}
    return vocab, [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]


def tokenizer(captions: Iterable[str], size: int = 2226) -> CLIPTokenizer:
    """A CLIP tokenizer of `size` tokens, trained on `captions`."""
    ends = ["<|startoftext|>", "<|endoftext|>"]
    vocab, merges = byte_pairs(captions, size - len(ends))
    # the ends come last, as in CLIP: the pooled state is read at the largest id
    for end in ends:
        vocab[end] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def text_config(tokens: CLIPTokenizer, width: int, layers: int = 2) -> CLIPTextConfig:
    """A CLIP text tower of `width` channels, 32 a head."""
    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=tokens.model_max_length,
        projection_dim=width,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )


def silent_t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    """A one-layer T5 whose states are zeros, as SD3 has them where T5 is left out, and its tokenizer without a word.

    `StableDiffusion3Pipeline.from_pretrained` wants a third tower; what the captions say is learnt by the other two.
    """
    tokens = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0)
    encoder = T5EncoderModel(T5Config(vocab_size=len(tokens), d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokens


def vae(channels: tuple[int, ...] = (32, 64, 96), latents: int = 4) -> AutoencoderKL:
    """An image autoencoder that shrinks each side by `2 ** (len(channels) - 1)`."""
    n = len(channels)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        layers_per_block=1,
        latent_channels=latents,
        norm_num_groups=16 if min(channels) >= 16 else min(channels),
        sample_size=8 * 2 ** (n - 1),
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        shift_factor=0.0,
    )


def unet(channels: tuple[int, ...], context: int, latents: int = 4) -> UNet2DConditionModel:
    """An SD 1.x-shaped UNet with cross-attention at every level."""
    n = len(channels)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latents,
        out_channels=latents,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * n,
        up_block_types=("CrossAttnUpBlock2D",) * n,
        cross_attention_dim=context,
        norm_num_groups=16 if min(channels) >= 16 else min(channels),
        attention_head_dim=max(1, channels[0] // 32),  # in this class the number of heads, see its source
    )


def vp_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    """Stable Diffusion's noise table, sampled with trailing spacing."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        steps_offset=1,
        prediction_type=prediction_type,
    )


def sd(
    tokens: CLIPTokenizer, image: AutoencoderKL, channels: tuple[int, ...] = (64, 112), width: int = 128
) -> StableDiffusionPipeline:
    """A whole `StableDiffusionPipeline` with random weights around `tokens` and `image`."""
    return StableDiffusionPipeline(
        vae=image,
        text_encoder=CLIPTextModel(text_config(tokens, width)),
        tokenizer=tokens,
        unet=unet(channels, width, image.config["latent_channels"]),
        scheduler=vp_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd3(
    tokens: CLIPTokenizer,
    image: AutoencoderKL,
    width: int = 128,
    layers: int = 6,
    patch: int = 1,
    shift: float = 3.0,
) -> StableDiffusion3Pipeline:
    """A whole `StableDiffusion3Pipeline` (two CLIP towers, a silent T5) with random weights."""
    half = width // 2
    t5, t5_tokens = silent_t5(width)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=8,
                patch_size=patch,
                in_channels=image.config["latent_channels"],
                out_channels=image.config["latent_channels"],
                num_layers=layers,
                attention_head_dim=32,
                num_attention_heads=width // 32,
                joint_attention_dim=width,
                caption_projection_dim=width,
                pooled_projection_dim=width,
                pos_embed_max_size=8 // patch,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=image,
            text_encoder=CLIPTextModelWithProjection(text_config(tokens, half)),
            tokenizer=tokens,
            text_encoder_2=CLIPTextModelWithProjection(text_config(tokens, half)),
            tokenizer_2=tokens,
            text_encoder_3=t5,
            tokenizer_3=t5_tokens,
        )


def wan_vae(
    base: int = 16, multiples: tuple[int, ...] = (1, 2, 2), latents: int = 16, patch: int | None = None
) -> AutoencoderKLWan:
    """A causal video autoencoder.

    The first frame has a latent frame of its own; then `2 ** (len(multiples) - 1)` frames share one, and each side
    shrinks by that number times `patch`.
    """
    factor = 2 ** (len(multiples) - 1)
    return AutoencoderKLWan(
        base_dim=base,
        z_dim=latents,
        dim_mult=list(multiples),
        num_res_blocks=1,
        temperal_downsample=[True] * (len(multiples) - 1),
        latents_mean=[0.0] * latents,
        latents_std=[1.0] * latents,
        patch_size=patch,
        in_channels=3 * (patch or 1) ** 2,
        out_channels=3 * (patch or 1) ** 2,
        scale_factor_temporal=factor,
        scale_factor_spatial=factor * (patch or 1),
    )


def wan(
    tokens: CLIPTokenizer,
    video: AutoencoderKLWan,
    width: int = 192,
    layers: int = 6,
    text_width: int = 128,
    shift: float = 3.0,
) -> WanPipeline:
    """A whole `WanPipeline` with random weights, told the time of each token as Wan 2.2 TI2V is.

    `WanImageToVideoPipeline.from_pretrained` opens its folder, too.
    """
    channels = video.config["z_dim"]
    return WanPipeline(
        tokenizer=tokens,
        text_encoder=UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokens),
                d_model=text_width,
                d_kv=32,
                d_ff=2 * text_width,
                num_heads=text_width // 32,
                num_layers=2,
                dropout_rate=0.0,
                pad_token_id=tokens.pad_token_id,
                eos_token_id=tokens.eos_token_id,
            )
        ),
        vae=video,
        transformer=WanTransformer3DModel(
            num_attention_heads=width // 32,
            attention_head_dim=32,
            in_channels=channels,
            out_channels=channels,
            text_dim=text_width,
            freq_dim=64,
            ffn_dim=8 * width // 3,
            num_layers=layers,
            rope_max_seq_len=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        expand_timesteps=True,
    )


def write_halves(pipe: DiffusionPipeline, out: Path) -> None:
    """Write a pipeline folder in half precision, except the text towers.

    transformers loads half files in half, which would then meet a float32 UNet.
    """
    pipe.save_pretrained(out)
    name = "unet" if "unet" in pipe.components else "transformer"
    deepcopy(pipe.components[name]).half().save_pretrained(out / name)
    deepcopy(pipe.vae).half().save_pretrained(out / "vae")


def drawing_texts() -> list[str]:
    """Texts for the tokenizer: every drawing's name and subgroup."""
    return [f"{drawing.name} {drawing.subgroup}" for drawing in emoji.drawings()]
