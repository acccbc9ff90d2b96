"""accelerate launch train/distill.py configs/quickstart.yaml

Distil the teacher of a config into a few-step student. Overrides follow it: `train.seed=1`, `--max-train-steps 400`.
`--dry-run` stops at the resolved config and the memory it needs; `--help` says more.
"""

import sys

from stepdistill.cli.main import main

main(["train", *sys.argv[1:]])
