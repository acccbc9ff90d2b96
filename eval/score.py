"""python eval/score.py samples/ --ref reference.npz -o runs/eval

Measure images that are there: `stepdistill eval score`. `--help` says more.
"""

import sys

from stepdistill.cli.main import main

main(["eval", "score", *sys.argv[1:]])
