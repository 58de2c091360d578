"""What is told of networks trained by several methods: quantities, and their estimates.

A quantity says where its numbers are in a run; a rule says how those of several runs become one
number with an interval, and how two methods differ. The runs themselves are `flat_result.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from flexure.contracts import FlexureError
from flexure.measure.intervals import t_interval
from flexure.methods.crossed import (
    CrossedMean,
    crossed_difference,
    crossed_mean,
    crossed_share,
)

if TYPE_CHECKING:
    from flexure.methods.flat_result import FlatRun

__all__ = ["FlatEstimate", "FlatQuantity", "over_seeds", "quantities"]

_LEVEL = 0.95


@dataclass(frozen=True)
class FlatEstimate:
    """One number of one method, or the difference of two methods, with its interval.

    Attributes:
        value: the mean over runs, and over samples where there is a value for each.
        low: lower end of the 95 % interval; nan where none can be told.
        high: upper end, likewise.
        covers: what the interval covers the draw of.
        runs: seeds that it rests on.
        samples: that it rests on; 0 where a run has one number.
        median: of the samples, its mean over runs; nan where a run has one number, for shares and
            for differences.
    """

    value: float
    low: float
    high: float
    covers: str
    runs: int
    samples: int = 0
    median: float = math.nan

    @property
    def has_interval(self) -> bool:
        """Whether both ends are known."""
        return not (math.isnan(self.low) or math.isnan(self.high))


Values: TypeAlias = "Callable[[FlatRun], Tensor | float | None]"
"""A run -> (N,) numbers, one a sample; or its one number; None where the run has none."""

Rule: TypeAlias = "Callable[[Sequence[Any]], FlatEstimate]"


@dataclass(frozen=True)
class FlatQuantity:
    """One row of the table of quantities.

    Attributes:
        name: unique; `"pgd_0.05"`, say.
        label: in words, with its unit.
        head: short, for the head of a column.
        better: which direction is wanted; None: neither.
        kind: `"mean"` over samples, `"share"` of samples, or `"run"`: one number a run.
        values: where the numbers are in a run.
        positive: whether no value is below 0: its intervals then end there, since a t-interval of
            few seeds may go on. Not those of differences.
        of_hessian: whether it comes from the Hessian, which does not see kinks: networks with
            some are not compared by it.
    """

    name: str
    label: str
    head: str
    better: Literal["lower", "higher"] | None
    kind: Literal["mean", "share", "run"]
    values: Values
    positive: bool = True
    of_hessian: bool = False

    def estimate(self, runs: Sequence[FlatRun]) -> FlatEstimate | None:
        """Of the runs of one method; None where none of them has the quantity."""
        found = [value for run in runs if (value := self._of(run)) is not None]
        if not found:
            return None
        told = _RULES[self.kind][0](found)
        return replace(told, low=max(told.low, 0.0)) if self.positive and told.low < 0 else told

    def difference(
        self, runs: Sequence[FlatRun], baseline: Sequence[FlatRun]
    ) -> FlatEstimate | None:
        """Of one method to another: runs of the same seed are paired, and samples are.

        None where no seed has the quantity from both.
        """
        others = {run.seed: self._of(run) for run in baseline}
        pairs = [
            (value, other)
            for run in runs
            if (value := self._of(run)) is not None and (other := others.get(run.seed)) is not None
        ]
        return _RULES[self.kind][1]([one - other for one, other in pairs]) if pairs else None

    def _of(self, run: FlatRun) -> Any:
        value = None if run.failure is not None else self.values(run)
        return value.detach().cpu().double() if isinstance(value, Tensor) else value


def quantities(radii: Sequence[float]) -> tuple[FlatQuantity, ...]:
    """All of them, the columns of the paper's tables first.

    Args:
        radii: l2 radii of the attacks.
    """
    attacked = tuple(
        FlatQuantity(
            f"pgd_{radius:g}",
            f"accuracy under l2 PGD of radius {radius:g} (share)",
            f"PGD {radius:g}",
            "higher",
            "share",
            partial(_robust, column=k),
        )
        for k, radius in enumerate(radii)
    )
    return (*_GEOMETRY, _ACCURACY, _CLEAN, *attacked, _SECONDS, *_MORE)


def over_seeds(values: Sequence[float]) -> FlatEstimate:
    """The mean of one number a run, with its t-interval over seeds; of one run there is none."""
    numbers = torch.tensor(list(values), dtype=torch.float64)
    n = len(numbers)
    mean = numbers.mean()
    low = high = torch.tensor(math.nan, dtype=torch.float64)
    if n > 1 and bool(mean.isfinite()):
        error = numbers.std() / math.sqrt(n)
        low, high = t_interval(mean, error, torch.tensor(n), level=_LEVEL)
    covers = "no draw" if n == 1 else f"{n} seeds"
    return FlatEstimate(float(mean), float(low), float(high), covers, n)


def _mean(values: Sequence[Tensor]) -> FlatEstimate:
    """Over seeds and samples; those without a value from some seed (nan) are left out."""
    return _crossed(values, crossed_mean)


def _share(values: Sequence[Tensor]) -> FlatEstimate:
    return _crossed(values, crossed_share, medians=False)


def _mean_difference(values: Sequence[Tensor]) -> FlatEstimate:
    return _crossed(values, crossed_mean, medians=False)


def _share_difference(values: Sequence[Tensor]) -> FlatEstimate:
    return _crossed(values, crossed_difference, medians=False)


def _crossed(
    values: Sequence[Tensor], rule: Callable[[Tensor], CrossedMean], *, medians: bool = True
) -> FlatEstimate:
    """By a rule of `crossed.py`; a mean that is not finite, or of one sample, has no interval."""
    table = torch.stack(list(values))
    table = table[:, ~table.isnan().any(0)]
    seeds, samples = table.shape
    if not samples:
        return FlatEstimate(math.nan, math.nan, math.nan, "no draw", seeds)
    median = float(table.quantile(0.5, dim=1).mean()) if medians else math.nan
    mean = float(table.mean())
    if samples < 2 or not math.isfinite(mean):
        return FlatEstimate(mean, math.nan, math.nan, "no draw", seeds, samples, median)
    found = rule(table)
    return FlatEstimate(found.mean, found.low, found.high, found.covers, seeds, samples, median)


_RULES: dict[str, tuple[Rule, Rule]] = {
    "mean": (_mean, _mean_difference),
    "share": (_share, _share_difference),
    "run": (over_seeds, over_seeds),
}
"""Kind -> how it is estimated, and how a difference is."""


def _sampled(run: FlatRun, measure: str, field: str) -> Tensor | None:
    """A field of a measure's result on test samples."""
    summary = run.test.get(measure)
    return None if summary is None else summary.result.samples()[field]


def _clean(run: FlatRun) -> Tensor | None:
    """Right answers without attack to the samples that were attacked, the first ones."""
    right = _sampled(run, "calibration", "correct")
    return None if right is None or run.robust is None else right[: len(run.robust)]


def _robust(run: FlatRun, column: int) -> Tensor | None:
    return None if run.robust is None else run.robust[:, column]


def _pooled(run: FlatRun, measure: str, name: str) -> float | None:
    """What pools over samples; None where it is not defined or infinite."""
    summary = run.test.get(measure)
    if summary is None:
        return None
    try:
        value = float(getattr(summary.result, name))
    except FlexureError:
        return None
    return value if math.isfinite(value) else None


_GEOMETRY = (
    FlatQuantity(
        "gradient_norm", "gradient norm (nats / input unit)", "E|grad|", "lower", "mean",
        partial(_sampled, measure="curvature", field="gradient_norm"),
    ),
    FlatQuantity(
        "hessian_norm", "Hessian norm (nats / input unit²)", "E|Hess|", "lower", "mean",
        partial(_sampled, measure="curvature", field="hessian_norm"), of_hessian=True,
    ),
    FlatQuantity(
        "normalized", "normalised curvature (1 / input unit)", "E C", "lower", "mean",
        partial(_sampled, measure="curvature", field="normalized"), of_hessian=True,
    ),
)  # fmt: skip

_ACCURACY = FlatQuantity(
    "accuracy", "accuracy on test data (share)", "accuracy", "higher", "share",
    partial(_sampled, measure="calibration", field="correct"),
)  # fmt: skip

_CLEAN = FlatQuantity(
    "clean", "accuracy on the attacked samples (share)", "clean", "higher", "share", _clean
)

_SECONDS = FlatQuantity(
    "seconds_per_epoch", "seconds per epoch, validation not included", "s/epoch", "lower", "run",
    lambda run: run.seconds_per_epoch,
)  # fmt: skip

_MORE = (
    FlatQuantity(
        "nll", "negative log-likelihood on test data (nats)", "NLL", "lower", "mean",
        partial(_sampled, measure="calibration", field="nll"),
    ),
    FlatQuantity(
        "ece", "expected calibration error, 15 bins", "ECE", "lower", "run",
        partial(_pooled, measure="calibration", name="ece"),
    ),
    FlatQuantity(
        "rate", "curvature rate", "rate", "lower", "run",
        partial(_pooled, measure="rate", name="rate"), positive=False,
    ),
    FlatQuantity(
        "lipschitz", "Lipschitz bound of the logits (1 / input unit)", "Lipschitz", "lower", "run",
        lambda run: run.lipschitz,
    ),
)  # fmt: skip
