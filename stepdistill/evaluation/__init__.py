"""Evaluations: what is drawn or read, measured, kept and shown; `stepdistill eval`."""
