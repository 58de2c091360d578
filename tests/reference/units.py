"""The units, slowly and independently: by mpmath, and eq. 8 as it was published."""

from __future__ import annotations

from typing import NamedTuple

import mpmath
import torch
from torch import Tensor
from torch.nn import functional as F

DIGITS = 40
# log((1+e^y)/2) needs as many digits more as y has zeros after the point.
DIGITS_CENTERED = 120


class Exact(NamedTuple):
    """The value of a unit and its derivatives at one point."""

    value: float
    slope: float
    curvature: float
    by_beta: float
    by_c: float


def exact_ctu(x: float, beta: float, c: float) -> Exact:
    """Eq. 8 of Curvature Tuning without the 1e-6, and its limits at beta = 1."""
    with mpmath.workdps(DIGITS):
        x, beta, c = (mpmath.mpf(v) for v in (x, beta, c))
        w = 1 - beta
        if w == 0:
            step = mpmath.mpf(x > 0)
            by_beta = -(1 - c) * mpmath.log(2) if x == 0 else mpmath.mpf(0)
            return Exact(*map(float, (max(x, 0), step, 0, by_beta, 0)))
        u, v = beta * x / w, x / w
        s, q = _sigmoid(u), _sigmoid(v)
        ds, dq = s * _sigmoid(-u), q * _sigmoid(-v)
        softplus = _softplus(v)
        return Exact(
            float(c * x * s + (1 - c) * softplus * w),
            float(c * (s + u * ds) + (1 - c) * q),
            float((c * beta * ds * (2 + u * (1 - 2 * s)) + (1 - c) * dq) / w),
            float(c * v * v * ds + (1 - c) * (v * q - softplus)),
            float(x * s - softplus * w),
        )


def exact_centered_softplus(x: float, beta: float) -> tuple[float, float, float]:
    """Value, derivative in x, derivative in beta."""
    with mpmath.workdps(DIGITS_CENTERED):
        x, b = mpmath.mpf(x), mpmath.mpf(beta)
        if b == 0:
            return float(x / 2), 0.5, float(x * x / 8)
        if mpmath.isinf(b):
            return float(max(x, 0)), float(x > 0), 0.0
        if abs(b * x) < mpmath.mpf(10) ** -40:
            return float(x / 2 + b * x * x / 8), 0.5, float(x * x / 8)
        value = (_softplus(b * x) - mpmath.log(2)) / b
        return float(value), float(_sigmoid(b * x)), float((x * _sigmoid(b * x) - value) / b)


def published_ctu(x: Tensor, beta: Tensor | float, c: Tensor | float) -> Tensor:
    """Eq. 8 as published, with 1e-6 added to 1 - beta; float64."""
    x = x.double()
    beta, c = torch.as_tensor(beta).double(), torch.as_tensor(c).double()
    eta = beta / (1 - beta + 1e-6)
    gamma = 1 / (1 - beta + 1e-6)
    return c * x * torch.sigmoid(eta * x) + (1 - c) * F.softplus(gamma * x) / gamma


def _sigmoid(u: mpmath.mpf) -> mpmath.mpf:
    if u > 10**6:
        return 1 - _sigmoid(-u)
    return mpmath.mpf(0) if u < -(10**6) else 1 / (1 + mpmath.exp(-u))


def _softplus(v: mpmath.mpf) -> mpmath.mpf:
    return max(v, 0) + (mpmath.log1p(mpmath.exp(-abs(v))) if abs(v) < 10**6 else 0)
