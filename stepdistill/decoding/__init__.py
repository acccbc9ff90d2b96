"""Autoregressive image models in one to three calls (experimental): Distilled Decoding, arXiv 2412.17153."""
