"""Negative prompts inside attention: NASA's closed forms on every kind of network, and by plain softmax."""

from __future__ import annotations

import inspect
import logging
from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SanaTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormContinuous
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import stepdistill
from stepdistill.core.errors import ConfigError
from stepdistill.students.draw.negative_prompt import nag, nasa, negative_prompt

PIPELINES = ("sd", "sdxl", "sd3", "ltx")
SUBTRACTING = [name for name in tiny.ADAPTED if name != "klein"]  # families that take a negative prompt in attention
NETWORKS = (*PIPELINES, "sd35", "flux", "pixart", "sana")


class Bare:
    """A network alone, its prompts hashed: what a negative prompt needs of a family without text encoders here."""

    def __init__(self, net: nn.Module, shape: tuple[int, int, int], call) -> None:
        self.net, self.shape, self.call = net.eval(), shape, call

    def network(self, pipe):
        return self.net

    def limits(self, pipe):
        return {}

    def native_size(self, pipe):
        return 8, 8

    def latent_shape(self, pipe, height, width):
        return self.shape

    def condition(self, pipe, prompts, width=16, length=6):
        rows = [torch.randn(length, width, generator=torch.Generator().manual_seed(sum(map(ord, p)))) for p in prompts]
        mask = torch.tensor([[float(i <= len(p.split())) for i in range(length)] for p in prompts])
        return {"states": torch.stack(rows), "mask": mask, "pooled": torch.stack(rows)[:, 0]}


def flux(net, x_t, t, cond):
    places = torch.tensor([[0.0, i // 4, i % 4] for i in range(16)])
    return net(
        x_t.flatten(2).mT,
        timestep=t / 1000,
        encoder_hidden_states=cond["states"],
        pooled_projections=cond["pooled"],
        img_ids=places,
        txt_ids=torch.zeros(cond["states"].shape[1], 3),
        return_dict=False,
    )[0]


def sd35(net, x_t, t, cond):
    texts = {"encoder_hidden_states": cond["states"], "pooled_projections": cond["pooled"]}
    return net(x_t, timestep=t, **texts, return_dict=False)[0]


def sana(net, x_t, t, cond, **more):
    texts = {"encoder_hidden_states": cond["states"], "encoder_attention_mask": cond["mask"]}
    return net(x_t, timestep=t, **texts, **more, return_dict=False)[0]


def pixart(net, x_t, t, cond):
    return sana(net, x_t, t, cond, added_cond_kwargs={"resolution": None, "aspect_ratio": None})


def bare(name: str, single: int = 2) -> Bare:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "attention_head_dim": 16}
    if name == "flux":
        size = {"in_channels": 4, "num_layers": 2, "num_single_layers": single, **heads, "axes_dims_rope": (4, 6, 6)}
        net = FluxTransformer2DModel(**size, joint_attention_dim=16, pooled_projection_dim=16)
        return Bare(net, (4, 4, 4), flux)
    if name == "sd35":
        size = {"in_channels": 4, "out_channels": 4, "num_layers": 3, **heads, "sample_size": 8, "qk_norm": "rms_norm"}
        text = {"joint_attention_dim": 16, "caption_projection_dim": 32, "pooled_projection_dim": 16}
        net = SD3Transformer2DModel(**size, **text, pos_embed_max_size=4, dual_attention_layers=(0, 1))
        return Bare(net, (4, 8, 8), sd35)
    if name == "pixart":
        size = {"in_channels": 4, "out_channels": 4, "num_layers": 2, **heads, "sample_size": 8, "norm_num_groups": 4}
        net = PixArtTransformer2DModel(**size, cross_attention_dim=32, caption_channels=16)
        return Bare(net, (4, 8, 8), pixart)
    size = {"in_channels": 4, "out_channels": 4, "num_layers": 2, **heads, "sample_size": 4, "caption_channels": 16}
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32}
    return Bare(SanaTransformer2DModel(**size, **cross), (4, 4, 4), sana)


class Case:
    """A family with a network of its kind, and a pass of it on two prompts."""

    def __init__(self, name: str, single: int = 2) -> None:
        whole = name in PIPELINES
        self.family = tiny.FAMILIES[name] if whole else bare(name, single)
        self.pipe = tiny.pipeline(name) if whole else SimpleNamespace()
        self.net = self.family.network(self.pipe)
        torch.manual_seed(1)
        for p in self.net.parameters():  # zeros at the start would hide what is behind them
            p.data = p.data + 0.02 * torch.randn_like(p)
        shape = tiny.latent_shape(name) if whole else self.family.shape
        self.x_t, self.t = torch.randn(2, *shape), torch.tensor([300.0, 700.0])

    def __call__(self, prompts=("red apple", "cat face")):
        with torch.no_grad():
            cond = self.family.condition(self.pipe, list(prompts))
            return self.family.call(self.net, self.x_t, self.t, cond)

    def negative(self, *args, **kwargs):
        return negative_prompt(self.pipe, *args, family=self.family, **kwargs)

    def ends(self):
        """Last layers of the attention that sees the prompt."""
        joint = [m.to_out[0] for n, m in self.net.named_modules() if n.endswith(".attn")]
        return joint or [m.to_out[0] for n, m in self.net.named_modules() if n.endswith(".attn2")]


@pytest.fixture(params=NETWORKS)
def case(request) -> Case:
    return Case(request.param)


def state(net: nn.Module) -> list:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    return [hooks, [id(p) for p in net.attn_processors.values()], [p.clone() for p in net.parameters()]]


def same(one: list, other: list) -> bool:
    return one[:2] == other[:2] and all(torch.equal(a, b) for a, b in zip(one[2], other[2], strict=True))


def test_scale_zero_is_the_plain_pass_bit_for_bit_and_any_other_is_not(case):
    plain = case()
    for kwargs in ({"scale": 0}, {"scale": 0, "mode": "nag"}, {"scale": 5, "mode": "nag", "blend": 0}):
        with case.negative("octopus", **kwargs):
            assert torch.equal(case(), plain)
    for kwargs in ({"scale": 0.2}, {"scale": 5, "mode": "nag"}):
        with case.negative("octopus", **kwargs):
            assert (case() - plain).abs().max() > 1e-4
    assert torch.equal(case(), plain)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_prompt_itself_as_negative_shrinks_what_attention_found_and_not_the_bias(name):
    case = Case(name, single=0)
    assert all(layer.bias is not None and layer.bias.abs().max() > 0 for layer in case.ends())
    plain = case()
    with case.negative(["red apple", "cat face"], scale=0.3):
        found = case()
    for layer in case.ends():
        layer.weight.data *= 0.7  # to_out((1 - scale) Z+) = (1 - scale) W Z+ + b
    assert torch.allclose(found, case(), atol=2e-5)
    assert (found - plain).abs().max() > 1e-3


def test_nag_with_the_prompt_itself_is_the_plain_pass(case):
    plain = case()
    with case.negative(["red apple", "cat face"], scale=5, mode="nag"):
        assert torch.allclose(case(), plain, atol=1e-5)


def test_the_network_is_as_it_was_also_after_an_exception(case):
    before, plain = state(case.net), case()
    with pytest.raises(KeyError), case.negative("octopus"):
        assert not same(state(case.net), before)
        raise KeyError
    assert same(state(case.net), before) and torch.equal(case(), plain)
    with pytest.raises(ConfigError, match="3 negative prompts"), case.negative(["rose", "octopus", "bat"]):
        case()
    assert same(state(case.net), before) and torch.equal(case(), plain)
    with case.negative("octopus"), pytest.raises(ConfigError, match="one at a time"), case.negative("rose"):
        pass
    assert same(state(case.net), before)


def test_each_image_has_its_own_negative_or_all_share_one(case):
    def drawn(what):
        with case.negative(what, scale=0.4):
            return case()

    one, other, own = drawn("octopus"), drawn("rose"), drawn(["octopus", "rose"])
    assert torch.allclose(own[0], one[0], atol=1e-6) and torch.allclose(own[1], other[1], atol=1e-6)
    assert not torch.allclose(own[1], one[1], atol=1e-4)
    assert torch.allclose(drawn(["octopus"] * 2), one, atol=1e-6)


def heads(x, attn):
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def softmax(attn, q, k, v, bias=None):
    """softmax(q k^T / sqrt(d) + bias) v, heads joined again."""
    logits = q @ k.mT / q.shape[-1] ** 0.5
    return ((logits if bias is None else logits + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)


def watch(module, seen):
    def hook(module, args, kwargs, output):
        names = ("hidden_states", "encoder_hidden_states", "attention_mask")
        seen.append(dict(zip(names, args, strict=False)) | kwargs | {"output": output})

    return module.register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart", "sana", "ltx"])
def test_a_layer_equals_plain_softmax_of_two_prompts_with_masks_of_their_own(name):
    case, seen, alone = Case(name), [], []
    site = next(n for n, m in case.net.named_modules() if n.endswith("attn2"))
    attn = case.net.get_submodule(site)
    with case.negative("black cat", scale=0.6):
        handle = watch(attn, seen)
        case()
        handle.remove()
    handle = watch(attn, alone)
    case(["black cat", "black cat"])
    handle.remove()
    (here,), (there,) = seen, alone
    x = here["hidden_states"]
    normed = (attn.norm_q, attn.norm_k) if name == "ltx" else (nn.Identity(), nn.Identity())
    q = heads(normed[0](attn.to_q(x)), attn)
    found = []
    for each in (here, there):
        text, mask = each["encoder_hidden_states"], each.get("attention_mask")
        assert (mask is not None) == (name in ("pixart", "sana", "ltx"))
        bias = None if mask is None else mask[:, None]
        found.append(softmax(attn, q, heads(normed[1](attn.to_k(text)), attn), heads(attn.to_v(text), attn), bias))
    z = found[0] - 0.6 * found[1]
    expected = z @ attn.to_out[0].weight.T + attn.to_out[0].bias  # tiny networks do not rescale it
    assert torch.allclose(here["output"], expected, atol=1e-5)
    assert (found[1] - found[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["pixart", "sana", "ltx"])
def test_padding_of_the_negative_is_not_looked_at(name, monkeypatch):
    case = Case(name)
    plain_condition = case.family.condition

    def other_padding(pipe, prompts):
        cond = plain_condition(pipe, prompts)
        return cond | {"states": cond["states"] + 10 * ~cond["mask"].bool()[..., None]}

    with case.negative("octopus", scale=0.6):
        one = case()
    with monkeypatch.context() as patch:
        patch.setattr(type(case.family), "condition", staticmethod(other_padding))
        with case.negative("octopus", scale=0.6):
            patch.undo()
            assert torch.equal(case(), one)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_layer_is_linear_in_the_scale_and_self_attention_is_untouched(name):
    case = Case(name)
    kind = "attn2" if name in ("sd", "sdxl", "pixart", "sana", "ltx") else "blocks.0.attn"
    first = next(m for n, m in case.net.named_modules() if n.endswith(kind))
    before = [m for n, m in case.net.named_modules() if n.endswith("attn1")][:1]
    outputs, texts, inner = [], [], []
    for scale in (0.0, 0.25, 0.5, 1.0):
        seen = []
        with case.negative("octopus", scale=scale):
            handles = [watch(first, seen), *(watch(m, inner) for m in before)]
            case()
        for handle in handles:
            handle.remove()
        out = seen[-1]["output"]
        outputs.append(out if isinstance(out, torch.Tensor) else out[0])
        texts += [] if isinstance(out, torch.Tensor) else [out[1]]
    assert len(texts) == 4 * (name in ("sd3", "sd35", "flux")) and all(torch.equal(each, texts[0]) for each in texts)
    assert len(inner) == 4 * len(before)  # it is not even asked twice
    assert all(torch.equal(each["output"], inner[0]["output"]) for each in inner)
    zero, quarter, half, one = outputs
    assert torch.allclose(half - zero, 2 * (quarter - zero), atol=1e-5)
    assert torch.allclose(one - zero, 4 * (quarter - zero), atol=1e-5)
    assert (one - zero).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sd3", "sd35", "flux"])
def test_joint_blocks_by_plain_softmax_with_a_text_stream_of_the_negative(name):
    case, blocks = Case(name), []
    watched = case.net.transformer_blocks[:2]

    def note(module, args, kwargs):
        blocks.append(kwargs)

    with case.negative("octopus", scale=0.6):
        outs = []
        handles = [b.register_forward_pre_hook(note, with_kwargs=True) for b in watched]
        handles += [b.attn.register_forward_hook(lambda m, a, o: outs.append(o)) for b in watched]
        case()
    for handle in handles:
        handle.remove()
    outs = outs[1::2]  # of each block the second call is the image's
    cond = case.family.condition(case.pipe, ["octopus"])
    text = case.net.context_embedder(cond["states"]).expand(2, -1, -1)
    for block, kwargs, out in zip(watched, blocks, outs, strict=True):
        attn, x = block.attn, block.norm1(kwargs["hidden_states"], emb=kwargs["temb"])[0]
        found = []
        for each in (kwargs["encoder_hidden_states"], text):
            last = isinstance(block.norm1_context, AdaLayerNormContinuous)
            y = block.norm1_context(each, kwargs["temb"]) if last else block.norm1_context(each, emb=kwargs["temb"])[0]
            q, k, v = (heads(layer(x), attn) for layer in (attn.to_q, attn.to_k, attn.to_v))
            k_y, v_y = (heads(layer(y), attn) for layer in (attn.add_k_proj, attn.add_v_proj))
            if name != "sd3":
                q, k, k_y = attn.norm_q(q), attn.norm_k(k), attn.norm_added_k(k_y)
            if name == "flux":
                cos, sin = (p[len(kwargs["image_rotary_emb"][0]) - q.shape[2] :] for p in kwargs["image_rotary_emb"])
                q, k = (turned(value, cos, sin) for value in (q, k))  # text stands at 0, where nothing turns
            found.append(softmax(attn, q, torch.cat([k, k_y], 2), torch.cat([v, v_y], 2)))
        expected = (found[0] - 0.6 * found[1]) @ attn.to_out[0].weight.T + attn.to_out[0].bias
        assert torch.allclose(out[0], expected, atol=1e-5)
        assert (found[0] - found[1]).abs().max() > 1e-4
        with torch.no_grad():
            text = block(**kwargs | {"encoder_hidden_states": text})[0]


def turned(value, cos, sin):
    """Pairs of channels as complex numbers, turned by the angle of their place."""
    pairs = torch.view_as_complex(value.unflatten(-1, (-1, 2)).contiguous())
    turns = torch.complex(cos[:, ::2], sin[:, ::2]).to(torch.complex64)
    return torch.view_as_real(pairs * turns).flatten(-2)


@pytest.mark.parametrize("longer", [0, 3])
def test_flux_single_blocks_change_the_image_tokens_alone(longer):
    case, seen = Case("flux"), []
    block = case.net.single_transformer_blocks[0]
    plain_condition = case.family.condition
    case.family.condition = lambda pipe, prompts: plain_condition(pipe, prompts, length=6 + longer)
    context, calls = case.negative("octopus", scale=0.6), []
    with context:
        case.family.condition = plain_condition
        handles = [watch(block.attn, seen)]
        handles.append(block.register_forward_pre_hook(lambda m, a, k: calls.append(k), with_kwargs=True))
        case()
    for handle in handles:
        handle.remove()
    asked, drawn = seen
    tokens = 6
    with torch.no_grad():
        again = block.attn(drawn["hidden_states"], image_rotary_emb=drawn["image_rotary_emb"])
    assert torch.equal(drawn["output"][:, :tokens], again[:, :tokens])
    assert asked["output"].shape[1] == drawn["output"].shape[1] + longer
    other = asked["output"][:, tokens + longer :]
    assert torch.allclose(drawn["output"][:, tokens:], again[:, tokens:] - 0.6 * other, atol=1e-6)
    cos = asked["image_rotary_emb"][0]
    assert torch.equal(cos[-16:], calls[0]["image_rotary_emb"][0][-16:]) and torch.equal(
        cos[: tokens + longer], torch.ones_like(cos[: tokens + longer])
    )


def test_nag_is_held_within_the_limit_and_blended():
    z, other = torch.tensor([[[1.0, -1.0], [2.0, 0.0]]]), torch.tensor([[[-1.0, 1.0], [1.9, 0.0]]])
    # first token: z + 2 (z - other) = (5, -5), 1-norm 10 against 2: held at 2.5 * 2; second: (2.2, 0) stays
    assert torch.allclose(nag(z, other, 2.0, 2.5, 1.0), torch.tensor([[[2.5, -2.5], [2.2, 0.0]]]))
    assert torch.allclose(nag(z, other, 2.0, 2.5, 0.5), torch.tensor([[[1.75, -1.75], [2.1, 0.0]]]))
    assert torch.equal(nag(z, other, 0.0, 1.0, 0.5), z) and torch.equal(nag(z, other, 2.0, 2.5, 0.0), z)
    assert torch.equal(nag(0 * z, 0 * other, 2.0, 2.5, 0.5), 0 * z)
    assert torch.allclose(nasa(z, other, 0.5), torch.tensor([[[1.5, -1.5], [1.05, 0.0]]]))


def per_prompt(family, count: int) -> dict[str, int]:
    """The argument that asks a pipeline for several samples of each prompt."""
    names = ("num_images_per_prompt", "num_videos_per_prompt")
    return {key: count for key in inspect.signature(family.pipeline_class.__call__).parameters if key in names}


@pytest.mark.parametrize("name", SUBTRACTING)
def test_a_plain_pipeline_with_a_lora_active_or_fused(name):
    pipe, family = tiny.pipeline(name), tiny.FAMILIES[name]
    net = family.network(pipe)
    inject_adapter_in_model(LoraConfig(target_modules=["to_k", "to_v", "to_out.0"], init_lora_weights=False), net)
    loras = [module for module in net.modules() if isinstance(module, BaseTunerLayer)]
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}
    call |= family.guidance(1.0) | family.arguments()

    def draw(prompts, **more):
        noise = torch.randn(2, *tiny.latent_shape(name), generator=torch.Generator().manual_seed(0))
        return pipe(list(prompts), latents=family.pack(noise), **call, **more)[0]

    pipe.set_progress_bar_config(disable=True)
    both = ["red apple", "cat face"]
    plain = draw(both)
    with negative_prompt(pipe, "octopus", 0.0, family=family):
        assert torch.equal(draw(both), plain)
    with negative_prompt(pipe, "octopus", 0.5, family=family):
        active = draw(both)
    assert (active - plain).abs().max() > 1e-3
    with negative_prompt(pipe, ["octopus", "rose"], 0.5, family=family):
        two = draw(["red apple"], **per_prompt(family, 2))
    with negative_prompt(pipe, "rose", 0.5, family=family):
        assert torch.allclose(two[1], draw(["red apple"] * 2)[1], atol=1e-5)
    for lora in loras:
        lora.enable_adapters(False)
    with negative_prompt(pipe, "octopus", 0.5, family=family):
        assert (draw(both) - active).abs().max() > 1e-3  # so the LoRA of to_k and to_v was in it
    for lora in loras:
        lora.enable_adapters(True)
        lora.merge()
    with negative_prompt(pipe, "octopus", 0.5, family=family):
        assert torch.allclose(draw(both), active, atol=1e-4)


def test_a_guided_call_has_the_shared_negative_in_both_halves():
    pipe = tiny.pipeline("sd")
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 1, "guidance_scale": 3.0, "height": 32, "width": 32, "output_type": "latent"}
    noise = torch.randn(1, 4, 8, 8)
    with negative_prompt(pipe, "octopus", 0.5):
        assert torch.isfinite(pipe("rose", latents=noise, **call).images).all()
    with negative_prompt(pipe, ["octopus", "rose"], 0.5), pytest.raises(ConfigError, match="2 negative prompts"):
        pipe(["rose", "bat"], latents=noise.repeat(2, 1, 1, 1), **call)


@pytest.mark.parametrize("name", tiny.ONE_STREAM)
def test_networks_of_one_stream_take_no_negative_prompt_without_guidance(name):
    match = "expected a network with cross-attention or joint attention"
    with (
        pytest.raises(ConfigError, match=match),
        negative_prompt(tiny.pipeline(name), "cat", family=tiny.FAMILIES[name]),
    ):
        pass


@pytest.mark.parametrize("name", SUBTRACTING)
def test_what_is_cut_of_a_long_negative_prompt_is_said(name, caplog):
    pipe = tiny.pipeline(name)
    with caplog.at_level(logging.WARNING), negative_prompt(pipe, "cat " * 200 + "octopus", family=tiny.FAMILIES[name]):
        pass
    assert any("are truncated" in r.getMessage() and "cat" in r.getMessage() for r in caplog.records)


def test_networks_without_such_attention_are_refused():
    pipe, match = tiny.pipeline("klein"), "a Flux2Transformer2DModel, expected a network with cross-attention or joint"
    with pytest.raises(ConfigError, match=match), negative_prompt(pipe, "octopus", family=tiny.FAMILIES["klein"]):
        pass


def test_values_out_of_range_unknown_pipelines_and_ip_adapters_are_refused():
    pipe = tiny.pipeline("sd")
    wrong = [{"scale": -0.1}, {"scale": float("nan")}, {"mode": "cfg"}, {"blend": 1.5}, {"limit": 0.5}, {"prompt": []}]
    for kwargs in wrong:
        with pytest.raises(ConfigError, match="expected"), negative_prompt(pipe, **{"prompt": "octopus", **kwargs}):
            pass
    match = "SimpleNamespace, expected one of"
    with pytest.raises(ConfigError, match=match), stepdistill.negative_prompt(SimpleNamespace(), "octopus"):
        pass
    given = tiny.pipeline("wan_image"), tiny.CONTINUING["wan_image"]
    with pytest.raises(ConfigError, match="a text-to-video one"), negative_prompt(given[0], "rose", family=given[1]):
        pass
    pipe.unet.set_attn_processor(
        {
            name: IPAdapterAttnProcessor2_0(32, 32) if name.endswith("attn2.processor") else old
            for name, old in pipe.unet.attn_processors.items()
        }
    )
    with pytest.raises(ConfigError, match="IPAdapterAttnProcessor2_0"), negative_prompt(pipe, "octopus"):
        pass


def test_gradient_checkpointing_is_refused_where_it_would_run():
    case = Case("sd3")
    case.net.enable_gradient_checkpointing()
    cond = case.family.condition(case.pipe, ["rose", "bat"])
    with case.negative("octopus"):
        assert torch.isfinite(case()).all()
        with pytest.raises(ConfigError, match="gradient checkpointing"):
            case.family.call(case.net, case.x_t, case.t, cond)
