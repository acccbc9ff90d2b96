"""The student folder: its contract, files, proof and card, and image generation with it."""
