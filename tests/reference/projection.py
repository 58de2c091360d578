"""Projections on a ball and a box together, slowly: Dykstra's alternating projections."""

from __future__ import annotations

import torch
from torch import Tensor


def on_ball(point: Tensor, centre: Tensor, norm: str, eps: float) -> Tensor:
    """The nearest point of one ball; vectors."""
    change = point - centre
    if norm == "linf":
        return centre + change.clamp(-eps, eps)
    length = change.norm()
    return point if length <= eps else centre + change * (eps / length)


def on_both(
    point: Tensor, centre: Tensor, norm: str, eps: float, limits: tuple[float, float]
) -> Tensor:
    """The nearest point of the intersection, float64 vectors."""
    now, ball, box = point.clone(), torch.zeros_like(point), torch.zeros_like(point)
    for _ in range(20_000):
        before = now
        on = on_ball(now + ball, centre, norm, eps)
        ball = now + ball - on
        now = (on + box).clamp(*limits)
        box = on + box - now
        if (now - on).norm() < 1e-13 and (now - before).norm() < 1e-14:
            break
    return now
