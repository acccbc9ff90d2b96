"""Embeddings and latents that are kept on disk."""
