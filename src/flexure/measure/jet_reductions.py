"""The catalogue of jets, second part: reductions that are not linear.

Sums and means are rows of `jet_rules.py`, softmax and its kin of `jet_layers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from flexure.measure.jet_rules import by_expression
from flexure.measure.propagate import Rule, Unsupported

__all__ = ["REDUCTIONS"]


def _variance(
    x: Any, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> Any:
    if isinstance(dim, bool):  # of var(input, unbiased)
        dim, unbiased = None, dim
    if unbiased is not None:
        correction = int(unbiased)
    axes = (dim,) if isinstance(dim, int) else tuple(dim or range(x.dim()))
    centered = x - x.mean(axes, keepdim=True)
    free = math.prod(x.shape[d] for d in axes) - (1 if correction is None else correction)
    return (centered * centered).sum(axes, keepdim=keepdim) / max(free, 0)


def _prod(x: Any, dim: int | None = None, keepdim: bool = False, dtype: Any = None) -> Any:
    x = x if dtype is None else x.to(dtype)
    if dim is None:
        x, dim = x.flatten(), 0
    if not x.shape[dim]:
        return x.sum(dim, keepdim=keepdim) + 1
    # Pairs, so that the number of multiplications in a row is logarithmic.
    while (size := x.shape[dim]) > 1:
        pairs, odd = x.narrow(dim, 0, size - size % 2), x.narrow(dim, size - size % 2, size % 2)
        left, right = pairs.unflatten(dim, (2, -1)).unbind(dim if dim >= 0 else dim - 1)
        x = torch.cat([left * right, odd], dim)
    return x if keepdim else x.squeeze(dim)


def _norm(x: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if p not in (2, None, "fro"):
        raise Unsupported("it has a kink unless p = 2; use the 2-norm")
    x = x if dtype is None else x.to(dtype)
    dims = tuple(range(x.dim())) if dim is None else dim
    return torch.sqrt((x * x).sum(dims, keepdim=keepdim))


def _vector_norm(
    x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    return _norm(x, ord, dim, keepdim, dtype=dtype)


REDUCTIONS: Mapping[Any, Rule] = {
    "var": by_expression(_variance),
    "std": by_expression(lambda *args, **kwargs: torch.sqrt(_variance(*args, **kwargs))),
    "prod": by_expression(_prod),
    "norm": by_expression(_norm),
    torch.linalg.vector_norm: by_expression(_vector_norm),
}
"""Names, or functions where a name has two meanings -> rule, as `rule_table` takes them."""
