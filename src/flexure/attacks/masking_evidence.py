"""When a difference counts as evidence of masked gradients: thresholds, and exact binomial tests.

What is counted is the business of the checks.
"""

from __future__ import annotations

import math

from flexure.contracts import FlexureError

__all__ = [
    "ALLOWED_BLIND",
    "ALLOWED_EFFORT",
    "ALLOWED_STUCK",
    "ALLOWED_VANISHED",
    "ALLOWED_WRONG_SLOPES",
    "CONFIDENCE",
    "FEWEST_SAMPLES",
    "MOSTLY_VANISHED",
    "RANDOM_SPREAD",
    "ROUGH",
    "SLOPE_ERROR",
    "exceeds",
    "fewest_that_exceed",
    "more_often",
]

CONFIDENCE = 0.99
"""Of every test: a check that finds nothing amiss is suspicious in at most 1 % of networks."""

FEWEST_SAMPLES = 16
"""Samples that must be classified rightly for the verdict "not masked": of 16, an attack must find
3 (19 %) before a share of 2 % is refuted, so that fewer would leave large shares unseen."""

ALLOWED_BLIND = 0.02
"""Share of the samples that an attack without the model's gradients may find beyond those with
them: what one of finitely many steps may leave. Of one that has converged Carlini et al. 2019
expect none."""

ALLOWED_EFFORT = 0.1
"""Share of the samples that more restarts, steps or targets may find: an attack that gains more has
not converged, and says little of the network."""

ALLOWED_STUCK = 0.05
"""Share of the samples that an attack may leave at a radius where none but one class can be
robust: a working attack leaves none (Athalye et al. 2018, section 3.1, "unbounded attacks")."""

ALLOWED_VANISHED = 0.05
"""Share of the samples whose gradient may be zero or not finite: float32 holds e^−m up to m = 103,
which networks reach on hardly any sample unless their logits are scaled."""

MOSTLY_VANISHED = 0.5
"""Share of the samples whose cross-entropy may be flat in float32 while the margin is not, before
that alone is proof: from there on most of what an attack on it reports is rounding, not the
network. A network that is sure of many samples is below."""

SLOPE_ERROR = 0.5
"""Relative error of the gradient's prediction over a thousandth of the radius beyond which it is
wrong: there a network with a gradient is as good as linear."""

ALLOWED_WRONG_SLOPES = 0.25
"""Share of the samples whose gradient may be wrong by that: kinks next to a sample are legal."""

ROUGH = 0.3
"""Share of turns among the loss's steps along the gradient from which on it is rough: noise turns
at 2/3 of its points, a curve with one top at one of them."""

RANDOM_SPREAD = 1e-4
"""Difference between repeated passes, as a share of the largest logit, from which on a network is
random: adding in another order makes a network differ by less."""


def exceeds(count: int, total: int, share: float) -> bool:
    """Whether `count` of `total` refutes that the true share is at most `share`.

    The exact binomial test: P(X >= count) <= 1 − CONFIDENCE for X of Binomial(total, share), which
    is to say that the lower Clopper–Pearson limit is above `share`.
    """
    return count > 0 and _tail(count, total, share) <= 1 - CONFIDENCE


def fewest_that_exceed(total: int, share: float) -> int:
    """The least count of `total` for which `exceeds` says yes; total + 1 if none does."""
    return next((k for k in range(1, total + 1) if exceeds(k, total, share)), total + 1)


def more_often(one: int, other: int) -> bool:
    """Whether `one` is more than chance where each of both is as likely: the exact sign test.

    Args:
        one: samples at which only the first of two paired outcomes holds.
        other: those at which only the second does.
    """
    return exceeds(one, one + other, 0.5)


def _tail(count: int, total: int, share: float) -> float:
    """P(X >= count), summed from the smallest term for accuracy."""
    if not 0 < share < 1 or not 0 <= count <= total:
        raise FlexureError(
            f"expected a count from 0 to {total} and a share between 0 and 1, got {count} and "
            f"{share}; mend the caller"
        )
    logs = (
        math.lgamma(total + 1)
        - math.lgamma(k + 1)
        - math.lgamma(total - k + 1)
        + k * math.log(share)
        + (total - k) * math.log1p(-share)
        for k in range(count, total + 1)
    )
    return math.fsum(map(math.exp, logs))
