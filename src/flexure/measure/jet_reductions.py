"""The catalogue of jets, second part: reductions that are not linear.

Sums and means are rows of `jet_rules.py`, softmax and its kin of `jet_layers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flexure.measure.jet_rules import by_expression
from flexure.measure.propagate import Rule, Unsupported

__all__ = ["REDUCTIONS"]


def _variance(x: Any, dim: Any = None, correction: Any = 1, keepdim: bool = False) -> Any:
    dims = tuple(range(x.dim())) if dim is None else dim
    centered = x - x.mean(dims, keepdim=True)
    axes = (dims,) if isinstance(dims, int) else dims
    count = math.prod(x.shape[d] for d in axes)
    return (centered * centered).sum(dims, keepdim=keepdim) / (count - correction)


def _var(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    named = dict(kwargs)
    if "unbiased" in named:
        named["correction"] = int(named.pop("unbiased"))
    x, *rest = args
    if rest and isinstance(rest[0], bool):
        named["correction"] = int(rest.pop(0))
    if rest:
        named["dim"] = rest.pop(0)
    if rest:
        named["correction"] = int(rest.pop(0))
    if rest:
        named["keepdim"] = rest.pop(0)
    return _variance(x, **named)


def _std(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return torch.sqrt(_var(function, args, kwargs))


def _prod(x: Any, dim: int | None = None, keepdim: bool = False, dtype: Any = None) -> Any:
    x = x if dtype is None else x.to(dtype)
    if dim is None:
        x, dim = x.flatten(), 0
    # Pairs, so that the number of multiplications in a row is logarithmic.
    while (size := x.shape[dim]) > 1:
        pairs, odd = x.narrow(dim, 0, size - size % 2), x.narrow(dim, size - size % 2, size % 2)
        left, right = pairs.unflatten(dim, (2, -1)).unbind(dim if dim >= 0 else dim - 1)
        x = torch.cat([left * right, odd], dim)
    return x if keepdim else x.squeeze(dim)


def _norm(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, p, dim, keepdim = _norm_arguments(*args, **kwargs)
    if p not in (2, 2.0, None, "fro"):
        raise Unsupported("it has a kink unless p = 2; use the 2-norm")
    dims = tuple(range(x.dim())) if dim is None else dim
    return torch.sqrt((x * x).sum(dims, keepdim=keepdim))


def _norm_arguments(
    x: Any, p: Any = None, dim: Any = None, keepdim: bool = False, **named: Any
) -> tuple[Any, Any, Any, bool]:
    return x, named.pop("ord", p), dim, keepdim


REDUCTIONS: Mapping[Any, Rule] = {
    "var": _var,
    "std": _std,
    "prod": by_expression(_prod),
    "norm": _norm,
    torch.linalg.vector_norm: _norm,
}
"""Names, or functions where a name has two meanings -> rule, as `rule_table` takes them."""
