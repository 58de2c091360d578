"""Taylor coefficients of the units and of the sigmoid at a point: derivatives over factorials.

Elementwise and differentiable to any order in the point and in the dials, as in `plain.py`. What
becomes of them when the unit is applied to a series is said in `flexure.measure`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexure.units import functional, plain
from flexure.units.plain import Dial

__all__ = ["centered_softplus_coefficients", "ctu_coefficients", "sigmoid_coefficients"]


def sigmoid_coefficients(u: Tensor, order: int) -> list[Tensor]:
    """`s⁽ᵏ⁾(u)/k!` of the sigmoid, k = 0..order.

    From `s' = s·(1-s)`: `(k+1)·s_{k+1} = -tanh(u/2)·s_k - Σ_{0<i<k} s_i·s_{k-i}`; nothing cancels
    in the tails.
    """
    s = [torch.ops.aten.sigmoid(u)]
    if order == 0:
        return s
    s.append(s[0] * torch.ops.aten.sigmoid(-u))
    bend = torch.ops.aten.tanh(-0.5 * u)
    for k in range(1, order):
        total = bend * s[k]
        for i in range(1, k // 2 + 1):
            total = torch.addcmul(total, s[i], s[k - i], value=-1.0 if 2 * i == k else -2.0)
        s.append(total / (k + 1))
    return s


def ctu_coefficients(x: Tensor, beta: Dial, c: Dial, order: int) -> list[Tensor]:
    """`phi⁽ᵏ⁾(x)/k!` of the CTU, k = 0..order; beta nowhere 1 (its derivatives do not exist there).

    With `s_k` of the sigmoid: `c·(x·eta^k·s_k(eta·x) + eta^(k-1)·s_{k-1}(eta·x))` plus
    `(1-c)·gamma^(k-1)·s_{k-1}(gamma·x)/k`.
    """
    found = [functional.ctu(x, beta, c)]
    t = plain._terms(x, beta, c)
    if order == 0 or t is None:
        return found
    step = (t.x > 0).to(t.x.dtype)
    gated, soft = sigmoid_coefficients(t.u, order), sigmoid_coefficients(t.v, order - 1)
    for k in range(1, order + 1):
        far = step if k == 1 else torch.zeros_like(step)
        by_u = (t.u * gated[k] + gated[k - 1]) * t.eta ** (k - 1)
        by_v = soft[k - 1] * (t.gamma ** (k - 1) / k)
        mixed = plain._mix(t.c, torch.where(t.far_u, far, by_u), torch.where(t.far_v, far, by_v))
        found.append(mixed.to(x.dtype))
    return found


def centered_softplus_coefficients(x: Tensor, beta: Dial, order: int) -> list[Tensor]:
    """`s⁽ᵏ⁾(x)/k!` of the centered softplus, k = 0..order; beta nowhere inf.

    `beta^(k-1)·s_{k-1}(beta·x)/k` with `s_k` of the sigmoid, for k > 0.
    """
    found = [functional.centered_softplus(x, beta)]
    if order == 0:
        return found
    t = plain._centered_terms(x, beta)
    step = (t.x > 0).to(t.x.dtype)
    slopes = sigmoid_coefficients(t.b * t.near_x, order - 1)
    for k, slope in enumerate(slopes, start=1):
        far = step if k == 1 else torch.zeros_like(step)
        found.append(torch.where(t.linear, far, slope * (t.b ** (k - 1) / k)).to(x.dtype))
    return found
