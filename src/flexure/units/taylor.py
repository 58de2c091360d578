"""Taylor coefficients of the units and of the sigmoid at a point: derivatives over factorials.

Elementwise and differentiable to any order in the point and in the dials, as in `plain.py`. What
becomes of them when the unit is applied to a series is said in `flexure.measure`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexure.units import functional, plain
from flexure.units.plain import Dial

__all__ = [
    "accumulate",
    "centered_softplus_coefficients",
    "ctu_coefficients",
    "sigmoid_coefficients",
    "sigmoid_derivatives",
]


def accumulate(total: Tensor, a: Tensor, b: Tensor, value: float = 1.0) -> Tensor:
    """`total + value·a·b`, written into `total` where that is possible.

    New memory is what elementwise passes over large tensors cost most. Autograd keeps a and b and
    not `total`, which must be nobody else's; `torch.vmap` may need a larger result than `total`.
    """
    if torch._C._are_functorch_transforms_active():
        return torch.addcmul(total, a, b, value=value)
    return total.addcmul_(a, b, value=value)


def sigmoid_derivatives(u: Tensor, order: int) -> list[Tensor]:
    """`s⁽ᵏ⁾(u)` of the sigmoid, k = 0..order.

    `s' = s·(1-s)`, differentiated: `s⁽ᵏ⁺¹⁾ = (1-2s)·s⁽ᵏ⁾ - Σ_{0<i<k} binom(k, i)·s⁽ⁱ⁾·s⁽ᵏ⁻ⁱ⁾`.
    `1-s` is the sigmoid of -u, so that nothing cancels in the tails.
    """
    s = [torch.ops.aten.sigmoid(u)]
    if order == 0:
        return s
    rest = torch.ops.aten.sigmoid_(-u)
    s.append(s[0] * rest)
    bend = rest - s[0]
    for k in range(1, order):
        total = bend * s[k]
        for i in range(1, k // 2 + 1):
            twice = 1.0 if 2 * i == k else 2.0
            total = accumulate(total, s[i], s[k - i], -twice * math.comb(k, i))
        s.append(total)
    return s


def sigmoid_coefficients(u: Tensor, order: int) -> list[Tensor]:
    """`s⁽ᵏ⁾(u)/k!` of the sigmoid, k = 0..order."""
    found = sigmoid_derivatives(u, order)
    return [s if k < 2 else s * (1.0 / math.factorial(k)) for k, s in enumerate(found)]


def ctu_coefficients(x: Tensor, beta: Dial, c: Dial, order: int) -> list[Tensor]:
    """`phi⁽ᵏ⁾(x)/k!` of the CTU, k = 0..order; beta nowhere 1 (its derivatives do not exist there).

    For k > 0, with u = eta·x and v = gamma·x, it is `c·eta^(k-1)·(s⁽ᵏ⁻¹⁾(u) + u·s⁽ᵏ⁾(u)/k)/(k-1)!`
    plus `(1-c)·gamma^(k-1)·s⁽ᵏ⁻¹⁾(v)/k!`.
    """
    found = [functional.ctu(x, beta, c)]
    if order == 0:
        return found
    wide, gamma, eta, c = _rates(x, beta, c)
    u = wide * eta
    gated, soft = sigmoid_derivatives(u, order), sigmoid_derivatives(wide * gamma, order - 1)
    for k in range(1, order + 1):
        by_u = torch.addcmul(gated[k - 1], u, gated[k], value=1.0 / k)
        first = c * eta ** (k - 1) / float(math.factorial(k - 1))
        second = (1.0 - c) * gamma ** (k - 1) / float(math.factorial(k))
        found.append(_mixed(by_u, first, soft[k - 1], second).to(x.dtype))
    return found


def _mixed(a: Tensor, first: Dial, b: Tensor, second: Dial) -> Tensor:
    """`a·first + b·second`, written into `a` if both are numbers."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return a * first + b * second
    a = a.mul_(first)
    if torch._C._are_functorch_transforms_active():
        return torch.add(a, b, alpha=second)
    return a.add_(b, alpha=second)


def _rates(x: Tensor, beta: Dial, c: Dial) -> tuple[Tensor, Dial, Dial, Dial]:
    """`x`, gamma, eta and c in the working dtype; 1 - beta is taken before beta is rounded."""
    dtype = plain.working_dtype(x)
    if isinstance(beta, Tensor):
        beta = beta.to(torch.promote_types(beta.dtype, torch.float32))
    width = 1.0 - beta
    gamma, eta = 1.0 / width, beta / width
    gamma, eta, c = (v.to(dtype) if isinstance(v, Tensor) else v for v in (gamma, eta, c))
    return x.to(dtype), gamma, eta, c


def centered_softplus_coefficients(x: Tensor, beta: Dial, order: int) -> list[Tensor]:
    """`s⁽ᵏ⁾(x)/k!` of the centered softplus, k = 0..order; beta nowhere inf.

    `beta^(k-1)·s⁽ᵏ⁻¹⁾(beta·x)/k!` with the derivatives of the sigmoid, for k > 0.
    """
    found = [functional.centered_softplus(x, beta)]
    if order == 0:
        return found
    wide = x.to(plain.working_dtype(x))
    rate = beta.to(wide.dtype) if isinstance(beta, Tensor) else beta
    for k, slope in enumerate(sigmoid_derivatives(rate * wide, order - 1), start=1):
        found.append((slope * (rate ** (k - 1) / float(math.factorial(k)))).to(x.dtype))
    return found
