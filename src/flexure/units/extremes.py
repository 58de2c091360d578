"""Extreme slopes of CTU, and of what is built from two of them, where there is no closed form.

Each search has a reason why it cannot miss: one crossing of a monotone function, or a bound of the
next derivative on every interval that is left out. `bounds.py` asks for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flexure.units import plain

__all__ = ["capped_extremes", "ctu_slope_excess"]

EPS = torch.finfo(torch.float64).eps
# Where S(u) = s + u·s·(1-s), s = sigmoid(u), is largest, rounded down; it decreases from there.
SILU_PEAK = 2.3993572
# Beyond it u·exp(-u) is 0 in float64.
FAR = 760.0
# Beyond it |S(u) - 1| and 1 - sigmoid(u) are below 1e-17.
SETTLED = 45.0
# Largest |S''|, |S'''|, |sigmoid''| and |sigmoid'''|, rounded up.
SILU_THIRD, SILU_FOURTH = 0.3089, 0.5001
SIGMOID_SECOND, SIGMOID_THIRD = 0.09623, 0.1251
# The largest S minus the smallest, rounded up.
SILU_CHANGE = 1.1997
# beta times the cap, and beta, below which `capped_extremes` does not search the gated part.
FAINT, NARROWEST = 1e-7, 1e-8


def ctu_slope_excess(beta: Tensor, c: Tensor) -> Tensor:
    """The largest slope of CTU minus 1, for every (beta, c); minus the smallest slope.

    With `u = eta·x > 0` the slope is `1 + h(u)`, `h = c·(S(u) - 1) - (1-c)·sigmoid(-u/beta)`. Both
    terms rise up to u0, where S is largest. From there on h' = 0 where `r(u) = (1-c)/c`, with
    `r = beta·(u·tanh(u/2) - 2)·cosh²(u/(2·beta))/cosh²(u/2)`, a product of rising factors: the
    maximum is alone, and bisection finds it. beta = 0 is affine plus softplus: `-c/2`.

    Args:
        beta: in [0, 1], float64.
        c: in [0, 1], float64, of the same shape.

    Returns:
        Of that shape, rounded up.
    """
    width = torch.where(beta > 0, beta, 1.0)
    wanted = torch.log1p(-c) - c.log()
    low, high = torch.full_like(beta, SILU_PEAK), torch.full_like(beta, FAR)
    for _ in range(80):
        u = 0.5 * (low + high)
        rising = 2.0 * (_log_cosh(0.5 * u / width) - _log_cosh(0.5 * u)) + width.log()
        rising = rising + (u * torch.tanh(0.5 * u) - 2.0).clamp_min(1e-300).log()
        past = rising > wanted
        low, high = torch.where(past, low, u), torch.where(past, u, high)
    u = low
    gated = torch.sigmoid(-u) * (u * torch.sigmoid(u) - 1.0)
    excess = c * gated - (1.0 - c) * torch.sigmoid(-u / width)
    excess = (excess * (1.0 + 8 * EPS) + 4 * EPS * c).clamp_min(0.0)
    excess = torch.where((beta == 1) | (c == 0), 0.0, excess)
    return torch.where(beta == 0, -0.5 * c, excess)


def capped_extremes(beta: float, c: float, cap: float) -> tuple[float, float, float]:
    """Smallest slope, largest slope and largest curvature of `CTU(x) - CTU(x - cap)`, beta < 1.

    The slope is even about cap/2 and constant away from 0 and cap, so that the search covers
    `v = (x - cap)/(1-beta)` from the middle to where both units have settled. `_largest` says why
    the results are bounds; they are within 1e-12 of the truth (times 1/(1-beta) for the curvature)
    for beta >= 1e-6. Below 1e-8, what a unit's gated part can add at most takes the place of the
    search, which would be 1/beta wide.
    """
    width = 1.0 - beta
    far = cap / width
    # |S'| <= 1/2 bounds what the gated part changes; the other part rises by a tanh at most.
    gated = c * min(0.5 * beta * far, SILU_CHANGE)
    rise = (1.0 - c) * math.tanh(far / 4) + 1e-15
    if beta > 0.0 and (c == 0.0 or beta * far < FAINT):
        lowest, highest, steepest = capped_extremes(0.0, c, far)
        return lowest - gated, highest + gated, (steepest + c * beta) / width
    if 0.0 < beta < NARROWEST:
        return -gated, gated + rise, (c * beta + 0.25 * (1.0 - c)) / width
    reach = SETTLED / beta if beta > 0 and c > 0 else SETTLED
    ends = (-min(0.5 * far, reach), reach)

    def slope(v: Tensor) -> Tensor:
        # Written so that nothing cancels at the second kink, however narrow it is.
        return plain.ctu_slope(v * width + cap, beta, c) - plain.ctu_slope(v * width, beta, c)

    def bend(v: Tensor) -> Tensor:
        near, other = (plain.ctu_curvature(x, beta, c) for x in (v * width, v * width + cap))
        return width * (other - near)

    def third(away: Tensor, step: float) -> Tensor:
        gated = _times_square(_decaying(SILU_THIRD, beta * away, 3.0), beta * step)
        return 2.0 * (c * gated + (1.0 - c) * _times_square(_decaying(SIGMOID_SECOND, away), step))

    def fourth(away: Tensor, step: float) -> Tensor:
        gated = beta * _times_square(_decaying(SILU_FOURTH, beta * away, 4.0), beta * step)
        return 2.0 * (c * gated + (1.0 - c) * _times_square(_decaying(SIGMOID_THIRD, away), step))

    highest = min(_largest(slope, ends, third), gated + rise)
    lowest = max(-_largest(lambda v: -slope(v), ends, third), -gated)
    steepest = _largest(lambda v: bend(v).abs(), ends, fourth)
    # The slope tends to 0 on both sides.
    return min(lowest, 0.0), highest, steepest / width


def _decaying(limit: float, u: Tensor, order: float | None = None) -> Tensor:
    """A bound, falling in u >= 0, of what is at most `limit` anywhere.

    The second to fourth derivatives of a sigmoid are at most exp(-u) in size, and so the m-th of
    u·sigmoid(u), `u·sigmoid^(m) + m·sigmoid^(m-1)`, is at most (u + m)·exp(-u).
    """
    tail = torch.exp(-u)
    return (tail if order is None else (u + order) * tail).clamp_max(limit)


def _times_square(values: Tensor, step: float) -> Tensor:
    """`values·step²`, for a step whose square may overflow where the values vanish."""
    return (values.sqrt() * step).square()


def _largest(
    f: Callable[[Tensor], Tensor],
    ends: tuple[float, float],
    allowance: Callable[[Tensor, float], Tensor],
) -> float:
    """An upper bound of f, or of |f|, between two ends.

    Between two points at distance d a function is at most `max |f''|·d²/8` above the larger of its
    values there. Intervals whose bound does not reach the largest value seen are left out; the
    others are cut in four, until the allowance is at rounding's level.

    Args:
        f: what is searched; `|f''|` is that of the function inside an absolute value.
        ends: of the search.
        allowance: a bound of `|f''|·d²` at a distance from 0, and beyond it; d comes with it.
    """
    pieces, most = 4, 2**18
    step = (ends[1] - ends[0]) / 1024
    left = ends[0] + step * torch.arange(1024, dtype=torch.float64)
    best = -float("inf")
    while True:
        values = torch.maximum(f(left), f(left + step))
        best = max(best, float(values.max()))
        away = torch.maximum(left, -left - step).clamp_min(0.0)
        highest = values + allowance(away, step) / 8
        left = left[highest >= best]
        if float(highest.max()) <= best + 1e-13 or pieces * len(left) > most:
            return float(highest.max()) + 1e-15
        step /= pieces
        left = (left[:, None] + step * torch.arange(pieces, dtype=torch.float64)).flatten()


def _log_cosh(y: Tensor) -> Tensor:
    return y + torch.log1p(torch.exp(-2.0 * y))
