"""How much larger a measured quantity is on test data than on training data.

[LCNN], Low-Curvature Networks (Srinivas et al., 2022), Table 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from torch import Tensor

from flexure.contracts import FlexureError
from flexure.measure.curvature import Curvature
from flexure.measure.summary import Summary
from flexure.per_sample import PerSample

__all__ = ["Discrepancy", "discrepancy"]


@dataclass(frozen=True)
class Discrepancy:
    """One quantity on two samples.

    Attributes:
        train: mean over the training samples that count.
        test: mean over the test samples that count.
        relative: (test - train) / train; nan where fewer than two samples count on either side, or
            a mean is not positive and finite: it then has no meaning.
        interval: for `relative`.
        confidence: of the interval.
        train_samples: how many count: those whose number is not nan, as in the means of `over`.
        test_samples: likewise.
    """

    train: float
    test: float
    relative: float
    interval: tuple[float, float]
    confidence: float
    train_samples: int
    test_samples: int

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.relative:+.4g} ({100 * self.confidence:g} % {low:+.4g} to {high:+.4g}): "
            f"{self.train:.4g} on {self.train_samples} training samples, {self.test:.4g} on "
            f"{self.test_samples} test samples"
        )


def discrepancy(
    train: PerSample | Summary[Any],
    test: PerSample | Summary[Any],
    *,
    fields: Sequence[str] | None = None,
    confidence: float = 0.95,
) -> dict[str, Discrepancy]:
    """The train-test discrepancy (test - train) / train of every quantity of a measure.

    [LCNN] Table 3 prints test as the denominator and an absolute value; its numbers, up to 21.8,
    are those of train as the denominator. The interval is that of log(test / train) by the delta
    method, for two independent samples: it stays above -1. It is one over samples, for one trained
    network.

    Args:
        train: a measure's result on training samples, or what `over` makes of it.
        test: the same measure's, with the same settings, on test samples.
        fields: of the result, with one number a sample each. None: those that [LCNN] compares for
            `Curvature` (norms of gradient and Hessian, normalised curvature; how the solver found
            them is no property of the network), and all there are for other results.
        confidence: of the intervals, in (0, 1).

    Returns:
        A `Discrepancy` for each field.

    Raises:
        FlexureError: the results are not of one measurement (of curvature: one is a classifier's,
            the other another field's), or there is no such field.
    """
    train, test = (each.result if isinstance(each, Summary) else each for each in (train, test))
    _check_comparable(train, test)
    if not 0 < confidence < 1:
        raise FlexureError(
            f"expected confidence between 0 and 1, got {confidence}; for example .95"
        )
    return {name: _compared(name, train, test, confidence) for name in _named(train, fields)}


_TOLD: Mapping[type[PerSample], tuple[str, ...]] = {
    Curvature: ("gradient_norm", "hessian_norm", "normalized")
}
"""Of results that also hold what is no property of the network, the fields that are."""


def _check_comparable(train: PerSample, test: PerSample) -> None:
    if type(train) is not type(test) or train.settings() != test.settings():
        raise FlexureError(
            f"expected two results of the same measure and settings, got {type(train).__name__} "
            f"{train.settings()} and {type(test).__name__} {test.settings()}; measure both alike"
        )
    if _is_classifiers(train) != _is_classifiers(test):
        raise FlexureError(
            "expected curvatures of one quantity, got those of a classifier's cross-entropy and of "
            "another field; measure both with the same field and kind of targets"
        )


def _is_classifiers(result: PerSample) -> bool:
    """Whether a curvature is that of a cross-entropy; other fields have no probability."""
    return isinstance(result, Curvature) and not bool(result.probability.isnan().all())


def _named(result: PerSample, fields: Sequence[str] | None) -> Sequence[str]:
    numbers = [
        name for name, v in result.samples().items() if v.dim() == 1 and v.is_floating_point()
    ]
    named = _TOLD.get(type(result), numbers) if fields is None else fields
    if not named or not set(named) <= set(numbers):
        raise FlexureError(
            f"expected fields with a number for each sample, of {type(result).__name__} one of "
            f"{numbers}, got {list(named)}; name others, or measure with flexure.curvature, say"
        )
    return named


def _compared(name: str, train: PerSample, test: PerSample, confidence: float) -> Discrepancy:
    a, b = _counting(name, train), _counting(name, test)
    means = a.mean().item(), b.mean().item()
    relative, interval = math.nan, (math.nan, math.nan)
    if min(len(a), len(b)) > 1 and all(0 < mean < math.inf for mean in means):
        ratio = means[1] / means[0]
        variance = sum(
            (v.std().item() / mean) ** 2 / len(v) for v, mean in zip((a, b), means, strict=True)
        )
        width = math.exp(NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance))
        relative, interval = ratio - 1, (ratio / width - 1, ratio * width - 1)
    return Discrepancy(
        train=means[0],
        test=means[1],
        relative=relative,
        interval=interval,
        confidence=confidence,
        train_samples=len(a),
        test_samples=len(b),
    )


def _counting(name: str, result: PerSample) -> Tensor:
    """The samples' numbers that count."""
    values = result.samples()[name].double()
    return values[~values.isnan()]
