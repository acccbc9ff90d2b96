"""Every field of `train` and `lora` changes what it is said to, and nothing else that is seen here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracles.toy import Turns, optimizers, step, weights

from stepdistill.config.schema import Factory, fields
from stepdistill.core.errors import ConfigError
from stepdistill.data import Prompts
from stepdistill.families.sd import StableDiffusion
from stepdistill.methods.dmd2 import DMD2
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.lora_layers import LoraLinear
from stepdistill.networks.roles import Lora, LoraSpec, RoleLora
from stepdistill.training import batches, distill, finish, loop, resume, sampling, setup
from stepdistill.training.cache.keys import Keys
from stepdistill.training.checks import check_output_dir
from stepdistill.training.finish import reference_file
from stepdistill.training.recipe import Run, TrainSpec

CPU = torch.device("cpu")
PROMPTS = Prompts(prompts=tuple("abcdefgh"))
Patch = pytest.MonkeyPatch


def run_of(spec: TrainSpec, **more: Any) -> Run:
    family = StableDiffusion(pretrained_teacher_model="none")
    return Run(family=family, method=DMD2(guidance_scale=3.0), data=PROMPTS, train=spec, **more)


class Log(list[tuple[Any, ...]]):
    """What was called, with what."""

    def note(self, *name: Any, result: Any = None) -> Callable[..., Any]:
        """A function that is noted with its arguments, as far as these are plain."""

        def call(*args: Any, **kwargs: Any) -> Any:
            given = [value for value in (*args, *kwargs.items()) if isinstance(value, str | int | float | tuple | Path)]
            self.append((*name, *map(str, given)))
            return result

        return call


# --- what is seen ----------------------------------------------------------------------------------------------------


def learned(spec: TrainSpec, patch: Patch) -> list[float]:
    """The weights of a toy after four steps."""
    method = Turns()
    team = optimizers(method, **{name: value for name, value in vars(spec).items()})
    for number in range(4):
        step(method, team, number)
    return torch.cat([weights(team, role) for role in ("student", "fake")]).tolist()


def started(spec: TrainSpec, patch: Patch) -> Log:
    """How a process begins, and how the teacher is loaded and placed."""
    log = Log()
    state = SimpleNamespace(num_processes=1, is_main_process=True, device=CPU, mixed_precision="no")
    patch.setattr(setup, "Accelerator", log.note("accelerator", result=state))
    patch.setattr(setup, "set_seed", log.note("seed"))
    net = SimpleNamespace(enable_xformers_memory_efficient_attention=log.note("xformers"))
    family: Any = SimpleNamespace(network=lambda pipe: net, load=log.note("load"), network_name="unet")
    names = ("check_processes", "shard")
    patch.setattr(setup, "sharding", SimpleNamespace(**{name: log.note(name) for name in names}))
    for name in ("warn_of_licence", "base_of", "cache_keys"):
        patch.setattr(setup, name, lambda *_: None)
    patch.setattr(setup, "LazyPipeline", log.note("placed"))
    patch.setattr(setup, "session_of", lambda *_: SimpleNamespace(backbone=None, shards=None))
    before = torch.backends.cuda.matmul.allow_tf32
    setup.prepare(replace(run_of(spec), family=family))
    log.append(("tf32", torch.backends.cuda.matmul.allow_tf32))
    torch.backends.cuda.matmul.allow_tf32 = before
    return log


def read(spec: TrainSpec, patch: Patch) -> Log:
    """The batches of two steps, and where they come from."""
    log, original = Log(), batches.loader

    def loader(stream: Any, start: int, places: Any, workers: int, seed: int) -> Iterator[Any]:
        log.append(("workers", workers))
        return original(stream, start, places, 0, seed)

    patch.setattr(batches, "loader", loader)
    family: Any = SimpleNamespace(
        condition=lambda pipe, prompts: {"mean": torch.zeros(len(prompts), 1)},
        latent_shape=lambda pipe, height, width: (1, height, width),
        native_size=lambda pipe: (64, 64),
        scale_factor=lambda pipe: 8,
        ragged=False,
    )
    patch.setattr(batches, "warn_of_cut", lambda *_: True)
    parts: Any = SimpleNamespace(family=family, pipe=SimpleNamespace(), text=log.note("text"))
    made = batches.Batches(parts, spec, Keys(), CPU)
    log.append(("folder", str(made.folder)))
    for micro_batches in islice(made.steps(PROMPTS, 0, 0, 1), 2):
        log.append(("step", *((batch.index, batch.prompts, batch.shape) for batch in micro_batches)))
    images: Any = SimpleNamespace(provides={"images"}, digest=lambda: "digest")
    patch.setattr(batches, "FixedCrops", lambda source: images)
    made.fixed(images)
    log.append(("latents are kept", made.latents is not None))
    return log


def looped(spec: TrainSpec, patch: Patch) -> Log:
    """The events of the loop: what is set up, saved, rotated and drawn, and when."""
    log = Log()
    net = SimpleNamespace(compile=log.note("compile"))
    bone = SimpleNamespace(enable_checkpointing=log.note("checkpointing"), assisted=nullcontext, net=net, declared={})
    state: Any = SimpleNamespace(
        is_main_process=True, device=CPU, process_index=0, num_processes=1, init_trackers=log.note("tracker")
    )
    feed = SimpleNamespace(steps=lambda *_: (each for each in repeat([])))
    session: Any = SimpleNamespace(
        run=run_of(spec), accelerator=state, backbone=bone, batches=feed, global_batch=1, context=lambda _: None
    )
    session.leading = lambda: nullcontext(True)
    team: Any = SimpleNamespace(
        fingerprint=dict, by_role={"student": None}, state=dict, scaler=torch.amp.GradScaler("cpu", enabled=False)
    )
    patch.setattr(loop, "restore", lambda *_: 0)
    patch.setattr(loop, "open_folder", lambda *_: None)
    patch.setattr(loop, "banner", lambda *_: "")
    patch.setattr(loop, "Logs", lambda *_: SimpleNamespace(write=lambda *_: None))
    patch.setattr(loop, "train_step", lambda *_: {})
    patch.setattr(loop, "draw_validation", log.note("validation"))
    patch.setattr(resume, "session_facts", lambda _: {})
    patch.setattr(resume, "save_checkpoint", lambda out, *_: not log.append(("save", str(out))))
    patch.setattr(resume, "rotate", log.note("rotate"))
    watch = SimpleNamespace(look=lambda step: False)
    patch.setattr(loop, "Watch", lambda *_: log.append(("watch",)) or watch)
    log.append(("finished", loop.training_loop(session, team)))
    return log


def drawn(spec: TrainSpec, patch: Patch) -> Log:
    """What validation images start from, and how the teacher samples them."""
    log = Log()
    feed = SimpleNamespace(shape=(1, 1, 1), shape_at=lambda size: (1, 1, 1))
    session: Any = SimpleNamespace(run=run_of(spec), batches=feed, accelerator=SimpleNamespace(device=CPU))
    teacher = SimpleNamespace(sample=log.note("teacher"))
    patch.setattr(sampling, "TeacherSampler", lambda *_: teacher)
    patch.setattr(sampling, "noise_of", log.note("noise", result=torch.zeros(1)))
    sampling.sample_teacher(session, ["a"], [0])
    return log


def finished(spec: TrainSpec, patch: Patch) -> Log:
    """What the end of a run writes, measures and uploads, and where."""
    log = Log()
    for name in ("write_student", "export_formats", "_show"):
        patch.setattr(finish, name, log.note(name, result={}))
    for name in ("remove_formats", "_print", "write_card", "read_contract"):
        patch.setattr(finish, name, lambda *_, **__: None)
    repo = SimpleNamespace(repo_id="repo")
    hub = SimpleNamespace(create_repo=log.note("repo", result=repo), upload_folder=log.note("upload"))
    patch.setattr(finish, "HfApi", lambda: hub)
    run = run_of(spec)
    feed = SimpleNamespace(size=(8, 8), sizes_of=lambda *_: SimpleNamespace(sizes=((8, 8),)))
    state = SimpleNamespace(num_processes=1)
    session = setup.Session(run, state, *[None] * 4, feed, run.method)  # pyright: ignore
    finish.finish_run(session)
    try:
        log.append(("reference", reference_file(spec).name))
    except ConfigError:
        log.append(("reference", None))
    return log


def checked(spec: TrainSpec, patch: Patch) -> Log:
    """Whether a folder that holds a run is taken, and whether that run is resumed."""
    log, folder = Log(), Path(spec.output_dir)
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").touch()
    log.append(("resumed", resume.is_resumed(run_of(spec))))
    try:
        check_output_dir(run_of(spec))
        log.append(("taken",))
    except ConfigError:
        log.append(("refused",))
    return log


SEEN: dict[str, Callable[[TrainSpec, Patch], Any]] = {
    each.__name__: each for each in (learned, started, read, looped, drawn, finished, checked)
}

# --- the fields ------------------------------------------------------------------------------------------------------

WATCHED = {"validation_prompts": ("a",), "validation_steps": 2}
# field: another value, where that is seen, and what else is set before and after
TRAIN: dict[str, tuple[Any, str] | tuple[Any, str, dict[str, Any]]] = {
    "output_dir": ("other", "started looped finished"),
    "seed": (5, "learned started read finished"),
    "max_train_steps": (5, "looped learned", {"lr_scheduler": "linear"}),
    "train_batch_size": (2, "read"),
    "gradient_accumulation_steps": (2, "read"),
    "learning_rate": (0.5, "learned"),
    "lr_scheduler": ("cosine", "learned"),
    "lr_warmup_steps": (3, "learned", {"lr_scheduler": "linear"}),
    "optimizer": (Factory("torch.optim.AdamW", {}), "learned"),
    "optimizers": ({"fake": Factory("torch.optim.SGD", {"lr": 0.1})}, "learned"),
    "max_grad_norm": (0.5, "learned"),
    "mixed_precision": ("bf16", "started"),
    "gradient_checkpointing": (True, "looped"),
    "shard_base": (True, "started"),
    "torch_compile": (True, "looped"),
    "allow_tf32": (True, "started"),
    "enable_xformers_memory_efficient_attention": (True, "started"),
    "resolution": (96, "read"),
    "resolution_weights": ((1e-9, 1.0), "read", {"resolution": ((64, 64), (96, 32))}),
    "cache_latents": (True, "read"),
    "cache_dir": ("cache", "started read"),
    "dataloader_num_workers": (3, "read"),
    "checkpointing_steps": (2, "looped"),
    "checkpoints_total_limit": (3, "looped"),
    "resume_from_checkpoint": ("latest", "checked"),
    "overwrite_output_dir": (True, "checked"),
    "report_to": ("wandb", "started"),
    "tracker_project_name": ("name", "looped"),
    "validation_prompts": (("a", "b"), "looped finished", {"validation_steps": 2}),
    "validation_steps": (2, "looped", {"validation_prompts": ("a",), "watch_samples": 0}),
    "validation_seed": (7, "drawn"),
    "teacher_steps": (20, "drawn"),
    "teacher_guidance_scale": (5.0, "drawn"),
    "watch_samples": (0, "looped", WATCHED),
    "eval_samples": (40, "finished"),
    "eval_reference": ("here.safetensors", "finished"),
    "export_formats": (("kohya",), "finished"),
    "push_to_hub": (True, "finished"),
    "hub_model_id": ("me/it", "finished", {"push_to_hub": True}),
}
ELSEWHERE = {
    "watch_stop": "test_watch.py: test_it_asks_to_stop_at_an_alarm_and_looks_once_at_a_step",
    "validation_images": "test_image_to_video.py: test_a_validation_image_is_what_the_videos_begin_with",
    "assistant": "test_assistant_runs.py: test_it_is_on_in_training_steps_and_nowhere_else",
}


def test_every_field_of_train_is_here():
    assert sorted(fields(TrainSpec)) == sorted([*TRAIN, *ELSEWHERE])
    for where in ELSEWHERE.values():
        file, test = where.split(": ")
        assert f"def {test}(" in (Path(__file__).parent / file).read_text()


@pytest.mark.parametrize("name", TRAIN)
def test_a_field_of_train_changes_what_it_is_said_to(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("here.safetensors").touch()
    value, where, *more = TRAIN[name]
    toy = {"optimizer": Factory("torch.optim.SGD", {}), "learning_rate": 1.0, "max_grad_norm": None}
    base = TrainSpec(**{"output_dir": "out", "max_train_steps": 4, "report_to": "none"} | toy | (more or [{}])[0])
    seen = []
    for spec in (base, replace(base, **{name: value})):
        seen.append({})
        for what, see in SEEN.items():
            with monkeypatch.context() as patch:
                seen[-1][what] = see(spec, patch)
    assert {what for what in SEEN if seen[0][what] != seen[1][what]} == set(where.split())


# --- lora ------------------------------------------------------------------------------------------------------------

LORA = {
    "rank": 3,
    "alpha": 5.0,
    "target_modules": ("to_v",),
    "roles": {"student": RoleLora(alpha=3.0)},
    "init_from": "folder",
    "arithmetic": "apart",
}


def test_every_field_of_lora_is_here():
    assert sorted(fields(LoraSpec)) == sorted(LORA)
    assert set(fields(RoleLora)) == set(LORA) - {"roles", "arithmetic"}


def wanted(spec: LoraSpec, monkeypatch: Patch) -> dict[str, Any]:
    """The PEFT config of each role, what the student starts from, and how the layers compute."""
    net = torch.nn.ModuleDict({"to_q": torch.nn.Linear(2, 2), "to_v": torch.nn.Linear(2, 2)})
    bone = Backbone(net, spec, ("to_q", "to_v"))
    for role in ("student", "fake"):
        bone.add(role, Lora())
    seen = {role: bone.lora_config(role) for role in ("student", "fake")}
    begun = Log()
    session: Any = SimpleNamespace(backbone=bone, shards=None, batches=SimpleNamespace(save=lambda: None))
    session.accelerator = SimpleNamespace(end_training=lambda: None)
    session.base = SimpleNamespace(hashes={})
    session.scaler = torch.amp.GradScaler("cpu", enabled=False)
    for name in ("check_run", "find_source", "check_loaded", "check_same", "make_data"):
        monkeypatch.setattr(distill, name, lambda *_: None)
    monkeypatch.setattr(distill, "prepare", lambda _: session)
    monkeypatch.setattr(distill, "start_from", begun.note("start"))
    monkeypatch.setattr(distill, "training_loop", lambda *_: False)
    bone.declared.clear()
    monkeypatch.setattr(distill.Optimizers, "declare", lambda self, method: self)
    distill.distill(run_of(TrainSpec(output_dir="out"), lora=spec))
    return seen | {"start": begun, "layers": {m.arithmetic for m in net.modules() if isinstance(m, LoraLinear)}}


@pytest.mark.parametrize("name", LORA)
def test_a_field_of_lora_changes_what_it_is_said_to(name, monkeypatch):
    """Of both roles, unless it is given for one; an override changes that role alone."""
    base = LoraSpec(rank=2)
    before, after = (wanted(spec, monkeypatch) for spec in (base, replace(base, **{name: LORA[name]})))
    assert not before["start"]
    where = {"roles": {"student"}, "init_from": {"start"}, "arithmetic": {"layers"}}.get(name, {"student", "fake"})
    assert {key for key in before if before[key] != after[key]} == where
    if name in fields(RoleLora):
        own = wanted(replace(base, roles={"fake": RoleLora(**{name: LORA[name]})}), monkeypatch)
        assert own["student"] == before["student"] and own["fake"] == after["fake"]
        assert own["start"] == ([("start", "folder", "fake")] if name == "init_from" else [])
