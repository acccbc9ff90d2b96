"""What measures the tables of README and documentation, and renders them: `python eval/tables.py NAME`."""
