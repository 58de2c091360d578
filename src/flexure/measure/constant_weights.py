"""Convolutions and BatchNorm as what they are to their input when weights are constants: affine.

Differentiated twice, torch's own convolution computes derivatives with respect to its weights that
nobody asked for, and BatchNorm derives its statistics' part. The values are the same, to rounding;
second derivatives with respect to the input take about half the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as input_gradients
from torch.overrides import TorchFunctionMode

__all__ = ["ConstantWeights"]


class ConstantWeights(TorchFunctionMode):
    """Inside, layers whose weights need no gradient are affine maps of their input.

    Weights that need one are left to torch: those of a parametrization, and those that a field
    differentiates with respect to itself. `measuring` takes the need from a model's parameters.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        affine = _AFFINE.get(function)
        out = NotImplemented if affine is None else affine(function, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {})) if out is NotImplemented else out


class _Convolution(torch.autograd.Function):
    """y = A x + b, A given by a weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Tensor:
        product: Tensor = how.function(x, weight, bias, *how.settings)
        return product

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, ctx.weight, _, ctx.how = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        product = _Transposed.apply(gradient, ctx.weight, ctx.shape, ctx.how)  # type: ignore[no-untyped-call]
        return product, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Any:
        return ctx.how.function(tangent, ctx.weight, None, *ctx.how.settings)


class _Transposed(torch.autograd.Function):
    """x = Aᵀ y."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, weight: Tensor, shape: torch.Size, how: _How) -> Tensor:
        return how.transposed(shape, weight, y, *how.settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, ctx.weight, ctx.shape, ctx.how = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        product = _Convolution.apply(gradient, ctx.weight, None, ctx.how)  # type: ignore[no-untyped-call]
        return product, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Any:
        return ctx.how.transposed(ctx.shape, ctx.weight, tangent, *ctx.how.settings)


class _How:
    """A convolution's function, that of its transpose, and its settings."""

    def __init__(self, function: Any, settings: tuple[Any, ...]) -> None:
        self.function, self.settings = function, settings
        self.transposed: Callable[..., Tensor] = _TRANSPOSED[function]


def _convolution(
    function: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    batched = input.dim() == weight.dim()
    if isinstance(padding, str) or not batched or not _constant(input, weight, bias):
        return NotImplemented
    how = _How(function, (stride, padding, dilation, groups))
    return _Convolution.apply(input, weight, bias, how)  # type: ignore[no-untyped-call]


def _batch_norm(
    function: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training or running_mean is None or running_var is None:
        return NotImplemented
    if not _constant(input, running_mean, running_var, weight, bias):
        return NotImplemented
    with torch.no_grad():
        slope = (running_var + eps).rsqrt() * (1.0 if weight is None else weight)
        offset = (0.0 if bias is None else bias) - running_mean * slope
    shape = (-1, *[1] * (input.dim() - 2))
    return torch.addcmul(offset.view(shape), input, slope.view(shape))


def _constant(input: Any, *weights: Tensor | None) -> bool:
    """Whether weights are constants; other kinds of tensors keep their own ways."""
    given = [weight for weight in weights if weight is not None]
    plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in (input, *given))
    alike = plain and all(t.dtype == input.dtype for t in given)
    return alike and input.is_floating_point() and not any(t.requires_grad for t in given)


_TRANSPOSED: Mapping[Any, Callable[..., Tensor]] = {
    F.conv1d: input_gradients.conv1d_input,
    F.conv2d: input_gradients.conv2d_input,
    F.conv3d: input_gradients.conv3d_input,
}

_AFFINE: Mapping[Any, Callable[..., Any]] = {
    **dict.fromkeys(_TRANSPOSED, _convolution),
    F.batch_norm: _batch_norm,
}
"""Functions of torch, and the affine maps in their places."""
