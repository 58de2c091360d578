"""How quantities differ between two models that were measured on the same samples.

Each way to compare gives a value with a 95 % interval over the draw of samples. Which quantity of
which measure is compared how is said by the table in `measures.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from flexure.contracts import FlexureError
from flexure.methods.crossed import crossed_difference, crossed_mean
from flexure.per_sample import PerSample

__all__ = [
    "LEVEL",
    "Compared",
    "Comparison",
    "PairedDifference",
    "mean_difference",
    "median_ratio",
    "pooled_difference",
    "share_difference",
]

LEVEL = 0.95
"""Of every interval."""

_RESAMPLES = 1000
"""Enough for the ends of a percentile interval (Efron and Tibshirani, "An introduction to the
bootstrap", 1993, section 14.3)."""


@dataclass(frozen=True)
class PairedDifference:
    """How one quantity of a model compares with that of another on the same samples.

    Attributes:
        measure: the measure's name in the table of measures.
        quantity: the name of the field, or of the pooled property, of the measure's result.
        kind: what `value` is: `"difference of means"`, `"median ratio"` (of the model's value to
            the other's, sample by sample) or `"difference"` (of what pools over samples).
        value: the model's minus the other's; for a ratio, the model's over the other's.
        low: lower end of the interval over the draw of samples.
        high: upper end.
        samples: pairs that it rests on: those where both values are finite.
        at: where the quantity has a value for each of several settings (radii), which of them.
        level: of the interval.
    """

    measure: str
    quantity: str
    kind: str
    value: float
    low: float
    high: float
    samples: int
    at: float | None = None
    level: float = LEVEL

    @property
    def neutral(self) -> float:
        """The value for models that do not differ: 1 for a ratio, else 0."""
        return _NEUTRAL.get(self.kind, 0.0)

    @property
    def certain(self) -> bool:
        """Whether the interval leaves that value out."""
        return not self.low <= self.neutral <= self.high

    def __str__(self) -> str:
        sign = "" if self.neutral else "+"
        return f"{self.value:{sign}.4g} [{self.low:{sign}.4g}, {self.high:{sign}.4g}]"


class Compared(NamedTuple):
    """A value, the ends of its interval, and the pairs of samples that it rests on."""

    value: float
    low: float
    high: float
    samples: int


Pairs: TypeAlias = "Callable[[Tensor, Tensor], Compared]"


@dataclass(frozen=True)
class Comparison:
    """One row: a quantity of a measure's result, and how two models' are compared.

    Attributes:
        quantity: a field of the result, or a property that pools over samples.
        kind: see `PairedDifference`.
        of_pairs: compares two (n,) tensors of finite values, pair by pair; None: the quantity
            pools over samples, and `pooled_difference` compares it.
        places: for a field (B, K): the setting of the result that names the K columns.
    """

    quantity: str
    kind: str
    of_pairs: Pairs | None = None
    places: str | None = None

    def __call__(
        self, measure: str, first: PerSample, second: PerSample, *, seed: int
    ) -> list[PairedDifference]:
        """How `first` compares with `second`; several for a field with several columns.

        Raises:
            FlexureError: they do not have the same number of samples.
        """
        if len(first) != len(second):
            raise FlexureError(
                f"expected {measure} of both models on the same samples, got {len(first)} and "
                f"{len(second)}; measure both on the same batches"
            )
        if self.of_pairs is None:
            found = pooled_difference(first, second, self.quantity, seed=seed)
            return [PairedDifference(measure, self.quantity, self.kind, *found)]
        columns = zip(self._columns(first), self._columns(second), self._places(first), strict=True)
        return [
            PairedDifference(measure, self.quantity, self.kind, *self.of_pairs(*_finite(x, y)), at)
            for x, y, at in columns
        ]

    def _columns(self, result: PerSample) -> tuple[Tensor, ...]:
        values: Tensor = getattr(result, self.quantity).detach().cpu().double()
        return values.reshape(len(values), -1).unbind(1)

    def _places(self, result: PerSample) -> tuple[float | None, ...]:
        return (None,) if self.places is None else tuple(getattr(result, self.places))


def mean_difference(x: Tensor, y: Tensor) -> Compared:
    """The mean of x − y with its t-interval."""
    if len(x) < 2:
        return Compared(float((x - y).mean()), -math.inf, math.inf, len(x))
    told = crossed_mean((x - y)[None])
    return Compared(told.mean, told.low, told.high, len(x))


def share_difference(x: Tensor, y: Tensor) -> Compared:
    """The difference of two shares: x and y are 1 where it holds, else 0 (`crossed_difference`)."""
    if len(x) < 2:
        return Compared(float((x - y).mean()), -1.0, 1.0, len(x))
    told = crossed_difference((x - y)[None])
    return Compared(told.mean, told.low, told.high, len(x))


def median_ratio(x: Tensor, y: Tensor) -> Compared:
    """The median of x / y, with an interval that assumes no distribution.

    Where a few samples make up a mean, the median says what happens to most of them. The ends are
    order statistics, by the sign test: (r_(k), r_(n−k+1)) with the largest k such that
    P(Bin(n, 1/2) < k) <= (1 − level)/2. Fewer than six samples have no such k: (0, inf). Pairs
    0/0 say nothing and are left out.
    """
    from scipy.stats import binom

    ratios = x / y
    ratios = ratios[~ratios.isnan()].sort().values
    n = len(ratios)
    middle = float(ratios[(n - 1) // 2] + ratios[n // 2]) / 2 if n else math.nan
    # The smallest q with P(X <= q) >= tail: one less is the largest with P(X <= ·) below it.
    k = int(binom.ppf((1 - LEVEL) / 2, n, 0.5)) if n else 0
    if k < 1:
        return Compared(middle, 0.0, math.inf, n)
    return Compared(middle, float(ratios[k - 1]), float(ratios[n - k]), n)


def pooled_difference(first: PerSample, second: PerSample, name: str, *, seed: int) -> Compared:
    """The difference of a property that pools over samples, with a percentile bootstrap.

    Both results are resampled alike, so that what is common to them cancels. Resamples where the
    property is not a number are left out.
    """
    n = len(first)
    value = _pooled(first, name) - _pooled(second, name)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.empty(_RESAMPLES, dtype=torch.float64)
    for k in range(_RESAMPLES):
        rows = torch.randint(n, (n,), generator=generator)
        draws[k] = _pooled(first.taken(rows), name) - _pooled(second.taken(rows), name)
    draws = draws[draws.isfinite()]
    if n < 2 or not len(draws):
        return Compared(value, -math.inf, math.inf, n)
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = draws.quantile(tails).tolist()
    return Compared(value, low, high, n)


_NEUTRAL = {"median ratio": 1.0}


def _pooled(result: PerSample, name: str) -> float:
    return float(getattr(result, name))


def _finite(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    both = x.isfinite() & y.isfinite()
    return x[both], y[both]
