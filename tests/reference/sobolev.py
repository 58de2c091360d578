"""Derivative tensors in full, by nested forward-over-reverse, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def squared_norms(f: Callable[[Tensor], Tensor], x: Tensor, order: int) -> Tensor:
    """(B, order): the sum of the squares of all d^n entries of D^n f(x)."""
    rows = []
    for sample in x:
        g = lambda point: f(point[None])[0]  # noqa: E731
        squares = []
        for _ in range(order):
            g = torch.func.jacfwd(g)
            squares.append(g(sample).square().sum())
        rows.append(torch.stack(squares))
    return torch.stack(rows)
