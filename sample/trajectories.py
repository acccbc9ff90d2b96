"""accelerate launch sample/trajectories.py configs/recipes/sd21_agd.yaml

Make the guided trajectories of a config before training, on as many processes as there are. Overrides follow it.
`stepdistill data make --help` says more.
"""

import sys

from stepdistill.cli.main import main

main(["data", "make", *sys.argv[1:]])
