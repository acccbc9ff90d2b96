"""A student of an autoregressive image model, which writes all tokens of an image in one to three calls.

It opens by `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`. Written by stepdistill; it needs torch,
Diffusers and transformers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor


class OneStepPipeline(DiffusionPipeline):
    """Draws images of prompts.

    Args:
        language_model: LlamaModel, which reads prompts and vectors.
        heads: the student's own layers.
        vqmodel: JanusVQVAE, which decodes codes.
        processor: JanusProcessor.
        keeps: how many tokens are known in the calls that the student was trained for, from 0.
        split: places from which on values are decoded in the place of codes; none decodes codes alone.
        max_sequence_length: tokens of a prompt at most.
    """

    def __init__(
        self,
        language_model: Any,  # noqa: ANN401
        heads: Any,  # noqa: ANN401
        vqmodel: Any,  # noqa: ANN401
        processor: Any,  # noqa: ANN401
        keeps: Sequence[int] = (0,),
        split: int | None = None,
        max_sequence_length: int = 256,
    ) -> None:
        super().__init__()
        self.register_modules(language_model=language_model, heads=heads, vqmodel=vqmodel, processor=processor)
        self.register_to_config(keeps=list(keeps), split=split, max_sequence_length=max_sequence_length)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d) of an image's noise."""
        rows, columns = self.vqmodel.quantize.quant_state_dims
        return rows * columns, self.heads.codebook.shape[1]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Images of prompts.

        Args:
            num_inference_steps: calls of the network; the first ones of `keeps`.
            generator: of the noise, one for each image or one for all.
            noise: (B, n, d), in its place.
            output_type: "pil", "pt" (B, 3, H, W) in [0, 1], "np", or "tokens" (B, n).
        """
        steps = len(self.config["keeps"])
        if not 1 <= num_inference_steps <= steps:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}: expected 1 to {steps}, the calls that this student was "
                "trained for"
            )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        repeated = [text for text in prompts for _ in range(num_images_per_prompt)]
        text, mask = self.read(repeated)
        if noise is None:
            noise = self.draw_noise(len(text), generator)
        elif noise.shape != (len(text), *self.shape):
            raise ValueError(f"noise is {tuple(noise.shape)}: expected {(len(text), *self.shape)}")
        noise = noise.to(self.device, torch.float32)
        tokens, values = self.heads.decode(
            self.language_model, text, mask, noise, self.config["keeps"][:num_inference_steps]
        )
        images = self.images(tokens, values, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def read(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, P, width) of prompts, and their mask (B, P); see `read_prompts`."""
        asked = read_prompts(self.processor, prompts, self.config["max_sequence_length"])
        ids, mask = (each.to(self.device) for each in asked)
        return self.language_model.get_input_embeddings()(ids), mask

    def images(self, tokens: Tensor, values: Tensor, output_type: str = "pil") -> Any:  # noqa: ANN401
        """Images of tokens (B, n) and values (B, n, d), of the types that a call has."""
        if output_type == "tokens":
            return tokens
        vectors = self.heads.codebook[tokens]
        if self.config["split"] is not None:
            vectors[:, self.config["split"] :] = values[:, self.config["split"] :]
        return VaeImageProcessor().postprocess(pixels_of_vectors(self.vqmodel, vectors), output_type=output_type)

    def draw_noise(self, rows: int, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        """Standard normal (B, n, d), drawn where the generators are."""
        if not isinstance(generator, list):
            device = "cpu" if generator is None else generator.device
            return torch.randn(rows, *self.shape, generator=generator, device=device)
        if len(generator) != rows:
            raise ValueError(f"{len(generator)} generators for {rows} images: expected one for each")
        return torch.stack([torch.randn(self.shape, generator=each, device=each.device) for each in generator])


def read_prompts(processor: Any, prompts: Sequence[str], most: int) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Token ids (B, P) of prompts, padded on the left, and their mask; the last one begins the image.

    Raises ValueError for a prompt of more than `most` tokens.
    """
    texts = list(prompts)
    if processor.chat_template:
        talks = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in texts]
        texts = [processor.apply_chat_template(talk, add_generation_prompt=True) for talk in talks]
    inputs = processor(text=texts, generation_mode="image", padding=True)
    lengths = inputs.attention_mask.sum(1)
    if (lengths > most).any():
        i = int(lengths.argmax())
        raise ValueError(f"a prompt of {int(lengths[i])} tokens, {prompts[i][:40]!r}: expected at most {most}")
    return inputs.input_ids, inputs.attention_mask


def pixels_of_vectors(vqmodel: Any, vectors: Tensor) -> Tensor:  # noqa: ANN401
    """Images (B, 3, H, W) in [-1, 1], not clamped, of codes or other vectors (B, n, d)."""
    grid = vectors.transpose(1, 2).unflatten(2, tuple(vqmodel.quantize.quant_state_dims))
    return vqmodel.decoder(vqmodel.post_quant_conv(grid))
