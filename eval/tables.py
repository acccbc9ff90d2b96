"""Measure the tables of README and docs: `python eval/tables.py consistency`, then `python eval/tables.py --render`.

A table is resumed row by row: what `eval/results/NAME.json` holds already is not measured again. The embedded
benchmark: R is the teacher at full steps with seeds A, the floor F the same with seeds B against R, every row uses
seeds B, and excess = FD(row, R) - F with a 20-block jackknife interval, N images over the table's prompts.
"""

import argparse
import json
import sys
from itertools import chain
from pathlib import Path

from tables import plots, render
from tables.measure import OTHERS, TABLES, TEACHERS, measure

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=sorted(TABLES))
    parser.add_argument("--render", action="store_true", help="write the tables into README.md and docs/")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--teacher", choices=[*TEACHERS, *chain(*OTHERS.values())], help="only this one")
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="only these students, as lcm or dmd2")
    args = parser.parse_args()
    results = Path(__file__).parent / "results"
    if args.name:
        measure(args.name, results, args.threads, args.teacher, args.rows)
    if args.render:
        for name, draw in plots.PLOTS.items():
            if (file := results / f"{name}.json").exists():
                draw(json.loads(file.read_text()), file.with_suffix(".png"))
        for document in render.documents(Path(__file__).parent.parent):
            document.write_text(render.render(document.read_text(), results))
    if not (args.name or args.render):
        parser.print_help(sys.stderr)
        raise SystemExit(2)
