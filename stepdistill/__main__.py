"""`python -m stepdistill`, which is also what `accelerate launch -m stepdistill` runs."""

from stepdistill.cli.main import main

main()
