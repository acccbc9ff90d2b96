"""Make a config's guided trajectories, or teacher samples, before training: on as many machines as there are.

    accelerate launch sample/trajectories.py configs/recipes/sd21_agd.yaml

Overrides follow the config, as for training. Started again, it goes on where it was cut; training then finds all of
it. Each process makes every n-th file, and any number of processes makes the same files.
"""

import argparse
import sys

from stepdistill import config
from stepdistill.errors import StepdistillError
from stepdistill.run import Run, fill
from stepdistill.stage import prepare

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config whose data the teacher makes")
    args, overrides = parser.parse_known_args()
    try:
        stage = prepare(config.load(Run, args.config, overrides))
        fill(stage)
        stage.feed.save()
        stage.accelerator.end_training()
    except StepdistillError as error:
        print(f"stepdistill: {error}", file=sys.stderr)
        raise SystemExit(2) from None
