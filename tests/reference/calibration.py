"""Calibration numbers by their definitions, one sample at a time, in many digits."""

from __future__ import annotations

from fractions import Fraction

from mpmath import mp, mpf


def expected_calibration_error(confidence: list[float], correct: list[bool], bins: int) -> float:
    """Sums over bins (k/bins, (k+1)/bins], whose ends are rounded as 64-bit numbers are."""
    total = Fraction(0)
    for k in range(bins):
        members = [i for i, p in enumerate(confidence) if k / bins < p <= (k + 1) / bins]
        gap = sum(
            (Fraction(int(correct[i])) - Fraction(confidence[i]) for i in members), Fraction()
        )
        total += abs(gap)
    return float(total / len(confidence))


def negative_log_likelihood(logits: list[float], label: int) -> float:
    with mp.workdps(60):
        terms = [mp.exp(mpf(z) - mpf(logits[label])) for z in logits]
        return float(mp.log(mp.fsum(terms)))


def probability(logits: list[float], label: int) -> float:
    with mp.workdps(60):
        return float(1 / mp.fsum(mp.exp(mpf(z) - mpf(logits[label])) for z in logits))
