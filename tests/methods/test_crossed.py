"""Intervals over seeds and samples at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm, t

from flexure.contracts import DataError
from flexure.methods.crossed import crossed_difference, crossed_mean, crossed_share


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


@pytest.mark.parametrize(
    ("seeds", "samples", "share", "a"),
    [
        (1, 100, 0.97, 0.0), (1, 100, 0.5, 0.0), (1, 30, 0.1, 0.0), (3, 100, 0.97, 0.1),
        (5, 360, 0.995, 0.1), (3, 300, 0.9, 0.1), (5, 50, 0.5, 0.3),
    ],
)  # fmt: skip
def test_intervals_of_accuracies_cover_them_near_0_and_1_too(
    seeds: int, samples: int, share: float, a: float
) -> None:
    """Right where a normal draw of the seed, the sample and both is above a threshold."""
    generator = np.random.default_rng(0)
    threshold = norm.ppf(1 - share) * np.sqrt(a**2 + 2**2 + 1)
    tables = [drawn(generator, seeds, samples, a=a, b=2, e=1) > threshold for _ in range(500)]
    found = [crossed_share(table) for table in tables]
    assert 0.925 <= np.mean([x.low <= share <= x.high for x in found]) <= 0.995
    assert all(0 <= x.low <= x.mean <= x.high <= 1 for x in found)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(
    ("samples", "won", "lost"),
    [(100, 0.03, 0.01), (300, 0.02, 0.005), (300, 0.05, 0.02), (60, 0.2, 0.1)],
)
def test_intervals_of_differences_cover_them_where_few_samples_differ(
    seeds: int, samples: int, won: float, lost: float
) -> None:
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(500):
        u = generator.random(samples)
        row = (u < won).astype(float) - ((u >= won) & (u < won + lost))
        shown = generator.random((seeds, samples)) < 0.7
        found = crossed_difference(torch.from_numpy(row * shown))
        covered.append(found.low <= 0.7 * (won - lost) <= found.high)
    assert np.mean(covered) >= 0.93


@pytest.mark.parametrize("shape", [(1, 2), (1, 100), (3, 100), (5, 2)])
def test_where_all_agree_doubt_is_left(shape: tuple[int, int]) -> None:
    right, wrong = crossed_share(torch.ones(shape)), crossed_share(torch.zeros(shape))
    assert right.low < right.mean == right.high == 1
    assert wrong.low == wrong.mean == 0 < wrong.high
    same = crossed_difference(torch.zeros(shape))
    assert -1 <= same.low < same.mean == 0 < same.high <= 1
    assert same.low == pytest.approx(-same.high)
    won = crossed_difference(torch.ones(shape))
    assert won.low < won.mean == won.high == 1


def test_the_adjusted_intervals_of_one_seed_are_the_published_ones() -> None:
    hits = torch.tensor([[1.0] * 37 + [0.0] * 3])
    found, share = crossed_share(hits), 39 / 44
    error = np.sqrt(share * (1 - share) / 43)
    assert found.mean == pytest.approx(37 / 40)
    assert found.low == pytest.approx(share - t.ppf(0.975, 43) * error)
    differences = torch.tensor([[1.0] * 6 + [-1.0] * 2 + [0.0] * 32])
    told, mean = crossed_difference(differences), 4 / 42
    error = np.sqrt(((7 + 3) / 42 - mean**2) / 41)
    assert told.mean == pytest.approx(0.1)
    assert told.low == pytest.approx(mean - t.ppf(0.975, 41) * error)
    assert told.high == pytest.approx(mean + t.ppf(0.975, 41) * error)
