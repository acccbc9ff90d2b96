"""The mathematics of diffusion and distillation, and helpers for all other packages. It imports no network library."""
