"""Images from teacher and student pipelines."""
