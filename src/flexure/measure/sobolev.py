"""The Sobolev semi-norm of a function over a sample: root mean squares of derivative tensors.

[CT] appendix C.1 says of steering that it changes this. Growth with the order is in `rate`.

[CT] is Curvature Tuning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Generator, Tensor, nn

from flexure.measure.checks import check_field
from flexure.measure.fields import measuring, point_of
from flexure.measure.probability import (
    ScaledField,
    at_rows,
    check_positive,
    pieces,
    probability_field,
    undisturbed,
)
from flexure.per_sample import PerSample

__all__ = ["SobolevSeminorm", "sobolev_seminorm"]


@dataclass(frozen=True)
class SobolevSeminorm(PerSample):
    """Squared Frobenius norms of the derivatives at each of B samples.

    Attributes:
        converged: (B,) bool, whether all of them are finite. The others do not count in what is
            pooled.
        squares: (B, order) float64; column n - 1 holds ||D^n f(x)||_F^2, or an unbiased estimate.
        exact: whether the columns above the first are exact; the first always is.
        probes: how many estimates are averaged where they are not.
        dimension: d, the number of elements of one input.
    """

    squares: Tensor
    exact: bool
    probes: int
    dimension: int

    @property
    def norms(self) -> Tensor:
        """(order,) float64: |f|_{H^n} = sqrt(mean over samples of ||D^n f(x)||_F^2)."""
        return self.squares[self.converged].mean(0).sqrt()

    @property
    def errors(self) -> Tensor:
        """(order,) standard errors of `norms` over samples (delta method), probes included.

        nan with fewer than two samples, and for a norm that is zero.
        """
        used = self.squares[self.converged]
        if len(used) < 2:
            return torch.full_like(self.norms, torch.nan)
        return used.std(0) / math.sqrt(len(used)) / (2 * self.norms)

    @property
    def seminorm(self) -> float:
        """The root of the sum of all orders' squares: |f|_{W^{order,2}} of [CT] eq. 14."""
        return float(self.norms.square().sum().sqrt())


def sobolev_seminorm(
    f: Callable[..., Any],
    x: Any,
    *,
    order: int = 2,
    probes: int = 16,
    generator: Generator | None = None,
    chunk: int | None = None,
    check: bool = True,
) -> SobolevSeminorm:
    """Norms of the derivatives of `f` of the orders 1 to `order`, over a sample, [CT] app. C.1.

    The norm of a derivative is that of Frobenius: all d^n entries count, mixed derivatives once for
    each order of their variables, as in ||grad^2 f|| of [CT] eq. 14 (the sum over multi-indices
    printed before it counts them once). Derivatives are those where they exist: for a ReLU network
    the kinks, where its second derivative is no function, do not count, as in [CT].

    Order 1 is exact. For n >= 2, ||D^n f[z_1, ..., z_{n-1}, .]||^2 with independent random signs z
    has the expectation ||D^n f||_F^2; with `probes` of them its relative standard deviation for
    one sample is at most sqrt((3^(n-1) - 1) / probes). Where d^(order - 1) <= `probes`, basis
    vectors replace the signs and every order is exact.

    Args:
        f: as for `flexure.curvature_rate`: a function (B, *shape) -> (B,), or a model.
        x: (B, *shape) float32 or float64; or an `Example` with one such tensor, the others held.
        order: the highest order. Derivatives are nested reverse-mode: each order costs two to three
            times the one below.
        probes: estimates that are averaged.
        generator: of the CPU, draws the signs of all samples before they are cut into chunks;
            None: a fresh one with seed 0.
        chunk: samples at a time; None: all.
        check: compare second derivatives with finite differences on a few samples first.

    Raises:
        FlexureError: bad settings or inputs; `f` returns something else than (B,); or its second
            derivatives are missing or wrong.
    """
    check_positive(order=order, probes=probes, chunk=chunk)
    drawn_from = torch.Generator().manual_seed(0) if generator is None else generator
    point = point_of(x).detach()
    dimension = point[0].numel()
    exact = dimension ** (order - 1) <= probes
    chains = _basis(point, order - 1) if exact else _signs(point, order - 1, probes, drawn_from)
    if check and order > 1:
        _check(f, x)
    with undisturbed(f, x):
        parts = [
            _squares(probability_field(f, at_rows(x, rows)), point[rows], chains[:, :, rows])
            for rows in pieces(len(point), chunk)
        ]
    squares = torch.cat(parts)
    if exact:  # a sum over all chains, not a mean
        squares *= squares.new_tensor([dimension**n for n in range(order)])
    return SobolevSeminorm(squares.isfinite().all(1), squares, exact, probes, dimension)


def _check(f: Callable[..., Any], x: Any) -> None:
    """Refuses missing and wrong second derivatives."""
    point = point_of(x)
    model = f if isinstance(f, nn.Module) else None
    with measuring(f):
        check_field(
            lambda rows: probability_field(f, at_rows(x, rows.to(point.device))).function,
            point,
            model=model,
            generator=torch.Generator().manual_seed(0),
        )


def _basis(x: Tensor, length: int) -> Tensor:
    """(d^length, length, B, *shape): every chain of so many basis vectors."""
    dimension = x[0].numel()
    basis = torch.eye(dimension, dtype=torch.int8, device=x.device)
    indices = torch.tensor(list(product(range(dimension), repeat=length)), dtype=torch.int64)
    chains = basis[indices]
    chains = chains.view(len(chains), length, 1, *x.shape[1:])
    return chains.expand(-1, -1, *x.shape)


def _signs(x: Tensor, length: int, probes: int, generator: Generator) -> Tensor:
    """(probes, length, B, *shape) random signs."""
    shape = (probes, length, *x.shape)
    bits = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
    return (2 * bits - 1).to(x.device)


def _squares(field: ScaledField, x: Tensor, chains: Tensor) -> Tensor:
    """(B, order) float64: means over chains of ||D^n f[z_1, ..., z_{n-1}, .]||^2."""
    total = x.new_zeros(chains.shape[1] + 1, len(x), dtype=torch.float64)
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        values = field.function(x)
        first = _derivative(values, x, torch.ones_like(values), len(total) > 1)
        for chain in chains:
            found = [first]
            for depth, z in enumerate(chain, 2):
                found.append(_derivative(found[-1], x, z.to(x), depth < len(total)))
            # In float32, squares overflow long before the derivatives do.
            total += torch.stack([d.detach().double().flatten(1).square().sum(1) for d in found])
    return (total / len(chains) * (2 * field.log_scale).exp()).T


def _derivative(of: Tensor, x: Tensor, along: Tensor, create_graph: bool) -> Tensor:
    """The gradient of `of . along` in `x`; zeros where it does not depend on `x`."""
    if not of.requires_grad:
        return torch.zeros_like(x)
    (found,) = torch.autograd.grad(
        of, x, along, create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    return torch.zeros_like(x) if found is None else found
