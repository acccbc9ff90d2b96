"""A layer with a LoRA computes `(W + s B A) x`, in one product or in PEFT's two; values, gradients, memory, caches."""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import pytest
import torch
from peft.tuners.lora import layer as peft_layers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from stepdistill.config.schema import Factory
from stepdistill.networks import lora_layers
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.lora_layers import KINDS, LIMITS, SMALL, Shape, choose_arithmetic
from stepdistill.networks.roles import TEACHER, Ema, Lora, LoraSpec
from stepdistill.training.optimizers import Optimizers
from stepdistill.training.recipe import TrainSpec

RANK, ALPHA = 6, 3.0  # a scale of 1/2


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


LAYERS = {
    "linear": (partial(nn.Linear, 12, 20), (3, 40, 12)),
    "linear of two dimensions": (partial(nn.Linear, 12, 20, bias=False), (90, 12)),
    "conv": (partial(nn.Conv2d, 5, 8, 3, padding=1), (2, 5, 16, 12)),
    "conv with strides": (partial(nn.Conv2d, 5, 8, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 5, 16, 12)),
    "pointwise conv": (partial(nn.Conv2d, 5, 8, 1), (2, 5, 16, 12)),
    "conv of video": (partial(nn.Conv3d, 4, 6, 3, padding=(0, 1, 1), stride=(1, 2, 1)), (2, 4, 5, 8, 7)),
}
# whether the weight's gradient is formed, and what is kept for backward, by what `Shape` says
PATHS = {"full": (True, True), "low rank, kept": (False, True), "low rank": (False, False)}


def network(kind: str, rank: int = RANK, alpha: float | None = ALPHA, zero: bool = False) -> tuple[Backbone, Tensor]:
    """A layer with a LoRA, and an input."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    backbone = Backbone(OneLayer(make()), LoraSpec(rank=rank, alpha=alpha), ["layer"])
    backbone.add("student", Lora())
    if not zero:
        awake(backbone)
    return backbone, torch.randn(shape)


def awake(backbone: Backbone, role: str = "student") -> None:
    with torch.no_grad():
        for p in backbone.parameters_of(role).values():
            nn.init.normal_(p, std=0.3)


@contextmanager
def path(monkeypatch, name: str):
    """Every layer merges, on this path."""
    full, keep = PATHS[name]
    monkeypatch.setattr(Shape, "merges", lambda self, limit: True)
    monkeypatch.setattr(Shape, "has_full_gradient", lambda self: full)
    monkeypatch.setattr(Shape, "keeps", lambda self: keep)
    yield
    monkeypatch.undo()


def both(backbone: Backbone, x: Tensor, arithmetic: str) -> dict[str, Tensor]:
    """Output, and gradients of the input, A and B for a cotangent that has no symmetry."""
    choose_arithmetic(backbone.net, arithmetic)
    x = x.clone().requires_grad_()
    with backbone.use("student") as net:
        y = net(x)
    cotangent = torch.linspace(-1, 2, y.numel()).view_as(y)
    params = backbone.parameters_of("student")
    grads = torch.autograd.grad(y, [x, *params.values()], cotangent)
    return {"y": y.detach(), "x": grads[0], **dict(zip(params, grads[1:], strict=True))}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], within: float = 3e-6) -> bool:
    return all(float((ours[k] - theirs[k]).abs().max()) <= within * float(theirs[k].abs().max()) for k in theirs)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", LAYERS)
def test_one_product_equals_two_in_values_and_gradients(kind, name, monkeypatch):
    backbone, x = network(kind)
    theirs = both(backbone, x, "apart")
    with path(monkeypatch, name):
        ours = both(backbone, x, "auto")
    assert theirs["y"].abs().max() > 0.1 and ours.keys() == theirs.keys() and len(ours) == 4
    assert close(ours, theirs) and not torch.equal(ours["y"], theirs["y"])  # else it would be the same path


def test_the_output_is_that_of_the_sum_of_the_weights():
    backbone, x = network("linear")
    layer = backbone.net.layer
    weight = layer.base_layer.weight.double()
    a, b = (part["student"].weight.double() for part in (layer.lora_A, layer.lora_B))
    expected = x.double() @ (weight + ALPHA / RANK * b @ a).T + layer.base_layer.bias.double()
    with torch.no_grad(), backbone.use("student") as net:
        assert torch.allclose(net(x).double(), expected, atol=1e-5)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_lora_of_zero_is_the_teacher_bit_for_bit(kind, name, monkeypatch):
    backbone, x = network(kind, zero=True)
    with path(monkeypatch, name):
        for grad in (False, True):
            with torch.set_grad_enabled(grad), backbone.use(TEACHER) as net:
                teacher = net(x)
            with torch.set_grad_enabled(grad), backbone.use("student") as net:
                assert torch.equal(net(x), teacher)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", ["linear", "conv with strides", "conv of video"])
def test_gradients_may_be_differentiated(kind, name, monkeypatch):
    """As a penalty on a gradient does."""
    backbone, x = network(kind)

    def second() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        params = list(backbone.parameters_of("student").values())
        with backbone.use("student") as net:
            y = net(leaf).pow(3).sum()
        first = torch.autograd.grad(y, [leaf, *params], create_graph=True)
        return list(torch.autograd.grad(sum(part.pow(2).sum() for part in first), [leaf, *params]))

    choose_arithmetic(backbone.net, "apart")
    theirs = second()
    with path(monkeypatch, name):
        choose_arithmetic(backbone.net, "auto")
        ours = second()
    assert close(dict(enumerate(ours)), dict(enumerate(theirs)), 1e-5)


@pytest.mark.parametrize("name", PATHS)
def test_a_frozen_role_gives_a_gradient_to_its_input_alone(name, monkeypatch):
    backbone, x = network("conv")
    expected = both(backbone, x, "apart")["x"]
    with path(monkeypatch, name):
        choose_arithmetic(backbone.net, "auto")
        leaf = x.clone().requires_grad_()
        with backbone.use("student", grad=False) as net:
            y = net(leaf)
        y.backward(torch.linspace(-1, 2, y.numel()).view_as(y))
    assert torch.allclose(leaf.grad, expected, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in backbone.parameters_of("student").values())
    with path(monkeypatch, name), backbone.use("student") as net:  # an input that is data, as a prompt's states
        net(x).sum().backward()
    assert all(p.grad is not None for p in backbone.parameters_of("student").values())


def kept(backbone: Backbone, x: Tensor) -> int:
    """Numbers that a pass keeps for backward, each storage once; the base's and the roles' own do not count."""
    own = {p.untyped_storage().data_ptr() for p in backbone.parameters()} | {x.untyped_storage().data_ptr()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), backbone.use("student") as net:
        y = net(x)
    assert y.requires_grad
    return sum(size for key, size in sizes.items() if key not in own)


@pytest.mark.parametrize(
    ("inputs", "places", "rank"), [(600, 2000, 8), (600, 800, 8), (16, 4000, 8), (64, 2000, 64), (600, 500, 300)]
)
def test_a_pass_keeps_no_more_than_peft_s_does(inputs, places, rank, monkeypatch):
    torch.manual_seed(0)
    backbone = Backbone(OneLayer(nn.Linear(inputs, inputs)), LoraSpec(rank=rank), ["layer"])
    backbone.add("student", Lora())
    x = torch.randn(places, inputs, requires_grad=True)
    choose_arithmetic(backbone.net, "apart")
    before = kept(backbone, x)
    choose_arithmetic(backbone.net, "merged")
    after = kept(backbone, x)
    assert before == places * rank
    assert after == (0 if inputs**2 > SMALL and inputs**2 > places * rank else inputs**2)
    assert after <= max(before, SMALL)
    assert bool(backbone.net.layer.formed) == (inputs**2 <= SMALL)  # a large one is not held from pass to pass
    x.requires_grad_(False)  # then no backward uses the weight
    assert kept(backbone, x) == 0


def test_the_choice_is_a_function_of_the_shape():
    wide, narrow = Shape(64, 1280 * 9, 1280, 64), Shape(4096, 320, 320, 64)  # SD 1.5's innermost, and outermost
    for linear, conv in LIMITS.values():
        assert not wide.merges(conv) and narrow.merges(linear)
    assert Shape(101, 200, 200, 1).merges(1.0) and not Shape(100, 200, 200, 1).merges(1.0)  # P (I + O) > I O
    assert Shape(121, 200, 200, 99).merges(1.2) and not Shape(119, 200, 200, 99).merges(1.2)
    # 0.8 (P + 2 r) I O < 2 P r (I + O)
    assert Shape(1000, 64, 64, 64).has_full_gradient() and not Shape(1000, 320, 320, 64).has_full_gradient()
    assert Shape(10**9, 100, 100, 21).has_full_gradient() and not Shape(10**9, 100, 100, 20).has_full_gradient()
    assert not Shape(100, 100, 100, 26).has_full_gradient() and Shape(10**4, 100, 100, 26).has_full_gradient()
    assert Shape(1, 512, 512, 1).keeps() and not Shape(1, 512, 513, 1).keeps() and Shape(5120, 512, 640, 64).keeps()


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("linear", (3, 40, 12), (120, 12, 20)),
        ("linear", (2, 3, 40, 12), (240, 12, 20)),
        ("conv", (2, 5, 16, 12), (384, 45, 8)),
        ("conv with strides", (2, 5, 16, 12), (192, 30, 8)),
        ("conv of video", (2, 4, 5, 8, 7), (280, 108, 6)),
    ],
)
def test_places_and_widths_are_counted(kind, shape, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(Shape, "merges", lambda self, limit: seen.append((self, limit)))
    backbone, _ = network(kind)
    with torch.no_grad(), backbone.use("student") as net:
        net(torch.randn(shape))
    ((found, limit),) = seen
    assert (found.places, found.inputs, found.outputs, found.rank) == (*expected, RANK)
    assert limit == LIMITS["cpu"][kind.startswith("conv")]


def test_peft_computes_what_is_not_plain_float32(monkeypatch):
    """Half precision, autocast, several LoRAs at once, heirs of the layers, a layer that learns, and `apart`."""
    backbone, x = network("linear")
    monkeypatch.setattr(Shape, "merges", lambda self, limit: True)
    layer = backbone.net.layer
    plain = partial(peft_layers.Linear.forward, layer)

    def is_two_paths(x: Tensor) -> bool:
        with torch.no_grad(), backbone.use("student") as net:
            return torch.equal(net(x), plain(x))

    assert not is_two_paths(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_two_paths(x)
    choose_arithmetic(backbone.net, "apart")
    assert is_two_paths(x)
    choose_arithmetic(backbone.net, "merged")
    assert not is_two_paths(x)
    layer.base_layer.weight.requires_grad_(True)
    assert is_two_paths(x)
    layer.base_layer.weight.requires_grad_(False)
    layer.base_layer.to(torch.bfloat16)
    assert is_two_paths(x.bfloat16())
    layer.base_layer.to(torch.float32)
    with torch.no_grad(), backbone.use("student") as net:
        added = net(x)
        layer.enable_adapters(False)
        assert torch.equal(net(x), layer.base_layer(x)) and not torch.allclose(net(x), added, atol=1e-3)
        layer.enable_adapters(True)
        layer.merge()
        assert torch.allclose(net(x), added, atol=1e-5)  # and not twice
        layer.unmerge()
    backbone.add("other", Lora())
    awake(backbone, "other")
    with torch.no_grad(), backbone.use("student") as net:
        backbone._active.append("other")
        assert torch.equal(net(x), plain(x))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, dilation=2),  # PEFT's own is of another size then
        type("Heir", (nn.Linear,), {})(4, 4),
    ],
)
def test_other_layers_stay_peft_s(layer):
    backbone = Backbone(OneLayer(layer), LoraSpec(rank=2), ["layer"])
    backbone.add("student", Lora())
    assert type(backbone.net.layer) in KINDS


class Bare(torch.optim.Optimizer):
    """Writes past autograd, as 8-bit optimizers and many others do."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize("optimizer", ["torch.optim.AdamW", "torch.optim.SGD", f"{__name__}.Bare"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_weight_that_is_kept_follows_every_write(kind, optimizer, monkeypatch):
    backbone, x = network(kind)
    backbone.add("mean", Ema("student", 0.5))
    optimizers = Optimizers(
        backbone, TrainSpec(output_dir="o", learning_rate=0.1, optimizer=Factory(optimizer))
    ).build()

    def check(role: str, before: Tensor | None = None) -> Tensor:
        outputs = []
        for arithmetic in ("merged", "apart"):
            for layer in backbone.net.modules():
                if type(layer) in KINDS.values():
                    layer.arithmetic = arithmetic  # what is kept stays
            with torch.no_grad(), backbone.use(role) as net:
                outputs.append(net(x))
        assert torch.allclose(*outputs, atol=1e-5)
        assert before is None or not torch.allclose(outputs[0], before, atol=1e-3)
        return outputs[0]

    first, mean = check("student"), check("mean")
    monkeypatch.setattr(Shape, "merges", lambda self, limit: True)
    with backbone.use("student") as net:
        net(x).square().mean().backward()
    optimizers.apply(("student",), 0)
    second = check("student", first)
    check("mean", mean)
    backbone.load_state("student", {key: 2 * value for key, value in backbone.state("student").items()})
    check("student", second)
    assert torch.equal(check("student"), check("student"))


def test_a_weight_is_formed_once_until_it_is_written_to(monkeypatch):
    calls = []
    form = lora_layers.add_lora
    monkeypatch.setattr(lora_layers, "add_lora", lambda *args: calls.append(1) or form(*args))
    backbone, x = network("conv")
    choose_arithmetic(backbone.net, "merged")
    for grad in (False, True, True, False):
        with torch.set_grad_enabled(grad), backbone.use("student") as net:
            net(x)
    assert len(calls) == 1
    a, b = backbone.parameters_of("student").values()
    writes = [lambda: b.add_(1), lambda: a.add_(1), lambda: setattr(a, "data", a.data.clone()), lambda: None]
    for write, expected in zip(writes, (2, 3, 4, 4), strict=True):
        with torch.no_grad(), backbone.use("student") as net:
            write()
            net(x)
        assert len(calls) == expected
    twin = deepcopy(backbone)
    awake(twin)
    with torch.no_grad(), twin.use("student") as net:
        y = net(x)
        choose_arithmetic(net, "apart")
        assert torch.allclose(y, net(x), atol=1e-5)


@pytest.mark.parametrize("name", PATHS)
def test_it_compiles_to_one_graph(name, monkeypatch):
    backbone, x = network("conv", zero=False)
    with path(monkeypatch, name):
        expected = both(backbone, x, "auto")
        backbone.net.compile(backend="aot_eager", fullgraph=True)
        assert close(both(backbone, x, "auto"), expected)
        awake(backbone)
        found = both(backbone, x, "auto")
    assert close(found, both(backbone, x, "apart"))  # nothing is kept in the graph


def test_a_pass_in_inference_mode_leaves_nothing_to_a_later_gradient():
    backbone, x = network("linear")
    choose_arithmetic(backbone.net, "merged")
    with torch.inference_mode(), backbone.use("student") as net:
        first = net(x)
    with backbone.use("student") as net:
        y = net(x)
    y.sum().backward()
    assert torch.equal(y, first)


def test_forward_derivatives_of_frozen_roles():
    backbone, x = network("linear")
    tangent = torch.randn_like(x)
    found = {}
    for arithmetic in ("apart", "merged"):
        choose_arithmetic(backbone.net, arithmetic)
        with torch.no_grad(), backbone.use("student") as net:
            found[arithmetic] = torch.func.jvp(net, (x,), (tangent,))
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(found["apart"], found["merged"], strict=True))
