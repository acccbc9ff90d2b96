"""Write captioned images to `FOLDER`, from which `tiny-wan` makes videos: `python train/first_frames.py FOLDER`."""

import argparse
from pathlib import Path

from stepdistill.data.bundled.first_frames import write_first_frames

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num", type=int, default=1024, help="images, the tables' prompts in turn")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_first_frames(args.folder, args.num, args.seed)
    print(f"{args.num} images in {args.folder}")
