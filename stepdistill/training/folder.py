"""The folder of a run: what is written in it, and what of that may be there already."""

from __future__ import annotations

from os.path import exists
from pathlib import Path

from stepdistill.config.dump import config_to_yaml
from stepdistill.core import distributed
from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.files import remove, write_text
from stepdistill.core.outputs import check_output_folder, check_output_tree, is_in, present_in
from stepdistill.data import inside
from stepdistill.data.made import TeacherMade
from stepdistill.data.routing import ROUTER
from stepdistill.students.contract import ADAPTERS, CONTRACT, WEIGHTS
from stepdistill.students.lora.comfyui import WORKFLOW
from stepdistill.training.checkpoint import MANIFEST, checkpoints, put_aside, step_of
from stepdistill.training.resume import AnyRun, AnySession, is_resumed

METRICS = "metrics.jsonl"
WRITTEN = (  # patterns; a tracker's folder is left out, since trackers add files and replace none
    *(
        METRICS,
        "config.yaml",
        "checkpoint-[0-9]*",
        "best",
        "samples",
        "watch.json",
        "rewards.json",
        "non_finite.pt",
        "eval.json",
    ),
    *(CONTRACT, WEIGHTS, ADAPTERS, ROUTER, WORKFLOW, "README.md", "scheduler", "unet", "transformer"),
    *(f"*_{'[0-9a-f]' * 8}_{to}.safetensors" for to in ("kohya", "comfyui")),
    *("model_index.json", "pipeline.py", "language_model", "heads", "vqmodel", "processor"),  # of a decoder
)


def check_output_dir(run: AnyRun) -> None:
    """The folder can be written to, is no input, and holds nothing, or a run that is resumed or overwritten."""
    out, spec = Path(run.train.output_dir), run.train
    check_output_folder(out)
    if is_resumed(run) and checkpoints(out):
        return
    own = any((out / name).exists() for name in (METRICS, CONTRACT)) or any(out.glob(f"checkpoint-*/{MANIFEST}"))
    if own and not spec.overwrite_output_dir and not is_resumed(run):
        got = f"train.output_dir {out}, which holds another run"
        why = "its student and checkpoints would be overwritten"
        todo = "resume with --resume_from_checkpoint latest, restart with --overwrite_output_dir, or set another"
        raise ConfigError(problem(got, "an empty or new folder", why, todo))
    check_output_tree(out, WRITTEN, run.inputs, own, overwrite=True)


def check_data_folders(run: AnyRun) -> None:
    """What the teacher has yet to make can be written."""
    for source in inside(run.data):
        if isinstance(source, TeacherMade) and not all(map(exists, source.files)):
            check_output_folder(source.path)


def open_folder(session: AnySession, source: Path | None) -> None:
    """Write the config into the run's folder, now that the checkpoint is loaded.

    What an overwritten run wrote is removed, and checkpoints later than `source` are renamed.
    """
    out = Path(session.run.train.output_dir)
    if session.accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        if source is None or source.resolve().parent != out.resolve():
            for place in present_in(out, WRITTEN):  # `check_output_dir` let only an overwritten folder pass
                if not any(is_in(Path(source), place) for source in session.run.inputs):  # such as data just made
                    remove(place)
        else:
            for old in checkpoints(out):
                if step_of(old) > step_of(source):
                    put_aside(old)
        (out / METRICS).touch()  # first: by it a run that dies from here on is known as one
        write_text(out / "config.yaml", config_to_yaml(session.run).rstrip("\n"))
    distributed.barrier()
