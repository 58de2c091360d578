"""Gradient norm, Hessian spectral norm and normalised curvature of each sample.

The equations and the choice of settings; fields, products and Lanczos are their own files'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from flexure.batched import dots, lanczos, norms, scaled
from flexure.calling import take
from flexure.contracts import FlexureError
from flexure.measure.fields import Field, measuring, point_of, scalar_field
from flexure.measure.products import PRODUCTS
from flexure.per_sample import PerSample

__all__ = ["Curvature", "curvature"]

_RANDOM_SHARE = 0.1
"""Norm of the random part of the start vector, that of the gradient's direction being 1."""


@dataclass(frozen=True)
class Curvature(PerSample):
    """Curvature of a scalar field (a classifier's cross-entropy, or another) at B inputs.

    Attributes:
        gradient_norm: (B,) g = ‖∇f‖₂, in units of f per unit of input.
        hessian_norm: (B,) ‖∇²f‖₂, spectral, estimated from below.
        normalized: (B,) C = ‖∇²f‖₂ / ‖∇f‖₂, in 1 / unit of input; exact where g or ‖∇²f‖
            underflows; nan where the gradient is exactly zero.
        zero_gradient: (B,) bool, where that is so.
        residual: (B,) ‖Hu − θu‖ / |θ| for the vector u found, ‖u‖ = 1, θ = uᵀHu.
        products: (B,) int64, Hessian-vector products taken.
        value: (B,) f: of a classifier the cross-entropy, softplus(−m).
        probability: (B,) that a classifier gives to the label, σ(m); nan for other fields.
    """

    gradient_norm: Tensor
    hessian_norm: Tensor
    normalized: Tensor
    zero_gradient: Tensor
    residual: Tensor
    products: Tensor
    value: Tensor
    probability: Tensor


def curvature(
    model: nn.Module | Callable[..., Any],
    x: Any,
    y: Tensor | None = None,
    *,
    field: Callable[[Tensor], Tensor] | None = None,
    tol: float = 1e-2,
    max_products: int = 20,
    chunk: int | None = None,
    generator: Generator | None = None,
    products: str = "double-backward",
) -> Curvature:
    """Curvature of each sample."""
    if products not in PRODUCTS or (chunk is not None and chunk < 1):
        raise FlexureError(
            f"expected products to be one of {', '.join(PRODUCTS)} and chunk to be at least 1, got "
            f"{products!r} and {chunk}; choose one, or leave them out"
        )
    with measuring(model):
        point = point_of(x)
        batch, size = len(point), chunk or len(point)
        noise = _noise(point, generator)
        parts = []
        for first in range(0, batch, size):
            rows = slice(first, first + size)
            of = scalar_field(
                model, take(x, rows, batch), None if y is None else y[rows], field=field
            )
            parts.append(_measured(of, noise[rows], tol, max_products, products))
    return Curvature.joined(parts)


def _noise(point: Tensor, generator: Generator | None) -> Tensor:
    """Uniformly random unit vectors for the whole batch, so that chunks do not change them."""
    drawn_by = torch.Generator().manual_seed(0) if generator is None else generator
    drawn = torch.randn(point.shape, generator=drawn_by, dtype=torch.float32)
    return scaled(1 / norms(drawn), drawn)


def _measured(field: Field, noise: Tensor, tol: float, max_products: int, how: str) -> Curvature:
    """The curvature of one chunk.

    With f = softplus(−m): ∇f = −σ(−m)∇m and ∇²f = σ(−m)·(σ(m)∇m∇mᵀ − ∇²m); Lanczos sees the
    operator in brackets, which does not underflow.
    """
    hessian = PRODUCTS[how](field)
    values, gradient = hessian.values, hessian.gradient
    length = norms(gradient)
    sign, outer, factor = _factors(field, values)

    def product(v: Tensor, rows: Tensor) -> Tensor:
        along = dots(gradient[rows], v) * outer[rows]
        return scaled(along, gradient[rows]) + sign * hessian(v, rows)

    direction = scaled(1 / torch.where(length > 0, length, 1.0), gradient)
    start = direction + _RANDOM_SHARE * noise.to(gradient)
    found = lanczos(product, start, tol=tol, max_products=max_products, random_share=_RANDOM_SHARE)
    theta = found.eigenvalue.abs()
    nan = torch.full_like(values, torch.nan)
    return Curvature(
        converged=found.converged & length.isfinite(),
        gradient_norm=factor * length,
        hessian_norm=factor * found.norm,
        normalized=torch.where(length > 0, found.norm / length, nan),
        zero_gradient=length == 0,
        residual=torch.where(theta > 0, found.residual / theta, found.residual),
        products=found.products,
        value=F.softplus(-values) if field.is_margin else values,
        probability=values.sigmoid() if field.is_margin else nan,
    )


def _factors(field: Field, values: Tensor) -> tuple[int, Tensor, Tensor]:
    """Sign of ∇², weight of ∇∇ᵀ, and what takes gradient and Hessian to those of the loss."""
    if field.is_margin:
        return -1, values.sigmoid(), (-values).sigmoid()
    return 1, torch.zeros_like(values), torch.ones_like(values)
