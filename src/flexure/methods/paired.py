"""Estimates over samples, and how those of two models on the same samples differ.

A statistic says how a quantity's values over samples become one number with an interval, for one
model and for a pair of models. Which quantity of which measure has which statistics is said by the
table in `measures.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from flexure.contracts import FlexureError
from flexure.measure.over import Summary
from flexure.per_sample import PerSample

__all__ = [
    "LEVEL",
    "MEAN",
    "MEDIAN",
    "POOLED",
    "Quantity",
    "QuantityDifference",
    "QuantityEstimate",
    "Statistic",
]

LEVEL = 0.95
"""Of every interval."""

_RESAMPLES = 1000
"""Enough for the ends of a percentile interval (Efron and Tibshirani, "An introduction to the
bootstrap", 1993, section 14.3)."""


@dataclass(frozen=True)
class QuantityEstimate:
    """One quantity of one model, with its interval over the draw of samples.

    Attributes:
        measure: the measure's name in the table of measures.
        quantity: the name of the field, or of the pooled property, of the measure's result.
        statistic: what `value` is: `"mean"`, `"median"`, or `"pooled"` (over samples, by the
            measure's own rule).
        value: the estimate.
        low: lower end of the interval.
        high: upper end.
        samples: that it rests on: those with a finite value.
        at: where the quantity has a value for each of several settings (radii), which of them.
        label: the quantity in words.
        level: of the interval.
    """

    measure: str
    quantity: str
    statistic: str
    value: float
    low: float
    high: float
    samples: int
    at: float | None
    label: str
    level: float = LEVEL

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class QuantityDifference(QuantityEstimate):
    """How one quantity of a model compares with that of another on the same samples.

    `value` is the difference of the means, or of what is pooled: the model's minus the other's.
    For the statistic `"median"` it is the median of the samples' ratios: the model's value over the
    other's. `samples` are the pairs where both values are finite.
    """

    @property
    def is_ratio(self) -> bool:
        """Whether it is a ratio and no difference."""
        return self.statistic == MEDIAN.name

    @property
    def neutral(self) -> float:
        """The value for models that do not differ: 1 for a ratio, else 0."""
        return float(self.is_ratio)

    @property
    def certain(self) -> bool:
        """Whether the interval leaves that value out; one of nan does not."""
        return self.low > self.neutral or self.high < self.neutral

    def __str__(self) -> str:
        sign = "" if self.is_ratio else "+"
        text = f"{self.value:{sign}.4g} [{self.low:{sign}.4g}, {self.high:{sign}.4g}]"
        return f"times {text}" if self.is_ratio else text


class Interval(NamedTuple):
    """A value, the ends of its interval, and the samples that it rests on."""

    value: float
    low: float
    high: float
    samples: int


Of: TypeAlias = "Callable[[Summary[Any], str, int], list[Interval]]"
Between: TypeAlias = "Callable[[Summary[Any], Summary[Any], str, int], list[Interval]]"


@dataclass(frozen=True)
class Statistic:
    """How the values of a quantity over samples become one number with its interval.

    Attributes:
        name: see `QuantityEstimate.statistic`.
        of: (summary, quantity, seed) -> one interval for each column of the quantity.
        between: (summary, another, quantity, seed) -> likewise, of the paired samples.
    """

    name: str
    of: Of
    between: Between


@dataclass(frozen=True)
class Quantity:
    """One row: a quantity of a measure's result.

    Attributes:
        name: a field of the result, or a property that pools over samples.
        label: in words, with its unit where it has one.
        statistics: what is told of it.
        places: for a field (B, K): the setting of the result that names the K columns.
    """

    name: str
    label: str
    statistics: tuple[Statistic, ...]
    places: str | None = None

    def estimates(
        self, measure: str, summary: Summary[Any], *, seed: int
    ) -> list[QuantityEstimate]:
        """What one model has; several for a field with several columns."""
        return [
            QuantityEstimate(measure, self.name, statistic.name, *one, at, self.label)
            for statistic in self.statistics
            for one, at in self._placed(statistic.of(summary, self.name, seed), summary)
        ]

    def differences(
        self, measure: str, first: Summary[Any], second: Summary[Any], *, seed: int
    ) -> list[QuantityDifference]:
        """How `first` compares with `second`.

        Raises:
            FlexureError: they do not have the same number of samples.
        """
        if len(first) != len(second):
            raise FlexureError(
                f"expected {measure} of both models on the same samples, got {len(first)} and "
                f"{len(second)}; measure both on the same batches"
            )
        return [
            QuantityDifference(measure, self.name, statistic.name, *one, at, self.label)
            for statistic in self.statistics
            for one, at in self._placed(statistic.between(first, second, self.name, seed), first)
        ]

    def _placed(
        self, found: list[Interval], summary: Summary[Any]
    ) -> list[tuple[Interval, float | None]]:
        places = (None,) if self.places is None else getattr(summary.result, self.places)
        return list(zip(found, places, strict=True))


def _mean(summary: Summary[Any], name: str, seed: int) -> list[Interval]:
    """The mean with its t-interval; of a share, Wilson's."""
    ends = summary.interval(name, level=LEVEL)
    return _listed(summary.mean[name], *ends, summary.defined[name])


def _mean_difference(
    first: Summary[Any], second: Summary[Any], name: str, seed: int
) -> list[Interval]:
    """The mean of the differences with its t-interval (`Summary.paired`)."""
    found = first.paired(second, name, level=LEVEL)
    return _listed(found.mean, found.low, found.high, found.defined)


def _median(summary: Summary[Any], name: str, seed: int) -> list[Interval]:
    """The median, with an interval that assumes no distribution.

    Where a few samples make up a mean, the median says what happens to most of them. The ends are
    order statistics, by the sign test: (x_(k), x_(n−k+1)) with the largest k such that
    P(Bin(n, 1/2) < k) <= (1 − level)/2. Fewer than six samples have no such k: (−inf, inf).
    """
    return [_middle(column) for column in _columns(summary, name)]


def _median_ratio(
    first: Summary[Any], second: Summary[Any], name: str, seed: int
) -> list[Interval]:
    """The median of the samples' ratios, likewise; pairs 0/0 say nothing and are left out."""
    pairs = zip(_columns(first, name), _columns(second, name), strict=True)
    return [_middle(x / y) for x, y in pairs]


def _pooled(summary: Summary[Any], name: str, seed: int) -> list[Interval]:
    """A property of the result that pools over samples, with a percentile bootstrap."""
    return [_bootstrap(lambda rows: _value(summary.result.taken(rows), name), len(summary), seed)]


def _pooled_difference(
    first: Summary[Any], second: Summary[Any], name: str, seed: int
) -> list[Interval]:
    """Both results are resampled alike, so that what is common to them cancels."""
    one, other = first.result, second.result

    def difference(rows: Tensor) -> float:
        return _value(one.taken(rows), name) - _value(other.taken(rows), name)

    return [_bootstrap(difference, len(first), seed)]


MEAN = Statistic("mean", _mean, _mean_difference)
MEDIAN = Statistic("median", _median, _median_ratio)
POOLED = Statistic("pooled", _pooled, _pooled_difference)


def _listed(*columns: Tensor) -> list[Interval]:
    values = zip(*(column.reshape(-1).tolist() for column in columns), strict=True)
    return [Interval(value, low, high, int(n)) for value, low, high, n in values]


def _columns(summary: Summary[Any], name: str) -> tuple[Tensor, ...]:
    values: Tensor = summary.result.samples()[name].detach().cpu().double()
    return tuple(values.reshape(len(values), -1).T)


def _middle(values: Tensor) -> Interval:
    from scipy.stats import binom

    values = values[~values.isnan()].sort().values
    n = len(values)
    if not n:
        return Interval(math.nan, math.nan, math.nan, 0)
    middle = float(values[(n - 1) // 2] + values[n // 2]) / 2
    # The smallest q with P(X <= q) >= tail is the largest k with P(X < k) below it.
    k = int(binom.ppf((1 - LEVEL) / 2, n, 0.5))
    if k < 1:
        return Interval(middle, -math.inf, math.inf, n)
    return Interval(middle, float(values[k - 1]), float(values[n - k]), n)


def _bootstrap(statistic: Callable[[Tensor], float], n: int, seed: int) -> Interval:
    """Of rows drawn with replacement; draws where the statistic is not finite are left out."""
    value = statistic(torch.arange(n))
    generator = torch.Generator().manual_seed(seed)
    found = [statistic(torch.randint(n, (n,), generator=generator)) for _ in range(_RESAMPLES)]
    draws = torch.tensor(found, dtype=torch.float64)
    draws = draws[draws.isfinite()]
    if n < 2 or not len(draws):
        return Interval(value, math.nan, math.nan, n)
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = draws.quantile(tails).tolist()
    return Interval(value, low, high, n)


def _value(result: PerSample, name: str) -> float:
    """The property; nan where it is not defined."""
    try:
        return float(getattr(result, name))
    except FlexureError:
        return math.nan
