"""Relative gradient change and its bound, one sample, one radius and one direction at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mpmath import mp, mpf
from torch import Tensor


def relative_change(f: Callable[[Tensor], Tensor], x: Tensor, step: Tensor) -> float:
    """Of a scalar function of one sample, by its own gradients."""

    def gradient(at: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(f(at), at)[0]

    before = gradient(x)
    return float((gradient(x + step) - before).norm() / before.norm())


def normalized_curvature(f: Callable[[Tensor], Tensor], x: Tensor) -> float:
    hessian = torch.autograd.functional.hessian(f, x).reshape(x.numel(), x.numel())
    gradient = torch.autograd.functional.jacobian(f, x).flatten()
    return float(torch.linalg.matrix_norm(hessian, 2) / gradient.norm())


def logistic_change(margin: float, moved: float) -> float:
    """Of softplus(−m) with an affine m: |σ(−m') − σ(−m)|/σ(−m), in many digits."""
    with mp.workdps(400):
        before, after = (1 / (1 + mp.exp(mpf(m))) for m in (margin, moved))
        return float(abs(after - before) / before)
