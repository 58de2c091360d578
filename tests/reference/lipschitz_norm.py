"""Lipschitz BatchNorm by its definition: one channel at a time, sums in exact arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence


def lipschitz_normed(
    values: Sequence[float], weight: float, bias: float, gamma: float, eps: float
) -> tuple[list[float], float, float]:
    """All values of one channel -> outputs, mean and biased variance.

    `y = (x - mean)·clip(weight/sqrt(variance + eps), -gamma, gamma) + bias`.
    """
    mean = math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
    return scaled(values, mean, variance, weight, bias, gamma, eps), mean, variance


def scaled(
    values: Sequence[float],
    mean: float,
    variance: float,
    weight: float,
    bias: float,
    gamma: float,
    eps: float,
) -> list[float]:
    """The same with given statistics."""
    slope = min(max(weight / math.sqrt(variance + eps), -gamma), gamma)
    return [(v - mean) * slope + bias for v in values]
