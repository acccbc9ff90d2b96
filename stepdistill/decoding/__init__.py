"""Autoregressive image models in one to three calls: Distilled Decoding, https://arxiv.org/abs/2412.17153.

Experimental: `distill_decoder` trains a student and writes its folder; the commands do not know it yet.
"""
