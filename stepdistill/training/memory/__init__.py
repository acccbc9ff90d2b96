"""Memory prediction of a run, by role, before anything is loaded."""
