"""How centered softplus changes with its beta, summed; and how its slope changes. No graphs.

The sums have three forms. In double precision, with a series near 0, they are right for every beta;
they cost several times what the unit does. In the working precision they take a dozen cheap passes;
their error is that of `log 2 - entropy`, which cancels where `beta·|x|` is small. As a difference,
given the unit's values, they take three; that cancels where `beta·|x|` is large, too.
`single_suffices` and `difference_suffices` say when that is harmless.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flexure.units.layout import Layout, Totals, widest
from flexure.units.plain import LN2, SOFTPLUS_THRESHOLD, Dial

__all__ = [
    "Bend",
    "difference",
    "difference_suffices",
    "double_sums",
    "fused_suffices",
    "root_mean_square",
    "single_suffices",
    "single_sums",
    "slope_changes",
]

# |x| counts as at most this much, so that its square stays finite.
LARGEST_SQUARED = 1e18
# The bracket of `double_sums` cancels for smaller t; three terms of its series take over.
BEND_SERIES_UP_TO = 1e-2
# Below, torch's softplus cancels beside typical values; above, many of its powers underflow, which
# is slow.
FUSED_ROOT_MEAN_SQUARES = (1.0, 16.0)
# The working precision suffices where the root mean square of beta·x is at least this: there its
# error was at most 1.5e-6 of the sum of magnitudes, next to the switch, and 2e-7 farther off
# (65,536 normal x, in `tests/units/test_smooth.py`). Below, double precision.
LEAST_ROOT_MEAN_SQUARE = 0.1
# Fewer elements cost little either way, and have few errors to average out.
FEWEST_ELEMENTS = 1 << 13

# As a tensor it is a first operand, and writes where it is told to.
_ONE = torch.ones(())

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_softplus_backward = torch.ops.aten.softplus_backward.grad_input


class Bend(NamedTuple):
    """The constants of centered softplus: numbers, or tensors that broadcast against a block."""

    beta: Dial
    fall: Dial
    """-beta"""
    inverse: Dial
    half: Tensor | None
    """where beta = 0"""
    relu: Tensor | None
    """where beta = inf"""


def root_mean_square(x: Tensor, beta: float | None) -> float:
    """Of beta·x; nan for few elements, other dtypes, and devices that reading a number stalls.

    Args:
        x: dense.
        beta: shared by all of its elements; None where they have several.
    """
    if (
        beta is None
        or x.numel() < FEWEST_ELEMENTS
        or x.dtype != torch.float32
        or x.device.type != "cpu"
    ):
        return math.nan
    return beta * float(torch.linalg.vector_norm(x)) / math.sqrt(x.numel())


def single_suffices(size: float) -> bool:
    """Whether the sums may be taken in the working precision, by the `root_mean_square`.

    Where all of x is finite. Elsewhere than on the CPU double precision is kept.
    """
    return LEAST_ROOT_MEAN_SQUARE <= size < math.inf


def difference_suffices(size: float) -> bool:
    """Whether the sums may be taken as a difference, by the `root_mean_square`."""
    return LEAST_ROOT_MEAN_SQUARE <= size <= FUSED_ROOT_MEAN_SQUARES[1]


def fused_suffices(size: float) -> bool:
    """Whether centered softplus may be taken as softplus less its value at 0, in one torch kernel.

    By the `root_mean_square`. Its error is a rounding of 1/beta, then below those of typical
    values.
    """
    low, high = FUSED_ROOT_MEAN_SQUARES
    return low <= size <= high


def difference(
    g: Tensor, x: Tensor, y: Tensor, beta: float, layout: Layout
) -> tuple[Tensor, Tensor]:
    """`d = g·sigmoid(beta·x)`, and the sum of `(d·x - g·y)/beta`, in one sweep over blocks.

    Args:
        g: shape of x.
        x: dense, in the working precision.
        y: centered softplus of x, with its strides.
        beta: shared by all elements.
        layout: of x, flat.

    Returns:
        Of the shape of x, and `()` in float64.
    """
    if g.stride() != x.stride():
        g = torch.empty_like(x).copy_(g)
    by_x, parts = torch.empty_like(x), []
    blocks = [layout.blocks(t, 2) for t in (g, x, y, by_x)]
    room = torch.empty_like(blocks[0][0])
    for gb, xb, yb, db in zip(*blocks, strict=True):
        _softplus_backward(gb, xb, beta, SOFTPLUS_THRESHOLD, grad_input=db)
        # Not two dot products: they gather rounding errors, and cancel, 1e-4 was measured.
        room = room if len(room) == len(xb) else room[: len(xb)]
        change = torch.mul(db, xb, out=room).addcmul_(gb, yb, value=-1.0)
        parts.append(torch.sum(change))
    return by_x, widest(torch.stack(parts)).sum() / beta


def single_sums(
    x: Tensor, g: Tensor, room: tuple[Tensor, ...], k: Bend, totals: Totals, _: object
) -> None:
    """`g·B(t)`, `t = beta·|x|`, `B = log(2·(1 - s)) - t·s`, `s = sigmoid(-t)`; beta² times."""
    t, s, bent = room[:3]
    torch.abs(x, out=t).mul_(k.fall)
    torch.sigmoid(t, out=s)
    torch.sub(_ONE, s, alpha=2.0, out=bent).log1p_().addcmul_(t, s)
    # Not a dot product, which gathers one sign's rounding errors: 2e-5 of a block was measured.
    totals.put(0, torch.sum(torch.mul(g, bent, out=t)))


def double_sums(
    x: Tensor, g: Tensor, room: tuple[Tensor, ...], k: Bend, totals: Totals, _: object
) -> None:
    """`g·x²·E(t)`, `t = beta·|x|`, `E = (log(2/(1+e^-t)) - t·sigmoid(-t))/t²`, in float64."""
    x, g = widest(x), widest(g)
    beta = widest(k.beta) if isinstance(k.beta, Tensor) else k.beta
    a = torch.abs(x).clamp_max_(LARGEST_SQUARED)
    t = (a * beta).clamp_max_(LARGEST_SQUARED)
    bent = LN2 - torch.log1p(torch.exp(-t)) - t * torch.sigmoid(-t)
    square = t * t
    series = (1.0 - square / 8.0 + square * square / 72.0) / 8.0
    e = torch.where(t < BEND_SERIES_UP_TO, series, bent / square)
    if k.relu is not None:
        e = torch.where(k.relu, 0.0, e)
    totals.add(0, g, a * a * e, torch.empty_like(a))


def slope_changes(v: Tensor, g: Tensor, x: Tensor, beta: Tensor | float) -> tuple[Tensor, Tensor]:
    """`v·g` times the derivatives of `sigmoid(beta·x)` in x and, summed, in one shared beta.

    With `h = v·g·s·(1-s)`, `s = sigmoid(beta·x)`: `beta·h` and the sum of `h·x`, which is exact
    where beta is 0.

    Args:
        v: shape of x.
        g: likewise.
        x: any shape, in the working precision.
        beta: a number, or a tensor of one element.

    Returns:
        Of the shape of x, and `()` in float64 (in the working precision where a device has none).
    """
    # At beta = inf the slope changes nowhere but at 0, where it has no derivative.
    near, factor, kept = _finite(beta)
    s = torch.mul(x, near).sigmoid_()
    h = torch.mul(v, g)
    _sigmoid_backward(h, s, grad_input=h)
    by_beta = widest(torch.sum(torch.mul(h, x, out=s)))
    return h.mul_(factor), by_beta * kept


def _finite(beta: Dial) -> tuple[Dial, Dial, Dial]:
    """Beta with 1 in the place of inf, and with 0; 0 at inf, else 1. Read where nothing stalls."""
    if isinstance(beta, Tensor) and beta.device.type != "cpu":
        beta = beta.detach().reshape(())
        endless = torch.isinf(beta)
        near, factor = torch.where(endless, 1.0, beta), torch.where(endless, 0.0, beta)
        return near, factor, 1.0 - endless.to(beta.dtype)
    number = float(beta)
    return (1.0, 0.0, 0.0) if math.isinf(number) else (number, number, 1.0)
