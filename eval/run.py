"""accelerate launch eval/run.py tiny-sd runs/quickstart --num-images 256 --teacher-steps 25 -o runs/eval

Draw a teacher and its students, measure them, and write the report: `stepdistill eval run`. `--help` says more.
"""

import sys

from stepdistill.cli.main import main

main(["eval", "run", *sys.argv[1:]])
