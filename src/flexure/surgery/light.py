"""Layers that keep no input for backward: what torch's own become while they are frozen.

A frozen convolution, a BatchNorm in eval mode and a max-pooling need their input for no gradient,
yet torch keeps it. The classes here are torch's, with torch's names, values, gradients and
parameters; an existing layer becomes one by `module.__class__ = LIGHT[type(module)]`. Which layers
do is `frozen.py`'s.

nn.Linear is absent because torch keeps no input of a frozen one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from flexure.units.pooling import light_max_pool2d

__all__ = [
    "LIGHT",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "MaxPool2d",
]


class _LightConv(_ConvNd):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        spatial = len(self.kernel_size)
        if not _can_be_light(input, weight, bias) or input.ndim not in (spatial + 1, spatial + 2):
            return super()._conv_forward(input, weight, bias)
        x, padding = _padded(self, input)
        run = partial(
            _FUNCTIONS[spatial, False],
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        geometry = (self.stride, padding, self.dilation, False, (0,) * spatial, self.groups)
        return _convolve(x, weight, bias, run, geometry)


class _LightConvTranspose(_ConvTransposeNd):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As torch's."""
        spatial = len(self.kernel_size)
        if (
            not _can_be_light(input, self.weight, self.bias)
            or input.ndim not in (spatial + 1, spatial + 2)
            or self.padding_mode != "zeros"
        ):
            return cast(Tensor, super().forward(input, output_size))
        padding: Any = self.padding
        stride: Any = self.stride
        kernel_size: Any = self.kernel_size
        dilation: Any = self.dilation
        output_padding = self._output_padding(
            input, output_size, stride, padding, kernel_size, spatial, dilation
        )
        run = partial(
            _FUNCTIONS[spatial, True],
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            groups=self.groups,
            dilation=dilation,
        )
        geometry = (stride, padding, dilation, True, output_padding, self.groups)
        return _convolve(input, self.weight, self.bias, run, geometry)


class _LightBatchNorm(_BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        """As torch's in eval mode."""
        mean, var = self.running_mean, self.running_var
        if not isinstance(input, Tensor):
            # A proxy of torch.fx, which takes only torch's own classes for leaves: the check of
            # its dimensions would stop the trace.
            eps, training = self.eps, self.training
            return F.batch_norm(input, mean, var, self.weight, self.bias, training, 0.0, eps)
        if (
            self.training
            or mean is None
            or var is None
            or not _can_be_light(input, self.weight, self.bias, mean, var)
        ):
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        y = _Normalization.apply(input, mean, var, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        return cast(Tensor, y)


class Conv1d(_LightConv, nn.Conv1d):
    """`nn.Conv1d`."""


class Conv2d(_LightConv, nn.Conv2d):
    """`nn.Conv2d`."""


class Conv3d(_LightConv, nn.Conv3d):
    """`nn.Conv3d`."""


class ConvTranspose1d(_LightConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d`."""


class ConvTranspose2d(_LightConvTranspose, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d`."""


class ConvTranspose3d(_LightConvTranspose, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d`."""


class BatchNorm1d(_LightBatchNorm, nn.BatchNorm1d):
    """`nn.BatchNorm1d`."""


class BatchNorm2d(_LightBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d`."""


class BatchNorm3d(_LightBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d`."""


class MaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        """As torch's."""
        plain = self.return_indices or self.dilation not in (1, (1, 1), [1, 1])
        if plain or not _can_be_light(input) or input.ndim != 4:
            return cast(Tensor, super().forward(input))
        return light_max_pool2d(
            input, self.kernel_size, self.stride, self.padding, ceil_mode=self.ceil_mode
        )

    # The census takes a module for what its forward wraps.
    forward.__wrapped__ = nn.MaxPool2d.forward  # type: ignore[attr-defined]


LIGHT: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.ConvTranspose1d: ConvTranspose1d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.ConvTranspose3d: ConvTranspose3d,
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.MaxPool2d: MaxPool2d,
}
"""What each of torch's layers becomes."""


def _can_be_light(x: Tensor, *fixed: Tensor | None) -> bool:
    """Whether only `x` needs a gradient, and nothing watches what the function here would hide."""
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or not torch.is_grad_enabled()
        or any(t is not None and type(t) not in (Tensor, nn.Parameter) for t in (x, *fixed))
    ):
        return False
    # A mode that routes activations would be asked about each of these attributes.
    with torch._C.DisableTorchFunction():
        return (
            x.requires_grad
            and x.is_floating_point()
            and x.layout is torch.strided
            and x.device.type != "meta"
            and not any(t is not None and t.requires_grad for t in fixed)
        )


_FUNCTIONS: Mapping[tuple[int, bool], Callable[..., Tensor]] = {
    (1, False): F.conv1d,
    (2, False): F.conv2d,
    (3, False): F.conv3d,
    (1, True): F.conv_transpose1d,
    (2, True): F.conv_transpose2d,
    (3, True): F.conv_transpose3d,
}
"""By spatial dimensions and whether transposed."""


def _padded(conv: _ConvNd, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input with the padding that a convolution cannot do itself, and what is left to do."""
    if conv.padding_mode != "zeros":
        pads = conv._reversed_padding_repeated_twice
        return F.pad(x, pads, mode=conv.padding_mode), (0,) * len(conv.kernel_size)
    if not isinstance(conv.padding, str):
        return x, conv.padding
    # "same" may need one more on the far side of an axis; torch, too, pads that side alone.
    near = conv._reversed_padding_repeated_twice[::2]
    far = conv._reversed_padding_repeated_twice[1::2]
    if near != far:
        x = F.pad(x, [n for a, b in zip(near, far, strict=True) for n in (0, b - a)])
    return x, tuple(reversed(near))


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    run: Callable[..., Tensor],
    geometry: tuple[Any, ...],
) -> Tensor:
    if x.ndim == weight.ndim:
        y = _Convolution.apply(x, weight, bias, run, geometry)  # type: ignore[no-untyped-call]
    else:
        y = _Convolution.apply(x[None], weight, bias, run, geometry)[0]  # type: ignore[no-untyped-call]
    return cast(Tensor, y)


class _Convolution(torch.autograd.Function):
    """A convolution with a constant weight: keeps the weight, and of the input the layout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        run: Callable[..., Tensor],
        geometry: tuple[Any, ...],
    ) -> Tensor:
        with torch._C.DisableTorchFunction():
            ctx.save_for_backward(weight)
            ctx.layout, ctx.geometry = torch.empty_like(x, device="meta"), geometry
            return run(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        grad, layout = grads[0], ctx.layout
        # Read by nothing, since no gradient of the weight is asked for; its layout decides which
        # kernel runs, and so the last bits. Under autocast all is in the output's dtype.
        x = torch.empty_like(layout, device=grad.device, dtype=grad.dtype)
        by_x, _, _ = torch.ops.aten.convolution_backward(
            grad, x, weight.to(grad.dtype), None, *ctx.geometry, [True, False, False]
        )
        return by_x.to(layout.dtype), None, None, None, None


class _Normalization(torch.autograd.Function):
    """BatchNorm in eval mode, an affine map per channel: keeps its `(channels,)` slopes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        with torch._C.DisableTorchFunction():
            slope = 1.0 / torch.sqrt(var.to(torch.promote_types(var.dtype, torch.float32)) + eps)
            ctx.save_for_backward(slope if weight is None else weight * slope)
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        grad = grads[0]
        by_x = (grad * slope.view(-1, *(1,) * (grad.ndim - 2))).to(grad.dtype)
        return by_x, None, None, None, None, None
