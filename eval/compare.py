"""python eval/compare.py runs/eval-a runs/eval-b -o comparison.html

Merge evaluations on one page: `stepdistill eval compare`. `--help` says more.
"""

import sys

from stepdistill.cli.main import main

main(["eval", "compare", *sys.argv[1:]])
