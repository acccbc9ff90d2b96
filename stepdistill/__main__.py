"""`python -m stepdistill`, which is also what `accelerate launch -m stepdistill` runs."""

from stepdistill.cli import main

main()
