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
from flexure.measure.intervals import t_interval, wilson_interval
from flexure.measure.over import Summary
from flexure.per_sample import PerSample

__all__ = [
    "LEVEL",
    "MEAN",
    "MEDIAN",
    "PLUG_IN",
    "POOLED",
    "SHARE",
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
        statistic: what `value` is: `"mean"`, `"median"`, `"share"` (of samples where the quantity
            is above 0), `"pooled"` (over samples, by the measure's own rule), or `"plug-in"`
            (pooled likewise, but biased at few samples, so that no interval over the draw of
            samples is told).
        value: the estimate.
        low: lower end of the interval; nan where there is none.
        high: upper end, likewise.
        samples: that it rests on: those with a value. Infinite ones have one; for what is pooled,
            all samples of the measure.
        at: where the quantity has a value for each of several settings (radii), which of them.
        label: the quantity in words, with its unit.
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

    @property
    def has_interval(self) -> bool:
        """Whether an interval says anything: not of too few samples, nor of such a statistic."""
        unknown = math.isnan(self.low) or math.isnan(self.high)
        return not unknown and (self.low, self.high) != (-math.inf, math.inf)

    def __str__(self) -> str:
        return "not defined" if math.isnan(self.value) else self._told()

    def _told(self, sign: str = "") -> str:
        """Value and interval; of a difference with its sign."""
        text = f"{self.value:{sign}.4g}"
        if not self.has_interval:
            return text
        return f"{text} [{self.low:{sign}.4g}, {self.high:{sign}.4g}]"


@dataclass(frozen=True)
class QuantityDifference(QuantityEstimate):
    """How one quantity of a model compares with that of another on the same samples.

    `value` is the difference of the means, of the shares, or of what is pooled: the model's minus
    the other's. For the statistic `"median"` it is the median of the samples' ratios: the model's
    value over the other's. `samples` are the pairs that have a difference or a ratio: not those
    where a value is missing, and not 0/0 or inf/inf.
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
        """Whether the interval leaves that value out; without one it is not said."""
        return self.low > self.neutral or self.high < self.neutral

    def _told(self, sign: str = "+") -> str:
        if not self.is_ratio:
            return super()._told(sign)
        if math.isinf(self.value):
            return "infinite ratios at half of the samples or more"
        return f"times {super()._told()}"


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
        place: what the label adds for a column; `{at}` in it stands for that column's setting.
        masked: the boolean field of the result that is true where a sample has no value by
            definition, and why that is so.
    """

    name: str
    label: str
    statistics: tuple[Statistic, ...]
    places: str | None = None
    place: str = ", {at}"
    masked: tuple[str, str] | None = None

    def estimates(
        self, measure: str, summary: Summary[Any], *, seed: int
    ) -> list[QuantityEstimate]:
        """What one model has; several for a field with several columns."""
        return [
            QuantityEstimate(measure, self.name, statistic.name, *one, at, self.labelled(at))
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
            QuantityDifference(measure, self.name, statistic.name, *one, at, self.labelled(at))
            for statistic in self.statistics
            for one, at in self._placed(statistic.between(first, second, self.name, seed), first)
        ]

    def labelled(self, at: float | None) -> str:
        """The label of one column."""
        return self.label + ("" if at is None else self.place.format(at=f"{at:.3g}"))

    def _placed(
        self, found: list[Interval], summary: Summary[Any]
    ) -> list[tuple[Interval, float | None]]:
        places = (None,) if self.places is None else getattr(summary.result, self.places)
        return list(zip(found, places, strict=True))


def _mean(summary: Summary[Any], name: str, seed: int) -> list[Interval]:
    """The mean with its t-interval; of a boolean field, Wilson's."""
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


def _plug_in(summary: Summary[Any], name: str, seed: int) -> list[Interval]:
    """Such a property of these samples alone."""
    return [Interval(_value(summary.result, name), math.nan, math.nan, len(summary))]


def _plug_in_difference(
    first: Summary[Any], second: Summary[Any], name: str, seed: int
) -> list[Interval]:
    difference = _value(first.result, name) - _value(second.result, name)
    return [Interval(difference, math.nan, math.nan, len(first))]


def _share(summary: Summary[Any], name: str, seed: int) -> list[Interval]:
    """The share of samples where the quantity is above 0, with Wilson's interval."""
    found = []
    for column in _columns(summary, name):
        hits = _hits(column)
        n = torch.tensor(len(hits))
        ends = wilson_interval(hits.sum(), n, level=LEVEL)
        found += _listed(hits.mean(), *ends, n)
    return found


def _share_difference(
    first: Summary[Any], second: Summary[Any], name: str, seed: int
) -> list[Interval]:
    """Of the shares; the t-interval with one more sample of +1 and of −1 (`Summary.paired`)."""
    found = []
    for x, y in zip(_columns(first, name), _columns(second, name), strict=True):
        both = ~(x.isnan() | y.isnan())
        differences = _hits(x[both]) - _hits(y[both])
        wide = torch.cat([differences, differences.new_tensor([1.0, -1.0])])
        n = torch.tensor(len(wide))
        low, high = t_interval(wide.mean(), wide.std() / n.sqrt(), n, level=LEVEL)
        mean = differences.mean()
        found += _listed(mean, low.minimum(mean), high.maximum(mean), n - 2)
    return found


def _hits(values: Tensor) -> Tensor:
    return (values[~values.isnan()] > 0).double()


MEAN = Statistic("mean", _mean, _mean_difference)
MEDIAN = Statistic("median", _median, _median_ratio)
POOLED = Statistic("pooled", _pooled, _pooled_difference)

PLUG_IN = Statistic("plug-in", _plug_in, _plug_in_difference)
"""Pooled without an interval: resampling does not show a bias, and adds one of its own."""

SHARE = Statistic("share", _share, _share_difference)


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
