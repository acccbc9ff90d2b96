"""Metrics as functions on tensors: feature extractors, Frechet distances, diversity, cost."""
