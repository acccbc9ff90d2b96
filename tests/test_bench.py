"""The side-by-sides count what they say, and their two sides compute the same losses. Times are left to scripts."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from tiny import awake
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import consistency_step as bench
import dmd2_cycle
import dmd2_memory as cycle
import dmd2_plain as plain
import guidance_step as guidance
import lcm_quality as quality
import lora_pass
import scm_step
from harness import interleaved
from tables import render

from stepdistill.core.denoise import guided, with_scale
from stepdistill.core.schedule import DiscreteVP
from stepdistill.data import Stream
from stepdistill.data.bundled import build
from stepdistill.methods.base import Batch, StepContext
from stepdistill.networks.backbone import Backbone
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.roles import TEACHER, Adapters, LoraSpec

SMALL = bench.Setup(channels=(32, 32), width=32, vae=(16, 16, 16), rank=4, batch=2, warm=1, steps=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    bench.save_teacher(folder, SMALL)
    return folder


def test_calls_are_the_fewest():
    rows = bench.measure(SMALL)
    mebibytes = {side: [{"peak MiB": 1.0}] for side in bench.SIDES}
    line = json.loads(json.dumps(bench.summary(SMALL, rows, mebibytes)))
    # the student once with a graph, the target once, the teacher twice or once in a batch of both conditions
    assert line["calls"] == {"reference": 4, "uncached": 3, "cached": 3}
    assert line["rows"] == dict.fromkeys(bench.SIDES, 4 * SMALL.batch)
    assert line["name"] == "consistency_step" and {"speedup", "speedup_uncached"} < line.keys()
    for side in bench.SIDES:
        (row,) = rows[side]
        assert sum(row[cause] for cause in bench.CAUSES) == pytest.approx(row[bench.CPU])
        assert all(row[cause] > 0 for cause in (*bench.PASSES, "backward", "clip, optimizer", "rest"))
    assert all(rows[side][0][cause] > 0 for side in ("reference", "uncached") for cause in bench.ENCODING)
    shown = bench.table(rows, bench.CAUSES, 1e3).splitlines()
    assert [text.split("  ")[0] for text in map(str.strip, shown[1:])] == list(bench.CAUSES)


def test_the_cached_side_encodes_nothing(teacher):
    side = bench.make("cached", teacher, SMALL)
    rows = [side.measure() for _ in range(2 * bench.EPOCH)]
    assert all(row["image encoding"] > 0 for row in rows[: bench.EPOCH])
    assert all(row[cause] == 0 for row in rows[bench.EPOCH :] for cause in bench.ENCODING)


def test_both_sides_compute_the_same_loss(teacher):
    reference = bench.Reference(teacher, SMALL)
    session, _ = bench.production(teacher, SMALL, "uncached")
    context, data = session.context(0), session.run.data
    (batch,) = next(session.batches.steps(data, 0, 0, 1))
    pixels, prompts = zip(*(data[i] for i in Stream(data, SMALL.batch, 0).items(0)), strict=True)
    index = (context.draw(batch, "t") * bench.GRID).long()
    with torch.no_grad():
        loss = reference.loss(torch.stack(pixels), list(prompts), index, context.noise(batch, "eps"))
    (update,) = session.run.method.updates(context, batch, 0)
    assert update.loss.item() == pytest.approx(loss.item(), rel=1e-4)


CYCLE = plain.Setup(partial(build.unet, (32, 32), 32), torch.float32, tokens=5, rank=4, batch=2, critic_steps=3)


def drawn(context: StepContext, batch: Batch) -> plain.Draws:
    """The draws that our side makes, for the reference."""
    taken = int(context.shared("step") * len(plain.TIMES))
    return plain.Draws(
        taken,
        context.noise(batch, "start"),
        [context.noise(batch, f"again {i}") for i in range(taken)],
        (plain.LOW + context.draw(batch, "score t") * (plain.HIGH - plain.LOW + 1)).long(),
        context.noise(batch, "score eps"),
        (context.draw(batch, "fake t") * 1000).long(),
        context.noise(batch, "fake eps"),
    )


def test_both_sides_train_dmd2_alike():
    """The same losses for two cycles, and so the same updates."""
    run, reference, stepped = cycle.production(CYCLE), plain.Reference(CYCLE), Counter()
    for role, net in (("student", reference.student), ("fake", reference.fake)):
        awake(run.optimizers.backbone, role)
        set_peft_model_state_dict(net, run.optimizers.backbone.state(role))
    for number in range(2 * CYCLE.critic_steps):
        (batch,) = next(run.batches)
        values = run.step(number, [batch])
        losses = reference.step(number, batch.cond["states"], drawn(run.context(number), batch))
        ours = [values[key] for key in ("loss", "loss_fake") if key in values]
        assert len(losses) == 1 + (number % CYCLE.critic_steps == 0)
        assert ours == pytest.approx(losses, rel=1e-4)
        stepped.update(role for role in run.optimizers.by_role if values.get(f"grad_norm/{role}", 0) > 0)
    assert stepped == {"student": 2, "fake": 2 * CYCLE.critic_steps}


def adapter(net: nn.Module, rank: int) -> tuple[int, int]:
    """Numbers and tensors of a LoRA, from the layers' shapes."""
    layers = [net.get_submodule(name) for name in plain.FAMILY.lora_targets(net)]
    return sum(rank * (m.weight[0].numel() + m.weight.shape[0]) for m in layers), 2 * len(layers)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_static_memory_is_all_that_stays(dtype, size):
    setup = replace(CYCLE, dtype=dtype)
    net = setup.network()
    base, (numbers, tensors) = size * sum(p.numel() for p in net.parameters()), adapter(net, setup.rank)
    trained = 2 * (plain.FULL * numbers + 4 * tensors)  # Adam counts the steps of each tensor in a float32
    for name, networks in (("reference", 3), ("ours", 1)):
        side, held = cycle.make(name, setup)
        side.measure()
        assert held.bytes() == networks * base + trained, name


def test_static_memory_at_full_size():
    """SD 1.5 with LoRAs of rank 32: the target, as arithmetic."""
    with torch.device("meta"):
        net = plain.stable_diffusion()
    base = sum(p.numel() for p in net.parameters())
    assert base == 859_520_964
    trained = 2 * plain.FULL * adapter(net, 32)[0]
    assert (2 * base + trained) / (3 * 2 * base + trained) <= 0.46
    assert cycle.full_fine_tune(plain.Setup()) == pytest.approx((32 + 2) * base / 2**30)


def test_a_cycle_of_dmd2_in_the_fewest_calls():
    rows = {
        side: [cycle.make(side, CYCLE)[0].measure() | {"static MiB": 1.0, "beyond imports": 2.0}]
        for side in cycle.SIDES
    }
    steps = range(1, 1 + CYCLE.critic_steps)
    taken = sum(int(cycle.scene(CYCLE, None, {}, i).shared("step") * len(plain.TIMES)) for i in steps)
    # each step the student and the fake score; in one both scores, too: the teacher with and without the prompt
    fewest = taken + 2 * CYCLE.critic_steps + 2
    assert taken > 0
    line = json.loads(json.dumps(cycle.summary(CYCLE, rows, rows, rows)))
    assert line["calls"] == {"reference": fewest + 1, "ours": fewest}
    assert line["rows"] == dict.fromkeys(cycle.SIDES, (fewest + 1) * CYCLE.batch)
    assert line["name"] == "dmd2_memory" and line["static_ratio"] == line["peak_ratio"] == 1
    assert {"time_ratio", "full_fine_tune_gib", "static_mib", "peak_mib", "machine"} < line.keys()
    assert {"static_ratio", "peak_ratio", "time_ratio"} < line["tiny"].keys()
    for (row,) in rows.values():
        assert sum(row[cause] for cause in cycle.CAUSES) == pytest.approx(row[bench.CPU])
        assert all(row[cause] > 0 for cause in cycle.CAUSES)


def test_the_full_fine_tune_trains_both_networks_from_the_same_losses():
    """A LoRA of zero is the teacher, so the first losses are equal; then all weights have moved."""
    full, lora = plain.Reference(CYCLE, full=True), plain.Reference(CYCLE)
    (batch,) = next(cycle.batches(CYCLE, full.teacher))
    draws = drawn(cycle.scene(CYCLE, None, {}, 0), batch)
    losses = [side.step(0, batch.cond["states"], draws) for side in (full, lora)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    for net in (full.student, full.fake):
        pairs = list(zip(net.parameters(), full.teacher.parameters(), strict=True))
        assert len(full.params[net]) == len(pairs) and all(not torch.equal(*pair) for pair in pairs)
    names, small = (dmd2_cycle.LORA, dmd2_cycle.FULL, dmd2_cycle.OURS), replace(CYCLE, critic_steps=1)
    rows = {name: [cycle.make(name, small)[0].measure() | {"beyond imports": 2.0}] for name in names}
    line = json.loads(json.dumps(dmd2_cycle.summary({"tiny": rows}, {"tiny": rows})))
    assert line["name"] == "dmd2_cycle" and {"lora_ratio", "full_ratio", "machine"} < line.keys()
    assert line["full_ratio"] == pytest.approx(rows["ours"][0][bench.CPU] / rows[names[1]][0][bench.CPU], abs=1e-3)
    assert line["tiny"]["calls"][names[0]] == line["tiny"]["calls"][names[1]] == line["tiny"]["calls"]["ours"] + 1


def test_a_pass_with_a_lora_is_measured_in_each_form(monkeypatch):
    row = lora_pass.layer_row("conv", 4, 6, 4, 2, 3)
    assert row["density"] == round(2 * 16 * (36 + 6) / (36 * 6), 2)
    shape = replace(lora_pass.TINY, network=CYCLE.unet, condition={"states": (5, 32)})
    tiny = lora_pass.NETWORKS["tiny-sd, batch 8"]._replace(shape=shape, batch=2, warm=0, turns=1)
    monkeypatch.setitem(lora_pass.NETWORKS, "tiny-sd, batch 8", tiny)
    for part in (row, lora_pass.network_row("tiny-sd, batch 8")):
        assert all({"merged", "auto"} <= part[name].keys() for name in lora_pass.PASSES)
    forms = []
    monkeypatch.setattr(lora_pass, "choose_arithmetic", lambda net, form, kept: forms.append(form))
    lora_pass.network_row("tiny-sd, batch 8")
    assert sorted(forms) == sorted(2 * [*lora_pass.FORMS, "apart"])


def test_a_step_with_adapters_is_one_call_on_half_the_rows():
    tiny = replace(CYCLE, batch=2)
    case = guidance.Case(tiny, Adapters("mixed", 8), 1)
    rows, share = guidance.measure(case)
    line = json.loads(json.dumps(guidance.summary({"SD 1.5": (rows, share), "tiny": (rows, share)})))
    assert line["name"] == "guidance_step" and {"time_ratio", "tiny"} < line.keys()
    assert line["calls"] == dict.fromkeys(guidance.SIDES, 1) and line["rows"] == {"two passes": 4, "adapters": 2}
    assert line["extra_parameters"] == pytest.approx(share, abs=1e-4)


def test_the_methods_sides_take_the_calls_of_their_updates():
    setup = replace(CYCLE, batch=2, checkpointing=False)
    sides = {name: scm_step.make(method, setup) for name, method in scm_step.METHODS.items()}
    rows = scm_step.figures(interleaved(sides, 0, 1), setup)
    dmd2 = rows.pop("DMD2")  # as many calls as there are steps before the one that is drawn
    assert 2 + 3 / 5 <= dmd2["calls"] <= 5 + 3 / 5
    assert {name: (row["calls"], row["rows"]) for name, row in rows.items()} == {
        "LCM": (3, 4),
        "sCM": (3, 4),
        "sCM by difference": (3, 5),
        "SANA-Sprint": (7, 8),
        "SANA-Sprint by difference": (7, 9),
        "BOOT": (4, 7),
    }
    assert rows["LCM"]["ratio"] == [1, 1, 1]


def test_both_sides_of_a_guided_step_are_what_the_library_computes():
    bench = guidance.Bench(guidance.Case(CYCLE, Adapters("mixed", 8), 1))
    net, schedule = bench.net, DiscreteVP(plain.noise_table())
    null, t = {"states": bench.both[:1]}, torch.full((CYCLE.batch,), float(guidance.NOW))
    two, one = bench.two_passes(), bench.one_pass()
    bone = Backbone(net, LoraSpec(), (), sites=plain.FAMILY.sites(net))
    bone.add("student", Adapters("mixed", 8))
    bone.load_state("student", bench.adapters.adapters.state_dict())
    bench.adapters.remove()
    base, student = (Denoiser(bone, role, schedule, "epsilon", plain.FAMILY.call) for role in (TEACHER, "student"))
    for ours, denoise in ((two, guided(base, null, guidance.GUIDANCE)), (one, with_scale(student, guidance.GUIDANCE))):
        with torch.no_grad():
            est = denoise(bench.x_t, t, {"states": bench.states})
        torch.testing.assert_close(
            ours, schedule.add_noise(*est, torch.full_like(t, guidance.THEN)), rtol=1e-4, atol=1e-4
        )
    assert (one - two).abs().max() > 1e-3


@pytest.fixture(scope="module")
def raced(tmp_path_factory) -> tuple[Path, dict]:
    """A small race, and its figures by student and steps."""
    work = tmp_path_factory.mktemp("race")
    return work, dict(quality.measure(quality.SMOKE, work))


def test_students_are_trained_and_judged_once(raced, monkeypatch):
    work, rows = raced
    assert rows.keys() == {f"{side}/0/4" for side in (quality.OURS, *quality.FLAGS)}
    assert len({row["excess"] for row in rows.values()}) == len(rows)  # each has figures of its own
    assert all((row["n"], row["train_steps"], row["nfe"]) == (40, 2, 4) for row in rows.values())
    for name in ("distill", "Script", "figures", "taught"):
        monkeypatch.setattr(quality, name, None)
    assert quality.measure(quality.SMOKE, work) == rows
    line = json.loads(json.dumps(quality.summary(quality.SMOKE, rows, wrapped=False)))
    for side in quality.FLAGS:
        assert line["ratios"][side] == [
            pytest.approx(rows["ours/0/4"]["excess"] / rows[f"{side}/0/4"]["excess"], abs=1e-3)
        ]
    shown = render.RENDERERS["lcm_quality"](line).splitlines()
    low, high = (round(each) for each in rows["best flags/0/4"]["ci95"])
    cells = f"{rows['best flags/0/4']['excess']:.0f} [{low}, {high}] | {line['ratios']['best flags'][0]:.2f}"
    assert shown[-1] == f"| plain loop, best flags, seed 0 | {cells} |" and len(shown) == 2 + len(rows)


def plain_loop(side: str, work: Path) -> tuple[quality.Script, list[tuple[torch.Tensor, str]]]:
    data = quality.images(quality.SMOKE.run(0, work))
    torch.manual_seed(0)
    return quality.Script(quality.FLAGS[side], quality.SMOKE, data), data


def test_plain_diffusers_loads_the_plain_loops_student(raced):
    work, _ = raced
    script, _ = plain_loop("best flags", work)
    for _ in range(quality.SMOKE.train_steps):
        script.step()
    pipe = quality.SMOKE.run(0, work).family.load()
    x, t, states = torch.randn(2, 4, 8, 8), torch.tensor([499, 259]), script.encode_text(["animal", "travel"])
    with torch.no_grad():
        trained, base = (net(x, t, states)[0] for net in (script.unet, pipe.unet))
        pipe.load_lora_weights(work / "best-flags-0-2x4")
        loaded = pipe.unet(x, t, states)[0]
    torch.testing.assert_close(loaded, trained)
    assert (trained - base).abs().max() > 1e-3


def test_the_plain_loop_has_the_scripts_flags(tmp_path):
    pred, target = torch.randn(2, 1, 4, 8, 8)
    for side, (rate, *_, decay, _) in zip(quality.FLAGS, map(astuple, quality.FLAGS.values()), strict=True):
        script, data = plain_loop(side, tmp_path)
        (group,) = script.optimizer.param_groups
        assert (group["lr"], group["weight_decay"]) == (rate, decay)
        square = side == "default flags"
        off = (pred - target).pow(2)
        distance = off if square else (off + bench.HUBER**2).sqrt() - bench.HUBER
        assert script.distance(pred, target).item() == pytest.approx(distance.mean().item())
        for _ in range(quality.SMOKE.train_steps):
            script.step()
        assert group["lr"] == pytest.approx(rate if square else 0)  # constant, or the cosine's end
    samples = quality.SMOKE.run(0, tmp_path).data
    exact = torch.stack([samples.sample(i, Random(0)).latents for i in range(len(samples))])
    pixels = torch.stack([each for each, _ in data])
    coded = script.latents(pixels)
    assert not torch.equal(coded, script.latents(pixels))  # sampled
    assert (coded - exact).norm() / exact.norm() < 0.2
    assert torch.equal((pixels * 127.5 + 127.5).round(), pixels * 127.5 + 127.5)
    assert [prompt for _, prompt in data] == [samples.prompt_of(i) for i in range(len(samples))]


def test_a_lora_with_the_names_of_pefts_wrapper_is_told_apart(tmp_path, monkeypatch):
    """The script's way of saving; whether Diffusers takes it is its own affair, and is measured."""
    loads = []
    monkeypatch.setattr(StableDiffusionPipeline, "load_lora_weights", lambda pipe, folder: loads.append(folder))
    assert quality.wrapped_loads(quality.SMOKE, tmp_path)
    names = load_file(loads[0] / "pytorch_lora_weights.safetensors")
    assert names and all(name.startswith("unet.base_model.model.") for name in names)
