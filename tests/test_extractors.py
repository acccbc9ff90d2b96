"""Feature extractors: what they compute, what their identities say, and where their weights come from."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import pipeline
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model, PreTrainedModel

from stepdistill.core.errors import ConfigError, MissingWeights, WrongWeights
from stepdistill.core.files import hash_of
from stepdistill.evaluation.metrics import extractors
from stepdistill.evaluation.metrics.encoders import clip_images, dinov2, pixel_features, vae_latents
from stepdistill.evaluation.metrics.extractors import availability, extractor_named, find_inception
from stepdistill.evaluation.metrics.frechet import frechet
from stepdistill.evaluation.metrics.identity import Identity
from stepdistill.evaluation.metrics.inception import inception, random_inception, random_state
from stepdistill.evaluation.metrics.resize import to_299
from stepdistill.evaluation.metrics.stats import Stats
from stepdistill.evaluation.spec import Weights

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import metrics_speed as bench

RESIZES = ("clean", "torchmetrics", "pytorch-fid", "tf1")
IDENTITY = Identity("inception-2015-12-05", "6726825d" + 56 * "0", "w.pth", 2048, "pool3", "clean", "u", "fp32", 64)


def images(n: int, height: int, width: int | None = None, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, height, width or height), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random tensors under the published file's names, with BatchNorms that do something, and its classifier."""
    generator = torch.Generator().manual_seed(1)
    found = random_state(0)
    for name, tensor in found.items():
        if ".bn." in name and tensor.is_floating_point():
            found[name] = tensor + 0.3 * torch.rand(tensor.shape, generator=generator)
    return found | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


@pytest.fixture(scope="module")
def file(state, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(state, place)
    return place


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    folder = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=tower, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    CLIPImageProcessor(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return folder


# identity


def test_a_user_s_extractor_cannot_call_itself_fid(monkeypatch):
    def factory():
        found = pixel_features()
        found.identity = replace(IDENTITY, dim=198)
        return found

    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(factory=factory))
    found = extractor_named("module:mine:factory")
    assert found.identity.key == "fd" and found.identity.arch == "module:inception-2015-12-05"
    assert found(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape == (1, 198)


def test_only_the_weights_that_fid_is_defined_on_are_called_fid():
    assert (IDENTITY.id, IDENTITY.key, IDENTITY.reasons()) == ("inception-2015-12-05@6726825d/clean", "fid", [])
    for other in (
        replace(IDENTITY, weights_sha256="6726825e" + 56 * "0"),
        replace(IDENTITY, weights_sha256="0" + IDENTITY.weights_sha256),
        replace(IDENTITY, arch="random-inception"),
        replace(IDENTITY, arch="efficientnet-lite0"),
    ):
        assert other.key == "fd"
    (unknown,) = replace(IDENTITY, weights_sha256="ab" * 32).reasons()
    assert "unknown weights: sha256 abababab" in unknown
    assert replace(IDENTITY, dtype="bf16").id == f"{IDENTITY.id}/bf16"
    (half,) = replace(IDENTITY, dtype="bf16").reasons()
    assert "bf16" in half
    assert replace(IDENTITY, arch="efficientnet-lite0", weights_sha256="ab" * 32).reasons() == []


def test_a_hash_tells_names_shapes_and_values_and_not_the_order():
    a, b = torch.arange(4.0), torch.tensor(3)
    want = hash_of({"a": a, "b": b})
    assert hash_of({"b": b, "a": a}) == want and len(want) == 64
    others = [{"a": a, "c": b}, {"a": a.reshape(2, 2), "b": b}, {"a": a + 1e-6, "b": b}, {"a": a.double(), "b": b}]
    assert want not in map(hash_of, others)
    assert hash_of({"a": a.reshape(2, 2).T}) == hash_of({"a": a.reshape(2, 2).T.contiguous()})


# resize


@pytest.mark.parametrize("side", [64, 512, 1024])
def test_clean_is_pillow_on_floats(side):
    x = images(1, side)
    size = (299, 299)
    want = [
        np.asarray(Image.fromarray(band.numpy()).convert("F").resize(size, Image.Resampling.BICUBIC)) for band in x[0]
    ]
    assert np.abs(to_299(x, "clean")[0].numpy() - np.stack(want).clip(0, 255)).max() < 0.01


def test_each_resize_is_its_tool_s():
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as tensorflow

    x = images(2, 40, 640)
    assert torch.equal(to_299(x, "tf1"), tensorflow(x.float(), (299, 299), align_corners=False))
    wide = to_299(torch.arange(598, dtype=torch.uint8).expand(1, 3, 598, 598) // 2, "pytorch-fid")
    assert wide.shape == (1, 3, 299, 299)
    # halved, a bilinear tap is the mean of two pixels; antialiased it is a triangle over four
    line = torch.zeros(1, 1, 598, 598)
    line[..., 300] = 80
    assert to_299(line, "pytorch-fid")[0, 0, 9, 148:153].tolist() == [0, 0, 40, 0, 0]
    assert to_299(line, "torchmetrics")[0, 0, 9, 148:153].tolist() == [0, 10, 30, 0, 0]
    assert to_299(line, "tf1")[0, 0, 9, 148:153].tolist() == [0, 0, 80, 0, 0]


@pytest.mark.parametrize("resize", RESIZES)
def test_a_plain_image_stays_plain_and_all_stay_in_range(resize):
    plain = to_299(torch.full((1, 3, 50, 333), 77, dtype=torch.uint8), resize)
    assert plain.shape == (1, 3, 299, 299) and plain.dtype == torch.float32
    assert (plain - 77).abs().max() < 1e-4
    noise = to_299(images(1, 48).where(images(1, 48) > 127, 0), resize)
    assert noise.min() >= 0 and noise.max() <= 255


def test_an_unknown_resize_is_refused():
    with pytest.raises(ValueError, match="got 'bicubic', expected 'clean'"):
        to_299(images(1, 8), "bicubic")


# Inception


def test_features_are_torchmetrics_own(file):
    """Folding, layout, pooling and normalisation, against the network as it was."""
    x = images(4, 96)
    theirs = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file))
    with torch.no_grad():
        want = theirs(x)
    ours = inception(file, "torchmetrics", batch=3, allow_unknown_weights=True)
    got = ours(x)
    assert got.shape == (4, 2048) and got.dtype == torch.float32 and got.device.type == "cpu"
    assert ((got - want).norm() / want.norm()).item() < 1e-5
    assert want.std(0).mean() > 1e-4 * want.mean()  # they differ from image to image
    got += 1  # no inference tensor


def test_pytorch_fid_scales_its_own_way(file):
    x = images(2, 299)
    one, two = (inception(file, resize, allow_unknown_weights=True) for resize in ("pytorch-fid", "torchmetrics"))
    assert one.identity.input_norm == "(u - 127.5) / 127.5" and two.identity.input_norm == "(u - 128) / 128"
    net = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file))
    y = 2 * (x / 255) - 1
    with torch.no_grad():
        for name, layer in net.named_children():
            y = layer(y) if name != "fc" else y.flatten(1)
    assert ((one(x) - y).norm() / y.norm()).item() < 1e-5
    assert ((two(x) - y).norm() / y.norm()).item() > 1e-4


def test_a_file_of_another_hash_is_refused_or_fd(file):
    with pytest.raises(WrongWeights, match=r"weights.pth with sha256 .*expected 6726825d.*--allow-unknown-weights"):
        inception(file)
    found = inception(file, allow_unknown_weights=True).identity
    assert (found.arch, found.key, found.dim, found.layer) == ("inception-2015-12-05", "fd", 2048, "pool3")
    assert found.id == f"inception-2015-12-05@{found.weights_sha256[:8]}/clean"
    assert found.weights_path == str(file) and "unknown weights" in found.reasons()[0]
    assert asdict(found)["input_norm"] == "(u - 128) / 128"


def test_odd_files_are_refused(state, tmp_path):
    def lacking(place: Path) -> None:
        torch.save({k: v for k, v in state.items() if "Mixed_6b.branch_pool" not in k}, place)

    odd = {
        "Missing key.*Mixed_6b.branch_pool": lacking,
        "Unexpected key.*AuxLogits": lambda place: torch.save(state | {"AuxLogits.x": torch.zeros(1)}, place),
        "named tensors": lambda place: torch.save([1, 2], place),
        "named tensors, as torch.save": lambda place: place.write_bytes(b"<html>not found</html>"),
        "a pickle of anything else": lambda place: torch.save(SimpleNamespace(), place),
    }
    for number, (message, write) in enumerate(odd.items()):
        place = tmp_path / f"{number}.pth"
        write(place)
        with pytest.raises(WrongWeights, match=message):
            inception(place, allow_unknown_weights=True)


def test_a_pickle_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "ran").write_text, ("x",))

    torch.save({"a": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(WrongWeights):
        inception(tmp_path / "bomb.pth", allow_unknown_weights=True)
    assert not (tmp_path / "ran").exists()


def test_random_weights_are_fd_repeatable_and_leave_the_generator():
    before = torch.get_rng_state()
    one, again, other = random_inception(3), random_inception(3), random_inception(4)
    assert torch.equal(torch.get_rng_state(), before)
    x = images(2, 64)
    rows = one(x)
    assert torch.equal(rows, again(x)) and one.identity == again.identity != other.identity
    assert (one.identity.arch, one.identity.key) == ("random-inception", "fd") and one.identity.reasons()
    assert 0.01 < rows.std() < 100 and not torch.allclose(rows, other(x), rtol=0.1)


def test_half_precision_is_recorded():
    found, x = random_inception(0, dtype="bf16"), images(2, 64)
    assert found.identity.dtype == "bf16" and any("bf16" in reason for reason in found.identity.reasons())
    rows, want = found(x), random_inception(0)(x)
    assert rows.dtype == torch.float32 and 1e-4 < ((rows - want).norm() / want.norm()).item() < 0.1


def test_torchmetrics_distance_on_our_features_is_ours():
    class Net(torch.nn.Module):
        num_features = 4
        extract, seen = random_inception(0), []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(self.extract(x)[:, : self.num_features])
            return self.seen[-1]

    net = Net()
    theirs = FrechetInceptionDistance(feature=net)
    theirs.update(images(12, 32), real=True)
    theirs.update(images(12, 32, seed=1) // 2, real=False)
    real, fake = net.seen
    want = frechet(Stats.of(real), Stats.of(fake))
    assert theirs.compute().item() == pytest.approx(want, rel=1e-5) and want > 0.01


# encoders


def test_dinov2_is_its_layer_normed_class_token(dino):
    found, x = dinov2(str(dino)), images(3, 60, 80)
    net = Dinov2Model.from_pretrained(dino).eval()
    y = torch.nn.functional.interpolate(x.float(), (224, 224), mode="bicubic", antialias=True).clamp(0, 255) / 255
    y = (y - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        want = net(pixel_values=y).last_hidden_state[:, 0]
    assert (found(x) - want).abs().max() < 1e-5
    assert (found.identity.arch, found.identity.dim, found.identity.key) == ("dinov2-32", 32, "fd")
    assert found.identity.weights_sha256 == hash_of(net.state_dict())


def test_clip_gives_its_embeddings_whatever_transformers_returns(clip, monkeypatch):
    found, x = clip_images(str(clip)), images(3, 70, 50)
    net = CLIPModel.from_pretrained(clip).eval()
    y = torch.nn.functional.interpolate(x.float(), (32, 32), mode="bicubic", antialias=True).clamp(0, 255) / 255
    y = (y - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        want = net.visual_projection(net.vision_model(pixel_values=y).pooler_output)
    assert (found(x) - want).abs().max() < 1e-5 and found(x).norm(dim=1).std() > 0
    assert (found.identity.arch, found.identity.dim) == ("clip-32x8x32", 16)
    assert found.identity.id == f"clip-32x8x32@{hash_of(net.state_dict())[:8]}/bicubic32"
    for result in (want, SimpleNamespace(pooler_output=want)):
        monkeypatch.setattr(CLIPModel, "get_image_features", lambda self, pixel_values, result=result: result)
        assert torch.equal(found(x), want)


def test_a_folder_of_another_model_is_refused(dino, clip):
    """transformers would draw what is missing at random, with a warning."""
    with pytest.raises(WrongWeights, match="expected all tensors of a Dinov2Model"):
        dinov2(str(clip))


def test_a_cut_folder_is_refused(dino, tmp_path):
    for place in dino.iterdir():
        (tmp_path / place.name).write_bytes(place.read_bytes()[: 5000 if place.suffix == ".safetensors" else None])
    with pytest.raises(WrongWeights, match="expected complete files"):
        dinov2(str(tmp_path))


def test_latents_are_the_pooled_mean():
    vae = pipeline("sd").vae
    found, x = extractor_named("vae", vae=vae), images(3, 64)
    with torch.no_grad():
        latents = vae.encode(x / 127.5 - 1).latent_dist.mean
    want = latents.reshape(3, 4, 8, 2, 8, 2).mean((3, 5)).flatten(1)
    assert (found(x) - want).abs().max() < 1e-5
    assert found.identity.dim == want.shape[1] and found.identity.batch == 8
    assert found.identity.id == f"vae@{hash_of(vae.state_dict())[:8]}/pool8"
    with pytest.raises(ValueError, match=r"latents are \(4, 4\), expected 8 x 8"):
        found(images(1, 16))
    half = pipeline("sd").vae.to(torch.float16)
    assert (vae_latents(half)(x) - want).norm() / want.norm() < 0.01 and half.dtype == torch.float16


def test_pixels_by_hand():
    x = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    x[0, 0, :, 8:] = 255
    x[0, 1] = 51
    x[0, 2, :2, :2] = torch.tensor([[0, 255], [255, 0]])
    (row,) = pixel_features()(x)
    grid, means, spreads = row[:192].reshape(3, 8, 8), row[192:195], row[195:]
    assert grid[0].tolist() == [[0] * 4 + [1] * 4] * 8
    assert grid[2].flatten().tolist() == [0.5] + [0] * 63
    torch.testing.assert_close(means, torch.tensor([0.5, 0.2, 2 / 256]))
    p = 2 / 256
    torch.testing.assert_close(spreads, torch.tensor([0.5, 0.0, (p * (1 - p)) ** 0.5]), atol=1e-6, rtol=1e-6)
    assert pixel_features().identity.id == "pixels@none/area8" and pixel_features().identity.reasons() == []


def every(dino: Path, clip: Path) -> list:
    names = ["efficientnet-lite0", "random-inception:0", "vae", "pixels", "dinov2-s", "clip-b32"]
    weights = Weights(dinov2=str(dino), clip=str(clip))
    return [extractor_named(name, weights=weights, vae=pipeline("sd").vae, batch=2) for name in names]


def test_all_map_bytes_to_float32_rows_and_refuse_the_rest(dino, clip):
    for found in every(dino, clip):
        x = images(5, 32)
        rows = found(x)
        assert rows.shape == (5, found.identity.dim) and rows.dtype == torch.float32 and not rows.requires_grad
        assert torch.equal(found(x), rows) and found.identity.batch == 2 and found.identity.key == "fd"
        torch.testing.assert_close(found(x[3:]), rows[3:], rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(found(x), rows), found.identity.arch
        with pytest.raises(TypeError, match="expected uint8"):
            found(x / 255)
        for shape in ((2, 1, 32, 32), (2, 32, 32, 3), (3, 32, 32), (0, 3, 32, 32)):
            with pytest.raises(ValueError, match="expected \\(N, 3, H, W\\)"):
                found(torch.zeros(shape, dtype=torch.uint8))


# by name, and where weights are


def flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_tf32_is_off_inside_and_back_outside(monkeypatch):
    seen, found = [], pixel_features()
    inner = found.net
    found.net = lambda x: seen.append(flags()) or inner(x)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        found(images(1, 8))
        assert seen == [(False, False)] and flags() == (True, True)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("inceptoin", {}, "did you mean inception"),
        ("dino-l", {}, "did you mean .*dinov2-l"),
        ("pixels:3", {}, "one of efficientnet-lite0"),
        ("random-inception", {}, "random-inception:SEED"),
        ("random-inception:x", {}, "random-inception:SEED"),
        ("vae", {}, "without a pipeline"),
        ("pixels", {"dtype": "bf16"}, "got bf16 for features 'pixels', expected fp32"),
        ("random-inception:0", {"dtype": "fp8"}, "expected fp32 or bf16 or fp16"),
        ("pixels", {"batch": 0}, "batch=0"),
        ("module:nowhere.to.be:found", {}, "No module named 'nowhere'"),
        ("module:math", {}, "expected module:pkg.mod:factory"),
        ("module:math:none", {}, "no attribute 'none'"),
        ("module:time:time", {}, "an object with `identity`"),
    ],
)
def test_odd_names_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        extractor_named(name, **options)


def test_a_user_s_own_extractor(tmp_path, monkeypatch):
    (tmp_path / "own_features.py").write_text(
        "from stepdistill.evaluation.metrics.encoders import pixel_features\n"
        "def make():\n    return pixel_features(batch=7)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert extractor_named("module:own_features:make").identity.batch == 7
    sys.modules.pop("own_features")


@pytest.fixture
def nowhere(tmp_path, monkeypatch) -> Path:
    """A home without any weights, and no network."""

    def no_network(url: str, place: str, hash_prefix: str) -> None:
        assert url.endswith(f"weights-inception-2015-12-05-{hash_prefix}.pth")
        raise OSError("<urlopen error Name or service not known>")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.delenv("STEPDISTILL_INCEPTION_WEIGHTS", raising=False)
    return tmp_path


def test_missing_inception_says_where_it_looked(nowhere):
    with pytest.raises(MissingWeights) as caught:
        extractor_named("inception")
    lines = str(caught.value).splitlines()
    assert lines[:3] == [
        "features 'inception' need the TF-ported Inception weights, not found in any of:",
        "  --inception-weights (not given)",
        "  $STEPDISTILL_INCEPTION_WEIGHTS (unset)",
    ]
    name = "inception-2015-12-05-6726825d.pth"
    places = [f".cache/stepdistill/weights-{name}", f"hub/checkpoints/weights-{name}", f"hub/checkpoints/pt_{name}"]
    assert lines[3:6] == [f"  {nowhere / place} (no such file)" for place in places]
    assert lines[6] == "and download failed: <urlopen error Name or service not known>"
    assert lines[8] == "  --inception-weights PATH" and lines[9].endswith("efficientnet-lite0 | vae | pixels")
    assert not [place for place in nowhere.rglob("*") if place.is_file()]


def test_inception_is_found_in_order(nowhere, monkeypatch):
    name = "inception-2015-12-05-6726825d.pth"
    places = [
        nowhere / "hub/checkpoints" / f"pt_{name}",
        nowhere / "hub/checkpoints" / f"weights-{name}",
        nowhere / ".cache/stepdistill" / f"weights-{name}",
        nowhere / "variable.pth",
        nowhere / "given.pth",
    ]
    weights = Weights()
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
        if place.name == "variable.pth":
            monkeypatch.setenv("STEPDISTILL_INCEPTION_WEIGHTS", str(place))
        if place.name == "given.pth":
            weights = Weights(inception="~/given.pth")
        assert find_inception(weights) == place
    places[-1].unlink()
    with pytest.raises(MissingWeights, match="--inception-weights ~/given.pth, which is no file"):
        find_inception(weights)
    places[-2].unlink()
    with pytest.raises(MissingWeights, match="STEPDISTILL_INCEPTION_WEIGHTS .*variable.pth, which is no file"):
        find_inception()


def test_a_download_is_checked_and_kept(nowhere, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *call, **options: asked.append((call, options)))
    found = find_inception()
    ((url, place), options) = asked[0]
    assert url.startswith("https://") and place == str(found) and options == {"hash_prefix": "6726825d"}
    assert found.parent == nowhere / ".cache/stepdistill"


@pytest.mark.parametrize(
    ("name", "given", "hub"),
    [
        ("dinov2-l", "dinov2", "facebook/dinov2-large"),
        ("clip-l14-336", "clip", "openai/clip-vit-large-patch14-336"),
    ],
)
def test_missing_models_say_so(name, given, hub, monkeypatch):
    flag = {"dinov2": "--dinov2-weights", "clip": "--clip-weights"}[given]

    def offline(cls, where: str, **_: object) -> None:
        raise OSError(f"We couldn't connect to load {where}\nand more")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(offline))
    with pytest.raises(MissingWeights) as caught:
        extractor_named(name)
    lines = str(caught.value).splitlines()
    assert lines[:4] == [
        f"features '{name}' need the weights of {hub}, not found in any of:",
        f"  {flag} (not given)",
        f"  the Hugging Face cache ({hub})",
        f"and download failed: We couldn't connect to load {hub}",
    ]
    assert lines[5] == f"  {flag} PATH"
    with pytest.raises(MissingWeights, match=f"{flag} /nowhere: We couldn't connect"):
        extractor_named(name, weights=Weights(**{given: "/nowhere"}))


def test_the_doctor_s_table_needs_no_network(nowhere, dino, clip, file, monkeypatch):
    asked = []
    monkeypatch.setattr(extractors, "try_to_load_from_cache", lambda repo, name: asked.append((repo, name)))
    found = {line.name: line for line in availability()}
    assert [name for name, line in found.items() if line.ok] == [
        "efficientnet-lite0",
        "random-inception:SEED",
        "vae",
        "pixels",
    ]
    assert "(not given)" in found["inception"].where and "facebook/dinov2-giant" in found["dinov2-g"].where
    assert ("openai/clip-vit-base-patch32", "config.json") in asked and len(found) == 13
    weights = Weights(inception=str(file), dinov2=str(dino), clip=str(clip))
    assert all(line.ok for line in availability(weights) if line.name != "lpips")
    (clip / "preprocessor_config.json").rename(clip / "kept")
    lines = {line.name: line for line in availability(weights)}
    (clip / "kept").rename(clip / "preprocessor_config.json")
    assert not lines["clip-b32"].ok and "preprocessor_config.json" in lines["clip-b32"].where
    wrong = {line.name: line for line in availability(Weights(inception="/nowhere", clip="/nowhere"))}
    assert "which is no file" in wrong["inception"].where and not wrong["clip-l14"].ok
    monkeypatch.setattr(extractors, "find_spec", lambda name: None)
    bare = {line.name: line for line in availability(weights)}
    assert not bare["inception"].ok and "stepdistill[fid]" in bare["random-inception:SEED"].where


def test_without_its_packages_inception_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ConfigError, match=r"pip install 'stepdistill\[fid\]'"):
        extractor_named("random-inception:0")


# the side-by-side


def test_both_sides_of_the_bench_compute_the_same():
    setup = bench.Setup(sizes=(64,), images=2, turns=1, samples=40, dim=12, distances=1)
    found = {64: bench.features(bench.Networks(), 64, setup)}
    line = json.loads(json.dumps(bench.summary(setup, found, bench.distance(setup))))
    assert line["name"] == "metrics_speed" and line["features_error_64"] < 1e-5 and line["distance_error"] < 1e-6
    assert {"features_speedup_64", "distance_speedup", "distance_seconds", "machine"} < line.keys()
