"""The student folder: its contract, files, proof and card, and drawing with it."""
