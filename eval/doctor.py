"""python eval/doctor.py

Say which features can be used here without a download: `stepdistill eval doctor`. `--help` says more.
"""

import sys

from stepdistill.cli.main import main

main(["eval", "doctor", *sys.argv[1:]])
