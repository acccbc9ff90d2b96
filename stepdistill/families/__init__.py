"""One module per Diffusers pipeline family: load, encode, call, LoRA targets, sample, save."""
