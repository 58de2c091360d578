"""The unit of many pieces: max-pooling as a max-affine spline, softened like an activation.

Equations 5–7 of the Curvature Tuning paper for any number of pieces; two pieces x and 0 give
`functional.ctu`. Plain differentiable code: pooling is steered only where it is asked for. Besides,
max-pooling itself in less memory than torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from flexure.units.functional import balanced_c, follows

__all__ = ["light_max_pool2d", "max_pool_ctu", "soft_maximum"]


def soft_maximum(pieces: Tensor, beta: float | Tensor, c: float | Tensor | str = 0.5) -> Tensor:
    """The CTU of the maximum of several pieces ([CT] eqs. 5–8).

    c · Σ_r softmax(η a)_r a_r + (1−c) · logsumexp(γ a)/γ with η = β/(1−β), γ = 1/(1−β); the
    maximum itself at β = 1, the mean at β = 0, c = 1.

    Args:
        pieces: `(..., R)`, any floating dtype; −inf marks a piece that is not there, and at least
            one must be there.
        beta: in [0, 1]: a float, or a tensor that broadcasts over `(..., R)` with R of size 1.
        c: in [0, 1], likewise, or `"balanced"`.

    Returns:
        `(...)`, in the pieces' dtype.
    """
    mixture = balanced_c(beta) if isinstance(c, str) else c
    if follows(pieces):
        return cast(Tensor, cast(Any, pieces).unit("soft_maximum", pieces, beta, mixture))
    a = pieces.to(torch.promote_types(pieces.dtype, torch.float32))
    top = a.amax(-1, keepdim=True)
    beta, mixture = (torch.as_tensor(v, dtype=a.dtype, device=a.device) for v in (beta, mixture))
    width = (1 - beta).clamp_min(torch.finfo(a.dtype).tiny)
    # Below the maximum nothing can overflow, and a missing piece has no weight: not even at beta
    # = 0, where every other piece has the same.
    gap = a - top
    there = a > -torch.inf
    weights = torch.where(there, beta * gap / width, -torch.inf).softmax(-1)
    average = (weights * torch.where(there, gap, 0)).sum(-1, keepdim=True)
    smooth = width * (gap / width).logsumexp(-1, keepdim=True)
    bend = torch.where(beta == 1, 0, mixture * average + (1 - mixture) * smooth)
    return (top + bend).squeeze(-1).to(pieces.dtype)


def max_pool_ctu(
    x: Tensor,
    beta: float | Tensor,
    c: float | Tensor | str,
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """Max-pooling with every window's maximum replaced by `soft_maximum`.

    Args:
        x: `(..., C, *spatial)`.
        beta: as in `soft_maximum`; a tensor broadcasts over `x`.
        c: likewise.
        kernel: window size along each spatial axis.
        stride: likewise.
        padding: likewise, on both sides.
        ceil_mode: whether a window may leave the padded input at the far end.

    Returns:
        The shape that `torch.nn.functional.max_pool{1,2,3}d` returns.
    """
    spatial = len(kernel)
    sides: list[int] = []
    for size, k, s, p in zip(x.shape[-spatial:], kernel, stride, padding, strict=True):
        count = _windows(size, k, s, p, ceil_mode)
        sides = [p, max(0, (count - 1) * s + k - size - p), *sides]
    windows = F.pad(x, sides, value=-torch.inf)
    for axis, (k, s) in enumerate(zip(kernel, stride, strict=True)):
        windows = windows.unfold(x.ndim - spatial + axis, k, s)
    beta, c = _over_windows(beta), c if isinstance(c, str) else _over_windows(c)
    return soft_maximum(windows.flatten(-spatial), beta, c)


def _over_windows(dial: float | Tensor) -> float | Tensor:
    return dial.unsqueeze(-1) if isinstance(dial, Tensor) and dial.ndim else dial


def _windows(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """How many windows fit; in ceil mode the last must still start inside the input."""
    free = size + 2 * padding - kernel
    count = free // stride + 1
    if ceil_mode and free % stride and count * stride < size + padding:
        count += 1
    return count


def light_max_pool2d(
    input: Tensor, kernel_size: Any, stride: Any, padding: Any = 0, *, ceil_mode: bool = False
) -> Tensor:
    """`F.max_pool2d` of an input that needs a gradient: keeps 32-bit indices, and no input.

    Same values and gradients, ties and nan included; differentiable any number of times. Function
    modes see it as they see `F.max_pool2d`.

    Args:
        input: `(N, C, H, W)`, floating point.
        kernel_size: as in `F.max_pool2d`, like the others.
        stride: likewise.
        padding: likewise.
        ceil_mode: likewise.
    """
    if has_torch_function_unary(input):
        function, given = light_max_pool2d, (input, kernel_size, stride, padding)
        return handle_torch_function(function, (input,), *given, ceil_mode=ceil_mode)
    window = [
        list(value) if isinstance(value, (tuple, list)) else [value] * 2
        for value in (kernel_size, stride, padding, 1)
    ]
    return cast(Tensor, _MaxPool2d.apply(input, (*window, ceil_mode)))  # type: ignore[no-untyped-call]


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple[Any, ...]) -> Tensor:
        # torch's CPU kernel is ten times as fast, copies included, where channels are last.
        turned = x.device.type == "cpu" and x.is_contiguous()
        source = x.contiguous(memory_format=torch.channels_last) if turned else x
        y, indices = torch.ops.aten.max_pool2d_with_indices(source, *window)
        if turned:
            y, indices = y.contiguous(), indices.contiguous()
        fits = x.shape[-1] * x.shape[-2] <= torch.iinfo(torch.int32).max
        ctx.save_for_backward(indices.int() if fits else indices)
        ctx.layout, ctx.window = torch.empty_like(x, device="meta"), window
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        # Only its shape and layout count.
        x = torch.empty_like(ctx.layout, device=grads[0].device)
        by_x = torch.ops.aten.max_pool2d_with_indices_backward(
            grads[0], x, *ctx.window, indices.long()
        )
        return by_x, None
