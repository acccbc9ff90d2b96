"""The end of a run: student folder, verification, sample grid, `eval.json` and summary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi

from stepdistill.core.cost import Cost
from stepdistill.core.errors import ConfigError, problem
from stepdistill.core.files import file_digest
from stepdistill.core.random import VALIDATION
from stepdistill.data import Partition, inside
from stepdistill.data.bundled import bundled
from stepdistill.data.routing import ROUTER, Routing
from stepdistill.evaluation.measure import Reference, Sampled, measured, without_interval
from stepdistill.evaluation.metrics.features import efficientnet_lite0
from stepdistill.evaluation.metrics.stats import Stats
from stepdistill.evaluation.protocol import PROTOCOLS
from stepdistill.evaluation.records import prompts_digest
from stepdistill.evaluation.results import document, protocol_facts
from stepdistill.evaluation.spec import SEED_B
from stepdistill.evaluation.stored_features import StoredFeatures
from stepdistill.networks import sharding
from stepdistill.networks.roles import ASSISTANT
from stepdistill.students.card import write_card
from stepdistill.students.contract import read_contract
from stepdistill.students.draw.call import PipelineCall, generate, student_calls, teacher_call
from stepdistill.students.draw.sheet import image_grid
from stepdistill.students.load import load_student
from stepdistill.students.measured import with_interval
from stepdistill.students.snippets import snippet
from stepdistill.students.verify import export_formats, remove_formats
from stepdistill.students.write import write_student
from stepdistill.training.recipe import Run, TrainSpec
from stepdistill.training.sampling import relative_straightness, validation_images
from stepdistill.training.setup import Session
from stepdistill.training.watch.rules import read_metrics, reward_scores, reward_sentence

FEW = 4  # steps at which teacher and student are compared


def finish_run(session: Session) -> None:
    """Write and prove the student folder, draw `samples/grid.png`, measure `eval.json`, print the summary."""
    session = replace(
        session, run=replace(session.run, method=session.method.finalize(partial(relative_straightness, session)))
    )
    run, out = session.run, Path(session.run.train.output_dir)
    spec = run.train
    (out / "eval.json").unlink(missing_ok=True)  # of this run before it went on: the card would show it
    difference = write_student(
        out,
        family=run.family,
        pipe=session.pipe,
        backbone=session.backbone,
        role=run.method.student_role(),
        method=run.method,
        resolution=session.batches.size,
        sizes=session.sizes.sizes,
        seed=spec.seed,
        start=session.start,
    )
    (out / ROUTER).unlink(missing_ok=True)  # of an earlier run in this folder
    remove_formats(out)
    export_formats(out, spec.export_formats)
    for part in inside(run.data):
        if isinstance(part, Partition):
            Routing(part.student, part.router).save(out)
    summary: dict[str, Any] = {"proof": difference}
    if spec.validation_prompts or spec.eval_samples:  # else the pipelines need not be loaded once more
        summary = _show(session, out) | summary
    _print(out, summary)
    if spec.push_to_hub:
        api = HfApi()
        repo = api.create_repo(spec.hub_model_id or out.name, exist_ok=True).repo_id
        write_card(out, read_contract(out), address=repo)
        api.upload_folder(repo_id=repo, folder_path=out, ignore_patterns=["checkpoint-*", "runs/*", "best/*"])
        print(f"uploaded to {repo}")


def _show(session: Session, out: Path) -> dict[str, Any]:
    """Draw `samples/grid.png` and measure `eval.json`, each where asked; returns what was measured."""
    run, spec = session.run, session.run.train
    teacher, plain = run.family.load(), run.family.load()
    few, full = (
        teacher_call(run.family, teacher, n, run.teacher_guidance_scale, f"teacher, {n} steps", session.batches.size)
        for n in (FEW, spec.teacher_steps)
    )
    load_student(plain, out, "student" if run.method.use == "sampling" else ASSISTANT)
    trained = len(run.method.sampler(session.schedule).timesteps)
    counts = sorted({trained, FEW, 2, 1}, reverse=True)
    rows = list(student_calls(run.family, run.method, teacher, counts, session.batches.size).values())
    for pipe in (teacher, plain):
        if session.shards is None:
            pipe.to(session.accelerator.device)
        else:
            sharding.stream(pipe, run.family.network(pipe), session.accelerator.device)
    if spec.validation_prompts:
        prompts, size = list(spec.validation_prompts), session.batches.size
        seed, numbers = spec.validation_seed, range(VALIDATION, VALIDATION + len(prompts))
        begun = validation_images(session, prompts)
        more: dict[str, Any] = {} if begun is None else {"images": begun / 2 + 0.5}
        columns = [
            (row.name.replace(", ", "\n"), generate(pipe, row, prompts, seed, numbers=numbers, size=size, **more)[0])
            for pipe, row in ((teacher, full), (teacher, few), *((plain, row) for row in rows))
        ]
        scale = max(1, 96 // columns[0][1].shape[-1])
        image_grid(columns, prompts, scale).save(out / "samples" / "grid.png")
        write_card(out, read_contract(out))  # again, now that there is an image
    if not spec.eval_samples:
        return {}
    reference = load_reference(run, session.base.hashes["float32"])
    document = measure(run, reference, teacher, plain, {"full": full, "few": few}, rows)
    (out / "eval.json").write_text(json.dumps(document, indent=1) + "\n")
    write_card(out, read_contract(out))  # again, now that there are figures
    return document


def reference_file(spec: TrainSpec) -> Path:
    """Where the teacher's features are; ConfigError where they are not."""
    file = bundled(spec.eval_reference or "")
    if not file.is_file():
        got = f"train.eval_reference {spec.eval_reference!r} with train.eval_samples {spec.eval_samples}"
        why = "the student's images are compared with them"
        todo = "set a file written by `eval/tables.py`, or set train.eval_samples to 0"
        raise ConfigError(problem(got, "a file of the teacher's features", why, todo))
    return file


def load_reference(run: Run, digest: str) -> StoredFeatures:
    """The stored features, which must be of this teacher under this guidance and number of steps."""
    stored = StoredFeatures.load(reference_file(run.train))
    wanted = {
        "teacher_sha256": digest,
        "teacher_steps": str(run.train.teacher_steps),
        "teacher_guidance_scale": str(run.teacher_guidance_scale),
    }
    odd = [key for key, value in wanted.items() if stored.facts.get(key) != value]
    if odd:
        got = f"train.eval_reference with other {', '.join(odd)}: {[stored.facts.get(key) for key in odd]}"
        why = "the student would be compared with another teacher"
        todo = "measure the features again, or set train.eval_samples to 0"
        raise ConfigError(problem(got, f"{[wanted[key] for key in odd]}", why, todo))
    return stored


def measure(
    run: Run,
    stored: StoredFeatures,
    teacher: DiffusionPipeline,
    plain: DiffusionPipeline,
    taught: Mapping[str, PipelineCall],
    rows_of_student: list[PipelineCall],
) -> dict[str, Any]:
    """The contents of `eval.json`: distance, excess over the teacher's full steps and diversity over it, with their
    intervals, and cost, at `eval_samples` images.

    The teacher's full rows come from the stored reference; the few-step rows are drawn here.
    """
    n = min(run.train.eval_samples, len(stored.prompts))
    ref, floor = (stored.features[key][:n] for key in ("reference", "floor"))
    print(f"Measuring {n} images of each sampler", flush=True)
    prompts, extractor, steps = stored.prompts[:n], efficientnet_lite0(), run.train.teacher_steps
    _, cost = generate(teacher, taught["full"], prompts[:64], SEED_B)
    rows = [Sampled(name=taught["full"].name, role="teacher", features=floor, cost=per_image(cost, min(n, 64)))]
    for pipe, row in [(teacher, taught["few"]), *((plain, row) for row in rows_of_student)]:
        images, cost = generate(pipe, row, prompts, SEED_B)
        role = "teacher" if pipe is teacher else "student"
        rows.append(Sampled(name=row.name, role=role, features=extractor(images), cost=per_image(cost, n)))
    file = reference_file(run.train)
    facts = {"kind": "teacher", "path": file.name, "sha256": file_digest(file), "n": n}
    compared = Reference(stats=Stats.of(ref), features=ref, paired=True, facts=facts)
    protocol, reasons = protocol_facts(PROTOCOLS["none"], extractor.identity, n, None, facts)
    index = torch.tensor([prompts.index(prompt) for prompt in prompts])
    metrics = ("diversity",) if min(Counter(prompts).values()) > 1 else ()
    scores = measured([replace(row, reasons=reasons) for row in rows], compared, extractor.identity.key, metrics, index)
    scale, hashed = run.teacher_guidance_scale, stored.facts["teacher_sha256"]
    return document(
        extractor.identity,
        facts,
        scores,
        protocol,
        plain.device,
        eval_res=None,
        teacher={"id": run.family.pretrained_teacher_model, "steps": steps, "guidance": scale, "sha256": hashed},
        prompts={"source": file.name, "n": len(set(prompts)), "sha256": prompts_digest(prompts)},
        left_out=without_interval(metrics, index) if metrics else ["diversity: some prompt has a single image"],
    )


def per_image(cost: Cost, n: int) -> dict[str, float]:
    """What n images cost, for each of them."""
    return {"calls": cost.calls / cost.batches, "nfe": cost.rows / n, "seconds_per_image": cost.seconds / n}


def _print(out: Path, summary: Mapping[str, Any]) -> None:
    contract = read_contract(out)
    print(f"\nStudent: {out}   (plain Diffusers differs from it by {summary['proof']:.1e})")
    for row in summary.get("rows", []):
        cost, metrics, beside = row["cost"], row["metrics"], ""
        if "delta_vs_teacher" in metrics:
            beside += f"  excess {with_interval(metrics['delta_vs_teacher'][summary['features']['key']], 1):<22}"
        if "diversity_vs_teacher" in metrics:
            beside += f"  diversity / teacher's {with_interval(metrics['diversity_vs_teacher'], 3)}"
        print(
            f"  {row['name']:<20} calls {cost['calls']:4.0f}  nfe {cost['nfe']:5.0f}  "
            f"{1000 * cost['seconds_per_image']:7.2f} ms an image{beside}".rstrip()
        )
    for text in summary.get("left_out", []):
        print(f"  left out: {text}")
    for key, scores in reward_scores(read_metrics(out / "metrics.jsonl")).items():
        print(f"  {reward_sentence(key, scores)}, on the validation prompts")
    print("\nSample with it:\n\n" + snippet(contract, out.resolve()))
    print(f"\nMeasure it:\n\nstepdistill eval run {contract.base_model} {out} --prompts-file FILE -o {out}-eval")
