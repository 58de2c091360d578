"""What is said of a measurement besides its numbers: when, and that it is true."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import t
from torch import Tensor, nn

import flexure
from flexure.measure.calibration import Calibration, calibration
from flexure.measure.curvature import Curvature
from flexure.measure.over import Summary
from flexure.methods.measured_notes import effective_number, notes
from flexure.methods.measurements import measure_model
from flexure.methods.measurements_result import ModelMeasurements
from flexure.methods.measures import FEW, MEASURES


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0] * 7, 7.0),
        ([0.0, 0.0, 5.0], 1.0),
        ([1.0, 3.0], 16 / 10),
        ([1e300, 1e300], 2.0),
        ([1e-300] * 3, 3.0),
        ([1.0, 1.0, math.nan, math.inf], 2.0),
        ([0.0, 0.0], 0.0),
        ([], 0.0),
    ],
)
def test_effective_number(values: list[float], expected: float) -> None:
    found = effective_number(torch.tensor(values, dtype=torch.float64))
    assert found == pytest.approx(expected, rel=1e-12)


def test_means_of_more_samples_than_few_are_covered_and_others_less() -> None:
    """How often the t-interval of log-normal values holds their mean, by their effective number."""
    generator = np.random.default_rng(0)
    found = []
    for n in (24, 64, 256):
        for sigma in (0.5, 1, 1.5, 2, 3, 4):
            x = np.exp(sigma * generator.normal(size=(1000, n)))
            half = t.ppf(0.975, n - 1) * x.std(1, ddof=1) / math.sqrt(n)
            covered = np.mean(np.abs(x.mean(1) - math.exp(sigma**2 / 2)) < half)
            effective = np.median(x.sum(1) ** 2 / (x**2).sum(1))
            found.append((effective >= FEW, covered))
    assert min(covered for many, covered in found if many) > 0.75
    assert max(covered for many, covered in found if not many) < 0.8
    assert sum(many for many, _ in found) == 9


def told(measure: str, result: Any) -> list[str]:
    summary = Summary(result)
    quantities = MEASURES[measure].quantities
    estimates = [e for q in quantities for e in q.estimates(measure, summary, seed=0)]
    model = ModelMeasurements("net", len(result), {measure: summary}, tuple(estimates))
    return list(notes([model]))


def curved(gradient: Tensor, hessian: Tensor) -> Curvature:
    ones = torch.ones(len(gradient))
    return Curvature(
        converged=ones > 0,
        gradient_norm=gradient,
        hessian_norm=hessian,
        normalized=torch.where(gradient > 0, hessian / gradient, torch.nan),
        zero_gradient=gradient == 0,
        residual=0 * ones,
        products=ones.long(),
        value=ones,
        probability=ones / 2,
        tol=0.01,
        max_products=20,
    )


def test_means_that_few_samples_carry_are_named() -> None:
    torch.manual_seed(0)
    alike, wide = torch.rand(40) + 1, torch.ones(40)
    wide[3] = 1e4
    assert told("curvature", curved(alike, alike)) == []
    (note,) = told("curvature", curved(alike, wide))
    assert "means of normalised curvature (1 / input unit), Hessian norm (nats / input" in note
    assert "gradient norm" not in note
    assert "as few as 1.0 equal" in note
    assert told("curvature", curved(alike[:5], alike[:5])) == []  # few, and carried by all


def test_samples_without_a_value_are_counted_and_explained() -> None:
    gradient = torch.ones(24)
    gradient[:3] = 0
    (note,) = told("curvature", curved(gradient, torch.ones(24)))
    assert note == (
        "net: 3 of 24 samples have no normalised curvature (1 / input unit): there the "
        "gradient is exactly zero, and they are relative to it"
    )
    (note,) = told(
        "curvature",
        curved(torch.ones(24), torch.ones(24).index_fill(0, torch.tensor([1]), math.nan)),
    )
    assert note.endswith("there they are not numbers")


def test_samples_that_did_not_converge_are_lower_bounds_where_they_are_numbers() -> None:
    norms = torch.ones(24).index_fill(0, torch.tensor([1]), math.nan)
    found = curved(torch.ones(24), norms)
    found = replace(found, converged=torch.arange(24) >= 3)
    lower, lost, missing = told("curvature", found)
    assert lower == (
        "net: 2 of 24 samples of curvature did not converge: their Hessian norms are lower bounds; "
        "raise max_products (--max-products) or tol"
    )
    assert lost == "net: 1 of 24 samples of curvature did not converge: they are not finite"
    assert missing.endswith("there they are not numbers")


def test_a_constant_network_says_why_it_has_no_curvature() -> None:
    constant = nn.Sequential(nn.Linear(4, 3)).eval()
    nn.init.zeros_(constant[0].weight)
    found = measure_model(constant, [(torch.randn(12, 4), torch.arange(12) % 3)])
    text = str(found)
    assert "12 of 12 samples have no normalised curvature" in text
    assert "12 of 12 samples have no relative gradient change, its estimated bound, share" in text
    assert "few samples decide" not in text
    assert "few samples carry" not in text
    assert not re.search(r"\bnan\b", text)


def calibrated(confidence: Tensor) -> Calibration:
    logits = torch.stack([0 * confidence, torch.logit(confidence)], 1)
    return calibration(nn.Identity(), logits, torch.ones(len(confidence), dtype=torch.int64))


def test_the_level_of_the_calibration_error_is_that_of_a_calibrated_network() -> None:
    """Of four samples at 1/2 in one bin the mean is E|k/4 − 1/2|, k binomial: 3/16."""
    (note,) = told("calibration", calibrated(torch.full((4,), 0.5)))
    level = float(re.search(r"would show (\S+) on average on 4", note).group(1))
    assert level == pytest.approx(3 / 16, abs=0.03)
    levels = []
    for n in (64, 256, 1024):
        (note,) = told("calibration", calibrated(torch.linspace(0.5, 0.99, n)))
        levels.append(float(re.search(r"would show (\S+) on", note).group(1)))
        assert told("calibration", calibrated(torch.linspace(0.5, 0.99, n))) == [note]  # seeded
    for more, fewer in pairwise(levels[::-1]):
        assert more == pytest.approx(fewer / 2, rel=0.15)  # it falls like 1/√n


def rates(squares: Tensor) -> flexure.CurvatureRate:
    return flexure.CurvatureRate(
        converged=torch.ones(len(squares), dtype=torch.bool),
        log_squares=squares.log(),
        orders=(1, 2, 3, 4),
        directions=2,
        reduction="rms",
        normalization="raw",
        calibrate=True,
        dimension=3,
    )


def test_a_rate_of_few_samples_is_told() -> None:
    squares = torch.ones(40, 4, dtype=torch.float64)
    caution = MEASURES["rate"].caution
    assert caution(rates(squares)) is None
    squares[0, 3] = 1e4
    many = rates(squares)
    assert "as few as 1.0 equal ones would carry an order, of 40" in caution(many)
    assert caution(many.taken(slice(1, None))) is None


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        (
            slice(2, None),
            0.0,
            "the curvature rate is -inf: derivatives of order 3, 4 are exactly",
        ),
        (slice(0, 1), 0.0, "is not defined: expected derivatives that do not vanish"),
        (slice(None), math.nan, "is not defined: no sample has finite derivatives"),
    ],
)
def test_where_there_is_no_rate_it_is_said_why(column: slice, value: float, expected: str) -> None:
    squares = torch.ones(40, 4, dtype=torch.float64)
    squares[:, column] = value
    caution = MEASURES["rate"].caution(rates(squares))
    assert expected in caution
    assert "few samples" not in caution
