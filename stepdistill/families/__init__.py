"""One Diffusers pipeline family a file: load, encode, call, LoRA targets, sample, save."""
