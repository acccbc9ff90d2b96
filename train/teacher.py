"""Train a bundled teacher: `python train/teacher.py configs/teachers/tiny_sd.yaml` (about an hour on one core).

The embedded drawings are packed first where the sheet is missing; that needs `pip install -e '.[teachers]'`.
"""

import argparse

from stepdistill.config.load import load_config
from stepdistill.data.bundled import emoji, teacher

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    if not (emoji.HERE / "emoji.webp").exists():
        emoji.build_sheet()
    print(teacher.train_teacher(load_config(teacher.TeacherSpec, args.config, args.overrides)))
