"""Images by teacher and student pipelines."""
