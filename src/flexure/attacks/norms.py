"""The norms that attacks are bounded in: sizes, steepest directions, projections, random points.

A new norm is a row of `NORMS`. Nothing here calls a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from flexure.batched import norms, scaled
from flexure.contracts import FlexureError

__all__ = ["NORMS", "Norm", "check_eps", "norm_named", "precise", "project"]

_ROUNDS = 100
"""Rounds of the l2 projection at most. Each adds coordinates to those that have met a bound; the
number of coordinates bounds the rounds, and a handful is usual."""

_LARGEST = math.sqrt(torch.finfo(torch.float32).max)
"""Of a radius, so that its square is finite."""


@dataclass(frozen=True)
class Norm:
    """What an attack needs to know of a norm. Tensors are (B, *shape), one row a sample.

    Attributes:
        size: the norm of each sample, (B,) float64.
        direction: the direction of norm 1 in which a linear function of this gradient rises
            fastest; zero where the gradient is.
        shrink: `(change, room below, room above, eps)`: the nearest change within the room whose
            norm is at most eps, up to rounding. The room below is at most 0, that above at least 0.
        point: uniformly random points of the unit ball, from normal (B, *shape) and uniform (B,)
            numbers.
    """

    size: Callable[[Tensor], Tensor]
    direction: Callable[[Tensor], Tensor]
    shrink: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    point: Callable[[Tensor, Tensor], Tensor]


def norm_named(name: str) -> Norm:
    """A row of `NORMS`.

    Raises:
        FlexureError: there is no such row.
    """
    if not isinstance(name, str) or name not in NORMS:
        raise FlexureError(f"expected norm to be one of {', '.join(NORMS)}, got {name!r}")
    return NORMS[name]


def check_eps(eps: Any) -> float:
    """The radius, once it is one.

    Raises:
        FlexureError: it is no number, negative, or its square is beyond float32.
    """
    number = isinstance(eps, Real) and not isinstance(eps, bool)
    if not number or not 0 <= eps <= _LARGEST:
        raise FlexureError(
            f"expected eps to be a finite radius, from 0 to {_LARGEST:.2g}, in units of the input, "
            f"got {eps!r}; give a number such as 8 / 255"
        )
    return float(eps)


def precise(x: Tensor) -> Tensor:
    """The inputs in float32 where they are half precision: steps would vanish in rounding there."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def project(
    changed: Tensor, x: Tensor, *, norm: str, eps: float, limits: tuple[float, float]
) -> Tensor:
    """The nearest inputs within eps of `x` and within the limits: both hold, in spite of rounding.

    Args:
        changed: (B, *shape), finite.
        x: (B, *shape), within the limits.
        norm: a row of `NORMS`.
        eps: the radius of the ball.
        limits: the lowest and the highest value, which the dtype of x can hold.

    Returns:
        (B, *shape) of the dtype of x.
    """
    low, high = limits
    origin = precise(x)
    change = norm_named(norm).shrink(changed.to(origin) - origin, low - origin, high - origin, eps)
    moved = (origin + change).clamp(low, high).to(x.dtype)
    # Adding rounds to a number near x, which may be farther from x than the change by more than a
    # small radius forgives; the next number towards x is not.
    farther = (moved.to(origin) - origin).abs() > change.abs()
    return torch.where(farther, torch.nextafter(moved, x), moved)


def unusable(gradient: Tensor) -> Tensor:
    """(B,) whether a sample's gradient gives no direction: all zero, or not all finite."""
    flat = gradient.flatten(1)
    return ~flat.isfinite().all(1) | (flat == 0).all(1)


def _length(a: Tensor) -> Tensor:
    return norms(a.double())


def _unit(gradient: Tensor) -> Tensor:
    largest = gradient.flatten(1).abs().amax(1)
    # Divided twice: the reciprocal of a denormal number overflows.
    relative = _divided(gradient, largest)
    return _divided(relative, norms(relative))


def _divided(a: Tensor, by: Tensor) -> Tensor:
    return a / torch.where(by > 0, by, 1.0).view(-1, *[1] * (a.dim() - 1))


def _shrink_l2(change: Tensor, below: Tensor, above: Tensor, eps: float) -> Tensor:
    """clamp(t · change) with the largest t in [0, 1] that fits the ball: the exact projection.

    By the conditions of Karush, Kuhn and Tucker the nearest point of ball and box has this form.
    With the coordinates known that meet a bound, t solves Σ room² + t² Σ rest² = eps²; from
    t = eps/‖change‖, which meets the fewest, t rises until no further coordinate meets a bound.
    """
    flat, room = change.double(), torch.where(change > 0, above, below).double()
    clipped = flat.clamp(below.double(), above.double())
    outside = _length(clipped) > eps
    t = torch.ones_like(outside, dtype=torch.float64)
    t[outside] = _largest_factor(flat[outside].flatten(1), room[outside].flatten(1), eps)
    shrunk = torch.minimum(torch.maximum(scaled(t, flat), below.double()), above.double())
    return shrunk.to(change.dtype)


def _largest_factor(change: Tensor, room: Tensor, eps: float) -> Tensor:
    length, room = change.abs(), room.abs()
    size = norms(length)
    t = eps / torch.where(size > 0, size, 1.0)  # no change leaves the box where x is outside of it
    for _ in range(_ROUNDS):
        free = t[:, None] * length < room
        met = torch.where(free, 0.0, room).square().sum(1)
        rest = torch.where(free, length, 0.0).square().sum(1)
        after = ((eps * eps - met).clamp(min=0) / torch.where(rest > 0, rest, 1.0)).sqrt()
        after = torch.maximum(t, torch.where(rest > 0, after, t))
        if bool((after <= t).all()):
            break
        t = after
    return t


def _in_ball(normal: Tensor, uniform: Tensor) -> Tensor:
    """A random direction, and the root of the share of the volume that is nearer to the centre."""
    return scaled(uniform.pow(1 / max(normal[0].numel(), 1)), _unit(normal))


def _shrink_linf(change: Tensor, below: Tensor, above: Tensor, eps: float) -> Tensor:
    return torch.minimum(torch.maximum(change, below.clamp(min=-eps)), above.clamp(max=eps))


def _in_cube(normal: Tensor, uniform: Tensor) -> Tensor:
    return torch.erf(normal / 2**0.5)


NORMS: Mapping[str, Norm] = {
    "l2": Norm(_length, _unit, _shrink_l2, _in_ball),
    "linf": Norm(lambda a: a.double().flatten(1).abs().amax(1), torch.sign, _shrink_linf, _in_cube),
}
"""Name -> what attacks need of it."""
