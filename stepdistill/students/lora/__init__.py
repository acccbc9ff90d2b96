"""A student's LoRA in the formats of Diffusers, kohya and ComfyUI."""
