"""A layer with a LoRA computes `(W + s B A) x`, in one product or in PEFT's two; values, gradients, memory, caches."""

from __future__ import annotations

from collections import OrderedDict
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
from stepdistill.networks.lora_layers import KEPT_NUMBERS, KINDS, LIMITS, Kept, LoraShape, choose_arithmetic
from stepdistill.networks.roles import TEACHER, Ema, Lora, LoraSpec
from stepdistill.training.optimizers import Optimizers
from stepdistill.training.recipe import TrainSpec

RANK, ALPHA = 6, 3.0  # a scale of 1/2


LAYERS = {
    "linear": (partial(nn.Linear, 12, 20), (3, 40, 12)),
    "linear of two dimensions": (partial(nn.Linear, 12, 20, bias=False), (90, 12)),
    "conv": (partial(nn.Conv2d, 5, 8, 3, padding=1), (2, 5, 16, 12)),
    "conv with strides": (partial(nn.Conv2d, 5, 8, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 5, 16, 12)),
    "pointwise conv": (partial(nn.Conv2d, 5, 8, 1), (2, 5, 16, 12)),
}
# whether the weight's gradient is formed, and what is kept for backward, by what `LoraShape` says
PATHS = {"full": (True, True), "low rank, kept": (False, True), "low rank": (False, False)}


def network(kind: str, rank: int = RANK, alpha: float | None = ALPHA, zero: bool = False) -> tuple[Backbone, Tensor]:
    """A layer with a LoRA, and an input."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    backbone = Backbone(nn.Sequential(OrderedDict(layer=make())), LoraSpec(rank=rank, alpha=alpha), ["layer"])
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
    monkeypatch.setattr(LoraShape, "merges", lambda self, limit: True)
    monkeypatch.setattr(LoraShape, "has_full_gradient", lambda self: full)
    monkeypatch.setattr(LoraShape, "keeps", lambda self, learns: keep)
    yield
    monkeypatch.undo()


def both(backbone: Backbone, x: Tensor, arithmetic: str) -> dict[str, Tensor]:
    """Output, and gradients of the input, A and B for a cotangent that has no symmetry."""
    choose_arithmetic(backbone.net, arithmetic, Kept())
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
@pytest.mark.parametrize("kind", ["linear", "conv with strides"])
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

    choose_arithmetic(backbone.net, "apart", Kept())
    theirs = second()
    with path(monkeypatch, name):
        choose_arithmetic(backbone.net, "auto", Kept())
        ours = second()
    assert close(dict(enumerate(ours)), dict(enumerate(theirs)), 1e-5)


@pytest.mark.parametrize("name", PATHS)
def test_a_frozen_role_gives_a_gradient_to_its_input_alone(name, monkeypatch):
    backbone, x = network("conv")
    expected = both(backbone, x, "apart")["x"]
    with path(monkeypatch, name):
        choose_arithmetic(backbone.net, "auto", Kept())
        leaf = x.clone().requires_grad_()
        with backbone.use("student", grad=False) as net:
            y = net(leaf)
        y.backward(torch.linspace(-1, 2, y.numel()).view_as(y))
    assert torch.allclose(leaf.grad, expected, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in backbone.parameters_of("student").values())
    with path(monkeypatch, name), backbone.use("student") as net:  # an input that is data, as a prompt's states
        net(x).sum().backward()
    assert all(p.grad is not None for p in backbone.parameters_of("student").values())


def kept(backbone: Backbone, x: Tensor, grad: bool) -> int:
    """Numbers that a pass keeps for backward, each storage once; the base's and the roles' own do not count."""
    own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), backbone.use("student", grad=grad) as net:
        net(x)
    return sum(size for key, size in sizes.items() if key not in own)


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("needs_input_grad", [True, False])
@pytest.mark.parametrize(
    ("width", "places", "rank"),
    [(600, 2000, 8), (600, 800, 8), (600, 9000, 64), (16, 4000, 8), (64, 2000, 64), (600, 500, 300)],
)
def test_a_pass_keeps_no_more_than_peft_s_does(width, places, rank, needs_input_grad, learns):
    """But for weights of less than a mebibyte."""
    torch.manual_seed(0)
    backbone = Backbone(nn.Sequential(OrderedDict(layer=nn.Linear(width, width))), LoraSpec(rank=rank), ["layer"])
    backbone.add("student", Lora())
    x = torch.randn(places, width, requires_grad=needs_input_grad)
    choose_arithmetic(backbone.net, "apart", Kept())
    before = kept(backbone, x, learns)
    choose_arithmetic(backbone.net, "merged", Kept())
    after = kept(backbone, x, learns)
    assert before == learns * places * (width + rank)
    small = width**2 <= KEPT_NUMBERS
    weight = width**2 if needs_input_grad and (small or (learns and width**2 <= places * rank)) else 0
    assert after == learns * places * width + weight
    assert small or after <= before


def test_the_choice_is_a_function_of_the_shape():
    wide, narrow = LoraShape(64, 1280 * 9, 1280, 64), LoraShape(4096, 320, 320, 64)  # SD 1.5's innermost, and outermost
    for linear, conv in LIMITS.values():
        assert not wide.merges(conv) and narrow.merges(linear)
    assert LoraShape(101, 200, 200, 1).merges(1.0) and not LoraShape(100, 200, 200, 1).merges(1.0)  # P (I + O) > I O
    assert LoraShape(121, 200, 200, 99).merges(1.2) and not LoraShape(119, 200, 200, 99).merges(1.2)
    # 0.8 (P + 2 r) I O < 2 P r (I + O)
    assert LoraShape(1000, 64, 64, 64).has_full_gradient() and not LoraShape(1000, 320, 320, 64).has_full_gradient()
    assert LoraShape(10**9, 100, 100, 21).has_full_gradient() and not LoraShape(10**9, 100, 100, 20).has_full_gradient()
    assert not LoraShape(100, 100, 100, 26).has_full_gradient() and LoraShape(10**4, 100, 100, 26).has_full_gradient()
    assert LoraShape(1, 512, 512, 1).keeps(True) and not LoraShape(1, 512, 513, 1).keeps(True)
    assert LoraShape(5120, 512, 640, 64).keeps(True) and not LoraShape(5120, 512, 640, 64).keeps(False)


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("linear", (3, 40, 12), (120, 12, 20)),
        ("linear", (2, 3, 40, 12), (240, 12, 20)),
        ("conv", (2, 5, 16, 12), (384, 45, 8)),
        ("conv with strides", (2, 5, 16, 12), (192, 30, 8)),
    ],
)
def test_places_and_widths_are_counted(kind, shape, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(LoraShape, "merges", lambda self, limit: seen.append((self, limit)))
    backbone, _ = network(kind)
    with torch.no_grad(), backbone.use("student") as net:
        net(torch.randn(shape))
    ((found, limit),) = seen
    assert (found.places, found.inputs, found.outputs, found.rank) == (*expected, RANK)
    assert limit == LIMITS["cpu"][kind.startswith("conv")]


def test_peft_computes_what_is_not_plain_float32(monkeypatch):
    """Half precision, autocast, several LoRAs at once, heirs of the layers, a layer that learns, and `apart`."""
    backbone, x = network("linear")
    monkeypatch.setattr(LoraShape, "merges", lambda self, limit: True)
    layer = backbone.net.layer
    plain = partial(peft_layers.Linear.forward, layer)

    def is_two_paths(x: Tensor) -> bool:
        with torch.no_grad(), backbone.use("student") as net:
            return torch.equal(net(x), plain(x))

    assert not is_two_paths(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_two_paths(x)
    choose_arithmetic(backbone.net, "apart", Kept())
    assert is_two_paths(x)
    choose_arithmetic(backbone.net, "merged", Kept())
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
    backbone = Backbone(nn.Sequential(OrderedDict(layer=layer)), LoraSpec(rank=2), ["layer"])
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
        with backbone.unchanged(), torch.no_grad(), backbone.use(role) as net:
            for net.layer.arithmetic in ("merged", "merged", "apart"):
                outputs.append(net(x))
        assert torch.equal(*outputs[:2]) and torch.allclose(*outputs[1:], atol=1e-5)
        assert before is None or not torch.allclose(outputs[0], before, atol=1e-3)
        return outputs[0]

    first, mean = check("student"), check("mean")
    monkeypatch.setattr(LoraShape, "merges", lambda self, limit: True)
    with backbone.unchanged(), backbone.use("student") as net:
        net(x).square().mean().backward()
    optimizers.apply(("student",), 0)
    second = check("student", first)
    check("mean", mean)
    backbone.load_state("student", {key: 2 * value for key, value in backbone.state("student").items()})
    check("student", second)
    assert torch.equal(check("student"), check("student"))


def test_a_small_weight_is_formed_once_while_nothing_changes(monkeypatch):
    calls = []
    form = lora_layers.add_lora
    monkeypatch.setattr(lora_layers, "add_lora", lambda *args: calls.append(1) or form(*args))
    monkeypatch.setattr(LoraShape, "merges", lambda self, limit: True)
    backbone, x = network("conv")
    backbone.add("other", Lora())
    awake(backbone, "other")

    def call(role: str, grad: bool) -> Tensor:
        with torch.set_grad_enabled(grad), backbone.use(role) as net:
            return net(x).detach()

    with backbone.unchanged():
        outputs = [call("student", grad) for grad in (False, True, True, False)]
        assert len(calls) == 1 and not torch.allclose(call("other", False), outputs[0], atol=1e-3)
        assert len(calls) == 2
        twin = deepcopy(backbone)  # has layers of its own
        awake(twin)
        with torch.no_grad(), twin.use("student") as net:
            assert not torch.allclose(net(x), outputs[0], atol=1e-3)
    assert not backbone._kept.values
    call("student", False), call("student", False)
    assert len(calls) == 5
    monkeypatch.setattr(lora_layers, "KEPT_NUMBERS", 1)
    with backbone.unchanged():
        call("student", False), call("student", False)
    assert len(calls) == 7


@pytest.mark.parametrize("name", PATHS)
def test_it_compiles_to_one_graph(name, monkeypatch):
    backbone, x = network("conv", zero=False)
    with path(monkeypatch, name):
        expected = both(backbone, x, "auto")
        backbone.net.compile(backend="aot_eager", fullgraph=True)
        assert close(both(backbone, x, "auto"), expected)
        awake(backbone)
        found = both(backbone, x, "auto")
        choose_arithmetic(backbone.net, "auto", backbone._kept)
        with backbone.unchanged(), backbone.use("student") as net:
            net(x)
            assert not backbone._kept.values  # each would be an input of the graph, and new ones a reason to compile
    assert close(found, both(backbone, x, "apart"))  # nothing is kept in the graph


def test_a_pass_in_inference_mode_leaves_nothing_to_a_later_gradient():
    backbone, x = network("linear")
    choose_arithmetic(backbone.net, "merged", Kept())
    with torch.inference_mode(), backbone.use("student") as net:
        first = net(x)
    with backbone.use("student") as net:
        y = net(x)
    y.sum().backward()
    assert torch.equal(y, first)


def test_a_network_made_in_inference_mode_is_called_outside():
    with torch.inference_mode():
        backbone, x = network("linear")
    found = []
    for arithmetic in ("merged", "apart"):
        choose_arithmetic(backbone.net, arithmetic, Kept())
        with torch.no_grad(), backbone.use("student") as net:
            found.append(net(x.clone()))
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_an_output_may_be_written_to(kind, name, monkeypatch):
    """As an activation in place does."""
    backbone, x = network(kind)
    with path(monkeypatch, name), backbone.use("student") as net:
        net(x).relu_().sum().backward()
    assert all(p.grad is not None for p in backbone.parameters_of("student").values())


@pytest.mark.parametrize("hook", ["before", "after", "instead"])
def test_a_layer_with_hooks_is_called(hook):
    """As an offloaded one is."""
    backbone, x = network("linear")
    base = backbone.net.layer.base_layer
    choose_arithmetic(backbone.net, "merged", Kept())
    if hook == "before":
        base.register_forward_pre_hook(lambda _, args: (0 * args[0],))
    elif hook == "after":
        base.register_forward_hook(lambda _, args, y: 0 * y)
    else:
        base.forward = lambda x: torch.zeros(*x.shape[:-1], 20)
    with torch.no_grad(), backbone.use("student") as net:
        layer = net.layer
        update = layer.lora_B["student"](layer.lora_A["student"](x)) * ALPHA / RANK
        assert torch.allclose(net(x) - update, base(x), atol=1e-5)


@pytest.mark.parametrize("name", PATHS)
def test_one_sample_without_a_batch(name, monkeypatch):
    backbone, x = network("conv")
    with path(monkeypatch, name), backbone.use("student") as net:
        one, of_many = net(x[0]), net(x)[0]
        one.sum().backward()
    assert torch.allclose(one, of_many, atol=1e-5)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_functions_of_torch_func(kind, name, monkeypatch):
    """`grad`, `vmap` of `grad`, and `jvp` of what does not learn."""
    backbone, x = network(kind)
    tangent = torch.randn_like(x)

    def derivatives(arithmetic: str) -> dict[str, Tensor]:
        choose_arithmetic(backbone.net, arithmetic, Kept())
        with backbone.use("student") as net:
            slope = torch.func.grad(lambda one: net(one[None]).pow(2).sum())
            found = {"grad": slope(x[0]), "vmap": torch.func.vmap(slope)(x)}
            with torch.no_grad():
                found |= dict(zip("yt", torch.func.jvp(net, (x,), (tangent,)), strict=True))
        return {key: value.detach() for key, value in found.items()}

    theirs = derivatives("apart")
    with path(monkeypatch, name):
        assert close(derivatives("auto"), theirs, 1e-5)
