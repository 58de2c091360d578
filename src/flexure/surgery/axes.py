"""Where the channels of a tensor are: known from the layer that made it, carried along.

`ChannelAxes` watches the functions of one forward pass. It never guesses from the number of
dimensions: what it cannot follow is unknown, and the caller is asked. Axes count from the end
(−1 last), so that they hold with and without a batch axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

__all__ = ["ChannelAxes"]

_MARK = "_flexure_channel_axis"
_WEIGHT = "_flexure_weight"


class ChannelAxes:
    """Follows the channel axis through the functions of one forward pass.

    The axis is remembered on the tensor objects themselves, so that nothing outlives them.
    """

    def of(self, x: Tensor) -> int | None:
        """The channel axis of `x`, or None where it is not known."""
        axis = getattr(x, _MARK, None)
        return axis if isinstance(axis, int) else None

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Marks the outputs of `func(*args, **kwargs)`."""
        if isinstance(out, Tensor):
            outputs: Sequence[Any] = (out,)
        elif isinstance(out, (tuple, list)):
            outputs = out
        else:
            return
        inputs = [value for value in _flat([*args, *kwargs.values()]) if isinstance(value, Tensor)]
        constant = bool(inputs) and all(_is_weight(x) for x in inputs)
        for output in outputs:
            if not isinstance(output, Tensor) or isinstance(output, torch.nn.Parameter):
                continue
            setattr(output, _WEIGHT, constant)
            setattr(output, _MARK, self._axis(func, args, kwargs, inputs, output))

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
        if name in _MOVES:
            return None if axis is None else _MOVES[name](x, axis, args[1:], kwargs, out)
        if name in _UNKNOWN:
            return None
        return self._elementwise(inputs, out)

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


def _is_weight(x: Tensor) -> bool:
    """Whether `x` is a parameter, or made of parameters alone (`weight.T`)."""
    return isinstance(x, torch.nn.Parameter) or bool(getattr(x, _WEIGHT, False))


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


def _matmul(inputs: Sequence[Tensor], out: Tensor) -> int | None:
    """x @ weight has its channels last, weight @ x before that; x @ y has none known."""
    if len(inputs) != 2:
        return None
    left, right = (x.ndim == 2 and _is_weight(x) for x in inputs)
    if left == right:
        return None
    return -1 if right else -2


def _layer_norm(inputs: Sequence[Tensor], out: Tensor) -> int | None:
    if len(inputs) > 1 and inputs[1].ndim != 1:
        axis = getattr(inputs[0], _MARK, None)
        return axis if isinstance(axis, int) else None
    return -1


_PRODUCERS: Mapping[str, Callable[[Sequence[Tensor], Tensor], int | None]] = {
    "linear": _last,
    "bilinear": _last,
    "addmm": _last,
    "embedding": _last,
    "layer_norm": _layer_norm,
    "rms_norm": _last,
    "multi_head_attention_forward": _last,
    "matmul": _matmul,
    "mm": _matmul,
    "__matmul__": _matmul,
    "__rmatmul__": _matmul,
    "batch_norm": _first_after_batch,
    "group_norm": _first_after_batch,
    "instance_norm": _first_after_batch,
    **{
        f"conv{transposed}{n}d": _after_batch(n)
        for n in (1, 2, 3)
        for transposed in ("", "_transpose")
    },
}

_UNKNOWN = frozenset({"bmm", "baddbmm", "einsum", "tensordot", "gather", "outer", "cdist", "roll"})


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
    """The axis survives where as many elements precede it and it has the same size."""
    position = axis % x.ndim
    before, size = prod(x.shape[:position]), x.shape[position]
    fitting = [j for j in range(out.ndim) if prod(out.shape[:j]) == before and out.shape[j] == size]
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
    """Splits, pads, pools, resizes: the number of dimensions stays, and with it the axis."""
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
