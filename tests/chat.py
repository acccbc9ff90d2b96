"""A tokenizer with a chat template and tiny Qwen language models, for pipelines that read prompts as chats."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

# Qwen-Image and Krea 2 drop the first 34 tokens of their template by count: each word and mark here is one token
WORDS = """
system Describe the image by detailing color shape size texture quantity text spatial relationships of objects
and background user assistant think a an red blue green yellow small large apple cat dog heart circle on left zebra
face rose octopus pear tiger lemon
""".split()
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>", "<think>", "</think>"),
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
WIDTH = 32  # of the language models' states


def tokens() -> PreTrainedTokenizerFast:
    """A tokenizer of words and marks, in which those that no prompt of a test uses are one unknown token."""
    vocabulary = dict.fromkeys([*SPECIAL, "<unk>", "\n", ",", ".", ":", *WORDS])
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]|\n"), "removed", invert=True)
    core.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
        padding_side="right",
        model_max_length=4096,
    )


def qwen3(kind: Any, layers: int = 3) -> Any:  # noqa: ANN401
    """A random language model of `kind`, one of the classes of Qwen3."""
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
    )
    return kind(config).eval()
