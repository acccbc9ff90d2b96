"""Caches of prompt embeddings and image latents, in memory and on disk."""
