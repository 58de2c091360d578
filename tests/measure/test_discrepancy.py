"""The train-test discrepancy: by hand, and by the coverage of its interval."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from flexure.contracts import FlexureError
from flexure.measure.curvature import curvature
from flexure.measure.discrepancy import discrepancy
from flexure.measure.over import over
from flexure.per_sample import PerSample


@dataclass(frozen=True)
class Measured(PerSample):
    size: Tensor
    steps: Tensor
    tol: float = 0.1


@dataclass(frozen=True)
class Columns(PerSample):
    squares: Tensor


def measured(values: list[float] | Tensor, *, tol: float = 0.1) -> Measured:
    size = torch.as_tensor(values)
    return Measured(torch.ones(len(size)).bool(), size, torch.zeros(len(size)).long(), tol)


def test_by_hand() -> None:
    found = discrepancy(measured([1.0, 3.0]), measured([4.0, 6.0, 8.0]))
    assert list(found) == ["size"]
    size = found["size"]
    assert (size.train, size.test, size.relative) == (2.0, 6.0, 2.0)
    width = 1.959963985 * math.sqrt((2**0.5 / 2) ** 2 / 2 + (2 / 6) ** 2 / 3)
    expected = (3 * math.exp(-width) - 1, 3 * math.exp(width) - 1)
    assert size.interval == pytest.approx(expected)
    assert (size.train_samples, size.test_samples) == (2, 3)
    assert "+2" in str(size)
    assert "2 training samples" in str(size)


def test_confidence_widens() -> None:
    train, test = measured([1.0, 3.0]), measured([4.0, 6.0, 8.0])
    wide, narrow = (discrepancy(train, test, confidence=c)["size"].interval for c in (0.99, 0.5))
    assert wide[0] < narrow[0] < 2 < narrow[1] < wide[1]


def test_samples_that_do_not_count() -> None:
    train = measured([1.0, 3.0, torch.nan])
    found = discrepancy(train, measured([4.0, 8.0]))["size"]
    assert (found.train, found.train_samples) == (2.0, 2)
    infinite = discrepancy(train, measured([4.0, torch.inf]))["size"]
    assert (infinite.test, infinite.test_samples) == (math.inf, 2)
    assert math.isnan(infinite.relative)


def test_of_curvature_the_geometry() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.arange(8) % 2
    measure = functools.partial(curvature, model)
    train, test = over(measure, [(x[:4], y[:4])]), over(measure, [(x[4:], y[4:])])
    found = discrepancy(train, test)
    assert list(found) == ["gradient_norm", "hessian_norm", "normalized"]
    assert found == discrepancy(train.result, test)
    means = float(train.mean["normalized"]), float(test.mean["normalized"])
    assert found["normalized"].relative == pytest.approx((means[1] - means[0]) / means[0])
    assert list(discrepancy(train, test, fields=["value"])) == ["value"]
    regression = curvature(model, x, torch.randn(8, 2, dtype=torch.float64))
    with pytest.raises(FlexureError, match="a classifier's cross-entropy and of another field"):
        discrepancy(train, regression)
    assert list(discrepancy(regression, regression)) == list(found)
    for name in ("products", "converged", "nonsense"):
        with pytest.raises(FlexureError, match=f"got \\['{name}'\\]"):
            discrepancy(train, test, fields=[name])


def test_interval_covers() -> None:
    """The true ratio of two log-normal means, in about 95 of 100 samples."""
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(1000):
        train = torch.randn(200, generator=generator, dtype=torch.float64).mul(0.7).exp()
        test = torch.randn(100, generator=generator, dtype=torch.float64).mul(0.7).add(1).exp()
        low, high = discrepancy(measured(train), measured(test))["size"].interval
        hits += low < math.e - 1 < high
    assert 0.92 < hits / 1000 < 0.975


@pytest.mark.parametrize("train", [[1.0], [0.0, 0.0], [-2.0, 1.0], [math.nan, math.inf], []])
def test_without_meaning(train: list[float]) -> None:
    for found in (
        discrepancy(measured(train), measured([1.0, 2.0])),
        discrepancy(measured([1.0, 2.0]), measured(train)),
    ):
        assert math.isnan(found["size"].relative)
        assert all(map(math.isnan, found["size"].interval))


def test_refusals() -> None:
    two = measured([1.0, 2.0])
    with pytest.raises(FlexureError, match="same measure and settings"):
        discrepancy(two, measured([1.0, 2.0], tol=0.2))
    with pytest.raises(FlexureError, match="same measure and settings"):
        discrepancy(two, Columns(torch.ones(2).bool(), torch.ones(2, 3)))
    columns = Columns(torch.ones(2).bool(), torch.ones(2, 3))
    with pytest.raises(FlexureError, match="a number for each sample"):
        discrepancy(columns, columns)
    with pytest.raises(FlexureError, match="confidence"):
        discrepancy(two, two, confidence=95)
