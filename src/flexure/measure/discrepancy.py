"""How much larger a measured quantity is on test data than on training data, [LCNN] Table 3."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

from flexure.contracts import FlexureError
from flexure.per_sample import PerSample

__all__ = ["Discrepancy", "discrepancy"]


@dataclass(frozen=True)
class Discrepancy:
    """One quantity on two samples.

    Attributes:
        train: mean over the training samples that count.
        test: mean over the test samples that count.
        relative: (test - train) / train; nan where fewer than two samples count on either side, or
            a mean is not positive: it then has no meaning.
        interval: for `relative`.
        confidence: of the interval.
        train_samples: how many count: those with a finite number, as in the means of `over`.
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
    train: PerSample, test: PerSample, *, confidence: float = 0.95
) -> dict[str, Discrepancy]:
    """The train-test discrepancy (test - train) / train of every quantity of a measure.

    [LCNN] Table 3 prints test as the denominator and an absolute value; its numbers, up to 21.8,
    are those of train as the denominator. The interval is that of log(test / train) by the delta
    method, for two independent samples: it stays above -1. It is one over samples, for one trained
    network.

    Args:
        train: a measure's result on training samples.
        test: the same measure's, with the same settings, on test samples.
        confidence: of the intervals, in (0, 1).

    Returns:
        A `Discrepancy` for each field that holds one number a sample.

    Raises:
        FlexureError: the results are not of one measurement, or there is no such field.
    """
    if type(train) is not type(test) or train.settings() != test.settings():
        raise FlexureError(
            f"expected two results of the same measure and settings, got {type(train).__name__} "
            f"{train.settings()} and {type(test).__name__} {test.settings()}; measure both alike"
        )
    if not 0 < confidence < 1:
        raise FlexureError(
            f"expected confidence between 0 and 1, got {confidence}; for example .95"
        )
    numbers = [
        name for name, v in train.samples().items() if v.dim() == 1 and v.is_floating_point()
    ]
    if not numbers:
        raise FlexureError(
            f"expected a result with a number for each sample, got {type(train).__name__} with "
            f"{list(train.samples())}; for example the result of flexure.curvature"
        )
    return {name: _compared(name, train, test, confidence) for name in numbers}


def _compared(name: str, train: PerSample, test: PerSample, confidence: float) -> Discrepancy:
    a, b = _counting(name, train), _counting(name, test)
    means = a.mean().item(), b.mean().item()
    relative, interval = math.nan, (math.nan, math.nan)
    if min(len(a), len(b)) > 1 and min(means) > 0:
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
    return values[values.isfinite()]
