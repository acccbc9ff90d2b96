"""What is known of a row of `eval.json`: where each value lies, and the columns that show it."""

from __future__ import annotations

from typing import NamedTuple

TITLES = {"fid": "FID", "fd": "fd", "fd_frames": "fd of frames"}  # a distance is one of them, never turned into another
UNKNOWN = "unknown"


class ComparisonKey(NamedTuple):
    """What two distances must have in common to be compared; its fields are keys of `flat_rows`."""

    key: str
    features_id: str
    n: int | None
    reference_sha256: str
    protocol: str


def _interval(name: str, path: str) -> dict[str, str]:
    return {name: f"{path}.value", f"{name}_low": f"{path}.ci95.0", f"{name}_high": f"{path}.ci95.1"}


# where the values of a flat row lie in a row of `eval.json`; {key} is `fid` or `fd`
SETTING = {name: name for name in ("name", "role", "student", "steps", "guidance", "seed", "n_skipped", "lora")}
MEASURED = {
    **_interval("distance", "metrics.{key}"),
    **{name: f"metrics.{{key}}.{name}" for name in ("bias_corrected", "mean_term", "cov_term", "noise_floor")},
    **_interval("excess", "metrics.delta_vs_teacher.{key}"),
    **_interval("diversity_vs_teacher", "metrics.diversity_vs_teacher"),
    **_interval("motion", "metrics.fd_motion"),
    **_interval("motion_excess", "metrics.delta_vs_teacher.fd_motion"),
    **_interval("by_motion_excess", "metrics.delta_vs_teacher.fd_by_motion"),
    **_interval("motion_ratio", "metrics.motion_ratio"),
    "moves": "metrics.motion.value",
    "consistency": "metrics.consistency.value",
    "consistency_first": "metrics.consistency_first.value",
    "image_distance": "metrics.image_distance.value",
    "kid": "metrics.kid.value",
    "kid_std": "metrics.kid.std",
    **{name: f"metrics.prdc.{name}" for name in ("precision", "recall", "density", "coverage")},
    **{name: f"metrics.{name}" for name in ("cmmd", "vendi", "diversity")},
    "clip_score": "metrics.clip_score.value",
    "clip_stderr": "metrics.clip_score.stderr",
    "clip_model": "metrics.clip_score.model",
    **_interval("clip_delta", "metrics.delta_vs_teacher.clip_score"),
    **_interval("log_likelihood", "metrics.log_likelihood"),
    **_interval("log_likelihood_delta", "metrics.delta_vs_teacher.log_likelihood"),
    "paired_features": "metrics.paired.features",
    **{name: f"metrics.paired.{name}" for name in ("psnr", "ssim", "lpips")},
    **{name: f"cost.{name}" for name in ("calls", "nfe", "seconds_per_image")},
    "latency_ms_p50": "cost.latency_ms.p50",
    "latency_ms_p90": "cost.latency_ms.p90",
    **{name: f"cost.{name}" for name in ("peak_mem_mib", "speedup_vs_teacher")},
    "comparable": "comparable",
}
FIELDS = ("evaluation", *SETTING, *ComparisonKey._fields, *MEASURED, "comparable_reasons")
CSV_MARK = ",".join(FIELDS[:6]).encode()  # by which a file of `write_csv` is known


# columns: the heading of each field
DISTANCE = {
    "{title}": "distance",
    "Excess": "excess",
    "Diversity / teacher's": "diversity_vs_teacher",
    "fd of motion": "motion",
    "Excess of motion": "motion_excess",
    "Excess by motion": "by_motion_excess",
    "Motion / teacher's": "motion_ratio",
    "Distance of frame 1": "image_distance",
}
CLIP = {
    "CLIP score": "clip_score",
    "Minus teacher's": "clip_delta",
    "Frame consistency": "consistency",
    "Frame consistency, with frame 0": "consistency_first",
}
LIKELIHOOD = {"Log-likelihood per token": "log_likelihood", "Minus teacher's": "log_likelihood_delta"}
SAMPLING = {"Steps": "steps", "Guidance": "guidance", "LoRA strength": "lora", "NFE": "nfe"}
SAMPLING |= {"Seconds per image": "seconds_per_image", "Speed-up": "speedup_vs_teacher"}
FEATURES = {
    "{title}, bias-corrected": "bias_corrected",
    "Mean term": "mean_term",
    "Covariance term": "cov_term",
    "Noise floor": "noise_floor",
    "KID": "kid",
    **{name.capitalize(): name for name in ("precision", "recall", "density", "coverage")},
    "CMMD": "cmmd",
    "Vendi": "vendi",
    "Diversity": "diversity",
    "Paired distance": "paired_features",
}
PIXELS = {"PSNR (dB)": "psnr", "SSIM": "ssim", "LPIPS": "lpips"}
RUN = {
    "Seed": "seed",
    "N": "n",
    "Skipped": "n_skipped",
    "Calls": "calls",
    "Latency p50 (ms)": "latency_ms_p50",
    "Latency p90 (ms)": "latency_ms_p90",
    "Peak memory (MiB)": "peak_mem_mib",
}
INTERVALS = ("distance", "excess", "motion", "motion_excess", "by_motion_excess", "motion_ratio", "clip_delta")
INTERVALS += ("diversity_vs_teacher", "log_likelihood", "log_likelihood_delta")
SPREAD = {"kid": ["kid_std"], "clip_score": ["clip_stderr"]}  # what is ± a value; others have an interval, or nothing
SPREAD |= {name: [f"{name}_low", f"{name}_high"] for name in INTERVALS}
