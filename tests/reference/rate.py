"""The curvature rate, slowly and independently: nested forward-mode, loops, differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import torch
from torch import Tensor


def nested_jet(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, *, order: int) -> Tensor:
    """(order + 1, B): the derivatives of t -> f(x + t v) at 0, one forward-mode in another."""

    def differentiated(g: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: torch.func.jvp(g, (t,), (torch.ones_like(t),))[1]

    rows, g = [], lambda t: f(x + t * v)
    for _ in range(order + 1):
        rows.append(g(torch.zeros((), dtype=x.dtype)))
        g = differentiated(g)
    return torch.stack(rows)


def slope(orders: tuple[int, ...], log_norms: list[float]) -> float:
    """Of the least-squares line."""
    return float(np.polyfit(orders, log_norms, 1)[0])


def calibration(order: int, dimension: int) -> float:
    """kappa_n by the moments of the first coordinate of a uniform unit vector: Gamma functions."""
    with mpmath.workdps(30):
        d = mpmath.mpf(dimension)
        moment = (mpmath.gamma(order + 0.5) * mpmath.gamma(d / 2)) / (
            mpmath.gamma(0.5) * mpmath.gamma(order + d / 2)
        )
        return float(1 / mpmath.sqrt(moment))


def central_difference(
    f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    """(B,) first and second derivative along v."""
    up, here, down = f(x + step * v), f(x), f(x - step * v)
    return (up - down) / (2 * step), (up - 2 * here + down) / step**2


def log_norm_of_sines(
    order: int, frequencies: tuple[float, ...], amplitudes: tuple[float, ...]
) -> float:
    """log of the root mean square of D^n of a sum of sines over a full period: Parseval."""
    pairs = zip(frequencies, amplitudes, strict=True)
    return math.log(sum((a * w**order) ** 2 / 2 for w, a in pairs)) / 2
