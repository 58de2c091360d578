"""Calibration: how sure a classifier is, how often it is right, and how the two agree.

Nothing is differentiated here. Curvature against confidence is the report's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from flexure.calling import call_model, logits_of
from flexure.contracts import DataError, FlexureError
from flexure.measure.fields import margin, measuring
from flexure.measure.intervals import wilson_interval
from flexure.per_sample import PerSample

__all__ = ["Calibration", "ReliabilityBin", "calibration"]

_BINS = 15  # of Guo et al. 2017

_LEVEL = 0.95


@dataclass(frozen=True)
class ReliabilityBin:
    """The samples whose confidence is in an interval.

    Attributes:
        above: the interval's lower end, which is not in it.
        up_to: its upper end, which is.
        count: samples in it, at least one.
        confidence: their mean confidence.
        accuracy: the share of them that is right.
        low: lower end of the accuracy's 95 % Wilson interval.
        high: upper end.
    """

    above: float
    up_to: float
    count: int
    confidence: float
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Calibration(PerSample):
    """What a classifier says of each of B samples, and how that pools.

    Attributes:
        converged: (B,) bool, always true: nothing is iterated.
        confidence: (B,) float64, probability of the predicted class; 1 for sure samples.
        correct: (B,) bool, whether that class is the label.
        nll: (B,) float64, negative log-likelihood of the label in nats: the cross-entropy.
        predicted: (B,) int64, the class with the largest logit, the first of several.
        doubt: (B,) float64, probability that is left: of all other classes together. 1 minus the
            confidence, but summed from theirs and not subtracted, so that it tells sure samples
            apart down to 1e-300; 0 below the range of float64.
    """

    confidence: Tensor
    correct: Tensor
    nll: Tensor
    predicted: Tensor
    doubt: Tensor

    @property
    def accuracy(self) -> float:
        """Share of samples that are right."""
        return float(self.correct.double().mean())

    @property
    def mean_nll(self) -> float:
        """Mean negative log-likelihood of the labels, in nats."""
        return float(self.nll.mean())

    @property
    def ece(self) -> float:
        """Expected calibration error, 15 bins of one width: Σ_b n_b/n · |accuracy − confidence|.

        Of the predicted class's probability, with bins (k/15, (k+1)/15] (Guo et al., "On
        calibration of modern neural networks", 2017). torchmetrics gives the same number, except
        for confidences at a bin's very end (it counts them in the bin above, and those of exactly
        1 in a bin of their own). It is biased upwards where bins have few samples.
        """
        return self._error_in(self.reliability(_BINS))

    def reliability(self, bins: int = _BINS) -> tuple[ReliabilityBin, ...]:
        """The reliability diagram: confidence against accuracy, bins without samples left out.

        Args:
            bins: how many equally wide bins [0, 1] is cut into.

        Raises:
            FlexureError: fewer than one bin.
        """
        if bins < 1:
            raise FlexureError(f"expected at least one bin, got {bins}; {_BINS} are usual")
        confidence = self.confidence.double()
        # Quotients: multiples of a rounded width miss confidences at the ends of bins.
        ends = torch.arange(1, bins + 1, dtype=torch.float64, device=confidence.device) / bins
        place = torch.bucketize(confidence, ends[:-1].contiguous())
        count = place.bincount(minlength=bins)
        hits = place.bincount(self.correct.double(), minlength=bins)
        sums = place.bincount(confidence, minlength=bins)
        low, high = wilson_interval(hits, count, level=_LEVEL)
        return tuple(
            ReliabilityBin(
                above=k / bins,
                up_to=(k + 1) / bins,
                count=int(count[k]),
                confidence=float(sums[k] / count[k]),
                accuracy=float(hits[k] / count[k]),
                low=float(low[k]),
                high=float(high[k]),
            )
            for k in range(bins)
            if count[k]
        )

    def _error_in(self, bins: tuple[ReliabilityBin, ...]) -> float:
        return sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / len(self)


def calibration(
    model: nn.Module | Callable[..., Any],
    x: Any,
    y: Tensor,
    *,
    generator: Generator | None = None,
) -> Calibration:
    """Confidence, rightness and negative log-likelihood of every sample, in eval mode.

    From the logits in float64: the probability of class k is σ(m_k) and its negative
    log-likelihood −log σ(m_k), m_k being its margin (`fields.margin`), so that neither is rounded
    to 0 or 1 before the other is. The doubt is o/(1 + o), o = Σ_{j≠k} exp(z_j − z_k) the odds
    against the predicted class k.

    Args:
        model: gives logits (B, K), K >= 2, or an object with `.logits`.
        x: an `Example` of B samples.
        y: (B,) int64 labels in range(K).
        generator: nothing is drawn; it is here since every measure has one.

    Raises:
        DataError: labels of another shape or kind, or that the model has no class for.
        FlexureError: the model gives no logits (B, K), or nan.
    """
    with measuring(model), torch.no_grad():
        logits = logits_of(call_model(model, x))  # type: ignore[arg-type]
    _check_logits(logits)
    y = y.to(logits.device)
    _check_labels(y, logits)
    # Finite stand-ins: a class that is ruled out by -inf must not make differences of infinities.
    wide = logits.double().clamp(min=-_HUGE)
    predicted = wide.argmax(1)
    nll = -F.logsigmoid(margin(wide, y))
    return Calibration(
        converged=torch.ones_like(y, dtype=torch.bool),
        confidence=torch.sigmoid(margin(wide, predicted)),
        correct=predicted == y,
        nll=torch.where(nll < _HUGE / 2, nll, torch.inf),
        predicted=predicted,
        doubt=_doubt(wide, predicted),
    )


_HUGE = 1e300


def _doubt(logits: Tensor, predicted: Tensor) -> Tensor:
    top = predicted[:, None]
    odds_against = (logits - logits.gather(1, top)).exp().scatter(1, top, 0.0).sum(1)
    return odds_against / (1 + odds_against)


def _check_logits(logits: Tensor) -> None:
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise FlexureError(
            f"expected logits (B, K) of at least two classes, got shape {tuple(logits.shape)}; "
            f"for one logit of two classes give the logits (0, z)"
        )
    if bool((logits.isnan() | logits.isposinf()).any()):
        raise FlexureError(
            "expected logits that are numbers, got nan or inf; check the inputs and the weights, "
            "and use float32 or wider"
        )


def _check_labels(y: Tensor, logits: Tensor) -> None:
    samples, classes = logits.shape
    if y.shape != (samples,) or y.dtype != torch.int64:
        raise DataError(
            f"expected ({samples},) labels of int64, got {y.dtype} of shape {tuple(y.shape)}; "
            f"give one class index a sample"
        )
    if samples and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise DataError(
            f"expected labels of the model's {classes} classes, in 0 to {classes - 1}, got "
            f"{int(y.min())} to {int(y.max())}; give the labels that the model was trained on"
        )
