"""Maxima as selections in the graph of bounds: pooling, reductions, and of two values.

Each function is a rule, as `bound_rules.py` describes them, with the arguments of PyTorch's
function. Minima have the bounds of maxima: they are -max(-x).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexure.layers.geometry import per_axis
from flexure.measure.bound_graph import WIDE
from flexure.measure.bound_rules import Signal, bent, concatenated, selected, shifted
from flexure.measure.propagate import Unsupported

__all__ = ["MAXIMUM", "adaptive_max_pool", "larger", "largest", "largest_along", "max_pool"]

MAXIMUM = "average in place of taking the maximum (nn.AvgPool2d for nn.MaxPool2d)"


def max_pool(
    spatial: int,
    function: Any,
    x: Signal,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Signal:
    """Max-pooling over the last `spatial` axes, by the windows that each element falls into."""
    _check(x, return_indices)
    settings = (kernel_size, stride or kernel_size, padding, dilation)

    def maxima(values: Tensor) -> Tensor:
        pooled: Tensor = function(values, *settings, ceil_mode)
        return pooled

    sizes = maxima(torch.zeros(x.shape, **WIDE)).shape
    kernels, strides, pads, gaps = (per_axis("a window", value, spatial) for value in settings)
    windows = []
    for axis in range(-spatial, 0):
        first = torch.arange(sizes[axis], device="cpu") * strides[axis] - pads[axis]
        taps = first[:, None] + torch.arange(kernels[axis], device="cpu") * gaps[axis]
        places = torch.arange(x.shape[axis], device="cpu")
        windows.append((places == taps[..., None]).any(1).double())
    return selected(x, maxima, lambda values: _summed(values, windows))


def adaptive_max_pool(
    spatial: int, function: Any, x: Signal, output_size: Any, return_indices: bool = False
) -> Signal:
    """Max-pooling to a given size, likewise."""
    _check(x, return_indices)

    def maxima(values: Tensor) -> Tensor:
        pooled: Tensor = function(values, output_size)
        return pooled

    sizes = maxima(torch.zeros(x.shape, **WIDE)).shape
    windows = []
    for axis in range(-spatial, 0):
        inside, outside = x.shape[axis], sizes[axis]
        step = torch.arange(outside, device="cpu")[:, None]
        places = torch.arange(inside, device="cpu")
        first, last = step * inside // outside, -(-(step + 1) * inside // outside)
        windows.append(((places >= first) & (places < last)).double())
    return selected(x, maxima, lambda values: _summed(values, windows))


def largest(function: Any, x: Any, *args: Any, **kwargs: Any) -> Signal:
    """`max(x)`, of all elements, or `max(x, y)`."""
    others = [*args, *kwargs.values()]
    if others and isinstance(others[0], Signal | Tensor):
        return larger(function, x, others[0])
    _check(x, indices=bool(others))
    return largest_along(function, x)


def largest_along(function: Any, x: Signal, dim: Any = (), keepdim: bool = False) -> Signal:
    """`amax`: over all elements of some axes."""
    _check(x)
    return selected(
        x,
        lambda values: values.amax(dim, keepdim),
        lambda values: values.sum(dim, keepdim),
    )


def larger(function: Any, x: Any, y: Any) -> Signal:
    """`maximum` of two values: a selection from both, or an activation where one is constant."""
    signals = [each for each in (x, y) if isinstance(each, Signal)]
    _check(signals[0])
    shape = torch.broadcast_shapes(x.shape, y.shape)  # type: ignore[no-untyped-call]
    wide = [shifted(each, torch.empty(shape, device="meta")) for each in signals]
    if len(wide) == 1:
        return bent(wide[0], 1.0, torch.inf, "")
    both: Signal = concatenated(torch.stack, wide)
    return largest_along(function, both, dim=0)


def _check(x: Any, indices: bool = False) -> None:
    """Refuses maxima where kinks are refused, and their places everywhere."""
    if not isinstance(x, Signal) or not x.graph.kinks:
        raise Unsupported(f"its slope jumps where another element becomes the largest; {MAXIMUM}")
    if indices:
        raise Unsupported("its indices depend on the input; take the values alone (torch.amax)")


def _summed(values: Tensor, windows: Sequence[Tensor]) -> Tensor:
    """Sums over windows that are products of one window an axis, `(outputs, inputs)` of 0 and 1."""
    for axis, window in zip(range(-len(windows), 0), windows, strict=True):
        values = (values.movedim(axis, -1) @ window.mT).movedim(-1, axis)
    return values
