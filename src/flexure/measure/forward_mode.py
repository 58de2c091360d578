"""Torch's functions as a forward derivative of a backward pass needs them: possible, and light.

Some have no forward derivative of their backward pass: they are put together from others. ReLU
saves where it is positive, in one byte an element, without its input's tangent. And tangents are
not recorded for a backward pass of their own, which nobody asks for. Values are the same, to
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from flexure.units.functional import ctu

__all__ = ["ForwardMode"]


class ForwardMode(TorchFunctionMode):
    """Inside, functions of torch have light forward derivatives of their backward passes."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if torch._C._are_functorch_transforms_active() or _beneath_autograd():
            return function(*args, **(kwargs or {}))
        out = _light(function, args)(*args, **(kwargs or {}))
        _forget(out)
        return out


def _light(function: Any, args: tuple[Any, ...]) -> Any:
    """What stands in a function's place; other kinds of tensors keep their own ways."""
    plain = all(type(t) is Tensor and t.is_floating_point() for t in args[:1])
    return _TABLE.get(function, function) if plain else function


def _beneath_autograd() -> bool:
    """Whether a watcher of operators is calling, which derivatives are none of its business."""
    autograd = torch._C.DispatchKey.AutogradFunctionality
    return torch._C._dispatch_tls_is_dispatch_key_excluded(autograd)


def _forget(found: Any) -> None:
    """Drops the graph of a tangent."""
    if type(found) is not Tensor or forward_ad._current_level < 0:
        return
    tangent = forward_ad.unpack_dual(found).tangent  # type: ignore[no-untyped-call]
    # A view's graph goes with that of its base.
    if tangent is not None and tangent.requires_grad and not tangent._is_view():
        tangent.detach_()


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    return cast(Tensor, _ReLU.apply(input, inplace))  # type: ignore[no-untyped-call]


def _relu_(input: Tensor) -> Tensor:
    return _relu(input, inplace=True)


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        y = torch.relu_(x) if inplace else torch.relu(x)
        ctx.inplace, positive = inplace, y > 0
        ctx.save_for_backward(positive)
        ctx.save_for_forward(positive)
        if inplace:
            ctx.mark_dirty(x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (positive,) = ctx.saved_tensors
        return _where(positive, grads[0]), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        (positive,) = ctx.saved_tensors
        kept = _where(positive, tangent)
        return tangent.copy_(kept) if ctx.inplace else kept


def _where(positive: Tensor, x: Tensor) -> Tensor:
    """x, or 0 where it is multiplied by a slope of 0, be it infinite."""
    return cast(Tensor, torch.ops.aten.threshold_backward(x, positive.to(x.dtype), 0.0))


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    return ctu(input, 0.5, 1.0, inplace=inplace)


def _mish(input: Tensor, inplace: bool = False) -> Tensor:
    x = input.clone() if inplace else input
    y = x * F.softplus(x).tanh()
    return input.copy_(y) if inplace else y


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    grouped = input.reshape(len(input), num_groups, -1)
    y = F.layer_norm(grouped, grouped.shape[2:], eps=eps).view(input.shape)
    shape = (-1, *[1] * (input.dim() - 2))
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


_TABLE: Mapping[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    **dict.fromkeys((torch.relu_, Tensor.relu_), _relu_),
    F.silu: _silu,
    F.mish: _mish,
    F.group_norm: _group_norm,
}
"""Functions of torch, and what stands in their places."""
