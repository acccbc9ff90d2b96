"""Bugs planted in what gives each step its size and its schedule, and in what says it: for each a test must fail."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import test_sizes as oracles
from oracles.planted import Bug, bug_tests

from stepdistill.core.errors import StepdistillError
from stepdistill.evaluation import sizes as evaluation_sizes
from stepdistill.families.base import Family
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.progressive import ProgressiveHalving
from stepdistill.methods.regression import Regression
from stepdistill.students import proof
from stepdistill.students import sizes as student_sizes
from stepdistill.training import size_checks
from stepdistill.training.batches import Batches
from stepdistill.training.memory import predict
from stepdistill.training.setup import Session
from stepdistill.training.sizes import BucketSizes, DrawnSizes, bucket_sizes


def folder() -> Path:
    return Path(mkdtemp())


@cache
def teachers() -> dict[str, Family]:
    return oracles.saved_teachers(folder)


def one_size() -> None:
    with pytest.MonkeyPatch.context() as patch:
        oracles.test_a_step_has_one_size_in_all_processes_and_micro_batches_and_after_a_resume(patch)


def weights() -> None:
    with pytest.MonkeyPatch.context() as patch:
        oracles.test_sizes_come_as_often_as_their_weights_say(patch, (6.0, 3.0, 1.0))


def buckets() -> None:
    with pytest.MonkeyPatch.context() as patch:
        oracles.test_images_go_to_the_nearest_of_the_listed_sizes(folder(), patch)


def schedules() -> None:
    oracles.test_a_step_has_the_schedule_of_its_size_as_the_pipeline_has_it(teachers(), folder())


def levels_of(kind: type) -> None:
    with pytest.MonkeyPatch.context() as patch:
        oracles.test_the_student_s_levels_are_one_list_over_all_sizes(kind, patch)


def levels_of_dmd2() -> None:
    levels_of(DMD2)


def levels_of_regression() -> None:
    levels_of(Regression)


def grid_of_consistency() -> None:
    oracles.test_a_student_learns_on_the_grid_that_it_is_sampled_on(oracles.GRIDS["consistency"])


def grid_of_halving() -> None:
    oracles.test_a_student_learns_on_the_grid_that_it_is_sampled_on(oracles.GRIDS["halving"])


def refused() -> None:
    oracles.test_data_of_one_size_takes_no_list(folder())


def fits() -> None:
    oracles.test_each_size_is_one_that_the_pipeline_takes(teachers(), folder())


def elongated() -> None:
    oracles.test_the_proof_fails_where_only_an_elongated_size_is_wrong(teachers(), folder())


def not_a_number() -> None:
    oracles.test_a_difference_that_is_not_a_number_at_the_second_size_is_not_lost(teachers(), folder())


def outside() -> None:
    for size in oracles.OUTSIDE:
        oracles.test_a_size_is_outside_by_its_area_or_its_ratio(size)


def memory() -> None:
    with pytest.MonkeyPatch.context() as patch:
        oracles.test_memory_is_predicted_at_the_size_with_the_most_tokens(teachers(), folder(), patch)


WORST = oracles.test_the_worst_is_the_largest_excess
SHOWN = oracles.test_shown_sizes

BUGS = {
    "another size on each micro-batch": Bug(
        Batches.steps,
        "self.batch_of(samples, index, size)",
        "self.batch_of(samples, index, self.drawn.at(index[0]))",
        one_size,
    ),
    "another size on each process": Bug(
        Batches.steps, "self.drawn.at(step)", "self.drawn.at(step + 7 * rank)", one_size
    ),
    "sizes counted from where the run starts": Bug(
        Batches.steps, "enumerate(read, start)", "enumerate(read, 0)", one_size
    ),
    "sizes that ignore the seed": Bug(DrawnSizes.at, "self.seed, step", "0, step", one_size),
    "one size for all steps": Bug(DrawnSizes.at, "self.seed, step", "self.seed, 0", one_size),
    "weights without effect": Bug(DrawnSizes.at, "accumulate(self.weights)", "accumulate([1.0] * 3)", weights),
    "weights in the other order": Bug(
        DrawnSizes.at, "accumulate(self.weights)", "accumulate(self.weights[::-1])", weights
    ),
    "the size of another bucket": Bug(BucketSizes.at, "self.shapes[", "self.shapes[-1 - ", buckets),
    "sizes without images": Bug(bucket_sizes, "sorted(set(buckets))", "range(len(shapes))", buckets),
    "the first size's schedule in all steps": Bug(
        Session.context, "size or self.sizes.at(step)", "size or self.batches.size", schedules
    ),
    "the step's schedule for a size that is named": Bug(
        Session.context, "size or self.sizes.at(step)", "self.sizes.at(step)", schedules
    ),
    "levels by the step's size": Bug(Session.context, "first_schedule=self.schedule", "first_schedule=None", schedules),
    "levels of DMD2 by the step's size": Bug(
        DMD2.towards, "context.student_schedule", "context.schedule", levels_of_dmd2
    ),
    "levels of regression by the step's size": Bug(
        Regression.updates, "context.student_schedule", "context.schedule", levels_of_regression
    ),
    "the grid of consistency by the step's size": Bug(
        Consistency.updates, "context.student_schedule", "context.schedule", grid_of_consistency
    ),
    "the grid of halving by the step's size": Bug(
        ProgressiveHalving.updates, "context.student_schedule", "context.schedule", grid_of_halving
    ),
    "several sizes of what the teacher made": Bug(
        size_checks.check_size_list, "isinstance(source, TeacherMade)", "False", refused
    ),
    "several sizes beside images": Bug(size_checks.check_size_list, '"images" in run.data.provides', "False", refused),
    "several sizes beside latents": Bug(size_checks.check_size_list, "isinstance(run.data, Latents)", "False", refused),
    "only the first size is checked": Bug(size_checks.check_sizes_fit, ", *session.sizes.sizes)", ",)", fits),
    "the proof at the first size alone": Bug(
        proof.prove, "shown_sizes(contract.resolution, contract.sizes)", "[contract.resolution]", elongated
    ),
    "a number lost beside another": Bug(
        proof.prove, "torch.tensor(differences).max().item()", "max(differences)", not_a_number
    ),
    "only the area is compared": Bug(
        student_sizes.is_outside,
        "[height / width for height, width in (size, *sizes)]",
        "[1.0 for height, width in (size, *sizes)]",
        outside,
    ),
    "only the ratio is compared": Bug(
        student_sizes.is_outside,
        "[height * width for height, width in (size, *sizes)]",
        "[1.0 for height, width in (size, *sizes)]",
        outside,
    ),
    "no slack": Bug(student_sizes.is_outside, "min(known) / SLACK", "min(known)", outside),
    "the least elongated": Bug(student_sizes.shown_sizes, "max((first", "min((first", SHOWN),
    "memory at the first size": Bug(
        predict.rehearse,
        "max(listed_sizes(spec.resolution), key=math.prod)",
        "listed_sizes(spec.resolution)[0]",
        memory,
    ),
    "memory of the first bucket": Bug(
        predict.rehearse, "session.batches.steps(data, start, 0, 1)", "session.batches.steps(data, 0, 0, 1)", memory
    ),
    "the best for the worst": Bug(evaluation_sizes.over_sizes, "worst = max(", "worst = min(", WORST),
    "the sum for the mean": Bug(evaluation_sizes.over_sizes, "mean(values)", "sum(values)", WORST),
}

FAILED: Any = pytest.fail.Exception  # of `pytest.raises` around what does not raise
test_the_oracles_pass, test_the_bug_is_noticed = bug_tests(BUGS, StepdistillError, FAILED)
