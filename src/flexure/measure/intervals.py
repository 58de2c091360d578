"""Intervals of means and shares over samples; which of them a summary uses is its business."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["t_interval", "wilson_interval"]


def t_interval(
    mean: Tensor, standard_error: Tensor, count: Tensor, *, level: float
) -> tuple[Tensor, Tensor]:
    """mean ± t · standard error, t with count − 1 degrees of freedom (Student 1908).

    Args:
        mean: of any shape.
        standard_error: of the mean, in its unit.
        count: values that the mean rests on; fewer than two have an interval of nan.
        level: the share of intervals that shall contain the expectation.

    Returns:
        The lower and the upper ends, float64.
    """
    from scipy.special import stdtrit

    freedom = torch.where(count > 1, count.double() - 1, torch.nan)
    half = torch.as_tensor(stdtrit(freedom.numpy(), (1 + level) / 2)) * standard_error
    return mean - half, mean + half


def wilson_interval(hits: Tensor, count: Tensor, *, level: float) -> tuple[Tensor, Tensor]:
    """Interval of a share of independent samples; it has a width at 0 and 1 too.

    (p + z²/2n ± z·sqrt(p(1−p)/n + z²/4n²)) / (1 + z²/n), p = hits/n (Wilson, "Probable inference,
    the law of succession, and statistical inference", 1927).

    Args:
        hits: samples that it holds for, of any shape.
        count: n, samples of all; none have an interval of nan.
        level: the share of intervals that shall contain the probability.

    Returns:
        The lower and the upper ends, float64.
    """
    n = torch.where(count > 0, count.double(), torch.nan)
    share = hits.double() / n
    z2 = float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64))) ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = (z2 * (share * (1 - share) / n + z2 / (4 * n**2))).sqrt() / (1 + z2 / n)
    # Rounding must not put the ends of 0 and of n hits on the wrong side of the share.
    return torch.minimum(share, centre - half).clamp(min=0), torch.maximum(
        share, centre + half
    ).clamp(max=1)
