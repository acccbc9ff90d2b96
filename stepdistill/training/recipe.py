"""What a config describes: a whole run, and its `train` section."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from stepdistill.config.schema import Factory
from stepdistill.data import InvertedImages, Source, TeacherSamples, inside
from stepdistill.families.base import Family
from stepdistill.methods.base import Method
from stepdistill.networks.roles import LoraSpec

GUIDANCE = 7.5  # of a teacher whose method follows it at no one scale; the default of Diffusers' pipelines


@dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """How to train; the names are those of diffusers' training scripts.

    Args:
        output_dir: the student folder to write.
        seed: keys every random draw of the run.
        max_train_steps: number of steps; a step is one call of the method.
        train_batch_size: samples of one micro-batch on one process.
        gradient_accumulation_steps: micro-batches of a step.
        learning_rate: of every role whose optimizer names no other.
        lr_scheduler: constant, constant_with_warmup, linear, cosine, cosine_with_restarts or polynomial.
        lr_warmup_steps: steps until the full rate.
        optimizer: any optimizer by dotted path, with its arguments beside `type`.
        optimizers: another one for single roles, by role name.
        max_grad_norm: gradients are clipped to this norm, per role; none for no clipping.
        mixed_precision: no, bf16 or fp16, of the frozen base and of arithmetic; none takes accelerate's. What is
            trained is float32.
        gradient_checkpointing: less memory, about a third more time.
        shard_base: each process keeps a share of the frozen base and gathers it block by block, for a base that
            outgrows a device; needs several processes and takes more time. The teacher's samples are then made by one
            process for all.
        torch_compile: compile the network; not yet run on a GPU.
        allow_tf32: TF32 matrix products on CUDA.
        enable_xformers_memory_efficient_attention: CUDA only; the default is torch's own attention.
        resolution: side in pixels where the data has no images; none takes the network's own.
        cache_latents: encode each image once, with its first crop and flip.
        cache_dir: keeps embeddings and latents, so that text encoders and autoencoder are loaded only where something
            is not there; `stepdistill precompute` fills it. None for memory only.
        dataloader_num_workers: processes that read images.
        checkpointing_steps: steps between checkpoints; none writes only the last.
        checkpoints_total_limit: older checkpoints beyond this many are removed.
        resume_from_checkpoint: a checkpoint folder, or `latest`.
        overwrite_output_dir: start anew in the folder of an earlier run.
        report_to: tensorboard, wandb, trackio or none, or a list; metrics.jsonl is always written.
        tracker_project_name: project at the tracker.
        validation_prompts: drawn at fixed seeds, under the student's own contract.
        validation_steps: steps between validations; none draws only the final ones.
        validation_seed: of the validation images.
        teacher_steps: steps of the teacher's row in the images.
        teacher_guidance_scale: of the teacher in validation images, the collapse monitor and eval.json; none takes the
            scale of the method or its data.
        watch_samples: seeds of each validation prompt with which the collapse monitor compares student and teacher at
            every validation; the teacher's are drawn at the start, four times as many. 0 switches it off.
        watch_stop: end the run, after a checkpoint, when the collapse monitor warns.
        eval_samples: images for eval.json after training, at least 40; 0 for none.
        eval_reference: the teacher's reference features, as `eval/tables.py` makes them for the bundled teachers.
        export_formats: other formats that a LoRA student is written in, too: kohya, comfyui. The second comes with
            `comfyui_workflow.json`.
        push_to_hub: upload the student folder when it is finished, with the token of `hf auth login` or HF_TOKEN.
        hub_model_id: repository to upload to; none makes one from the folder's name.
    """

    output_dir: str
    seed: int = 0
    max_train_steps: int = 1000
    train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    optimizer: Factory = Factory("torch.optim.AdamW", {"weight_decay": 0.0})
    optimizers: dict[str, Factory] | None = None
    max_grad_norm: float | None = 1.0
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    gradient_checkpointing: bool = False
    shard_base: bool = False
    torch_compile: bool = False
    allow_tf32: bool = False
    enable_xformers_memory_efficient_attention: bool = False
    resolution: int | None = None
    cache_latents: bool = False
    cache_dir: str | None = None
    dataloader_num_workers: int = 0
    checkpointing_steps: int | None = 500
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str | None = None
    overwrite_output_dir: bool = False
    report_to: str | tuple[str, ...] = "tensorboard"
    tracker_project_name: str = "stepdistill"
    validation_prompts: tuple[str, ...] = ()
    validation_steps: int | None = None
    validation_seed: int = 0
    teacher_steps: int = 50
    teacher_guidance_scale: float | None = None
    watch_samples: int = 4
    watch_stop: bool = False
    eval_samples: int = 0
    eval_reference: str | None = None
    export_formats: tuple[Literal["kohya", "comfyui"], ...] = ()
    push_to_hub: bool = False
    hub_model_id: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate is {self.learning_rate}: expected 0 or more")
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            raise ValueError(
                f"checkpoints_total_limit is {self.checkpoints_total_limit}: expected at least 1, or none for all"
            )
        if 0 < self.eval_samples < 40:
            raise ValueError(f"eval_samples is {self.eval_samples}: expected 40 or more, for 20 blocks of two; or 0")
        if self.shard_base and self.torch_compile:
            raise ValueError("shard_base with torch_compile: the two were never tried together; switch one off")
        if self.watch_samples < 0 or self.watch_samples == 1:
            raise ValueError(
                f"watch_samples is {self.watch_samples}: expected 2 or more, since diversity needs pairs; or 0"
            )
        if self.watch_stop and not self.is_watched:
            raise ValueError("watch_stop needs validation_steps, validation_prompts and watch_samples")

    @property
    def is_watched(self) -> bool:
        """Whether student and teacher are compared at each validation."""
        return bool(self.watch_samples and self.validation_steps and self.validation_prompts)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A whole run, as a config describes it.

    Args:
        family: the teacher's pipeline.
        method: how it is distilled.
        data: what it is distilled on.
        lora: the size and place of the adapters.
        train: everything else.
    """

    family: Family
    method: Method
    data: Source
    lora: LoraSpec = field(default_factory=LoraSpec)
    train: TrainSpec

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
        """The run with `train.teacher_guidance_scale` as a number."""
        return replace(self, train=replace(self.train, teacher_guidance_scale=self.teacher_guidance_scale))
