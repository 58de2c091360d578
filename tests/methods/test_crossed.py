"""Intervals over seeds and samples at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import t

from flexure.contracts import DataError
from flexure.methods.crossed import crossed_mean


def drawn(
    generator: np.random.Generator, seeds: int, samples: int, *, a: float, b: float, e: float
) -> torch.Tensor:
    """Cells with mean 0 and standard deviations a (seeds), b (samples), e (both)."""
    rows = a * generator.normal(size=(seeds, 1))
    columns = b * generator.normal(size=(1, samples))
    return torch.from_numpy(rows + columns + e * generator.normal(size=(seeds, samples)))


def test_one_seed_is_the_ordinary_interval() -> None:
    x = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 1.0]])
    found = crossed_mean(x)
    error = float(x.double().std()) / np.sqrt(6)
    assert found.mean == pytest.approx(4 / 6)
    assert found.high - found.mean == pytest.approx(t.ppf(0.975, 5) * error)
    assert found.covers == "test samples"


def test_seeds_that_disagree_give_the_interval_over_seeds() -> None:
    """Every sample alike within a seed: nothing but the seeds is drawn."""
    means = torch.tensor([0.5, 0.6, 0.8], dtype=torch.float64)
    found = crossed_mean(means[:, None].repeat(1, 50))
    half = t.ppf(0.975, 2) * float(means.std()) / np.sqrt(3)
    assert found.high - found.mean == pytest.approx(half, rel=1e-6)
    assert found.covers == "test samples and 3 seeds"


def test_seeds_that_agree_give_the_interval_over_samples() -> None:
    row = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    one, three = crossed_mean(row[None]), crossed_mean(row[None].repeat(3, 1))
    assert (three.low, three.high) == pytest.approx((one.low, one.high))


def test_nothing_varies() -> None:
    found = crossed_mean(torch.ones(3, 5))
    assert (found.low, found.mean, found.high, found.error) == (1.0, 1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("a", "b", "e"), [(0.3, 0.0, 1.0), (0.0, 1.0, 0.5), (0.1, 1.0, 1.0), (0.0, 0.0, 1.0)]
)
def test_the_interval_covers_the_truth_as_often_as_it_says(a: float, b: float, e: float) -> None:
    generator = np.random.default_rng(0)
    found = [crossed_mean(drawn(generator, 4, 60, a=a, b=b, e=e)) for _ in range(1500)]
    share = np.mean([x.low <= 0 <= x.high for x in found])
    assert 0.93 <= share <= 0.995  # 95 %, or more where a component is 0 and so is bounded


@pytest.mark.parametrize("shape", [(3, 1), (0, 4), (4,)])
def test_too_little_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="at least one seed and two test samples"):
        crossed_mean(torch.zeros(shape))
