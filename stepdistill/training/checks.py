"""Checks of a run: some before anything is loaded, one after the teacher is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from stepdistill.config.schema import locate
from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.outputs import check_output_folder
from stepdistill.core.schedule import NoiseSchedule
from stepdistill.core.solvers import Sampler
from stepdistill.data import Source, Stream, Trajectories, inside
from stepdistill.data.made import TeacherMade
from stepdistill.families.controlled import Controlled
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.methods.base import Method
from stepdistill.networks.lora.names import OUTSIDE
from stepdistill.networks.lora.tensors import FAMILIES
from stepdistill.networks.roles import Copy, Ema, Lora
from stepdistill.students.draw.call import teacher_call
from stepdistill.students.lora.files import warn_of_ignored
from stepdistill.students.proof import check_sampling
from stepdistill.training.derivative import check_derivative
from stepdistill.training.finish import load_reference, reference_file
from stepdistill.training.folder import check_data_folders, check_output_dir
from stepdistill.training.lora_checks import check_assistant, check_loras, check_start_from
from stepdistill.training.recipe import Run
from stepdistill.training.resume import AnyRun
from stepdistill.training.setup import Session
from stepdistill.training.size_checks import check_size_list, check_sizes_fit
from stepdistill.training.video_checks import (
    check_clip_frames,
    check_clip_lengths,
    check_first_frame_size,
    check_first_frames,
    provided,
)

logger = logging.getLogger(__name__)


def check_run(run: Run) -> None:
    """Raise ConfigError for the first problem that can be detected before anything is loaded."""
    for check in CHECKS:
        check(run)


def check_loaded(session: Session) -> None:
    """Raise ConfigError for problems that need the teacher's pipeline, before anything is generated or trained."""
    run, schedule = session.run, session.schedule
    check_sizes_fit(session)
    check_first_frame_size(session)
    check_noise_process(run, schedule)
    check_derivative(session)
    sampler = run.method.sampler(schedule)
    check_sampling(run.family, session.pipe, sampler)
    for reward in (*run.method.trained_rewards, run.method.held_out):
        if reward is not None:  # its weights may not be there
            reward.load(session.accelerator.device)
    check_guidance_range(run.data, sampler)
    if run.train.validation_prompts or run.train.eval_samples:
        teacher_call(run.family, session.pipe, run.train.teacher_steps, 1.0, "teacher")
    if run.train.eval_samples:
        load_reference(run, session.base.hashes["float32"])


def check_cache_dir(run: Run) -> None:
    """`train.cache_dir` can be written to."""
    if run.train.cache_dir:
        check_output_folder(Path(run.train.cache_dir))


def check_scheduler(run: Run) -> None:
    """The method runs on the teacher's noise process, where that is known without loading."""
    scheduler = run.family.load_scheduler()
    if scheduler is not None:
        check_noise_process(run, run.family.schedule(scheduler))


def check_noise_process(run: Run, schedule: NoiseSchedule) -> None:
    """The method runs on this noise process, and the teacher can make the data on it."""
    try:
        run.method.check(schedule)
    except ValueError as error:
        raise ConfigError(f"method: {error}") from error
    for source in inside(run.data):
        if isinstance(source, TeacherMade):
            try:
                schedule.grid(source.num_inference_steps)
            except ValueError as error:
                raise ConfigError(f"num_inference_steps of {type(source).__name__}: {error}") from error


def check_sharding(run: Run) -> None:
    """A base that is sharded is not quantised, and no role is a network of its own."""
    if not run.train.shard_base:
        return
    if run.family.quantization is not None:
        why = "quantized tensors cannot be split and gathered, and the combination is untested"
        got = "train.shard_base with family.quantization"
        raise ConfigError(problem(got, "one of the two", why, "disable one of them"))
    for name, role in run.method.roles().items():
        if isinstance(role, Copy):
            got = f"train.shard_base with role {name!r}, a whole network"
            why = (
                "every process would hold it whole, in float32, with gradients and optimizer states, many times "
                "the memory that sharding saves"
            )
            todo = "set train.shard_base to false, or choose a method whose student is a LoRA"
            raise ConfigError(problem(got, "roles that are LoRAs, adapters or heads on the base", why, todo))


def check_needs(source: Source, method: Method) -> None:
    """The source provides what the method needs."""
    missing = method.needs - provided(source)
    if missing:
        got = f"a {type(source).__name__} source, which provides {sorted(provided(source))}"
        why = f"{type(method).__name__} trains on them"
        todo = (
            "use stepdistill.data.Trajectories around your prompts"
            if "trajectories" in missing
            else "use an image source, or stepdistill.data.TeacherSamples around your prompts"
        )
        raise ConfigError(problem(got, f"one that provides {sorted(missing)}", why, todo))


def check_data(run: Run) -> None:
    """The source provides what the method needs, and has an index that reads."""
    check_needs(run.data, run.method)
    for source in inside(run.data):
        len(source)  # reads the index, also of a source that the teacher's samples are wrapped around
    Stream(run.data, 1, run.train.seed)


def check_control(run: Run) -> None:
    """The samples have the images that a ControlNet sees, and the function that computes its input is there."""
    if not isinstance(run.family, Controlled) or run.family.controlnet is None:
        return
    locate(run.family.control)
    if "latents" not in provided(run.data):
        got, why = f"family.controlnet with a {type(run.data).__name__} source", "control images are computed from them"
        todo = "use an image source or stepdistill.data.TeacherSamples, or remove family.controlnet"
        raise ConfigError(problem(got, "one that provides images or latents", why, todo))


def check_reference_file(run: Run) -> None:
    """The features that the student is compared with are there."""
    if run.train.eval_samples:
        reference_file(run.train)


def check_export_formats(run: Run) -> None:
    """The student can be written in the formats that are asked for."""
    formats = run.train.export_formats
    if not formats:
        return
    roles, name = run.method.roles(), run.method.student_role()
    while isinstance(role := roles[name], Ema):
        name = role.of
    layout = run.family.lora_layout()
    missing = [to for to in formats if layout.family not in FAMILIES[to]]
    if missing or not isinstance(role, Lora):
        got = f"train.export_formats {list(formats)}"
        why = f"{missing[0]} does not support {layout.family}" if missing else "only a LoRA has other formats"
        raise ConfigError(problem(got, "formats that the student can be written in", why, "remove them"))
    if "kohya" in formats:
        targets = run.lora.of(name).target_modules or ()
        outside = OUTSIDE.get(layout.family or "", ())
        ignored = [name for name in outside if any(f".{name}".endswith(f".{end}") for end in targets)]
        warn_of_ignored(ignored, layout.family)


def check_quantized_roles(run: Run) -> None:
    """A quantised base has no role that is a network of its own."""
    copies = [name for name, role in run.method.roles().items() if isinstance(role, Copy)]
    if run.family.quantization is not None and copies:
        got = f"family.quantization with {type(run.method).__name__}"
        why = f"it trains {copies[0]!r} as a whole network, and quantized weights cannot be trained"
        todo = "remove family.quantization, or choose a method whose roles are LoRAs"
        raise ConfigError(problem(got, "roles that are LoRAs or adapters", why, todo))


def check_roles(run: AnyRun) -> None:
    """Settings of single roles are of roles that the method has, and that take them."""
    roles = run.method.roles()
    for key, given, taking, what in (
        (
            "lora.roles",
            run.lora.roles,
            [name for name, role in roles.items() if isinstance(role, Lora) and role.of is None],
            "a LoRA of its own",
        ),
        (
            "train.optimizers",
            run.train.optimizers,
            [name for name, role in roles.items() if not isinstance(role, Ema)],
            "trained",
        ),
    ):
        for name in sorted(set(given or ()) - set(taking)):
            got = f"{key}.{name} with {type(run.method).__name__}"
            why = "a copy of a role has the settings of that role" if name in roles else "the method has no such role"
            raise ConfigError(problem(got, f"a role that is {what}: {taking}", why, "rename or remove it"))


def check_attention(run: Run) -> None:
    """xformers has kernels for CUDA only."""
    if run.train.enable_xformers_memory_efficient_attention and not torch.cuda.is_available():
        got, why = "xformers attention without CUDA", "xformers has CUDA kernels only"
        raise ConfigError(problem(got, "a CUDA device", why, "disable it"))


def check_guidance_scale(run: Run) -> None:
    """Warn where the student is compared with the teacher at another scale than it learns from."""
    given, followed = run.train.teacher_guidance_scale, run.followed_guidance_scale
    if None not in (given, followed) and given != followed:
        logger.warning(
            "train.teacher_guidance_scale is %g, but the student learns from its teacher at guidance_scale %g, so "
            "validation and eval.json compare it with another teacher. Remove train.teacher_guidance_scale if this is "
            "not intended",
            given,
            followed,
        )


def check_held_out(run: Run) -> None:
    """A reward that is held out is measured at validations."""
    if run.method.held_out is not None and not run.train.is_watched:
        got, why = "method.held_out without validations", "it is measured on the collapse monitor's images"
        todo = "set train.validation_steps, train.validation_prompts and train.watch_samples, or remove it"
        raise ConfigError(problem(got, "a run that is watched", why, todo))


def check_stored(run: Run) -> None:
    """Each part of the data is of the kind that the method trains on."""
    for source in inside(run.data):
        run.method.check_data(source)


def check_unused(run: Run) -> None:
    """Warn of images and latents that the method does not train on."""
    unused = provided(run.data) & {"images", "latents", "trajectories"}
    if run.method.needs == {"prompts"} and unused and not isinstance(run.family, ImageToVideo):
        logger.warning(
            "%s trains on prompts alone: the %s of the %s are read and not used. Use stepdistill.data.Prompts, which "
            "saves their time and memory",
            type(run.method).__name__,
            "images" if "images" in unused else min(unused),
            type(run.data).__name__,
        )


def check_guidance_range(data: Source, sampler: Sampler) -> None:
    """Guidance adapters promise no scales that their data do not have."""
    for source in inside(data):
        promised = sampler.adapter_range
        if isinstance(source, Trajectories) and promised not in (None, source.guidance_range):
            got = f"data.guidance_range {list(source.guidance_range)}"
            why = "the contract stores the range that the adapters were trained on"
            todo = "set data.guidance_range and method.guidance_range to the same range"
            raise ConfigError(problem(got, f"that of the method, {list(promised)}", why, todo))


def check_teacher(run: Run) -> None:
    """The teacher is a pipeline of the family."""
    run.family.check_files()


CHECKS: tuple[Callable[[Run], None], ...] = (
    *(
        check_teacher,
        check_cache_dir,
        check_scheduler,
        check_sharding,
        check_data,
        check_size_list,
        check_clip_frames,
        check_clip_lengths,
        check_first_frames,
    ),
    *(check_reference_file, check_export_formats, check_loras, check_start_from, check_assistant, check_output_dir),
    *(check_data_folders, check_quantized_roles, check_roles, check_attention, check_guidance_scale, check_held_out),
    *(check_control, check_unused, check_stored),
)
