"""The run that a config describes, and its `train` section."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from stepdistill.config.kinds import Amount, Count, Place, Positive, Seed, Whole
from stepdistill.config.schema import Factory, places
from stepdistill.data import InvertedImages, Source, TeacherSamples, inside
from stepdistill.families.base import Family
from stepdistill.methods.base import Method, Tuning
from stepdistill.networks.roles import LoraSpec
from stepdistill.students.chain import start_sampler
from stepdistill.training.sizes import check_sizes

LrSchedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
Tracker = Literal[  # those of accelerate
    "tensorboard", "wandb", "trackio", "none", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"
]
GUIDANCE = 7.5  # of a teacher whose method follows it at no one scale; the default of Diffusers' pipelines


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """Training settings, named as in Diffusers' training scripts.

    Args:
        output_dir: the student folder to write.
        seed: seed of every random draw of the run.
        max_train_steps: number of training steps; a step is one call of the method.
        train_batch_size: samples per micro-batch and process.
        gradient_accumulation_steps: micro-batches per step.
        learning_rate: learning rate of every role whose optimizer sets no other.
        lr_scheduler: constant, constant_with_warmup, linear, cosine, cosine_with_restarts or polynomial.
        lr_warmup_steps: steps until the full learning rate.
        optimizer: optimizer by dotted path, with its arguments beside `type`.
        optimizers: optimizers of single roles, by role name.
        assistant: a training assistant, for fine-tuning a few-step model on new images: a student folder, hub id or
            LoRA file. It is on in training steps, and off in validation and in the student.
        max_grad_norm: norm to which the gradients of each role are clipped; none disables clipping.
        mixed_precision: no, bf16 or fp16, for the frozen base and the computation; none takes Accelerate's setting.
            Trained weights are float32.
        gradient_checkpointing: recompute activations in backward, for less memory and about a third more time.
        shard_base: shard the frozen base over all processes and gather it block by block, for a base that does not fit
            on one device. It needs several processes and takes more time. One process then generates the teacher's
            samples for all.
        torch_compile: compile the network; untested on GPUs.
        allow_tf32: allow TF32 matrix multiplications on CUDA.
        enable_xformers_memory_efficient_attention: use xformers attention, on CUDA only; the default is PyTorch's
            attention.
        resolution: size in pixels if the data has no images: a square's side, or height and width, or a list of such
            pairs, such as `[[1024, 1024], [832, 1216], [1216, 832]]`, of which each step takes one. The first is that
            of validation images. None takes the network's native size.
        resolution_weights: how often each of several sizes is taken, relative to the others; none takes all alike.
        cache_latents: encode each image once, with a fixed crop and flip.
        cache_dir: folder of cached embeddings and latents; text encoders and autoencoder are loaded only if one is
            missing. `stepdistill precompute` fills it. None caches in memory only.
        dataloader_num_workers: number of processes that read images.
        checkpointing_steps: steps between checkpoints; none writes only the last one.
        checkpoints_total_limit: maximum number of checkpoints; older ones are removed.
        resume_from_checkpoint: checkpoint folder to resume from, or `latest`.
        overwrite_output_dir: start a new run in the folder of an earlier one.
        report_to: tensorboard, wandb, trackio or none, or a list; metrics.jsonl is always written.
        tracker_project_name: project name for the trackers.
        validation_prompts: prompts of the validation images, which are sampled at fixed seeds as the student's contract
            says.
        validation_images: the image that each of the validation prompts continues, for a family that takes one.
        validation_steps: steps between validations; none validates only at the end.
        validation_seed: seed of the validation images.
        teacher_steps: sampling steps of the teacher in the validation images.
        teacher_guidance_scale: guidance scale of the teacher in validation images, the collapse monitor and eval.json;
            none takes the scale of the method or its data.
        watch_samples: images per validation prompt with which the collapse monitor compares student and teacher at
            every validation; four times as many of the teacher are sampled at the start. 0 disables the monitor.
        watch_stop: end the run, after a checkpoint, when the collapse monitor warns.
        eval_samples: number of images for eval.json after training, at least 40; 0 disables it.
        eval_reference: file of the teacher's reference features, as `eval/tables.py` writes for the bundled teachers.
        export_formats: further formats for a LoRA student: kohya, comfyui. The second comes with
            `comfyui_workflow.json`.
        push_to_hub: upload the finished student folder to the Hub, with the token of `hf auth login` or HF_TOKEN.
        hub_model_id: Hub repository to upload to; none takes the folder's name.
    """

    output_dir: Place
    seed: Seed = 0
    max_train_steps: Count = 1000
    train_batch_size: Count = 16
    gradient_accumulation_steps: Count = 1
    learning_rate: Amount = 1e-4
    lr_scheduler: LrSchedule = "constant"
    lr_warmup_steps: Whole = 0
    optimizer: Factory = Factory("torch.optim.AdamW", {"weight_decay": 0.0})
    optimizers: dict[str, Factory] | None = None
    assistant: Place | None = None
    max_grad_norm: Positive | None = 1.0
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    gradient_checkpointing: bool = False
    shard_base: bool = False
    torch_compile: bool = False
    allow_tf32: bool = False
    enable_xformers_memory_efficient_attention: bool = False
    resolution: Count | tuple[Count, Count] | tuple[tuple[Count, Count], ...] | None = None
    resolution_weights: tuple[Positive, ...] | None = None
    cache_latents: bool = False
    cache_dir: Place | None = None
    dataloader_num_workers: Whole = 0
    checkpointing_steps: Count | None = 500
    checkpoints_total_limit: Count | None = None
    resume_from_checkpoint: Place | None = None
    overwrite_output_dir: bool = False
    report_to: Tracker | tuple[Tracker, ...] = "tensorboard"
    tracker_project_name: str = "stepdistill"
    validation_prompts: tuple[str, ...] = ()
    validation_images: tuple[Place, ...] = ()
    validation_steps: Count | None = None
    validation_seed: Seed = 0
    teacher_steps: Count = 50
    teacher_guidance_scale: Amount | None = None
    watch_samples: Whole = 4
    watch_stop: bool = False
    eval_samples: Whole = 0
    eval_reference: Place | None = None
    export_formats: tuple[Literal["kohya", "comfyui"], ...] = ()
    push_to_hub: bool = False
    hub_model_id: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        check_sizes(self.resolution, self.resolution_weights)
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate is {self.learning_rate}: expected 0 or more")
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            raise ValueError(
                f"checkpoints_total_limit is {self.checkpoints_total_limit}: expected at least 1, or none for all"
            )
        if 0 < self.eval_samples < 40:
            raise ValueError(f"eval_samples is {self.eval_samples}: expected 40 or more, for 20 blocks of two; or 0")
        if self.shard_base and self.torch_compile:
            raise ValueError("shard_base with torch_compile: the combination is untested; disable one of them")
        if self.watch_samples < 0 or self.watch_samples == 1:
            raise ValueError(
                f"watch_samples is {self.watch_samples}: expected 2 or more, since diversity needs pairs; or 0"
            )
        if self.watch_stop and not self.is_watched:
            raise ValueError("watch_stop needs validation_steps, validation_prompts and watch_samples")

    def global_batch(self, processes: int) -> int:
        """Samples of a step, over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes

    @property
    def is_watched(self) -> bool:
        """Whether student and teacher are compared at each validation."""
        return bool(self.watch_samples and self.validation_steps and self.validation_prompts)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A whole run, as a config describes it.

    Args:
        family: the teacher's pipeline.
        start_from: a few-step student to train on top of: its folder or hub id, or a LoRA such as LCM-LoRA. It is fused
            into the teacher, and the student that is written includes it.
        method: the distillation method.
        data: the training data.
        lora: rank and target modules of the LoRAs.
        train: training settings.
    """

    family: Family
    start_from: Place | None = None
    method: Method
    data: Source
    lora: LoraSpec = field(default_factory=LoraSpec)
    train: TrainSpec

    @property
    def inputs(self) -> list[str]:
        """The files and folders that the run reads; some may be hub ids."""
        parts = (self.family, self.lora, self.data, self.method)
        found = [*(place for part in parts for place in places(part)), self.train.eval_reference]
        return [place for place in found if place]

    @property
    def followed_guidance_scale(self) -> float | None:
        """The one guidance scale of the teacher that the student stands for: that of the method, or of its data.

        A student of the unguided teacher that is guided itself stands for the teacher at its own scale.
        """
        scale, sampling = self.method.guidance_scale, self.method.sampling_guidance_scale
        if scale in (None, 1.0) and sampling not in (None, 1.0):
            return sampling
        for source in inside(self.data) if scale is None else ():
            if isinstance(source, TeacherSamples):
                return source.guidance_scale
            if isinstance(source, InvertedImages):
                return 1.0
        return None if isinstance(scale, tuple) else scale

    @property
    def teacher_guidance_scale(self) -> float:
        """`train.teacher_guidance_scale`, or what stands for it."""
        for scale in (self.train.teacher_guidance_scale, self.followed_guidance_scale):
            if scale is not None:
                return scale
        return GUIDANCE

    def resolved(self) -> Run:
        """The run with `train.teacher_guidance_scale` as a number, and the sampling contract of `start_from`."""
        method = self.method
        if isinstance(method, Tuning) and method.sampling is None and self.start_from:
            method = replace(method, sampling=start_sampler(self.start_from))
        train = replace(self.train, teacher_guidance_scale=self.teacher_guidance_scale)
        return replace(self, method=method, train=train)
