"""LoRA files: the names that each format has for the layers, and the reader of them all."""
