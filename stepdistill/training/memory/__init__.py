"""What a run needs of memory, by role, before anything of it is loaded."""
