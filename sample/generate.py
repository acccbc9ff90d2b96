"""Draw with a student folder: `python sample/generate.py runs/quickstart "cat face" rose --out student.png`.

The folder's own sampling contract says how many steps, which noise levels and which scheduler. Of a folder of several
students each draws the prompts that the router sends to it.
"""

import argparse

from stepdistill import multi, student
from stepdistill.contract import is_multi, read_multi
from stepdistill.evaluate import Row, generate, grid

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a student folder")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="student.png")
    args = parser.parse_args()
    contract = (read_multi if is_multi(args.folder) else student.read_contract)(args.folder)
    family = student.teacher(contract)
    pipe = family.load()
    loaded = student.load_student(pipe, args.folder)
    if is_multi(args.folder):
        pictures, cost = multi.generate_each(loaded, args.prompts, args.seed)
    else:
        for size in ("height", "width"):  # `generate` draws at the network's own size
            loaded.pop(size, None)
        pictures, cost = generate(pipe, Row("student", pipe.scheduler, loaded, family), args.prompts, args.seed)
    grid([("student", pictures)], args.prompts, max(1, 96 // pictures.shape[-1])).save(args.out)
    print(f"{args.out}: {cost.calls} calls, {cost.seconds:.2f} s")
