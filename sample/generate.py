"""python sample/generate.py runs/quickstart "cat face" rose --grid sheet.png

Draw with a student folder: `stepdistill generate`. `--help` says more.
"""

import sys

from stepdistill.cli.main import main

main(["generate", *sys.argv[1:]])
