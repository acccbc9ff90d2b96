"""Runs of a few steps on a tiny random teacher, shared by the tests of training."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import pipeline

from stepdistill.data import Prompts, TeacherSamples
from stepdistill.data.bundled import build
from stepdistill.families.sd import StableDiffusion
from stepdistill.methods.base import Method
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.regression import Regression
from stepdistill.networks.roles import LoraSpec
from stepdistill.training.recipe import Run, TrainSpec

LCM = Consistency(num_ddim_timesteps=10, guidance_scale=3.0, ema_decay=0.9, loss_type="l2")
# regression, whose error is of the latents' own size: the start of LCM is a small difference of two outputs, and
# single precision leaves 3e-6 of it
REGRESSION = Regression(num_inference_steps=2)


def saved_teacher(folder: Path) -> Path:
    pipe = pipeline("sd")
    # epsilon multiplies rounding by sigma / alpha = 14.6 at t = 999, which would hide what these tests look for
    pipe.scheduler = build.vp_scheduler("v_prediction")
    pipe.save_pretrained(folder)
    return folder


def make(teacher: Path, samples: Path, out: Path, method: Method = LCM, **train) -> Run:
    given = {
        "output_dir": str(out),
        "max_train_steps": 4,
        "train_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": "none",
        "checkpointing_steps": 1,
        "teacher_steps": 5,
    }
    return Run(
        family=StableDiffusion(pretrained_teacher_model=str(teacher)),
        method=method,
        data=TeacherSamples(
            source=Prompts(prompts=("red apple", "rose", "octopus")),
            folder=str(samples),
            count=16,
            num_inference_steps=2,
            guidance_scale=3.0,
        ),
        lora=LoraSpec(rank=4, alpha=6),
        train=TrainSpec(**(given | train)),
    )


def weights(out: Path, step: int = 4, role: str = "student") -> torch.Tensor:
    state = load_file(out / f"checkpoint-{step}" / f"{role}.safetensors")
    return torch.cat([value.flatten() for _, value in sorted(state.items())])
