"""Shares of samples, of one model and paired of two, with their intervals over samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flexure.measure.intervals import wilson_interval
from flexure.methods.crossed import crossed_difference

__all__ = ["PairedShare", "Share", "over", "paired_share", "share"]

_LEVEL = 0.95


@dataclass(frozen=True)
class Share:
    """A share of samples, with Wilson's interval over the draw of samples.

    Attributes:
        value: hits / samples.
        low: lower end of the interval.
        high: upper end.
        hits: samples that it holds for.
        samples: of all.
        level: of the interval.
    """

    value: float
    low: float
    high: float
    hits: int
    samples: int
    level: float = _LEVEL

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class PairedShare:
    """How much larger a share is for one model than for another on the same samples.

    Attributes:
        value: the difference of the shares, the model's minus the reference's.
        low: lower end of its interval (`crossed_difference`); nan for fewer than two samples.
        high: upper end, likewise.
        won: samples that the model alone gets right.
        lost: samples that the reference alone gets right.
        samples: of all.
        level: of the interval.
    """

    value: float
    low: float
    high: float
    won: int
    lost: int
    samples: int
    level: float = _LEVEL

    @property
    def certain(self) -> bool:
        """Whether the interval leaves no difference out."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        value = f"{100 * self.value:+.1f}"
        if math.isnan(self.low):
            return value
        return f"{value} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def share(hits: Tensor) -> Share:
    """The share of (N,) booleans that are true."""
    n, count = len(hits), int(hits.sum())
    low, high = wilson_interval(torch.tensor(count), torch.tensor(n), level=_LEVEL)
    return Share(over(count, n), float(low), float(high), count, n)


def paired_share(hits: Tensor, others: Tensor) -> PairedShare:
    """The share of (N,) booleans that are true, minus that of others of the same samples."""
    n, won, lost = len(hits), int((hits & ~others).sum()), int((others & ~hits).sum())
    if n < 2:
        return PairedShare(over(won - lost, n), math.nan, math.nan, won, lost, n)
    found = crossed_difference(hits.double()[None] - others.double()[None])
    return PairedShare(found.mean, found.low, found.high, won, lost, n)


def over(number: float, of: int) -> float:
    """A quotient; nan for none."""
    return number / of if of else math.nan
