"""Rewards: the contract, and each against a direct reading of its definition."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel

from stepdistill.config.dump import to_node
from stepdistill.config.load import read_node
from stepdistill.config.registry import every
from stepdistill.core.errors import ConfigError, MissingWeights, WrongWeights
from stepdistill.core.files import file_digest, hash_of
from stepdistill.core.pixels import resized_square
from stepdistill.evaluation.metrics.features import efficientnet_lite0
from stepdistill.networks.rewards.base import Reward
from stepdistill.networks.rewards.clip_score import ClipScore
from stepdistill.networks.rewards.custom import Custom
from stepdistill.networks.rewards.quality import Quality, logistic_head
from stepdistill.networks.rewards.white_border import WhiteBorder

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
CALLS: list[tuple[Tensor, list[str]]] = []


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """A user's own reward."""
    CALLS.append((images, prompts))
    return images.mean((1, 2, 3))


def one_for_all(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean()


def without_gradient(images: Tensor, prompts: list[str]) -> Tensor:
    return brightness(images.detach(), prompts)


def product(images: Tensor, prompts: list[str]) -> Tensor:
    return (images.flatten(1) @ images.flatten(1).T).diagonal()


def own(name: str) -> Custom:
    return Custom(function=f"{__name__}.{name}")


def photos(n: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Images of a few colours, with edges, in [0, 1]."""
    coarse = torch.rand(n, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").clamp(0, 1)


def bytes_of(image: Tensor) -> Image.Image:
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())


# --- the contract ----------------------------------------------------------------------------------------------------


def test_a_config_names_a_reward_by_its_dotted_path():
    for reward in (own("brightness"), WhiteBorder(width=0.2), ClipScore(pretrained_clip_model="some/clip")):
        node = to_node(reward, Reward)
        assert node["type"] == f"{type(reward).__module__}.{type(reward).__name__}"
        assert read_node(Reward, node, "reward") == reward


def test_a_function_is_looked_for_when_it_is_needed():
    """The method of a student whose reward is not installed here can be read."""
    assert read_node(Reward, to_node(own("brigthness"), Reward), "reward") == own("brigthness")
    with pytest.raises(ConfigError, match="no brigthness; did you mean brightness"):
        own("brigthness").load(CPU)
    with pytest.raises(ConfigError, match="cannot be called"):
        own("CPU").load(CPU)


def test_every_reward_is_hashable_and_says_what_its_scores_depend_on():
    assert {Custom, WhiteBorder, ClipScore} <= set(every(Reward))
    assert own("brightness").identity == f"Custom(function='{__name__}.brightness')"
    assert WhiteBorder().identity != WhiteBorder(width=0.2).identity


def test_a_reward_is_built_once():
    assert own("brightness").load(CPU) is own("brightness").load(CPU)
    assert own("brightness").load(CPU) is not own("product").load(CPU)


def test_a_reward_computes_in_float32_whatever_the_autocast():
    images = photos(2, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        scores = own("product").load(CPU)(images, ["", ""])
    assert torch.equal(scores, product(images, []))
    half = own("brightness").load(CPU)(images.bfloat16(), ["a", "b"])
    assert half.dtype == torch.float32 and CALLS[-1][0].dtype == torch.float32 and CALLS[-1][1] == ["a", "b"]


def test_scores_of_another_shape_or_without_a_gradient_are_refused():
    images = photos(2, 9, 9).requires_grad_()
    with pytest.raises(ConfigError, match=r"shape \(\).*one_for_all.*expected \(2,\)"):
        own("one_for_all").load(CPU)(images, ["", ""])
    flat = own("without_gradient").load(CPU)
    with pytest.raises(ConfigError, match="without_gradient.* without a gradient"):
        flat(images, ["", ""])
    with torch.no_grad():
        assert flat(images, ["", ""]).shape == (2,)
    assert flat(images.detach(), ["", ""]).shape == (2,)


def test_weights_that_are_not_there_are_an_error_of_the_user_s(tmp_path):
    with pytest.raises(MissingWeights, match=r"ClipScore\(.*gone'\) without its files .*rewards.md"):
        ClipScore(pretrained_clip_model=str(tmp_path / "gone")).load(CPU)


# --- the border ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(16, 24), (16, 3), (1, 3)])
def test_the_border_is_the_frame_s_mean_pixel_by_pixel(height, width):
    images, reward = 1.2 * photos(2, height, width) - 0.1, WhiteBorder(width=0.125, softness=0.2)
    rows, columns = max(1, round(height / 8)), max(1, round(width / 8))
    want = []
    for image in images.clamp(0, 1):
        frame = [
            1 / (1 + ((1 - image[:, y, x]) ** 2).mean() / 0.04)
            for y in range(height)
            for x in range(width)
            if not (rows <= y < height - rows and columns <= x < width - columns)
        ]
        want.append(sum(frame) / len(frame))
    torch.testing.assert_close(reward.load(CPU)(images, ["", ""]), torch.stack(want))


def test_a_white_border_is_the_optimum_and_every_colour_is_pulled_to_it():
    score = WhiteBorder().load(CPU)
    images = photos(2, 32, 32)
    images[:, :, 2:-2, 2:-2] = 0
    images[1] = 1 - images[1]
    images.requires_grad_()
    (pull,) = torch.autograd.grad(score(images, ["", ""]).sum(), images)
    frame = torch.ones(32, 32, dtype=torch.bool)
    frame[2:-2, 2:-2] = False
    below = frame & (images[0] < 1)
    assert (pull[0][below] > 0).all() and not pull[:, :, 2:-2, 2:-2].any()
    white = images.detach().clone()
    white[..., frame] = 1
    assert torch.equal(score(white, ["", ""]), torch.ones(2))
    assert (score(images, ["", ""]) < 1).all()


# --- CLIP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(60, 90), (97, 64), (32, 32), (20, 31)])
def test_the_square_is_that_of_clip_s_own_processor(height, width):
    """To the rounding of bytes: PIL resizes in two passes, each of which rounds."""
    images = photos(2, height, width)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_normalize=False
    )
    want = np.stack(processor([bytes_of(image) for image in images]).pixel_values)
    got = resized_square(images, 32)
    assert got.shape == (2, 3, 32, 32) and np.abs(got.numpy() - want).max() < 2 / 255


def test_the_square_is_clamped_after_resizing():
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1
    assert resized_square(edge, 21).min() == 0 and resized_square(edge, 21).max() == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tiny.clip(tmp_path_factory.mktemp("clip")))


def test_the_clip_score_is_the_cosine_of_image_and_prompt(folder):
    reward, prompts = ClipScore(pretrained_clip_model=folder), ["red apple", "cat"]
    images = photos(2, 48, 80).requires_grad_()
    scores = reward.load(CPU)(images, prompts)
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPImageProcessor.from_pretrained(folder)
    words = tiny.build.tokenizer(tiny.build.drawing_texts())(prompts, padding=True, return_tensors="pt")
    pixels = processor([bytes_of(image) for image in images.detach()], return_tensors="pt").pixel_values
    with torch.no_grad():
        out = model(input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=pixels)
    torch.testing.assert_close(scores.detach(), (out.image_embeds * out.text_embeds).sum(1), atol=0.01, rtol=0)
    scores.sum().backward()
    assert images.grad is not None and images.grad.isfinite().all() and images.grad.any()
    assert reward.identity == f"ClipScore@{hash_of(model.state_dict())}"
    assert replace(reward, pretrained_clip_model=folder).load(CPU) is reward.load(CPU)


# --- a head of one's own ---------------------------------------------------------------------------------------------


def test_a_logistic_head_is_at_the_minimum_of_its_loss():
    """Where the loss has no slope in weight and bias. Either kind counts half, though one has more images."""
    generator, ridge = torch.Generator().manual_seed(0), 0.05
    good = torch.randn(200, 4, generator=generator) * torch.tensor([1.0, 5.0, 0.2, 1.0]) + torch.tensor([1.0, 9, 9, 0])
    bad = torch.randn(50, 4, generator=generator) * torch.tensor([1.0, 5.0, 0.2, 1.0]) + torch.tensor([0.0, 5, 9, 0])
    weight, bias = logistic_head(good, bad, ridge)
    assert weight.shape == (4,) and bias.shape == () and weight.dtype == torch.float32
    rows = torch.cat([good, bad]).double()
    odds = rows @ weight.double() + bias
    wrong = odds.sigmoid() - torch.cat([torch.ones(200), torch.zeros(50)])
    wrong *= torch.cat([torch.full((200,), 1 / 400), torch.full((50,), 1 / 100)]).double()
    slope = wrong @ ((rows - rows.mean(0)) / rows.std(0)) + ridge * weight.double() * rows.std(0)
    assert slope.abs().max() < 1e-5 and wrong.sum().abs() < 1e-5
    assert (good @ weight + bias).mean() > 0.5 > -0.5 > (bad @ weight + bias).mean()


def test_features_that_tell_the_kinds_apart_give_a_finite_head():
    weight, bias = logistic_head(torch.ones(8, 2), torch.zeros(8, 2))
    assert weight.isfinite().all() and weight[0] > 0 and weight @ torch.ones(2) + bias > 1 > -1 > bias


def test_quality_is_the_head_of_the_benchmark_s_features(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(1280, generator=generator), torch.tensor(0.3)
    file = tmp_path / "head.safetensors"
    save_file({"weight": weight, "bias": bias, "size": torch.tensor(64)}, file)
    reward, images = Quality(head=str(file)), (photos(2, 32, 48) * 255).round()
    seen, images = efficientnet_lite0(64)(images.byte()), (images / 255).requires_grad_()
    scores = reward.load(CPU)(images, ["", ""])
    torch.testing.assert_close(scores.detach(), seen @ weight + bias, atol=1e-3, rtol=1e-3)
    scores.sum().backward()
    assert images.grad is not None and images.grad.isfinite().all() and images.grad.any()
    assert reward.identity == f"Quality@{file_digest(file)}"
    save_file({"weight": weight[:9], "bias": bias, "size": torch.tensor(64)}, tmp_path / "short.safetensors")
    with pytest.raises(WrongWeights, match="a weight of 1280 numbers"):
        Quality(head=str(tmp_path / "short.safetensors")).load(CPU)


@pytest.mark.slow
def test_the_script_makes_a_head_that_tells_full_steps_from_one(tmp_path):
    script, config = ROOT / "train" / "quality.py", ROOT / "configs" / "quickstart.yaml"
    args = ["train.teacher_steps=8", "--output", tmp_path / "head.safetensors", "--num-images", "32"]
    done = subprocess.run([sys.executable, script, config, *args], cwd=ROOT, capture_output=True, text=True, check=True)
    right = float(re.search(r": ([\d.]+)% of 32 held-out images are told right", done.stdout)[1])
    assert right > 80
    scores = Quality(head=str(tmp_path / "head.safetensors")).load(CPU)(photos(2, 32, 32), ["", ""])
    assert scores.isfinite().all()
