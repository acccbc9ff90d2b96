"""Commands of the `stepdistill` command line, one a file; `stepdistill.cli.main` declares them."""
