"""The proof of a student folder: in a plain pipeline it generates the same output as the student in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from torch import Tensor, nn

from stepdistill.core.denoise import Condition, guided, with_scale
from stepdistill.core.errors import ConfigError, StudentError, problem
from stepdistill.core.prediction import Estimate, Kind, estimate, output
from stepdistill.core.random import fresh_noise
from stepdistill.core.schedule import expand
from stepdistill.core.solvers import Sampler, few_step
from stepdistill.families.base import Family
from stepdistill.families.image_to_video import ImageToVideo
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.layers import time_given
from stepdistill.networks.roles import TEACHER
from stepdistill.networks.sharding import is_sharded, stream
from stepdistill.students.contract import Contract, Proof
from stepdistill.students.draw.animation import image_of
from stepdistill.students.draw.arguments import each
from stepdistill.students.lora.comfyui import SIGMA_FOR_ALPHA, comfy_levels, read_as_sigma
from stepdistill.students.lora.comfyui_draw import ComfyRun
from stepdistill.students.sizes import at_size, shown_sizes

PROMPTS = ("red apple", "")
# half precision turns rounding in the seventh digit into rounding in the third, and the steps carry it on
FLOAT32 = 1e-4
TOLERANCE = {torch.float32: FLOAT32, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@torch.no_grad()
def prove(
    contract: Contract,
    family: Family,
    plain: DiffusionPipeline,
    pipe: DiffusionPipeline,
    backbone: Backbone,
    role: str,
    seed: int,
) -> Proof:
    """Sample the student in memory and the one in `plain` from the same noise, and compare the final latents.

    This is done at the contract's resolution, and at the most elongated of the sizes in training. In half precision
    only the networks run in it. All other arithmetic is float32 on both sides.

    Args:
        plain: a pipeline of float32 weights that has loaded the student folder. Do not use it afterwards.
        pipe: the pipeline that `backbone` belongs to.
        seed: of the starting noise and of the fresh noise between steps.

    Raises:
        StudentError: the plain pipeline passes other timesteps to the network than the contract's.
    """
    parameter = next(backbone.net.parameters())
    device, dtype = parameter.device, parameter.dtype
    if is_sharded(backbone.net):
        stream(plain, family.network(plain), device)
    else:
        plain.to(device)
    plain.set_progress_bar_config(disable=True)
    shown = [at_size(contract, size) for size in shown_sizes(contract.resolution, contract.sizes)]
    subjects = [_Subject(one, family, plain, pipe, backbone, seed) for one in shown]
    compared = [(subject, subject.sample(role), subject.sample(TEACHER)) for subject in subjects]
    visited, differences = _watch(family, family.network(plain)), []
    for one, (subject, ours, taught) in zip(shown, compared, strict=True):
        visited.clear()
        packed, call = family.pack(subject.noise), each(one.call, len(subject.prompts)) | subject.image
        half = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        with half, _seeded(seed, device):
            drawn: Any = plain(prompt=subject.prompts, latents=packed, output_type="latent", **call)  # pyright: ignore[reportCallIssue]
        theirs = family.latents_of(plain, drawn[0], *subject.noise.shape[-2:])
        _compare(visited, contract.timesteps)
        differences.append(((theirs - ours).abs().max() / taught.abs().max()).item())
    return Proof(
        difference=torch.tensor(differences).max().item(),  # nan stays nan
        tolerance=TOLERANCE[dtype],
        dtype=str(dtype).removeprefix("torch."),
        timesteps=tuple(visited),
        seed=seed,
    )


@torch.no_grad()
def prove_workflow(
    contract: Contract, family: Family, pipe: DiffusionPipeline, backbone: Backbone, nodes: Mapping[str, Any]
) -> float:
    """Compare the student in memory with what ComfyUI computes with it by the nodes of a workflow.

    Returns:
        The largest difference of the latents that are decoded, relative to the teacher's largest value.
    """
    subject = _Subject(contract, family, pipe, pipe, backbone, 0)
    ours, taught = subject.sample("student"), subject.sample(TEACHER)
    denoiser = subject.denoiser("student")

    def raw(x: Tensor, t: float, cfg: float) -> Tensor:
        time = torch.full((len(x),), t, device=x.device)
        return denoiser.native(guided(denoiser, subject.null, cfg, subject.combine)(x, time, subject.cond), time)

    flow = contract.prediction_type == "flow"
    levels = None if flow else comfy_levels(contract)
    with _seeded(0, subject.noise.device):
        theirs = ComfyRun(nodes, levels, raw, subject.noise, subject.fresh).latents()
    if read_as_sigma(contract):
        theirs = theirs / SIGMA_FOR_ALPHA
    return ((theirs - ours).abs().max() / taught.abs().max()).item()


class _Subject:
    """A student in memory with the prompts and the noise of a proof."""

    def __init__(
        self,
        contract: Contract,
        family: Family,
        plain: DiffusionPipeline,
        pipe: DiffusionPipeline,
        backbone: Backbone,
        seed: int,
    ) -> None:
        parameter = next(backbone.net.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.family, self.backbone, self.seed = family, backbone, seed
        shape, generator = family.latent_shape(plain, *contract.resolution), torch.Generator().manual_seed(seed)
        begins = isinstance(family, ImageToVideo)
        self.prompts = list(PROMPTS[:1] if begins else PROMPTS)  # such a pipeline takes one image for all prompts
        self.noise = torch.randn(len(self.prompts), *shape, generator=generator).to(self.device)
        self.image: dict[str, Any] = {}
        pixels = torch.randint(0, 256, (3, *contract.resolution), generator=generator, dtype=torch.uint8)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            self.cond, self.null = family.condition(plain, self.prompts), family.unconditional(plain)
            if isinstance(family, ImageToVideo):
                begun = pixels[None].to(self.device) / 127.5 - 1
                self.cond = {**self.cond, **family.first_frame(plain, begun)}
                self.noise = family.started(plain, self.noise, begun)
                self.image = {"image": image_of(pixels)}  # an image file: of tensors Diffusers gives CLIP another one
        self.sampler = contract.sampler()
        self.schedule = family.schedule(pipe.scheduler)
        self.kind: Kind = family.kind(pipe)
        self.combine = family.combine(self.kind, self.schedule)

    def denoiser(self, role: str) -> Denoiser:
        return Denoiser(self.backbone, role, self.schedule, self.kind, self.family.call, self.dtype, grad=False)

    def fresh(self, i: int) -> Tensor:
        """The noise after step i, in the order of the pipeline's draws."""
        return self.family.fresh(self.noise)

    def sample(self, role: str) -> Tensor:
        """The final latents (B, C, H, W) of a role by the library's own sampler."""
        sampler = self.sampler
        with _seeded(self.seed, self.device):
            denoise = guided(self.denoiser(role), self.null, sampler.guidance_scale, self.combine)
            denoise = with_scale(denoise, sampler.adapter_scale)
            return few_step(denoise, self.schedule, sampler, self.noise, self.cond, self.fresh)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generator inside the context only, for the fresh noise that belongs to `seed`.

    Both samplers draw their fresh noise from it, in the same order: not every pipeline passes a generator
    to its scheduler (Stable Diffusion 3's does not). Seeded with `seed`, it would begin with the starting noise.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(fresh_noise(seed, 0).initial_seed())
        yield


def _watch(family: Family, net: nn.Module) -> list[float]:
    """A list that collects the timesteps at which `net` is called; from now on its output is float32."""
    visited: list[float] = []

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        t = family.time(net, float(time_given(net, args, kwargs).max()))
        if visited[-1:] != [t]:  # guidance may be two calls
            visited.append(t)

    def after(_: nn.Module, args: tuple, output: tuple) -> tuple:
        # or the scheduler would calculate in half precision, which ours does not
        y = output[0]
        return ([row.float() for row in y] if isinstance(y, list) else y.float(),)

    net.register_forward_pre_hook(before, with_kwargs=True)
    net.register_forward_hook(after)
    return visited


def _compare(visited: Sequence[float], trained: Sequence[float]) -> None:
    # the absolute part is float32's at 1000: some pipelines give their networks 1 - t / 1000
    same = [math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-3) for a, b in zip(visited, trained, strict=False)]
    if len(visited) != len(trained) or not all(same):
        raise StudentError(
            problem(
                f"timesteps {list(visited)} in a plain pipeline",
                f"{list(trained)}, as in training",
                "the student works only at the noise levels that it was trained at",
                "correct `call` in distill_config.json and the scheduler's config, or the family that wrote them",
            )
        )


@torch.no_grad()
def check_sampling(family: Family, pipe: DiffusionPipeline, sampler: Sampler) -> None:
    """Raise ConfigError if the scheduler of a student folder differs from `few_step` by more than rounding.

    Both sample in float32 with a network in closed form, that of independent normal numbers of several spreads. So an
    error of the scheduler is known before training, and not only from `prove` afterwards.

    Args:
        pipe: of `family`, with the teacher's scheduler.
    """
    schedule, kind = family.schedule(pipe.scheduler), family.kind(pipe)
    stock, call = family.scheduler(pipe, sampler)
    scheduler: Any = stock
    spread = torch.logspace(-1, 1, 64)

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        alpha_t, sigma_t = (expand(v, x_t) for v in schedule(t))
        power = (alpha_t * spread) ** 2 + sigma_t**2
        return output(kind, Estimate(alpha_t * spread**2 * x_t / power, sigma_t * x_t / power), t, schedule)

    def denoise(x_t: Tensor, t: Tensor, cond: Condition) -> Estimate:
        return estimate(kind, network(x_t, t), x_t, t, schedule)

    cpu, scaled = torch.device("cpu"), not schedule.straight  # the state of a flow's scheduler is the network's input
    noise = torch.randn(1, len(spread), generator=torch.Generator().manual_seed(0))
    with _seeded(0, cpu):
        ours = few_step(denoise, schedule, sampler, noise, {})
    times: Any = retrieve_timesteps(scheduler, **family.steps(call))[0]
    eta = {name: value for name, value in call.items() if name == "eta"}
    theirs = noise * scheduler.init_noise_sigma if scaled else noise
    with _seeded(0, cpu):
        for t in times:
            x_t = scheduler.scale_model_input(theirs, t) if scaled else theirs
            theirs = scheduler.step(network(x_t, t.float()[None]), t, theirs, **eta, return_dict=False)[0]
    # latents have a spread of about 1: below it, rounding is not relative to the smaller one
    difference = ((theirs - ours).abs() / spread.clamp(min=1)).max().item()
    if not difference <= FLOAT32:
        got = f"a difference of {difference:.2g} between {type(scheduler).__name__} and training's own sampler"
        got += f" at timesteps {[round(t, 3) for t in sampler.timesteps]} of a {kind} network"
        why = "no scheduler of Diffusers samples with the steps that the student is trained for"
        todo = "choose other timesteps or another number of steps, or correct the teacher's scheduler"
        raise ConfigError(problem(got, f"at most {FLOAT32:g}", why, todo))
