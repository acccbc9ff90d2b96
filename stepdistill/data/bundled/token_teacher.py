"""What the token teacher learns from: an autoencoder with a codebook, images as tokens, a loss on captions.

It is a Janus (https://arxiv.org/abs/2410.13848) of 2.7 million parameters: a causal language model reads the caption
and then the tokens of an image, row by row, and predicts the next one.
"""

from __future__ import annotations

import random
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import JanusForConditionalGeneration, JanusProcessor
from transformers.models.janus.modeling_janus import JanusVQVAE

from stepdistill.data.bundled import build, emoji
from stepdistill.data.bundled.build_tokens import janus_config, janus_processor
from stepdistill.data.bundled.teacher_spec import TeacherSpec
from stepdistill.data.bundled.token_autoencoder import codebook, tokens_of, train_token_autoencoder, unit_vectors


@torch.no_grad()
def encode_tokens(spec: TeacherSpec, vae: JanusVQVAE, file: Path) -> Tensor:
    """Tokens (images, drawings, 64) in 16 bits."""
    if file.exists():
        return torch.load(file, weights_only=True)
    rng, rows = random.Random(spec.seed + 1), []
    source, drawn = emoji.packed_sheet(), emoji.subjects()
    for _ in tqdm(range(spec.images), desc="encode", mininterval=5):
        x = emoji.pixels([emoji.image(source, drawing, rng) for drawing in drawn])
        vectors = torch.cat([unit_vectors(vae, part) for part in x.split(64)])
        rows.append(tokens_of(vectors, codebook(vae)).short())
    tokens = torch.stack(rows)
    torch.save(tokens, file)
    return tokens


def token_loss(model: JanusForConditionalGeneration, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of each token (B, n) after the caption's ids (B, P), padded on the left, and the tokens before."""
    text = model.get_input_embeddings()(ids)
    image = model.prepare_embeddings_for_image_generation(tokens[:, :-1])
    mask = torch.cat([mask, torch.ones_like(tokens[:, :-1])], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    states = model.model.language_model(
        inputs_embeds=torch.cat([text, image], 1), attention_mask=mask, position_ids=places, use_cache=False
    ).last_hidden_state[:, ids.shape[1] - 1 :]
    logits = model.model.generation_head(states)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


class TokenLessons:
    """Batches of captioned tokens for one `spec`; `work` keeps the autoencoder and the tokens."""

    def __init__(self, spec: TeacherSpec, work: Path) -> None:
        self.spec, self.drawn = spec, emoji.subjects()
        self.vae = train_token_autoencoder(spec, work)
        self.tokens = encode_tokens(spec, self.vae, work / "tokens.pt")
        self.processor: JanusProcessor = janus_processor(build.drawing_texts())

    def networks(self) -> tuple[JanusForConditionalGeneration, nn.ModuleList]:
        """The model, and its networks that learn."""
        torch.manual_seed(self.spec.seed)
        model = JanusForConditionalGeneration(janus_config(len(self.processor.tokenizer)))
        model.model.vqmodel.load_state_dict(self.vae.state_dict())
        inner = model.model
        parts = (inner.language_model, inner.generation_embeddings, inner.generation_aligner, inner.generation_head)
        return model.train(), nn.ModuleList(parts)

    def loss(self, model: JanusForConditionalGeneration, rng: random.Random) -> Tensor:
        """The loss of one batch, a scalar."""
        spec, drawn = self.spec, self.drawn
        rows = [(rng.randrange(spec.images), rng.randrange(len(drawn))) for _ in range(spec.train_batch_size)]
        tokens = torch.stack([self.tokens[row] for row in rows]).long()
        captions = [emoji.caption(drawn[i], rng) for _, i in rows]
        inputs = self.processor(text=captions, generation_mode="image", padding=True)
        dropped = torch.tensor([rng.random() < spec.dropout for _ in rows])
        ids = torch.where(dropped[:, None], without_words(inputs.input_ids, self.processor), inputs.input_ids)
        return token_loss(model, ids, inputs.attention_mask, tokens)

    def write(self, model: JanusForConditionalGeneration, out: Path) -> None:
        """The model's folder, in half precision."""
        deepcopy(model).half().save_pretrained(out)
        self.processor.save_pretrained(out)


def without_words(ids: Tensor, processor: JanusProcessor) -> Tensor:
    """Ids of the unconditional prompt: all but the ends are padding, which Janus attends to."""
    tokens = processor.tokenizer
    ends = (ids == tokens.bos_token_id) | (ids == tokens.convert_tokens_to_ids(processor.image_start_token))
    return ids.masked_fill(~ends, tokens.pad_token_id)
