"""Layers as linear maps of the graph of bounds, and why some operations have no bound.

Each function is a rule, as `bound_rules.py` describes them, with the arguments of PyTorch's
function. Operator norms are those of `flexure.layers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexure.layers.geometry import per_axis
from flexure.layers.spectral import conv_norm_bound, linear_norm_bound
from flexure.measure.bound_rules import Signal, constant, moved, scaled, weighted
from flexure.measure.propagate import Unsupported

__all__ = [
    "JUMP",
    "KINK",
    "PRODUCT",
    "RANDOM",
    "TRAINING",
    "UNBOUNDED",
    "avg_pool",
    "batch_norm",
    "conv",
    "conv_transpose",
    "interpolate",
    "linear",
    "masked_fill",
    "matmul",
    "pad",
]

KINK = (
    "its slope jumps, so that its second derivative has no bound; steer it (flexure.steer with "
    "beta < 1), or use flexure.units.centered_softplus in its place"
)
JUMP = "its value jumps: nothing bounds its slope; leave it out"
UNBOUNDED = (
    "its first or second derivative has no bound over all inputs, so that the network has none "
    "that this can see; use flexure.curvature on data instead"
)
PRODUCT = "a product of two values that depend on the input: " + UNBOUNDED
TRAINING = (
    "in training mode it is random or depends on the other samples; let it follow model.eval()"
)
RANDOM = "it draws random numbers, and a bound is one of a fixed function; remove the noise"


def linear(function: Any, x: Signal, weight: Any, bias: Any = None) -> Signal:
    """W x, by the certified norm of W."""
    return weighted(
        x,
        F.linear,
        _weight(x, weight, bias),
        norm=linear_norm_bound,
        scaled_weight=lambda w, factors: factors[:, None] * w,
    )


def conv(
    function: Any,
    x: Signal,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Signal:
    """A convolution, by its certified norm at the signal's spatial size.

    One of what was padded by copies is one with that padding mode: less than the product of two.
    """
    kernels, spatial = _weight(x, weight, bias), weight.dim() - 2
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    settings: dict[str, Any] = _sizes(geometry)
    source, widths, mode = x.graph.padded.get(x.index, (x, (), "zeros"))
    if len(widths) == 2 * spatial and not any(per_axis("padding", _sized(padding), spatial)):
        pairs = [(widths[i], widths[i + 1]) for i in range(0, 2 * spatial, 2)]
        settings |= {"padding": pairs[::-1], "padding_mode": mode}
    else:
        source, widths = x, ()
    size = source.shape[-spatial:]

    def apply(values: Tensor, w: Tensor) -> Tensor:
        values = F.pad(values, widths, mode=mode) if widths else values
        result: Tensor = function(values, w, **geometry)
        return result

    return weighted(
        source,
        apply,
        kernels,
        norm=lambda w: conv_norm_bound(w, input_size=size, **settings),
        scaled_weight=lambda w, factors: factors.reshape(-1, *(1,) * (spatial + 1)) * w,
        axis=-1 - spatial,
    )


def conv_transpose(
    function: Any,
    x: Signal,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Signal:
    """A transposed convolution, likewise."""
    spatial = weight.dim() - 2
    geometry = {
        "stride": stride,
        "padding": padding,
        "output_padding": output_padding,
        "groups": groups,
        "dilation": dilation,
    }
    size = x.shape[-spatial:]

    def scaled_weight(w: Tensor, factors: Tensor) -> Tensor:
        grouped = w.reshape(groups, -1, *w.shape[1:])
        return (grouped * factors.reshape(groups, 1, -1, *(1,) * spatial)).reshape(w.shape)

    return weighted(
        x,
        lambda values, w: function(values, w, **geometry),
        _weight(x, weight, bias),
        norm=lambda w: conv_norm_bound(w, input_size=size, transposed=True, **_sizes(geometry)),
        scaled_weight=scaled_weight,
        axis=-1 - spatial,
    )


def _sizes(geometry: Mapping[str, Any]) -> dict[str, Any]:
    """PyTorch's functions take `(2,)` where both axes have 2."""
    return {
        key: value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value
        for key, value in geometry.items()
    }


def _sized(padding: Any) -> Any:
    """A padding in numbers, of which only zero matters: `same` is taken for another."""
    return {"valid": 0, "same": 1}.get(padding, padding) if isinstance(padding, str) else padding


def _weight(x: Any, weight: Any, bias: Any) -> Tensor:
    """A layer's weight as a constant of the bounds."""
    if isinstance(weight, Signal) or not isinstance(x, Signal):
        raise Unsupported(PRODUCT)
    if isinstance(bias, Signal):
        raise Unsupported("its bias depends on the input; add it in a step of its own")
    return constant(weight)


def matmul(function: Any, *operands: Any, **kwargs: Any) -> Signal:
    """Products with one constant: matrices, vectors, `einsum`."""
    signals = [each for each in operands if isinstance(each, Signal)]
    constants = [each for each in operands if isinstance(each, Tensor)]
    if len(signals) != 1 or len(constants) != 1:
        raise Unsupported(PRODUCT if len(signals) > 1 else "it has more than one constant factor")

    def apply(x: Tensor, weight: Tensor) -> Tensor:
        filled = [
            x if isinstance(each, Signal) else weight if isinstance(each, Tensor) else each
            for each in operands
        ]
        result: Tensor = function(*filled, **kwargs)
        return result

    # Of an einsum, the matrix of the map is another one than the constant.
    plain = constants[0].dim() == 2 and not isinstance(operands[0], str)
    norm = linear_norm_bound if plain else None
    return weighted(signals[0], apply, constant(constants[0]), norm=norm)


def batch_norm(
    function: Any,
    x: Signal,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Signal:
    """Normalisation in eval mode: a factor for each channel."""
    if training:
        raise Unsupported("it normalises by the batch's own statistics; " + TRAINING)
    factors = (constant(running_var) + eps).rsqrt()
    if weight is not None:
        factors = factors * constant(weight)
    if not bool(torch.isfinite(factors).all()):
        raise Unsupported("a factor of it is nan or inf; check its statistics, and eps")
    return scaled(x, factors.reshape(-1, *(1,) * (len(x.shape) - 2)))


def avg_pool(
    function: Any,
    x: Signal,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """Sums over windows, divided by a number of either sign."""
    divisor = None if divisor_override is None else abs(divisor_override)
    return moved(function, x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor)


def interpolate(function: Any, x: Signal, *args: Any, **kwargs: Any) -> Any:
    """Interpolation whose weights are not negative."""
    if kwargs.get("mode", args[2] if len(args) > 2 else "nearest") == "bicubic":
        raise Unsupported("its bicubic weights are of both signs; use mode='bilinear'")
    return moved(function, x, *args, **kwargs)


def pad(function: Any, x: Signal, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    """Any padding; a value to pad with is a constant."""
    signal = moved(function, x, pad, mode)
    if mode != "constant":
        signal.graph.padded[signal.index] = (x, tuple(pad), mode)
    return signal


def masked_fill(function: Any, x: Any, mask: Any, value: Any) -> Any:
    """What is filled in is a constant."""
    if isinstance(value, Signal) or not isinstance(x, Signal):
        raise Unsupported("it fills in what depends on the input; use torch.where")
    return moved(function, x, mask, 0.0)
