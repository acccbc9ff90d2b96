"""The maths of diffusion and distillation, and what every room needs. It loads no network library."""
