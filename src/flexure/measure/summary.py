"""What a measure gave over many samples: means, intervals, quantiles, and how two results differ.

How the values come about is `over.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor

from flexure.contracts import DataError, FlexureError
from flexure.measure.intervals import t_interval, wilson_interval
from flexure.per_sample import PerSample

__all__ = ["QUANTILES", "PairedDifference", "Summary"]

Result = TypeVar("Result", bound=PerSample)

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Levels of `Summary.quantiles`."""


@dataclass(frozen=True)
class PairedDifference:
    """How much larger a quantity is in one result than in another on the same samples.

    Attributes:
        mean: of the differences, one minus other: () or (k,), float64.
        standard_error: of that mean.
        low: lower end of its interval.
        high: upper end.
        defined: pairs that it rests on: those whose difference has a value, which it has not where
            one of them is nan, or both are the same infinity.
        level: of the interval.
    """

    mean: Tensor
    standard_error: Tensor
    low: Tensor
    high: Tensor
    defined: Tensor
    level: float


@dataclass(frozen=True)
class Summary(Generic[Result]):
    """The values of a measure over all samples of the data, and what they are on average.

    The dictionaries have an entry for every floating-point and every boolean field of the result
    (besides `converged`; of booleans the mean is a share): a float64 tensor of shape () for a
    field (B,), of shape (k,) for a field (B, k). They rest on the values that are not nan (which
    says that there is none), of which `defined` has the number. An infinite value counts: the mean
    is then infinite, and has no interval. Values of samples that have not converged count.

    What does not average over samples (a root mean square, the slope λ) is a property of `result`
    and pools over all samples there.

    Attributes:
        result: the values, with the samples in the order of the data.
        labels: CRC-32 of the labels in that order; None where there are none.
    """

    result: Result
    labels: int | None = None

    def __len__(self) -> int:
        return len(self.result)

    @cached_property
    def mean(self) -> dict[str, Tensor]:
        """Mean over samples."""
        return {name: _mean(values) for name, values in self._values.items()}

    @cached_property
    def standard_error(self) -> dict[str, Tensor]:
        """Of the mean: the sample standard deviation over √n.

        nan below two values, and where the mean is infinite.
        """
        return {name: _standard_error(values) for name, values in self._values.items()}

    @cached_property
    def quantiles(self) -> dict[str, Tensor]:
        """(5,) or (5, k): at the levels `QUANTILES`, interpolated linearly."""
        return {name: _quantiles(values) for name, values in self._values.items()}

    @cached_property
    def defined(self) -> dict[str, Tensor]:
        """int64: how many samples have a value, one that is not nan."""
        return {name: _count(values) for name, values in self._values.items()}

    @property
    def converged(self) -> float:
        """Share of samples whose values are what the measure promises."""
        return float(self.result.converged.double().mean())

    def interval(self, name: str, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Interval of a mean over the draw of samples, which are taken as independent.

        The t-interval; for a boolean field the Wilson interval of the share.

        Args:
            name: of the field.
            level: the share of intervals that shall contain the expectation, in (0, 1).

        Returns:
            The lower and the upper ends, shaped as the mean; nan where it is not finite.

        Raises:
            FlexureError: there is no such field, or no such level.
        """
        values = self._named(name, level)
        count, mean = _count(values), _mean(values)
        if self._is_share(name):
            return wilson_interval((mean * count).round(), count, level=level)
        return t_interval(mean, _standard_error(values), count, level=level)

    def paired(self, other: Summary[Result], name: str, level: float = 0.95) -> PairedDifference:
        """How much larger the mean is here than in `other`, on the same samples.

        The t-interval of the differences. For a boolean field that of the differences with one
        more of +1 and one of −1, so that it has a width where no sample differs (Bonett and Price,
        "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
        data", 2012, with t for z).

        Args:
            other: another model's, say, over the same samples in the same order. Checked are their
                number, their labels where both have them, and the settings of the measure.
            name: of the field.
            level: of the interval, in (0, 1).

        Raises:
            FlexureError: a field or level that there is not, or other settings.
            DataError: they are not of the same samples.
        """
        self._check_comparable(other)
        here, there = self._named(name, level), other._named(name, level)
        differences = here - there
        mean, error, count = (f(differences) for f in (_mean, _standard_error, _count))
        wide = differences
        if self._is_share(name):
            one = torch.ones_like(differences[:1])
            wide = torch.cat([differences, one, -one])
        low, high = t_interval(_mean(wide), _standard_error(wide), _count(wide), level=level)
        low, high = torch.minimum(low, mean), torch.maximum(high, mean)
        if self._is_share(name):
            low, high = low.clamp(min=-1.0), high.clamp(max=1.0)
        return PairedDifference(mean, error, low, high, count, level)

    def __str__(self) -> str:
        rows = [["", "mean", "s.e.", *(f"{100 * level:g} %" for level in QUANTILES), "defined"]]
        for name, values in self._values.items():
            columns = values.reshape(len(values), -1).unbind(1)
            for index, column in enumerate(columns):
                label = name if values.dim() == 1 else f"{name}[{index}]"
                told = [_mean(column), _standard_error(column), *_quantiles(column)]
                rows.append([label, *(f"{float(v):.4g}" for v in told), str(int(_count(column)))])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            row[0].ljust(widths[0])
            + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        head = f"{type(self.result).__name__}: {len(self)} samples, "
        return "\n".join([head + f"{100 * self.converged:.4g} % converged", *lines])

    @cached_property
    def _values(self) -> dict[str, Tensor]:
        """The fields that have a mean, float64 on the CPU."""
        return {
            name: values.detach().cpu().double()
            for name, values in self.result.samples().items()
            if name != "converged" and (values.is_floating_point() or values.dtype == torch.bool)
        }

    def _named(self, name: str, level: float) -> Tensor:
        if name not in self._values:
            raise FlexureError(
                f"expected one of the fields {', '.join(self._values)}, got {name!r}; what pools "
                f"over samples is a property of .result"
            )
        if not 0 < level < 1:
            raise FlexureError(f"expected a level between 0 and 1, got {level!r}; give 0.95, say")
        return self._values[name]

    def _is_share(self, name: str) -> bool:
        return self.result.samples()[name].dtype == torch.bool

    def _check_comparable(self, other: Summary[Result]) -> None:
        if (settings := self.result.settings()) != (others := other.result.settings()):
            raise FlexureError(
                f"expected results of the same settings, got {settings} and {others}; measure both "
                f"alike"
            )
        if len(self) != len(other):
            raise DataError(
                f"expected results of the same samples, got {len(self)} and {len(other)} of them; "
                f"measure both over the same batches"
            )
        if None not in (self.labels, other.labels) and self.labels != other.labels:
            raise DataError(
                "expected results of the same samples in the same order, got other labels; "
                "measure both over the same batches, without shuffling"
            )


def _count(values: Tensor) -> Tensor:
    return (~values.isnan()).sum(0)


def _mean(values: Tensor) -> Tensor:
    return values.nanmean(0)


def _standard_error(values: Tensor) -> Tensor:
    count, mean = _count(values), _mean(values)
    squares = (values - mean).square().nansum(0)
    known = (count > 1) & mean.isfinite()
    return torch.where(known, squares / (count - 1) / count, torch.nan).sqrt()


def _quantiles(values: Tensor) -> Tensor:
    """(5, ...): interpolated, but for an infinite value only where a level is beyond the others."""
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    low, high = (
        values.nanquantile(levels, dim=0, interpolation=which) for which in ("lower", "higher")
    )
    ranks = levels.view(-1, *[1] * (values.dim() - 1)) * (_count(values) - 1)
    # 0·inf and inf - inf are nan: nothing is interpolated between equal values or from -inf.
    flat = (low == high) | low.isinf()
    return torch.where(flat, low, low + (ranks - ranks.floor()) * (high - low))
