"""The nodes by which ComfyUI loads a base whose parts are separate files, and those that give empty latents."""

from __future__ import annotations

T5, QWEN, QWEN_VL = "t5xxl_fp16.safetensors", "qwen_3_4b.safetensors", "qwen3vl_4b_bf16.safetensors"
# by layout: the node of the text encoders, its title and its inputs; the file of the autoencoder
APART: dict[str, tuple[str, str, dict[str, str], str]] = {
    "flux": (
        *("DualCLIPLoader", "text encoders"),
        *({"clip_name1": "clip_l.safetensors", "clip_name2": T5, "type": "flux"}, "ae.safetensors"),
    ),
    "klein": (
        *("CLIPLoader", "text encoder: Qwen3 of 4B, or 8B for the base of 9B"),
        *({"clip_name": QWEN, "type": "flux2"}, "flux2-vae.safetensors"),
    ),
    "pixart": ("CLIPLoader", "text encoder", {"clip_name": T5, "type": "pixart"}, "vae.safetensors"),
    # with this type ComfyUI reads a Qwen3 of 4B as Z-Image's
    "z_image": ("CLIPLoader", "text encoder", {"clip_name": QWEN, "type": "lumina2"}, "ae.safetensors"),
    "krea2": ("CLIPLoader", "text encoder", {"clip_name": QWEN_VL, "type": "krea2"}, "qwen_image_vae.safetensors"),
    "qwen_image": (
        *("CLIPLoader", "text encoder"),
        *({"clip_name": "qwen_2.5_vl_7b.safetensors", "type": "qwen_image"}, "qwen_image_vae.safetensors"),
    ),
}
# by layout: the node of the empty latent, and what it takes beside the size
EMPTY: dict[str, tuple[str, dict[str, int]]] = {
    **dict.fromkeys(("sd3", "flux", "z_image"), ("EmptySD3LatentImage", {})),
    "klein": ("EmptyFlux2LatentImage", {}),
    # latents of a video of one frame: `AddNoise` would make 16 frames of an image's 16 channels
    **dict.fromkeys(("qwen_image", "krea2"), ("EmptyHunyuanLatentVideo", {"length": 1})),
}
