"""The code of a student's folder, which is copied into it: it imports torch, Diffusers and transformers."""
