"""Autoregressive image models in one to three calls: Distilled Decoding, https://arxiv.org/abs/2412.17153.

Experimental. A config with `teacher` in the place of `family` is a run of it, for the same commands.
"""
