"""Evaluation: sample or read images, measure them, store the results, and report; `stepdistill eval`."""
