"""The check of networks that a method differentiates, before training; and of data that a method does not use."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny import FAMILIES, pipeline
from torch import Tensor

from stepdistill.core.errors import ConfigError
from stepdistill.data import ImageFolder, Prompts, TeacherSamples
from stepdistill.methods.base import Method
from stepdistill.methods.boot import Boot
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.gan import Gan
from stepdistill.methods.scm import SCM
from stepdistill.methods.vsd import VSD
from stepdistill.training import derivative
from stepdistill.training.checks import check_loaded, check_unused
from stepdistill.training.derivative import check_derivative
from stepdistill.training.recipe import Run, TrainSpec
from stepdistill.training.setup import Session, prepare


@pytest.fixture(params=["sd", "sd3", "sana"])
def session(request, tmp_path) -> Session:
    name = request.param
    pipeline(name).save_pretrained(tmp_path / "teacher")
    family = replace(FAMILIES[name], pretrained_teacher_model=str(tmp_path / "teacher"))
    data = TeacherSamples(source=Prompts(prompts=("rose",)), folder=str(tmp_path / "x"), count=4, num_inference_steps=2)
    spec = TrainSpec(output_dir=str(tmp_path / "out"), report_to="none", resolution=32)
    return prepare(Run(family=family, method=SCM(), data=data, train=spec))


def difference(session: Session) -> Session:
    return replace(session, run=replace(session.run, method=SCM(difference=0.1)))


def replaced(session: Session, monkeypatch, operation) -> None:
    """Every call of attention's product goes through the operation."""
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: operation(kernel(*args, **kwargs))
    )


def test_a_network_with_all_derivatives_passes(session):
    check_loaded(session)
    check_loaded(difference(session))


def test_half_precision_is_refused(session):
    """For the derivative and for the difference; a method that takes neither may have it."""
    for dtype in (torch.bfloat16, torch.float16):
        for scene in (session, difference(session)):
            with pytest.raises(ConfigError, match=r"mixed_precision .*16 with SCM, expected float32"):
                check_loaded(replace(scene, dtype=dtype))
        check_derivative(replace(session, dtype=dtype, run=replace(session.run, method=Consistency())))


class NoRule(torch.autograd.Function):
    """An identity that has a backward and no forward-mode rule."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None: ...

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return dy


@torch.library.custom_op("stepdistill_tests::silent", mutates_args=())
def silent(x: Tensor) -> Tensor:
    """An identity of an extension: `torch.func.jvp` takes its derivative for 0, and says nothing."""
    return x.clone()


def test_an_operation_without_a_rule_is_named(session, monkeypatch):
    replaced(session, monkeypatch, NoRule.apply)
    with pytest.raises(
        ConfigError, match=r"no forward-mode derivative \(NotImplementedError: .*jvp function.*difference"
    ):
        check_loaded(session)
    check_loaded(difference(session))  # which needs none


@pytest.mark.parametrize("session", ["sd", "sd3"], indirect=True)  # SANA attends to one token of the empty prompt
def test_an_operation_whose_derivative_is_silently_zero_is_noticed(session, monkeypatch):
    check_derivative(session)
    replaced(session, monkeypatch, silent)
    with pytest.raises(
        ConfigError, match=r"no forward-mode derivative \(its derivative and a difference are .*% apart"
    ):
        check_derivative(session)
    check_derivative(difference(session))


def test_the_fused_kernel_is_named(session, monkeypatch):
    """Where the plain one is not chosen, as by a network that chooses for itself."""
    kernel = torch.nn.functional.scaled_dot_product_attention

    def fused(*args, **kwargs):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return kernel(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    with pytest.raises(ConfigError, match="no forward-mode derivative .*flash_attention"):
        check_derivative(session)


def test_a_device_that_is_full_is_no_missing_rule(session, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(derivative, "tangent", full)
    with pytest.raises(torch.OutOfMemoryError):
        check_derivative(session)


@pytest.mark.parametrize(
    ("method", "warned"),
    [(Boot(), True), (VSD(), True), (DMD2(), True), (DMD2(gan=Gan()), False), (Consistency(), False), (SCM(), False)],
    ids=lambda value: type(value).__name__,
)
def test_images_that_a_method_does_not_use_are_told(method: Method, warned, tmp_path, caplog):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("rose")
    images = ImageFolder(train_data_dir=str(tmp_path / "images"), resolution=32)
    prompts = Prompts(prompts=("rose",))
    samples = TeacherSamples(source=prompts, folder=str(tmp_path / "x"), count=4, num_inference_steps=2)
    for data, what in (
        (images, "images of the ImageFolder"),
        (samples, "latents of the TeacherSamples"),
        (prompts, ""),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check_unused(
                Run(family=FAMILIES["sd"], method=method, data=data, train=TrainSpec(output_dir=str(tmp_path / "out")))
            )
        said = f"{type(method).__name__} trains on prompts alone: the {what} are read and not used" in caplog.text
        assert said is (warned and bool(what)) and len(caplog.records) == said
