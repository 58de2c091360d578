"""Means over seeds and samples at once, with an interval that covers the draw of both.

A table of numbers, one row a seed and one column a test sample, has two sources of chance: another
training run, and another test sample. What the numbers are is the caller's; for right answers and
for their differences there are intervals of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexure.contracts import DataError

__all__ = ["CrossedMean", "crossed_difference", "crossed_mean", "crossed_share"]

_LEVEL = 0.95


@dataclass(frozen=True)
class CrossedMean:
    """The mean of a table of seeds by samples, with its interval; in the table's unit.

    Attributes:
        mean: over all cells.
        low: lower end of the interval.
        high: upper end.
        level: of the interval.
        error: the standard error of the mean.
        seeds: rows.
        samples: columns.
    """

    mean: float
    low: float
    high: float
    level: float
    error: float
    seeds: int
    samples: int

    @property
    def covers(self) -> str:
        """What the interval covers the draw of."""
        return "test samples" if self.seeds == 1 else f"test samples and {self.seeds} seeds"


def crossed_mean(table: Tensor) -> CrossedMean:
    """The mean of `table` with a t-interval over seeds and samples, as random effects.

    With x_si = mu + a_s + b_i + e_si and the mean squares MS of seeds, samples and interaction,

        Var(mean) = (MS_e + max(MS_a − MS_e, 0) + max(MS_b − MS_e, 0)) / (S N),

    and the degrees of freedom are Satterthwaite's ("An approximate distribution of estimates of
    variance components", 1946). One row: the ordinary t-interval over samples. Many samples and
    few seeds that disagree: close to the t-interval over seeds.

    Args:
        table: (S, N) numbers: S seeds, N test samples.

    Raises:
        DataError: fewer than two samples, or no seed.
    """
    if table.dim() != 2 or table.shape[0] < 1 or table.shape[1] < 2:
        raise DataError(
            f"expected a table of at least one seed and two test samples, got "
            f"{tuple(table.shape)}; give more test data"
        )
    from scipy.stats import t

    x = table.double()
    seeds, samples = x.shape
    mean = float(x.mean())
    terms = _terms(x)
    variance = max(sum(square for square, _ in terms), 0.0)
    error = math.sqrt(variance / x.numel())
    if not error:
        return CrossedMean(mean, mean, mean, _LEVEL, 0.0, seeds, samples)
    freedom = 1 / sum((square / variance) ** 2 / n for square, n in terms)
    half = float(t.ppf((1 + _LEVEL) / 2, freedom)) * error
    return CrossedMean(mean, mean - half, mean + half, _LEVEL, error, seeds, samples)


def crossed_share(hits: Tensor) -> CrossedMean:
    """The mean of right answers, with an interval that holds near 0 and 1 too.

    The interval is `crossed_mean`'s of the table with two more samples that every seed gets right
    and two that none does, within [0, 1]: for one seed, Agresti and Coull's ("Approximate is
    better than 'exact' for interval estimation of binomial proportions", 1998) with t for z. Mean
    and standard error are the table's own.

    Args:
        hits: (S, N), 1 where a seed is right on a test sample, else 0.

    Raises:
        DataError: fewer than two samples, or no seed.
    """
    return _adjusted(hits, added=(1.0, 1.0, 0.0, 0.0), bounds=(0.0, 1.0))


def crossed_difference(table: Tensor) -> CrossedMean:
    """The mean of paired differences of right answers, with an interval that holds for few of them.

    The interval is `crossed_mean`'s of the table with one more sample won by every seed and one
    lost, within [-1, 1]: for one seed, Bonett and Price's ("Adjusted Wald confidence interval for a
    difference of binomial proportions based on paired data", 2012) with t for z. Mean and standard
    error are the table's own. Differences that are zero everywhere have an interval with a width.

    Args:
        table: (S, N), each -1, 0 or 1: right answers of one minus those of the other.

    Raises:
        DataError: fewer than two samples, or no seed.
    """
    return _adjusted(table, added=(1.0, -1.0), bounds=(-1.0, 1.0))


def _adjusted(
    table: Tensor, *, added: tuple[float, ...], bounds: tuple[float, float]
) -> CrossedMean:
    """The table's mean, with the interval that it has when all seeds see these samples too."""
    found = crossed_mean(table)
    more = torch.tensor(added, dtype=torch.float64, device=table.device)
    wide = crossed_mean(torch.cat([table.double(), more.expand(len(table), -1)], dim=1))
    low = min(max(wide.low, bounds[0]), found.mean)
    return replace(found, low=low, high=max(min(wide.high, bounds[1]), found.mean))


def _terms(x: Tensor) -> list[tuple[float, int]]:
    """The mean squares that add up to S·N times the variance, with their degrees of freedom."""
    seeds, samples = x.shape
    rows, columns, mean = x.mean(1, keepdim=True), x.mean(0, keepdim=True), x.mean()
    by_sample = float(seeds * ((columns - mean) ** 2).sum()) / (samples - 1)
    if seeds == 1:
        return [(by_sample, samples - 1)]
    by_seed = float(samples * ((rows - mean) ** 2).sum()) / (seeds - 1)
    freedom = (seeds - 1) * (samples - 1)
    rest = float(((x - rows - columns + mean) ** 2).sum()) / freedom
    terms = [(by_seed, seeds - 1)] if by_seed > rest else []
    terms += [(by_sample, samples - 1)] if by_sample > rest else []
    # Each mean square that is kept holds the interaction once; it counts once in all.
    return [*terms, ((1 - len(terms)) * rest, freedom)]
