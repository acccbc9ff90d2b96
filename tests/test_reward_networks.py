"""Published rewards on random weights of the real widths, against a direct reading of their own code."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_rewards import CPU, photos
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertTokenizer, CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

from stepdistill.core.errors import MissingWeights, WrongWeights
from stepdistill.core.files import file_digest, hash_of
from stepdistill.core.pixels import resized_square
from stepdistill.networks.rewards import hpsv2 as hpsv2_module
from stepdistill.networks.rewards import image_reward as image_reward_module
from stepdistill.networks.rewards import weights as weights_module
from stepdistill.networks.rewards.aesthetic import Aesthetic
from stepdistill.networks.rewards.base import Reward
from stepdistill.networks.rewards.clip_score import ClipScore
from stepdistill.networks.rewards.hpsv2 import HPSv2, clip_tensors, resized_whole
from stepdistill.networks.rewards.image_reward import ImageReward
from stepdistill.networks.rewards.pick_score import PickScore
from stepdistill.networks.rewards.weights import linear
from stepdistill.training.memory.tracker import Tracker

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = ["red apple", "a cat face that smiles"]
Tensors = dict[str, Tensor]


def random(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    """Weights of the size that they have at the start of training: norms about 1, biases small."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        norm = name.endswith("weight") and len(shape) == 1
        made[name] = 1 + 0.1 * noise if norm else noise / math.sqrt(shape[-1] if len(shape) == 2 else 40)
    return made


def layer(width: int, inner: int) -> dict[str, tuple[int, ...]]:
    """A transformer's layer in open_clip."""
    return {
        **{f"ln_{i}.{part}": (width,) for i in (1, 2) for part in ("weight", "bias")},
        **{"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)},
        **{"attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,)},
        **{"mlp.c_fc.weight": (inner, width), "mlp.c_fc.bias": (inner,)},
        **{"mlp.c_proj.weight": (width, inner), "mlp.c_proj.bias": (width,)},
    }


def open_clip(depths: tuple[int, int] = (32, 24), words: int = 49408) -> dict[str, tuple[int, ...]]:
    """The shapes of a ViT-H-14 of open_clip."""
    towers = (("visual.", depths[0], 1280), ("", depths[1], 1024))
    return {
        **{"logit_scale": (), "positional_embedding": (77, 1024), "token_embedding.weight": (words, 1024)},
        **{"text_projection": (1024, 1024), "ln_final.weight": (1024,), "ln_final.bias": (1024,)},
        **{"visual.class_embedding": (1280,), "visual.positional_embedding": (257, 1280)},
        **{"visual.conv1.weight": (1280, 3, 14, 14), "visual.proj": (1280, 1024)},
        **{f"visual.ln_{end}.{part}": (1280,) for end in ("pre", "post") for part in ("weight", "bias")},
        **{
            f"{tower}transformer.resblocks.{i}.{name}": shape
            for tower, depth, width in towers
            for i in range(depth)
            for name, shape in layer(width, 4 * width).items()
        },
    }


def norm(x: Tensor, w: Callable[[str], Tensor], name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w(f"{name}.weight"), w(f"{name}.bias"), eps)


def affine(x: Tensor, w: Callable[[str], Tensor], name: str) -> Tensor:
    return F.linear(x, w(f"{name}.weight"), w(f"{name}.bias"))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of (B, tokens, width), written out."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    return ((logits if mask is None else logits + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)


def normalised(pixels: Tensor) -> Tensor:
    return (pixels - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)


def blocks(x: Tensor, tensors: Tensors, tower: str, mask: Tensor | None) -> Tensor:
    """open_clip's `Transformer.forward`, with its own attention module."""
    for i in range(2):
        part = f"{tower}transformer.resblocks.{i}."
        w = lambda name, part=part: tensors[part + name]  # noqa: E731
        attend = nn.MultiheadAttention(x.shape[-1], 16, batch_first=True)
        own = {name: t for name, t in tensors.items() if name.startswith(f"{part}attn.")}
        attend.load_state_dict({name.removeprefix(f"{part}attn."): t for name, t in own.items()})
        y = norm(x, w, "ln_1", 1e-5)
        x = x + attend(y, y, y, need_weights=False, attn_mask=mask)[0]
        x = x + affine(F.gelu(affine(norm(x, w, "ln_2", 1e-5), w, "mlp.c_fc")), w, "mlp.c_proj")
    return x


@torch.no_grad()
def hps(tensors: Tensors, pixels: Tensor, tokens: Tensor) -> Tensor:
    """open_clip's `encode_image` and `encode_text`, and HPSv2's score of both."""
    w = tensors.__getitem__
    x = F.conv2d(normalised(pixels), w("visual.conv1.weight"), stride=14).flatten(2).mT
    x = torch.cat([w("visual.class_embedding").expand(len(x), 1, -1), x], 1) + w("visual.positional_embedding")
    x = blocks(norm(x, w, "visual.ln_pre", 1e-5), tensors, "visual.", None)
    image = norm(x[:, 0], w, "visual.ln_post", 1e-5) @ w("visual.proj")
    y = w("token_embedding.weight")[tokens] + w("positional_embedding")[: tokens.shape[1]]
    mask = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)
    y = norm(blocks(y, tensors, "", mask), w, "ln_final", 1e-5)
    text = y[torch.arange(len(y)), tokens.argmax(-1)] @ w("text_projection")
    return (F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T).diagonal()


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A small tokenizer of CLIP's kind: its last token ends a text, as in CLIP's own."""
    place = tmp_path_factory.mktemp("words")
    tiny.build.tokenizer(tiny.build.drawing_texts()).save_pretrained(place)
    return place


def padded(words: Path) -> Tensor:
    """As open_clip's tokenizer gives the prompts: zeros after the last token, up to 77."""
    ids = tiny.build.tokenizer(tiny.build.drawing_texts())(PROMPTS)["input_ids"]
    return torch.tensor([row + [0] * (77 - len(row)) for row in ids])


@pytest.fixture(scope="module")
def hpsv2(tmp_path_factory, words) -> tuple[HPSv2, Tensors]:
    tensors = random(open_clip((2, 2), len(tiny.build.tokenizer(tiny.build.drawing_texts()))))
    file = tmp_path_factory.mktemp("hps") / "hps.safetensors"
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, file)
    return HPSv2(weights=str(file), tokenizer=str(words)), tensors


def test_hpsv2_is_open_clip_s_arithmetic(hpsv2, words):
    reward, tensors = hpsv2
    images = photos(2, 40, 64).requires_grad_()
    scores = reward.load(CPU)(images, PROMPTS)
    want = hps(tensors, resized_whole(images.detach(), 224), padded(words))
    torch.testing.assert_close(scores.detach(), want, atol=2e-6, rtol=0)
    assert (want[0] - want[1]).abs() > 1e-3
    scores.sum().backward()
    assert images.grad is not None and images.grad.isfinite().all() and images.grad.any()
    assert reward.identity == f"HPSv2@{file_digest(Path(reward.weights))}"


def test_an_image_that_is_not_square_is_seen_whole_between_black_bars():
    images = photos(1, 40, 80) + 1
    wide = resized_whole(images, 32)
    assert wide.shape == (1, 3, 32, 32) and wide.max() == 1
    assert not wide[:, :, :8].any() and not wide[:, :, 24:].any() and wide[:, :, 8:24].all()
    assert torch.equal(resized_whole(images.mT, 32), wide.mT)
    odd = resized_whole(photos(1, 33, 100) + 1, 32)[0, 0, :, 0]
    assert odd.nonzero().flatten().tolist() == list(range(10, 21))


def test_every_tensor_of_a_real_hpsv2_finds_its_place():
    """All 32 and 24 layers, by name and shape, without memory."""
    with torch.device("meta"):
        ours = clip_tensors({f"module.{name}": torch.empty(shape) for name, shape in open_clip().items()})
        vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
        vision |= {"num_attention_heads": 16, "patch_size": 14}
        text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
        theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)).state_dict()
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert sum(t.numel() for t in ours.values()) == 986_109_441


# --- ImageReward -----------------------------------------------------------------------------------------------------


def dense(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def scale(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def blip(depths: tuple[int, int] = (24, 12), words: int = 30524) -> dict[str, tuple[int, ...]]:
    """The shapes of ImageReward: a BLIP with a ViT-L/16, and its head."""
    eyes, text, shapes = "blip.visual_encoder.", "blip.text_encoder.", dict[str, tuple[int, ...]]()
    shapes |= {f"{eyes}cls_token": (1, 1, 1024), f"{eyes}pos_embed": (1, 197, 1024)}
    shapes |= {f"{eyes}patch_embed.proj.weight": (1024, 3, 16, 16), f"{eyes}patch_embed.proj.bias": (1024,)}
    shapes |= scale(f"{eyes}norm", 1024)
    for i in range(depths[0]):
        part = f"{eyes}blocks.{i}."
        shapes |= scale(f"{part}norm1", 1024) | scale(f"{part}norm2", 1024)
        shapes |= dense(f"{part}attn.qkv", 3072, 1024) | dense(f"{part}attn.proj", 1024, 1024)
        shapes |= dense(f"{part}mlp.fc1", 4096, 1024) | dense(f"{part}mlp.fc2", 1024, 4096)
    shapes |= {f"{text}embeddings.word_embeddings.weight": (words, 768)}
    shapes |= {f"{text}embeddings.position_embeddings.weight": (512, 768)} | scale(f"{text}embeddings.LayerNorm", 768)
    for i in range(depths[1]):
        part = f"{text}encoder.layer.{i}."
        for attend, into in (("attention", 768), ("crossattention", 1024)):
            shapes |= dense(f"{part}{attend}.self.query", 768, 768) | dense(f"{part}{attend}.output.dense", 768, 768)
            shapes |= dense(f"{part}{attend}.self.key", 768, into) | dense(f"{part}{attend}.self.value", 768, into)
            shapes |= scale(f"{part}{attend}.output.LayerNorm", 768)
        shapes |= dense(f"{part}intermediate.dense", 3072, 768) | dense(f"{part}output.dense", 768, 3072)
        shapes |= scale(f"{part}output.LayerNorm", 768)
    shapes |= dense("blip.vision_proj", 256, 1024) | dense("blip.text_proj", 256, 768)  # which the score does not use
    return shapes | mlp("mlp.layers.")


def mlp(prefix: str) -> dict[str, tuple[int, ...]]:
    """The head of ImageReward and of LAION's v2; the numbers left out are those of dropout."""
    sizes = ((0, 1024, 768), (2, 128, 1024), (4, 64, 128), (6, 16, 64), (7, 1, 16))
    return {key: value for i, out, into in sizes for key, value in dense(f"{prefix}{i}", out, into).items()}


def head(tensors: Tensors, prefix: str, x: Tensor) -> Tensor:
    """Layer by layer."""
    for i in (0, 2, 4, 6, 7):
        x = affine(x, tensors.__getitem__, f"{prefix}{i}")
    return x[:, 0]


@torch.no_grad()
def image_reward(tensors: Tensors, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """ImageReward's `score`, with its ViT and its BERT."""
    w = lambda name: tensors[f"blip.visual_encoder.{name}"]  # noqa: E731
    x = F.conv2d(normalised(pixels), w("patch_embed.proj.weight"), w("patch_embed.proj.bias"), stride=16).flatten(2).mT
    x = torch.cat([w("cls_token").expand(len(x), 1, -1), x], 1) + w("pos_embed")
    for i in range(2):
        q, k, v = affine(norm(x, w, f"blocks.{i}.norm1", 1e-6), w, f"blocks.{i}.attn.qkv").chunk(3, -1)
        x = x + affine(attention(q, k, v, 16), w, f"blocks.{i}.attn.proj")
        inner = F.gelu(affine(norm(x, w, f"blocks.{i}.norm2", 1e-6), w, f"blocks.{i}.mlp.fc1"))
        x = x + affine(inner, w, f"blocks.{i}.mlp.fc2")
    seen = norm(x, w, "norm", 1e-6)
    w = lambda name: tensors[f"blip.text_encoder.{name}"]  # noqa: E731
    y = w("embeddings.word_embeddings.weight")[ids] + w("embeddings.position_embeddings.weight")[: ids.shape[1]]
    y = norm(y, w, "embeddings.LayerNorm", 1e-12)
    hidden = (1.0 - mask[:, None, None, :].float()) * -10000.0
    for i in range(2):
        for kind, other, hide in (("attention", None, hidden), ("crossattention", seen, None)):
            part, source = f"encoder.layer.{i}.{kind}.", y if other is None else other
            q, k, v = (
                affine(y, w, f"{part}self.query"),
                *(affine(source, w, f"{part}self.{n}") for n in ("key", "value")),
            )
            y = norm(
                affine(attention(q, k, v, 12, hide), w, f"{part}output.dense") + y, w, f"{part}output.LayerNorm", 1e-12
            )
        part = f"encoder.layer.{i}."
        inner = F.gelu(affine(y, w, f"{part}intermediate.dense"))
        y = norm(affine(inner, w, f"{part}output.dense") + y, w, f"{part}output.LayerNorm", 1e-12)
    return (head(tensors, "mlp.layers.", y[:, 0]) - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("bert")
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def rated(tmp_path_factory, bert) -> tuple[ImageReward, Tensors]:
    tensors = random(blip((2, 2), 60))
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        tensors[f"blip.visual_encoder.{name}"] *= 1e-3  # so that what the first norms add to a variance shows
    file = tmp_path_factory.mktemp("rated") / "ImageReward.safetensors"
    extra = {"blip.text_encoder.embeddings.position_ids": torch.arange(512)[None]}  # a buffer of the official file
    save_file(tensors | extra, file)
    return ImageReward(weights=str(file), tokenizer=str(bert)), tensors


def test_image_reward_is_its_own_arithmetic(rated, bert):
    reward, tensors = rated
    images = photos(2, 300, 240).requires_grad_()
    prompts = ["red apple", "a long prompt " * 10]
    scores = reward.load(CPU)(images, prompts)
    words = BertTokenizer.from_pretrained(bert)(prompts, padding="max_length", truncation=True, max_length=35)
    ids, mask = torch.tensor(words["input_ids"]), torch.tensor(words["attention_mask"])
    assert ids.shape == (2, 35) and mask.sum(1).tolist()[1] == 35 > mask.sum(1).tolist()[0]
    want = image_reward(tensors, resized_square(images.detach(), 224), ids, mask)
    torch.testing.assert_close(scores.detach(), want, atol=5e-5, rtol=0)
    assert (want[0] - want[1]).abs() > 0.01
    scores.sum().backward()
    assert images.grad is not None and images.grad.isfinite().all() and images.grad.any()
    assert reward.identity == f"ImageReward@{file_digest(Path(reward.weights))}"


# --- CLIP with a factor, CLIP with a head ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small CLIP; its embedding has the 768 numbers of a ViT-L/14's."""
    place = tiny.clip(tmp_path_factory.mktemp("clip"))
    config = json.loads((place / "config.json").read_text()) | {"projection_dim": 768}
    config["vision_config"]["projection_dim"] = 768
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(**config)).save_pretrained(place)
    return place


def test_pick_score_is_the_logit(folder):
    images = photos(2, 40, 40)
    reward = PickScore(pretrained_clip_model=str(folder))
    cosine = ClipScore(pretrained_clip_model=str(folder)).load(CPU)(images, PROMPTS)
    model = CLIPModel.from_pretrained(folder)
    scale = model.logit_scale.item()
    torch.testing.assert_close(reward.load(CPU)(images, PROMPTS), math.exp(scale) * cosine)
    assert scale > 1 and reward.identity == f"PickScore@{hash_of(model.state_dict())}"


@pytest.mark.parametrize("kind", ["v2", "v2 with mlp", "v1", "v1 alone", "with its CLIP"])
def test_an_aesthetic_score_is_the_head_of_the_normalised_embedding(folder, tmp_path, kind):
    images, model = photos(2, 40, 56).requires_grad_(), CLIPModel.from_pretrained(folder).eval()
    tensors = random(mlp("layers.") if "v2" in kind else dense("predictor", 1, 768))
    named = {"v2 with mlp": lambda n: f"mlp.{n}", "v1 alone": lambda n: n.removeprefix("predictor.")}
    saved = {named.get(kind, str)(name): tensor for name, tensor in tensors.items()}
    if kind == "with its CLIP":
        saved |= {name: t for name, t in model.state_dict().items() if name.startswith("vis")}
    save_file(saved, tmp_path / "head.safetensors")
    reward = Aesthetic(weights=str(tmp_path / "head.safetensors"), pretrained_clip_model=str(folder))
    scores = reward.load(CPU)(images, PROMPTS)
    with torch.no_grad():
        seen = model.vision_model(pixel_values=normalised(resized_square(images, 32))).pooler_output
        seen = model.visual_projection(seen)
        seen = seen / seen.norm(dim=-1, keepdim=True)
        want = head(tensors, "layers.", seen) if "v2" in kind else affine(seen, tensors.__getitem__, "predictor")[:, 0]
    torch.testing.assert_close(scores.detach(), want, atol=1e-5, rtol=1e-5)
    assert (want[0] - want[1]).abs() > 1e-4
    scores.sum().backward()
    assert images.grad is not None and images.grad.any()
    assert reward.identity.endswith(
        f"CLIP@{hash_of(CLIPVisionModelWithProjection.from_pretrained(folder).state_dict())}"
    )


# --- the real size ---------------------------------------------------------------------------------------------------


def blank(kind, config, tensors: Tensors, device: torch.device, **given) -> nn.Module:
    """Stands for `network_of`: the same network, of fake tensors."""
    with torch.device("meta"):
        network = kind(config, **given)
    assert {name: t.shape for name, t in network.state_dict().items()} == {name: t.shape for name, t in tensors.items()}
    with FakeTensorMode(allow_non_fake_inputs=True):
        return network.to_empty(device=device).eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "module", "sizes", "weights"),
    [(HPSv2, hpsv2_module, open_clip(), 986_109_441), (ImageReward, image_reward_module, blip(), 445_271_808)],
)
def test_a_reward_of_the_real_size_scores_a_batch(monkeypatch, tmp_path, words, bert, kind, module, sizes, weights):
    """On tensors without content, which is how its memory is predicted: 3.7 and 1.7 GiB of weights."""

    def shaped(path: Path) -> Tensors:
        with torch.device("meta"):
            return {
                name: torch.empty(shape, device="cpu" if "mlp.l" in name else None) for name, shape in sizes.items()
            }

    monkeypatch.setattr(weights_module, "load_file", shaped)
    monkeypatch.setattr(module, "network_of", blank)
    (tmp_path / "real.safetensors").touch()
    reward = kind(weights=str(tmp_path / "real.safetensors"), tokenizer=str(words if kind is HPSv2 else bert))
    tracker = Tracker(CPU)
    with tracker:
        score = reward.load(CPU)
        assert 0 <= tracker.total - 4 * weights < 1e5  # and numbers of positions
        images = torch.rand(2, 3, 512, 512, requires_grad=True)
        score(images, PROMPTS).sum().backward()
    assert images.grad is not None and images.grad.shape == images.shape


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sizes"), [(HPSv2, open_clip()), (ImageReward, blip())])
def test_a_reward_of_the_real_size_runs_on_one_batch(tmp_path, words, bert, kind, sizes):
    """On tensors with content: forward, and backward to the images."""
    file = tmp_path / "real.safetensors"
    save_file({name: tensor.half() for name, tensor in random(sizes).items()}, file)
    score = kind(weights=str(file), tokenizer=str(words if kind is HPSv2 else bert)).load(CPU)
    images = photos(2, 512, 512).requires_grad_()
    scores = score(images, PROMPTS)
    scores.sum().backward()
    assert scores.isfinite().all() and (scores[0] - scores[1]).abs() > 1e-4
    assert images.grad is not None and images.grad.isfinite().all() and images.grad.flatten(1).any(1).all()


# --- files that are not what they should be --------------------------------------------------------------------------


def all_of(place: Path, folder: Path, words: Path, bert: Path) -> list[Reward]:
    return [
        HPSv2(weights=str(place), tokenizer=str(words)),
        ImageReward(weights=str(place), tokenizer=str(bert)),
        Aesthetic(weights=str(place), pretrained_clip_model=str(folder)),
    ]


def test_pickles_and_missing_files_are_refused_with_what_to_do(tmp_path, folder, words, bert):
    for reward in all_of(tmp_path / "HPS_v2.1_compressed.pt", folder, words, bert):
        with pytest.raises(WrongWeights, match=r"HPS_v2.1_compressed.pt.*expected a .safetensors.*rewards.md"):
            reward.load(CPU)
    for reward in all_of(tmp_path / "gone.safetensors", folder, words, bert):
        with pytest.raises(MissingWeights, match=r"gone.safetensors, which is not there.*rewards.md"):
            reward.load(CPU)


def test_another_network_s_file_is_refused_by_a_tensor_s_name(tmp_path, folder, words, bert):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-2])
    for reward in all_of(tmp_path / "x.safetensors", folder, words, bert):
        with pytest.raises(WrongWeights, match=r"x.safetensors, in which \S.* is missing or does not fit"):
            reward.load(CPU)
    for reward in all_of(tmp_path / "half.safetensors", folder, words, bert):
        with pytest.raises(WrongWeights, match="half.safetensors.*complete"):
            reward.load(CPU)
    save_file(random(mlp("layers.")) | {"layers.0.weight": torch.zeros(1024, 512)}, tmp_path / "narrow.safetensors")
    with pytest.raises(WrongWeights, match="a head on 768 numbers"):
        all_of(tmp_path / "narrow.safetensors", folder, words, bert)[2].load(CPU)


def test_linear_layers_are_one_vector_in_the_order_of_their_numbers():
    layers = random({key: shape for i in range(11) for key, shape in dense(str(i), 3, 3).items()})
    layers |= {"10.weight": layers["10.weight"][:1], "10.bias": layers["10.bias"][:1]}
    x = want = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    for i in range(11):
        want = affine(want, layers.__getitem__, str(i))
    vector, bias = linear(layers)
    torch.testing.assert_close(x @ vector + bias, want[:, 0])


@pytest.mark.parametrize(
    ("kind", "names", "said"),
    [
        ("hpsv2", "visual.transformer.resblocks.0.ln_2.bias", "layers.0.layer_norm2.bias"),
        ("rated", "blip.visual_encoder.norm.bias", "post_layernorm.bias"),
        ("rated", "mlp.", "the head"),
    ],
)
def test_a_missing_tensor_is_named(request, tmp_path, kind, names, said):
    reward, tensors = request.getfixturevalue(kind)
    save_file({key: t for key, t in tensors.items() if not key.startswith(names)}, tmp_path / "lacking.safetensors")
    with pytest.raises(WrongWeights, match=f"lacking.safetensors, in which .*{said} is missing"):
        replace(reward, weights=str(tmp_path / "lacking.safetensors")).load(CPU)
