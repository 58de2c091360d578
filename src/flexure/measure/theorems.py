"""The bounds that the Low-Curvature Networks paper states, each with its equation, as corrected.

Numbers in, a bound out: nothing here looks at a network. What bounds a network's Hessian is in
`bounds.py`; what measures gradients under noise, in `robustness_of_gradients.py`.

[LCNN] is Low-Curvature Networks (Srinivas et al., 2022). C is `‖∇²f‖₂/‖∇f‖₂`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flexure.contracts import FlexureError

__all__ = ["lemma1_bound", "output_change_bound", "relative_gradient_bound", "theorem1_proxy"]

Values = float | Tensor


def lemma1_bound(curvatures: Sequence[Values], slopes: Sequence[Values]) -> Values:
    """Lemma 1 of [LCNN], corrected: `|f''/f'| <= Σ_i |f_i''/f_i'| · Π_{j<i} |f_j'|`.

    For `f = f_L ∘ ... ∘ f_1` on the real line, each term at the point that the composition brings
    it to, or at its maximum. An infinite `|f_i''/f_i'|` says nothing, whatever the slopes: inf. The
    printed product runs to j = i, which is false wherever a last
    slope is below 1: softplus alone has 1/2 at 0, and the printed bound is 1/4.

    Args:
        curvatures: `|f_i''/f_i'|`, first function first: numbers, or tensors of one shape.
        slopes: `|f_i'|`, likewise; the last one is not used.

    Raises:
        FlexureError: two lengths, none, a negative value, or nan.
    """
    _check_lengths(curvatures=curvatures, slopes=slopes)
    total: Values = 0.0
    steepness: Values = 1.0
    for curvature, slope in zip(curvatures, slopes, strict=True):
        total = total + _term(curvature, steepness)
        steepness = _product(steepness, slope)
    return total


def theorem1_proxy(
    widths: Sequence[int], curvatures: Sequence[Values], slopes: Sequence[Values]
) -> Values:
    """Theorem 1 of [LCNN], eq. 2, as printed: `Σ_i n_i · max C_{f_i} · Π_{j<=i} max ‖∇f_j‖₂`.

    **Not a bound.** It is false as stated: gradients of a layer's outputs can cancel, and C is then
    infinite while this is not (softplus(x) + softplus(−x) at 0). It is the quantity that motivates
    the penalties of [LCNN], kept to compare with; `flexure.hessian_bound` bounds the Hessian.

    Args:
        widths: outputs n_i of each layer, first layer first.
        curvatures: the largest C of each layer; 0 for a linear one.
        slopes: the largest 2-norm of each layer's Jacobian.

    Raises:
        FlexureError: different lengths, none, a negative value, or nan.
    """
    _check_lengths(widths=widths, curvatures=curvatures, slopes=slopes)
    total: Values = 0.0
    steepness: Values = 1.0
    for width, curvature, slope in zip(widths, curvatures, slopes, strict=True):
        steepness = _product(steepness, slope)
        total = total + width * _term(curvature, steepness)
    return total


def relative_gradient_bound(radius: Values, curvature: Values) -> Values:
    """Proposition 1 of [LCNN], tightened: `‖∇f(x+ε) − ∇f(x)‖/‖∇f(x)‖ <= e^a − 1`, `a = ‖ε‖·max C`.

    From `d‖∇f‖/dt <= ‖∇²f‖·‖ε‖ <= a·‖∇f‖` along the segment (Grönwall). Below the printed `a·e^a`
    for every a > 0. inf where it overflows; 0 where either argument is 0.

    Args:
        radius: `‖ε‖₂`.
        curvature: the largest C on the segment from x to x + ε.

    Returns:
        Shape by the rules of broadcasting, dtype the widest of the tensors'; integers count as
        float64. A float for numbers. Computed in float64; a narrower dtype is rounded up to, so
        that the bound stays one.

    Raises:
        FlexureError: a negative argument, or nan.

    Example:
        >>> round(relative_gradient_bound(0.1, 2.0), 4)
        0.2214
    """
    (r, c), dtype = _as_tensors(radius=radius, curvature=curvature)
    return _rounded_up(torch.expm1(torch.as_tensor(_product(r, c))), dtype)


def output_change_bound(radius: Values, curvature: Values, gradient_norm: Values) -> Values:
    """Proposition 2 of [LCNN], tightened: `|f(x+ε) − f(x)| <= ‖∇f(x)‖·(e^a − 1)/max C`.

    The integral of Proposition 1's `‖∇f(x)‖·e^(t·a)` over the segment, `a = ‖ε‖·max C`; computed as
    `‖∇f(x)‖·‖ε‖·(e^a − 1)/a`, which is `‖∇f(x)‖·‖ε‖` where C vanishes. inf where it overflows.

    Args:
        radius: `‖ε‖₂`.
        curvature: the largest C on the segment from x to x + ε.
        gradient_norm: `‖∇f(x)‖₂`. 0 gives 0 (with a finite C the gradient then vanishes on the
            whole segment), except with an infinite C, which says nothing: inf.

    Returns:
        As of `relative_gradient_bound`.

    Raises:
        FlexureError: a negative argument, or nan.
    """
    (r, c, g), dtype = _as_tensors(radius=radius, curvature=curvature, gradient_norm=gradient_norm)
    a = torch.as_tensor(_product(r, c))
    growth = torch.where(a == 0, 1.0, torch.expm1(a) / torch.where(a == 0, 1.0, a))
    # e^inf/inf has no value of its own: the exponential wins.
    growth = torch.where(torch.isinf(a), a, growth)
    bound = g * r * growth
    bound = torch.where((g == 0) & torch.isinf(c), torch.inf, bound)
    still = (r == 0) | ((g == 0) & torch.isfinite(c))
    return _rounded_up(torch.where(still, 0.0, bound), dtype)


def _term(curvature: Values, steepness: Values) -> Values:
    """`curvature·steepness`, inf where the curvature is (0·inf is nan otherwise)."""
    if isinstance(curvature, Tensor):
        return torch.where(torch.isinf(curvature), torch.inf, _product(curvature, steepness))
    return curvature if curvature == math.inf else _product(curvature, steepness)


def _product(one: Values, other: Values) -> Values:
    """Of two norms: 0 where either is 0 (0·inf is nan otherwise)."""
    product = one * other
    still = (one == 0) | (other == 0)
    if isinstance(product, Tensor):
        return torch.where(torch.as_tensor(still), torch.zeros_like(product), product)
    return 0.0 if still else product


def _as_tensors(**values: Values) -> tuple[list[Tensor], torch.dtype | None]:
    """The arguments in float64, and the dtype of the result; None: they are numbers."""
    for name, value in values.items():
        _check_sign(name, value)
    given = [value for value in values.values() if isinstance(value, Tensor)]
    # A number in the dtype of integers would lose what is behind its point.
    kinds = [v.dtype if v.is_floating_point() else torch.float64 for v in given]
    dtype = functools.reduce(torch.promote_types, kinds) if kinds else None
    device = given[0].device if given else None
    tensors = [
        value.double()
        if isinstance(value, Tensor)
        else torch.full((), value, dtype=torch.float64, device=device)
        for value in values.values()
    ]
    return tensors, dtype


def _rounded_up(bound: Tensor, dtype: torch.dtype | None) -> Values:
    if dtype is None:
        return float(bound)
    nearest = bound.to(dtype)
    # A constant, so that gradients pass.
    below = nearest.detach()
    gap = torch.nextafter(below, torch.full_like(below, torch.inf)) - below
    return nearest + torch.where(below.double() < bound, gap, torch.zeros_like(gap))


def _check_lengths(**values: Sequence[Values]) -> None:
    lengths = {len(value) for value in values.values()}
    if len(lengths) != 1 or lengths == {0}:
        got = ", ".join(f"{len(value)} {name}" for name, value in values.items())
        raise FlexureError(f"expected one value a function, got {got}; give one for each")
    for name, items in values.items():
        for item in items:
            _check_sign(name, item)


def _check_sign(name: str, value: Values) -> None:
    right = value >= 0  # not of nan
    if not (bool(right.all()) if isinstance(right, Tensor) else right):
        raise FlexureError(f"expected {name} of at least 0, got {value}; give norms or maxima")
