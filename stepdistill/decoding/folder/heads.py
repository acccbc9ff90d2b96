"""What a one-step decoder adds to its language model: it reads vectors in the place of tokens, and writes all at once.

Distilled Decoding, https://arxiv.org/abs/2412.17153. Written by stepdistill; it needs torch and Diffusers alone.
"""

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import layer_norm


class Heads(ModelMixin, ConfigMixin):
    """Input and output layers for n places of a grid, each with a vector in R^d.

    Args:
        width: of the language model.
        codes: V, of the codebook.
        dim: d.
        hidden: width of the layer before the logits.
    """

    @register_to_config
    def __init__(self, width: int, codes: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("codebook", torch.zeros(codes, dim))
        self.read = nn.Linear(dim, width)
        self.mark = nn.Embedding(2, width)  # noise, data
        self.logits = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, codes))
        self.rows = nn.Parameter(torch.zeros(2, width))  # shift and scale of the states before the value
        self.value = nn.Linear(width, dim)

    def inputs(self, text: Tensor, x: Tensor, kept: Tensor) -> Tensor:
        """Embeddings (B, P + n, width) of the prompt's (B, P, width) and vectors (B, n, d), of which some are data."""
        prompt = text + self.mark.weight[1]
        return torch.cat([prompt, self.read(x) + self.mark(kept.long())], 1)

    def outputs(self, states: Tensor, places: int) -> tuple[Tensor, Tensor]:
        """Logits (B, n, V) and values (B, n, d) of the language model's states (B, P + n, width)."""
        condition, own = states[:, -places - 1, None], states[:, -places:]
        shift, scale = condition + self.rows[0], condition + self.rows[1]
        return self.logits(own), self.value(layer_norm(own, own.shape[-1:]) * (1 + scale) + shift)

    def one_call(
        self, language_model: nn.Module, text: Tensor, mask: Tensor, x: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, n, V) and values (B, n, d) of all places.

        A place reads its own vector and writes its own token, and is told no later one: the model is causal.

        Args:
            text: embeddings (B, P, width) of the prompt, padded on the left; its last one begins the image.
            mask: (B, P), 1 for tokens of the prompt.
            x: (B, n, d), codes of the tokens that are known, and noise.
            kept: (B, n), whether a vector is the code of a token.
        """
        whole = torch.cat([mask, torch.ones(x.shape[:2], dtype=mask.dtype, device=mask.device)], 1)
        states = language_model(
            inputs_embeds=self.inputs(text, x, kept),
            attention_mask=whole,
            position_ids=(whole.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        return self.outputs(states, x.shape[1])

    def decode(
        self, language_model: nn.Module, text: Tensor, mask: Tensor, noise: Tensor, keeps: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, n) and values (B, n, d), in one call for each of `keeps`.

        Args:
            noise: (B, n, d). It is the same in all calls.
            keeps: how many tokens each call keeps of those before it, ascending, from 0. A student is right for the
                numbers that it was trained with alone.
        """
        tokens = torch.zeros(noise.shape[:2], dtype=torch.long, device=noise.device)
        values = noise
        for keep in keeps:
            tokens, values = self.next_call(language_model, text, mask, noise, tokens, keep)
        return tokens, values

    def next_call(
        self, language_model: nn.Module, text: Tensor, mask: Tensor, noise: Tensor, tokens: Tensor, keep: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, n) and values (B, n, d) by one call, which keeps the first `keep` of the tokens (B, n)."""
        kept = (torch.arange(noise.shape[1], device=noise.device) < keep).expand_as(tokens)
        x = torch.where(kept[..., None], self.codebook[tokens], noise)
        logits, new = self.one_call(language_model, text, mask, x, kept)
        tokens = torch.where(kept, tokens, logits.argmax(-1))
        return tokens, torch.where(kept[..., None], self.codebook[tokens], new)
