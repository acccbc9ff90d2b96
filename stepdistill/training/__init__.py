"""A run: its recipe, checks, set-up, loop and end."""
