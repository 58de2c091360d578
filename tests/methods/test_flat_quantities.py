"""Estimates over seeds and samples, against slow references written out here."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from flexure.measure.curvature import Curvature
from flexure.measure.over import Summary
from flexure.methods.flat_quantities import FlatQuantity, over_seeds, quantities
from flexure.methods.flat_result import FlatRun, FlatTraining


def curvatures(norms: Tensor) -> Summary[Curvature]:
    ones, yes = torch.ones_like(norms), torch.ones(len(norms), dtype=torch.bool)
    return Summary(
        Curvature(yes, norms, 2 * norms, 2 * ones, ~yes, ones, ones, ones, ones, 1e-2, 20)
    )


def run(method: str, seed: int, norms: list[float], hits: list[bool], **other: Any) -> FlatRun:
    given: dict[str, Any] = {
        "losses": (1.0,), "val_accuracy": (0.5,), "val_loss": (1.0,), "penalties": {},
        "learning_rates": (0.1,), "kept": 1, "seconds": 2.0, "seconds_per_epoch": 1.0 + seed,
        "start": "", "parameters": 3,
        "test": {"curvature": curvatures(torch.tensor(norms))},
        "train": {"curvature": curvatures(torch.tensor(norms) / 2)},
        "robust": torch.tensor(hits)[:, None],
    }  # fmt: skip
    return FlatRun(method=method, seed=seed, **given | other)


def training(*runs: FlatRun) -> FlatTraining:
    methods = dict.fromkeys((one.method for one in runs), "words")
    seeds = tuple(dict.fromkeys(one.seed for one in runs))
    sizes = {"train": 4, "val": 4, "test": 4, "measured": 4}
    return FlatTraining(methods, seeds, runs, next(iter(methods)), (0.1,), sizes, {}, {})


ONE = run("a", 1, [1.0, 2.0, 3.0, 6.0], [True, True, False, True])
TWO = run("a", 2, [2.0, 2.0, 4.0, 6.0], [True, False, False, True])
OTHER = run("b", 1, [0.5, 1.0, 1.0, 3.0], [True, True, True, True])


def t_half(values: list[float]) -> float:
    n = len(values)
    return float(stats.t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n)


def test_one_seed_has_the_t_interval_over_samples() -> None:
    found = training(ONE)["a"].estimates["gradient_norm"]
    half = t_half([1.0, 2.0, 3.0, 6.0])
    assert (found.value, found.median, found.samples, found.runs) == (3.0, 2.5, 4, 1)
    assert found.low == max(3.0 - half, 0.0) == 0.0  # of a norm, which is not negative
    assert found.high == pytest.approx(3.0 + half)
    assert found.covers == "test samples"


def test_several_seeds_are_crossed_with_samples() -> None:
    found = training(ONE, TWO)["a"].estimates["gradient_norm"]
    assert found.value == pytest.approx(3.25)
    assert found.median == pytest.approx((2.5 + 3.0) / 2)
    assert "2 seeds" in found.covers
    assert found.low < 3.0 < 3.25 < found.high


def test_differences_are_paired_by_sample() -> None:
    row = training(ONE, OTHER)["b"]
    differences = [-0.5, -1.0, -2.0, -3.0]
    found = row.differences["gradient_norm"]
    assert found.value == pytest.approx(mean(differences))
    assert found.high - found.value == pytest.approx(t_half(differences))
    assert row.differences["pgd_0.1"].value == pytest.approx(0.25)
    assert training(ONE, OTHER)["a"].differences == {}


def test_only_common_seeds_are_compared() -> None:
    row = training(ONE, TWO, OTHER)["b"]
    assert row.differences["gradient_norm"].runs == 1
    assert row.relative_time == pytest.approx(2.0 / 2.5)


def test_shares_stay_within_bounds_and_have_a_width() -> None:
    sure = training(OTHER)["b"].estimates["pgd_0.1"]
    assert sure.value == sure.high == 1.0
    assert 0 < sure.low < 1


def test_numbers_of_runs_have_the_t_interval_over_seeds() -> None:
    values = [1.0, 2.0, 4.0]
    found = over_seeds(values)
    assert found.value == pytest.approx(mean(values))
    assert found.high - found.value == pytest.approx(t_half(values))
    assert not over_seeds([3.0]).has_interval


def test_samples_without_a_value_are_left_out_and_infinite_ones_count() -> None:
    missing = run("a", 1, [math.nan, 2.0, 3.0, 7.0], [True] * 4)
    assert training(missing)["a"].estimates["gradient_norm"].value == pytest.approx(4.0)
    endless = run("a", 1, [math.inf, 2.0, 3.0, 7.0], [True] * 4)
    found = training(endless)["a"].estimates["gradient_norm"]
    assert (found.value, found.has_interval) == (math.inf, False)
    none = run("a", 1, [math.nan] * 4, [True] * 4)
    assert math.isnan(training(none)["a"].estimates["gradient_norm"].value)


def test_failed_runs_do_not_count() -> None:
    failed = replace(TWO, failure="no", test={}, train={}, robust=None)
    row = training(ONE, failed)["a"]
    assert row.estimates["gradient_norm"].runs == 1
    assert row.finished == (ONE,)


def test_the_discrepancy_is_relative_to_training_data() -> None:
    one = training(ONE)["a"].discrepancies["gradient_norm"]
    assert one.value == pytest.approx(1.0)
    assert one.covers == "samples"
    assert one.low < 1.0 < one.high
    several = training(ONE, TWO)["a"].discrepancies["gradient_norm"]
    assert (several.value, several.covers) == (pytest.approx(1.0), "2 seeds")


def test_huge_numbers_keep_their_interval() -> None:
    huge = FlatQuantity(
        "x", "x", "x", None, "mean", lambda run: torch.tensor([1e100, 2e100], dtype=torch.float64)
    )
    found = huge.estimate([ONE])
    assert found is not None
    assert found.has_interval


def test_names_are_unique_and_the_paper_s_columns_come_first() -> None:
    names = [one.name for one in quantities((0.05, 0.2))]
    assert len(set(names)) == len(names)
    assert names[:8] == [
        "gradient_norm", "hessian_norm", "normalized", "accuracy", "clean", "pgd_0.05", "pgd_0.2",
        "seconds_per_epoch",
    ]  # fmt: skip


def test_intervals_end_at_0_where_values_do() -> None:
    known = {one.name: one for one in quantities((0.1,))}
    assert [name for name, one in known.items() if not one.positive] == ["rate"]
    assert [name for name, one in known.items() if one.of_hessian] == ["hessian_norm", "normalized"]
