"""The tables, charts and page of an evaluation."""
