"""Where the channels of a tensor are: known from the layer that made it, carried along.

`ChannelAxes` watches the functions of one forward pass. It never guesses from the number of
dimensions: what it cannot follow is unknown, and the caller is asked. Axes count from the end
(−1 last), so that they hold with and without a batch axis.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from flexure.units.catalogue import read_call

__all__ = ["ChannelAxes"]


class ChannelAxes:
    """Follows the channel axis through the functions of one forward pass.

    Tensors are known by identity and held weakly, so that nothing is left on them or kept alive.
    """

    def __init__(self) -> None:
        self._axes: Any = WeakIdKeyDictionary()
        self._weights: Any = WeakIdKeyDictionary()

    def of(self, x: Tensor) -> int | None:
        """The channel axis of `x`, or None where it is not known."""
        axis: int | None = self._axes.get(x)
        return axis

    def _is_weight(self, x: Tensor) -> bool:
        """Whether `x` is a parameter, or made of parameters alone (`weight.T`)."""
        return isinstance(x, torch.nn.Parameter) or x in self._weights

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Marks the outputs of `func(*args, **kwargs)`."""
        if isinstance(out, Tensor):
            outputs: Sequence[Any] = (out,)
        elif isinstance(out, (tuple, list)):
            outputs = out
        else:
            return
        inputs = [value for value in _flat([*args, *kwargs.values()]) if isinstance(value, Tensor)]
        constant = bool(inputs) and all(self._is_weight(x) for x in inputs)
        for output in outputs:
            if not isinstance(output, Tensor) or isinstance(output, torch.nn.Parameter):
                continue
            if constant:
                self._weights[output] = True
            # Of several outputs (attention and its weights) the first is the layer's.
            first = output is outputs[0] or getattr(func, "__name__", "") not in _PRODUCERS
            axis = self._axis(func, args, kwargs, inputs, output) if first else None
            # In place, the output is the input: what was known of it may no longer hold.
            if axis is None:
                self._axes.pop(output, None)
            else:
                self._axes[output] = axis

    def _axis(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        inputs: Sequence[Tensor],
        out: Tensor,
    ) -> int | None:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # a property of Tensor, such as x.T
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name in _PRODUCERS:
            return _PRODUCERS[name](inputs, out)
        if not inputs:
            return None
        x, axis = inputs[0], self.of(inputs[0])
        if name in _PRODUCTS:
            return self._product(inputs[-2:], out)
        if name in _NORMS:
            shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
            return -1 if len(shape) == 1 else axis
        if name in _JOINS:
            axes = {self.of(part) for part in inputs}
            return axes.pop() if len(axes) == 1 and x.ndim == out.ndim else None
        if name in _MOVES:
            return None if axis is None else _MOVES[name](x, axis, args[1:], kwargs, out)
        if name.rstrip("_") in _KEEPS or func in _POOLS or read_call(func, tuple(args), kwargs):
            return self._elementwise(inputs, out)
        return None

    def _product(self, inputs: Sequence[Tensor], out: Tensor) -> int | None:
        """x @ weight has its channels last, weight @ x before that; x @ y has none known."""
        if len(inputs) != 2:
            return None
        left, right = (x.ndim == 2 and self._is_weight(x) for x in inputs)
        if left == right:
            return None
        return -1 if right or out.ndim == 1 else -2

    def _elementwise(self, inputs: Sequence[Tensor], out: Tensor) -> int | None:
        """The axis that the inputs agree on, if the output kept that axis."""
        found = {
            axis
            for x in inputs
            if (axis := self.of(x)) is not None
            and x.ndim == out.ndim
            and x.shape[axis] == out.shape[axis]
        }
        return found.pop() if len(found) == 1 else None


def _flat(values: Sequence[Any]) -> Sequence[Any]:
    return [
        item
        for value in values
        for item in (value if isinstance(value, (tuple, list)) else (value,))
    ]


def _last(inputs: Sequence[Tensor], out: Tensor) -> int | None:
    return -1


def _first_after_batch(inputs: Sequence[Tensor], out: Tensor) -> int | None:
    return 1 - out.ndim if out.ndim > 1 else -1


def _after_batch(spatial: int) -> Callable[[Sequence[Tensor], Tensor], int]:
    return lambda inputs, out: -1 - spatial


_PRODUCERS: Mapping[str, Callable[[Sequence[Tensor], Tensor], int | None]] = {
    "linear": _last,
    "bilinear": _last,
    "embedding": _last,
    "multi_head_attention_forward": _last,
    "batch_norm": _first_after_batch,
    "group_norm": _first_after_batch,
    "instance_norm": _first_after_batch,
    **{
        f"conv{transposed}{n}d": _after_batch(n)
        for n in (1, 2, 3)
        for transposed in ("", "_transpose")
    },
}

_PRODUCTS = frozenset({"matmul", "mm", "__matmul__", "__rmatmul__", "addmm"})
_NORMS = frozenset({"layer_norm", "rms_norm"})
_JOINS = frozenset({"cat", "concat", "concatenate"})

# What leaves every element where it is, or moves it along an axis only. Anything else that is not
# named in this file makes the axis unknown.
_KEEPS = frozenset(
    f"{prefix}{name}{suffix}"
    for name in ("add", "sub", "mul", "truediv", "div", "pow", "neg")
    for prefix, suffix in (("", ""), ("__", ""), ("__r", ""), ("__i", ""), ("r", ""))
) | frozenset(
    re.findall(
        r"\w+",
        """
        true_divide divide multiply subtract negative positive square abs absolute exp exp2
        expm1 log log2 log10 log1p sqrt rsqrt reciprocal sign sin cos tan sinh cosh asin acos
        atan atan2 erf erfc floor ceil round trunc frac lerp addcmul addcdiv nan_to_num where
        masked_fill maximum minimum fmax fmin softmax log_softmax softmin normalize dropout
        dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout
        contiguous clone detach to type type_as float half bfloat16 double cpu cuda data real
        requires_grad copy zero fill alias local_response_norm avg_pool1d avg_pool2d avg_pool3d
        lp_pool1d lp_pool2d lp_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
        adaptive_avg_pool3d interpolate upsample pad expand expand_as flip roll cumsum cumprod
        """,
    )
)
_POOLS = frozenset(
    {
        *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
        *(F.max_pool1d, F.max_pool2d, F.max_pool3d),
    }
)


def _dims(values: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    found = list(values)
    found += [kwargs[name] for name in names if name in kwargs]
    if len(found) == 1 and isinstance(found[0], (tuple, list, torch.Size)):
        return list(found[0])
    return found


def _permute(x: Tensor, axis: int, values: Any, kwargs: Any, out: Tensor) -> int | None:
    order = [d % x.ndim for d in _dims(values, kwargs, ("dims",))]
    return int(order.index(axis % x.ndim)) - x.ndim


def _transpose(x: Tensor, axis: int, values: Any, kwargs: Any, out: Tensor) -> int | None:
    names = ("dim0", "dim1", "axis0", "axis1")
    a, b = (d % x.ndim for d in _dims(values, kwargs, names))
    position = axis % x.ndim
    return int({a: b, b: a}.get(position, position)) - x.ndim


def _reverse_last_two(x: Tensor, axis: int, values: Any, kwargs: Any, out: Tensor) -> int | None:
    return {-1: -2, -2: -1}.get(axis, axis) if x.ndim > 1 else axis


def _movedim(x: Tensor, axis: int, values: Any, kwargs: Any, out: Tensor) -> int | None:
    moved = torch.movedim(torch.empty(range(1, x.ndim + 1), device="meta"), *values, **kwargs)
    shape: list[int] = list(moved.shape)
    return shape.index(axis % x.ndim + 1) - x.ndim


def _reshape(x: Tensor, axis: int, values: Any, kwargs: Any, out: Tensor) -> int | None:
    """The axis survives where as many elements precede it and it has the same size.

    In a batch of one, a channel axis that becomes the first would swallow the batch of others.
    """
    position = axis % x.ndim
    before, size = prod(x.shape[:position]), x.shape[position]
    first = min(position, 1)
    fitting = [
        j for j in range(first, out.ndim) if prod(out.shape[:j]) == before and out.shape[j] == size
    ]
    return fitting[0] - out.ndim if len(fitting) == 1 else None


def _reduce(x: Tensor, axis: int, values: Any, kwargs: Any, out: Tensor) -> int | None:
    if x.ndim == out.ndim:
        return axis if x.shape[axis] == out.shape[axis] else None
    named = kwargs.get("dim", values[0] if values else None)
    if named is None:
        return None
    gone = {d % x.ndim for d in (named if isinstance(named, (tuple, list)) else (named,))}
    position = axis % x.ndim
    if position in gone:
        return None
    before = sum(1 for d in gone if d < position)
    return position - before - out.ndim


def _keep_if_same(x: Tensor, axis: int, values: Any, kwargs: Any, out: Tensor) -> int | None:
    """Splits and cuts: the number of dimensions stays, and with it the axis."""
    return axis if x.ndim == out.ndim else None


def _index(x: Tensor, axis: int, values: Any, kwargs: Any, out: Tensor) -> int | None:
    key = values[0] if isinstance(values[0], tuple) else (values[0],)
    if any(isinstance(part, (Tensor, list)) for part in key):
        return axis if x.ndim == out.ndim and x.shape[axis] == out.shape[axis] else None
    used = sum(part is not None and part is not Ellipsis for part in key)
    filled: list[Any] = []
    for part in key if Ellipsis in [p for p in key if not isinstance(p, slice)] else (*key, ...):
        filled += [slice(None)] * (x.ndim - used) if part is Ellipsis else [part]
    source, target = 0, 0
    for part in filled:
        if part is None:
            target += 1
            continue
        if source == axis % x.ndim:
            return target - out.ndim if isinstance(part, slice) else None
        source += 1
        target += isinstance(part, slice)
    return None


_MOVES: Mapping[str, Callable[[Tensor, int, Any, Any, Tensor], int | None]] = {
    "permute": _permute,
    **dict.fromkeys(("transpose", "transpose_", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(("T", "mT", "H", "mH", "t", "adjoint"), _reverse_last_two),
    **dict.fromkeys(("movedim", "moveaxis"), _movedim),
    **dict.fromkeys(
        (
            *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"),
            *("squeeze_", "unsqueeze_", "view_as", "reshape_as"),
        ),
        _reshape,
    ),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "select", "unbind"), _reduce),
    **dict.fromkeys(("chunk", "split", "tensor_split", "narrow"), _keep_if_same),
    "__getitem__": _index,
}
