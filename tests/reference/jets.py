"""Directional derivatives, slowly and independently: forward mode nested in itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import flexure


def nested_forward_mode(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, order: int) -> Tensor:
    """`(order + 1, B)`: Dⁿf(x)[v, ..., v]; exponentially many passes."""
    levels = [f]
    for _ in range(order):
        levels.append(_derivative(levels[-1], v))
    with Formulas(), sdpa_kernel(SDPBackend.MATH):
        return torch.stack([level(x).detach() for level in levels])


def assert_close_to_nested(
    f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, order: int, tolerance: float = 1e-12
) -> None:
    """That `flexure.jet` agrees, relative to the scale of each order over the batch."""
    with torch.no_grad():
        found = flexure.jet(f, x, v, order=order)
    expected = nested_forward_mode(f, x, v, order)
    assert found.shape == expected.shape == (order + 1, len(x))
    assert bool(found.isfinite().all())
    scale = expected.abs().amax(1, keepdim=True)
    errors = (found - expected).abs() / torch.where(scale > 0, scale, 1.0)
    assert errors.max().item() < tolerance, errors


def _derivative(f: Callable[[Tensor], Tensor], v: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: jvp(f, (x,), (v,))[1]


class Formulas(TorchFunctionMode):
    """Writes out what torch's forward mode cannot nest, or nests wrongly (layer norm)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return FORMULAS.get(func, func)(*args, **(kwargs or {}))


def _silu(x: Tensor, inplace: bool = False) -> Tensor:
    return x * torch.sigmoid(x)


def _mish(x: Tensor, inplace: bool = False) -> Tensor:
    return x * torch.tanh(torch.log1p(torch.exp(x)))


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    a, b = x.chunk(2, dim)
    return a * torch.sigmoid(b)


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    apart = x - x.mean(dims, keepdim=True)
    y = apart / torch.sqrt((apart * apart).mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _instance_norm(
    x: Tensor,
    *,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    shape = (-1, *(1,) * (x.dim() - 2))
    if use_input_stats:
        y = _layer_norm(x, x.shape[2:], eps=eps)
    else:
        y = (x - running_mean.reshape(shape)) / torch.sqrt(running_var.reshape(shape) + eps)
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


FORMULAS: dict[Any, Callable[..., Tensor]] = {
    F.silu: _silu,
    F.mish: _mish,
    F.glu: _glu,
    F.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
    torch.ops.aten.silu: _silu,
}
