"""A small Janus from configs alone, for images of 32 pixels as 64 tokens."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import JanusConfig, JanusImageProcessor, JanusProcessor, LlamaConfig, PreTrainedTokenizerFast

from stepdistill.data.bundled.build import LENGTH, byte_pairs


def janus_processor(captions: Iterable[str], size: int = 800) -> JanusProcessor:
    """Captions of at most `LENGTH` tokens between their ends, padded on the left, and images of 32 pixels."""
    vocab, merges = byte_pairs(captions, size)
    bpe = Tokenizer(models.BPE(vocab, merges, end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    image = {"image_token": "<image>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    bpe.add_special_tokens([*ends.values(), *image.values()])
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))])
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **ends,
        extra_special_tokens=image,
        padding_side="left",
        truncation_side="left",
        model_max_length=LENGTH,
    )
    pixels = JanusImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return JanusProcessor(pixels, tokens, num_image_tokens=64)


def janus_config(words: int, width: int = 192, layers: int = 6, codes: int = 256, dim: int = 8) -> JanusConfig:
    """A Janus for images of 32 pixels as 64 tokens; what reads images is as small as it can be."""
    return JanusConfig(
        text_config=LlamaConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=5 * width // 2,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            max_position_embeddings=LENGTH + 64,
        ),
        vision_config={
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 32,
            "patch_size": 4,
            "projection_dim": width,
            "num_image_tokens": 64,
            "depth": 1,
        },
        vq_config={
            "embed_dim": dim,
            "num_embeddings": codes,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 2, 2],
            "num_res_blocks": 1,
            "projection_dim": width,
            "image_token_embed_dim": width,
        },
    )
