"""Rows of a report from features: what is beside what, and when a figure may call itself what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import t as student_t

from stepdistill.evaluation.measure import Reference, Sampled, measured, without_interval
from stepdistill.evaluation.metrics.frechet import feature_diversity, frechet, frechet_terms
from stepdistill.evaluation.metrics.identity import FID_WEIGHTS, INCEPTION, Identity
from stepdistill.evaluation.metrics.jackknife import difference_of_means, noise_floor
from stepdistill.evaluation.metrics.kernel import cmmd, kid
from stepdistill.evaluation.metrics.neighbours import prdc
from stepdistill.evaluation.metrics.stats import Stats
from stepdistill.evaluation.metrics.vendi import vendi
from stepdistill.evaluation.protocol import PROTOCOLS
from stepdistill.evaluation.results import protocol_facts

FID = Identity(INCEPTION, FID_WEIGHTS + 56 * "0", "file", 2048, "pool3", "clean", "(u - 128) / 128", "fp32", 64)


def features(n: int, seed: int, shift: float = 0.0, dim: int = 4) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + shift


def against(x: torch.Tensor, paired: bool) -> Reference:
    return Reference(stats=Stats.of(x), features=x, paired=paired, facts={"kind": "images"})


def rows(n: int, shift: float = 1.0) -> list[Sampled]:
    """A few-step teacher before the teacher at its best must not be taken for it: the first one is."""
    few = features(n, 1, shift) * 0.9
    return [
        Sampled(name="best", role="teacher", features=features(n, 1), cost={"seconds_per_image": 4.0}),
        Sampled(name="few", role="teacher", features=few, cost={"seconds_per_image": 1.0}),
        Sampled(name="student", role="student", features=features(n, 1, shift), cost={"seconds_per_image": 0.5}),
    ]


@pytest.mark.parametrize("paired", [True, False])
def test_a_translation_costs_its_square(paired):
    """Student = teacher + 1 in each of 4 dimensions, and the reference is the teacher: excess 4, certain."""
    best, few, student = measured(rows(200), against(features(200, 1), paired), "fd")
    assert best["metrics"]["fd"]["value"] == pytest.approx(0, abs=1e-6)
    delta = student["metrics"]["delta_vs_teacher"]["fd"]
    assert delta["value"] == pytest.approx(4, rel=1e-5)
    assert student["metrics"]["fd"]["mean_term"] == pytest.approx(4, rel=1e-5)
    assert student["metrics"]["fd"]["cov_term"] == pytest.approx(0, abs=1e-5)
    assert student["metrics"]["paired"]["features"] == pytest.approx(2, rel=1e-5)  # the norm of four ones
    assert "delta_vs_teacher" not in best["metrics"] and "paired" not in best["metrics"]
    if paired:
        assert delta["ci95"] == pytest.approx([4, 4], rel=1e-4)  # what both share has left the interval
    assert (few["cost"]["speedup_vs_teacher"], student["cost"]["speedup_vs_teacher"]) == (4, 8)


def test_values_are_those_of_the_metrics():
    ref, made = features(300, 5), rows(200, 0.3)
    found = measured(made, against(ref, paired=False), "fd", ("kid",))
    for row, own in zip(made, found, strict=True):
        value = own["metrics"]["fd"]
        assert value["value"] == pytest.approx(frechet(Stats.of(row.features), Stats.of(ref)), rel=1e-9)
        terms = frechet_terms(Stats.of(row.features), Stats.of(ref))
        assert [value["mean_term"], value["cov_term"]] == pytest.approx(terms, rel=1e-6)
        assert value["noise_floor"] == noise_floor(Stats.of(ref), 200)
        assert own["metrics"]["kid"]["value"] == kid(row.features, ref, subset_size=100).value
        assert "paired" not in own["metrics"]


def test_every_metric_has_the_reference_and_the_row_in_its_place():
    """A narrow row in a wide reference: precise and of little recall, not the other way round."""
    ref, scores = features(150, 5), torch.arange(120.0)
    row = Sampled(name="narrow", role="images", features=0.3 * features(120, 6), scores={"clip": scores})
    (found,) = (own["metrics"] for own in measured([row], against(ref, False), "fd", ("kid", "prdc", "vendi", "cmmd")))
    assert found["prdc"] == prdc(ref, row.features)._asdict() | {"k": 5}
    assert found["prdc"]["precision"] > 2 * found["prdc"]["recall"]
    assert found["kid"].items() >= kid(row.features, ref, subset_size=60)._asdict().items()
    assert found["kid"]["subset_size"] == 60  # half of the smaller set, so that subsets differ
    assert (found["vendi"], found["cmmd"]) == (vendi(row.features), cmmd(row.features, ref))
    assert found["clip_score"]["stderr"] == pytest.approx((121 / 12) ** 0.5)  # n (n + 1) / 12 is the variance


def test_a_difference_is_from_the_teacher_at_its_best():
    best, few, student = measured(rows(200), against(features(200, 7, 0.5), paired=True), "fd")
    for row in (few, student):
        delta = row["metrics"]["delta_vs_teacher"]["fd"]["value"]
        assert delta == pytest.approx(row["metrics"]["fd"]["value"] - best["metrics"]["fd"]["value"], rel=1e-9)


def test_under_the_teacher_the_floor_is_the_teacher_s_own():
    found = measured(rows(200), against(features(200, 7), paired=True), "fd")
    assert {row["metrics"]["fd"]["noise_floor"] for row in found} == {found[0]["metrics"]["fd"]["value"]}
    (alone,) = measured(rows(200)[2:], against(features(200, 7), paired=True), "fd")
    assert alone["metrics"]["fd"]["noise_floor"] is None


def test_a_bias_is_corrected_only_where_n_allows():
    ref = against(features(400, 2, dim=12), paired=False)
    each = [Sampled(name="x", role="images", features=features(n, 1, dim=12)) for n in (47, 48)]
    corrected = [measured([row], ref, "fd") for row in each]
    assert corrected[0][0]["metrics"]["fd"]["bias_corrected"] is None
    assert corrected[1][0]["metrics"]["fd"]["bias_corrected"] < corrected[1][0]["metrics"]["fd"]["value"]


def test_clip_scores_are_compared_at_equal_prompts():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(200, generator=generator) + 25
    made = rows(200)
    made = [replace(row, scores={"clip": shared - i}) for i, row in enumerate(made)]
    found = measured(made, against(features(200, 1), True), "fd")
    delta = found[2]["metrics"]["delta_vs_teacher"]["clip_score"]
    assert delta["value"] == pytest.approx(-2, rel=1e-5) and delta["ci95"] == pytest.approx([-2, -2], rel=1e-4)
    assert delta["value"] == pytest.approx(difference_of_means(shared - 2, shared).value)
    own = found[2]["metrics"]["clip_score"]
    assert own["value"] == pytest.approx((shared - 2).double().mean().item())
    assert own["ci95"][1] - own["ci95"][0] > 0.1


def test_diversity_is_within_prompts_and_over_the_teacher_s():
    made, index = rows(200, 0.0), torch.arange(200) % 50
    found = measured(made, against(features(200, 3), True), "fd", ("diversity",), index)
    same, less = (found[i]["metrics"]["diversity_vs_teacher"] for i in (2, 1))
    assert same["value"] == pytest.approx(1) and same["ci95"] == pytest.approx([1, 1])  # what is shared cancels
    assert less["value"] == pytest.approx(0.9) and less["ci95"] == pytest.approx([0.9, 0.9])
    assert "diversity_vs_teacher" not in found[0]["metrics"]


@pytest.mark.parametrize("index", [torch.arange(123) % 41, torch.arange(123).flip(0) % 40])
def test_the_interval_of_diversity_is_that_of_a_jackknife_by_hand(index):
    """Everything made anew without each of 20 runs of images, of the student and of the teacher."""
    teacher, student = (replace(row, features=features(123, k) + row.features) for k, row in enumerate(rows(123)[:2]))
    found = measured([teacher, student], against(features(123, 3), True), "fd", ("diversity",), index)[1]["metrics"]
    parts = [torch.arange(0), *torch.arange(123).tensor_split(20)]
    kept = [torch.ones(123, dtype=torch.bool).index_fill(0, part, False) for part in parts]
    full, *less = (
        feature_diversity(student.features[k], index[k]) / feature_diversity(teacher.features[k], index[k])
        for k in kept
    )
    h = [123 / len(part) for part in parts[1:]]
    pseudo = [one * full - (one - 1) * value for one, value in zip(h, less, strict=True)]
    centre = 20 * full - sum((1 - 1 / one) * value for one, value in zip(h, less, strict=True))
    variance = sum((p - centre) ** 2 / (one - 1) for one, p in zip(h, pseudo, strict=True)) / 20
    half = student_t.ppf(0.975, 19) * variance**0.5
    told = found["diversity_vs_teacher"]
    assert told["value"] == pytest.approx(full, rel=1e-9) and told["ci_method"] == "jackknife-20"
    assert told["ci95"] == pytest.approx([full - half, full + half], rel=1e-4) and half > 0.001
    assert found["diversity"] == pytest.approx(feature_diversity(student.features, index), rel=1e-9)


def test_the_interval_of_diversity_covers_its_law():
    """Teacher and student of unit normals and 0.8 of other ones: 0.8 is the quotient of what is expected."""
    index, covered = torch.arange(120) % 12, 0
    for seed in range(100):
        x, y = (torch.randn(120, 6, generator=torch.Generator().manual_seed(seed + part)) for part in (0, 1000))
        made = [Sampled(name=role, role=role, features=z) for role, z in (("teacher", x), ("student", 0.8 * y))]
        low, high = measured(made, against(x + y, True), "fd", ("diversity",), index)[1]["metrics"][
            "diversity_vs_teacher"
        ]["ci95"]
        covered += low <= 0.8 <= high
    assert 0.89 <= covered / 100 <= 0.99


def test_of_two_images_a_prompt_diversity_has_no_interval():
    """A block has one of both, and the other alone has no distance."""
    for n, prompts, fewest in ((200, 100, 1), (200, 67, 1), (60, 20, 2)):
        index = torch.arange(n) % prompts
        found = measured(rows(n), against(features(n, 3), True), "fd", ("diversity",), index)
        told = found[1]["metrics"]["diversity_vs_teacher"]
        expected = [feature_diversity(row.features, index) for row in rows(n)[:2]]
        assert told["value"] == pytest.approx(expected[1] / expected[0])
        words = without_interval(("diversity",), index)
        assert (told["ci95"] is None) == bool(words) == (fewest < 2)
        assert without_interval(("kid",), index) == without_interval(("diversity",), None) == []
    assert without_interval(("diversity",), torch.arange(200) % 100) == [
        "interval of diversity: without one of its 20 blocks a prompt keeps 1 image, and needs two"
    ]


def test_numbers_that_json_cannot_hold_are_null():
    made = [Sampled(name="x", role="images", features=features(60, 1), cost={"nfe": float("nan")})]
    (row,) = measured(made, against(features(60, 2), False), "fd")
    assert row["cost"]["nfe"] is None


# protocols


def test_without_a_protocol_no_row_is_comparable():
    for name in ("none", "quick"):
        told, reasons = protocol_facts(PROTOCOLS[name], FID, 30_000, None, NPZ)
        assert not told["met"] and reasons


NPZ = {"kind": "npz", "path": "coco.npz", "n": 40_504, "features_id": FID.id}


def test_a_protocol_is_met_or_says_what_is_not():
    coco = PROTOCOLS["coco30k-dmd2"]
    told, reasons = protocol_facts(coco, FID, 30_000, 256, NPZ)
    assert told["met"] and told["deviations"] == reasons == []
    assert len(told["trusted"]) == 2 and "coco.npz" in told["trusted"][0]  # what no file says
    for change, words in [
        ({"n": 1000}, "n=1000 (protocol 30000)"),
        ({"side": None}, "eval_res None (protocol 256)"),
        ({"reference": {**NPZ, "kind": "teacher"}}, "the reference is the teacher"),
        ({"reference": {**NPZ, "n": 5000}}, "a reference of n=5000 (protocol 40504)"),
        ({"reference": {**NPZ, "n": None}}, "a reference of n=None (protocol 40504)"),
        ({"clip": "openai/clip-vit-base-patch16"}, "CLIP openai/clip-vit-base-patch16 (protocol laion/"),
        ({"identity": replace(FID, resize="tf1")}, "resize tf1 (protocol clean)"),
        ({"identity": replace(FID, arch="efficientnet-lite0")}, "not FID's Inception"),
    ]:
        given = {"protocol": coco, "identity": FID, "n": 30_000, "side": 256, "reference": NPZ} | change
        told, reasons = protocol_facts(**given)
        assert not told["met"] and words in reasons[0], change
    told, reasons = protocol_facts(coco, replace(FID, dtype="bf16"), 30_000, 256, NPZ)
    assert told["met"] and "half precision" in reasons[0]  # the protocol's, and yet no more than a hint
    told, reasons = protocol_facts(coco, FID, 30_000, 256, {**NPZ, "features_id": "unknown"})
    assert "made with these features" in told["trusted"][2]


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_protocols_are_met_by_what_they_set(name):
    protocol = PROTOCOLS[name]
    if not protocol.guide:
        identity = replace(FID, resize=protocol.resize)
        assert protocol.n is not None and protocol.features == "inception"
        assert protocol.deviations(protocol.n, identity, protocol.eval_res, {**NPZ, "n": protocol.reference_n}) == []
