"""Training runs: recipe, checks, setup, loop and final export."""
