"""Curvature the slow way: dense Hessians of the plain cross-entropy, and margins in many digits."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import torch
from torch import Tensor

DIGITS = 60


def dense(field: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient norms and spectral norms of the dense Hessians, one sample at a time, in float64.

    `field` maps one sample, without the batch dimension, to a scalar.
    """
    gradients, hessians = [], []
    for sample in x.double():
        size = sample.numel()
        gradient = torch.func.grad(field)(sample)
        hessian = torch.autograd.functional.hessian(field, sample).reshape(size, size)
        gradients.append(gradient.norm())
        hessians.append(torch.linalg.matrix_norm((hessian + hessian.T) / 2, 2))
    return torch.stack(gradients), torch.stack(hessians)


def logistic_curvature(weight: Tensor, bias: Tensor, x: Tensor, y: int) -> tuple[float, ...]:
    """g, ‖H‖ and C of the cross-entropy of logits W x + b at one x, in 60 digits.

    g = ‖Wᵀ(p − e_y)‖, H = Wᵀ(diag p − ppᵀ)W.
    """
    with mpmath.workdps(DIGITS):
        w = mpmath.matrix(weight.double().tolist())
        z = w * mpmath.matrix(x.double().tolist()) + mpmath.matrix(bias.double().tolist())
        top = max(z)
        e = [mpmath.exp(value - top) for value in z]
        p = mpmath.matrix([value / mpmath.fsum(e) for value in e])
        wrong = p.copy()
        wrong[y] = -mpmath.fsum(p[j] for j in range(len(p)) if j != y)
        g = mpmath.norm(w.T * wrong)
        # diag p − ppᵀ = Σ_{i<j} p_i p_j (e_i − e_j)(e_i − e_j)ᵀ, without cancellation.
        core = mpmath.zeros(len(p))
        for i in range(len(p)):
            for j in range(len(p)):
                core[i, j] = -p[i] * p[j] if i != j else mpmath.mpf(0)
            core[i, i] = p[i] * mpmath.fsum(p[j] for j in range(len(p)) if j != i)
        h = max(abs(value) for value in mpmath.eigsy(w.T * core * w, eigvals_only=True))
        return float(g), float(h), float(h / g)


def margin_digits(logits: Tensor, y: int) -> float:
    """log(p_y / (1 − p_y)) in 60 digits."""
    with mpmath.workdps(DIGITS):
        z = [mpmath.mpf(float(value)) for value in logits]
        others = [mpmath.exp(value - z[y]) for j, value in enumerate(z) if j != y]
        return float(-mpmath.log(mpmath.fsum(others)))
