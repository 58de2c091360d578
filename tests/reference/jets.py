"""Directional derivatives, slowly and independently: forward mode nested in itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp


def nested_forward_mode(
    f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, order: int
) -> Tensor:
    """`(order + 1, B)`: Dⁿf(x)[v, ..., v]; exponentially many passes."""
    levels = [f]
    for _ in range(order):
        levels.append(_derivative(levels[-1], v))
    return torch.stack([level(x) for level in levels])


def _derivative(f: Callable[[Tensor], Tensor], v: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: jvp(f, (x,), (v,))[1]
