"""python eval/ref.py coco/val2014 --features inception --eval-res 256 -o coco.npz

Make statistics of images: `stepdistill eval ref`. `--help` says more.
"""

import sys

from stepdistill.cli.main import main

main(["eval", "ref", *sys.argv[1:]])
