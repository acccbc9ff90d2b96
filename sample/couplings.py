"""accelerate launch sample/couplings.py configs/recipes/sd21_reflow.yaml

Make the couplings of a config, pairs of noise and the teacher's image, before training, on as many processes as there
are. Overrides follow it. `stepdistill data make --help` says more.
"""

import sys

from stepdistill.cli.main import main

main(["data", "make", *sys.argv[1:]])
