"""Values that were joined, by stacking or by writing beside each other, and what mixes them again.

Each joined tensor has a tensor of labels: which value an element comes from. Functions that move
elements, and those that combine some of them, are run on labels too, so that it is known whether an
element of their result comes from several values. Who calls what is seen by `sum_watch.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["STACKS", "Joins"]


@dataclass(frozen=True)
class _Joined:
    """What is known of a joined tensor.

    Attributes:
        labels: of its shape, int64; 0 where an element comes from none of the values.
        ndim: of the values that were joined.
    """

    labels: Tensor
    ndim: int

    @property
    def several(self) -> bool:
        """Whether elements of more than one value are here."""
        return len(_values(self.labels)) > 1


class Joins:
    """Which tensors are joined of several values that depend on the input."""

    def __init__(self) -> None:
        self._known: Any = WeakIdKeyDictionary()
        self._labels = itertools.count(1)

    def mixed(
        self,
        func: Any,
        name: str,
        args: Any,
        kwargs: Mapping[str, Any],
        inputs: Sequence[Tensor],
        out: Any,
    ) -> bool:
        """Whether a call combined elements of several joined values; follows them if not.

        A layer over the axis along which values were concatenated does not count: it is no sum in
        the sense of residual sums. Over an axis that stacking has made it does, as far as can be
        told.

        Args:
            func: what was called, outside of any function mode now.
            name: its name.
            args: its arguments.
            kwargs: the same.
            inputs: those of its arguments that depend on the input.
            out: its result.
        """
        if name in STACKS:
            self._join(func, args, kwargs, inputs, out)
            return False
        if name in _WRITES:
            self._write(name, args, inputs)
            return False
        source = next((x for x in inputs if x in self._known), None)
        if source is None:
            return False
        found: _Joined = self._known[source]
        plain = name.strip("_")
        alone = plain == "einsum" and len(list(_tensors(args))) == 1
        if plain in _REPLAYED or alone:
            try:
                return self._replayed(func, plain, (args, kwargs), source, out)
            except Exception:  # whatever labels, being integers, cannot do
                return found.several
        same = isinstance(out, Tensor) and out.shape == source.shape
        if same and plain not in _LAYERS:
            self._know(out, found)
            return False
        if plain not in _SAMPLEWISE and found.labels.ndim > found.ndim:
            return found.several
        first = plain in _LAST and args and args[0] is source
        return self._layer(found, found.labels.ndim - 1 if first else 1, out)

    def _know(self, x: Tensor, found: _Joined) -> None:
        if found.several and x.shape == found.labels.shape:
            self._known[x] = found

    def _join(self, func: Any, args: Any, kwargs: Any, inputs: Any, out: Any) -> None:
        parts = args[0] if args else kwargs.get("tensors", ())
        own = {id(x) for x in inputs}
        known = any(x in self._known for x in inputs)
        if (len(own) < 2 and not known) or "out" in kwargs:
            return
        labels = [self._labels_of(x) if id(x) in own else _filled(x, 0) for x in parts]
        others = {key: value for key, value in kwargs.items() if key != "tensors"}
        joined = func(labels, *args[1:], **others)
        self._know(out, _Joined(joined, max(x.ndim for x in parts)))

    def _labels_of(self, x: Tensor) -> Tensor:
        labels: Tensor = self._known[x].labels if x in self._known else _filled(x, self._new())
        return labels

    def _new(self) -> int:
        return next(self._labels)

    def _write(self, name: str, args: Any, inputs: Sequence[Tensor]) -> None:
        """Something was written into a part of a tensor, or into a view of one."""
        target, value = args[0], args[-1]
        root = target if target._base is None else target._base
        if not any(value is x for x in inputs) or not root.is_contiguous():
            return
        known = self._known.get(root)
        if known is None:
            signal = any(root is x for x in inputs) and name == "__setitem__"
            known = _Joined(_filled(root, self._new() if signal else 0), root.ndim)
        labels = known.labels.clone()
        start = target.storage_offset() - root.storage_offset()
        part = labels.as_strided(target.shape, target.stride(), start)
        if name == "__setitem__":
            part[args[1]] = self._new()
        else:
            part.fill_(self._new())
        # Kept though it holds one value as yet: another may come.
        for x in {id(each): each for each in (root, target)}.values():
            shown = labels if x is root else part
            self._known[x] = _Joined(shown, min(known.ndim, max(value.ndim, 1)))

    def _replayed(
        self, func: Any, name: str, call: tuple[Any, Any], source: Tensor, out: Any
    ) -> bool:
        found: _Joined = self._known[source]

        def run(labels: Tensor) -> list[Tensor]:
            args, kwargs = _replaced(call, source, labels)
            return list(_tensors(func(*args, **{k: v for k, v in kwargs.items() if k != "out"})))

        outs = list(_tensors(out))
        if name in _MOVES:
            for x, labels in zip(outs, run(found.labels), strict=True):
                self._know(x, _Joined(labels, found.ndim))
            return False
        labels = torch.zeros(outs[0].shape, dtype=torch.int64, device=found.labels.device)
        for label in _values(found.labels):
            part = run((found.labels == label).float())[0] > 0
            if bool((part & (labels > 0)).any()):
                return True
            labels[part] = label
        self._know(outs[0], _Joined(labels, found.ndim))
        return False

    def _layer(self, found: _Joined, axis: int, out: Any) -> bool:
        """A function that may combine all elements from an axis on, and no others."""
        labels = found.labels
        rows = labels.flatten(axis) if labels.ndim > axis else labels[..., None]
        kept = rows.amax(-1)
        if not bool(((rows == kept[..., None]) | (rows == 0)).all()):
            return labels.ndim > found.ndim and found.several
        for x in _tensors(out):
            if x.shape[: kept.ndim] == kept.shape:
                spread = kept.view(*kept.shape, *[1] * (x.ndim - kept.ndim)).expand(x.shape)
                self._know(x, _Joined(spread, min(found.ndim, x.ndim)))
        return False


def _filled(x: Tensor, label: int) -> Tensor:
    return torch.full(x.shape, label, dtype=torch.int64, device=x.device)


def _values(labels: Tensor) -> list[int]:
    found: list[int] = torch.unique(labels).tolist()
    return [value for value in found if value]


def _replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    """Nested arguments with a tensor in the place of another."""
    if value is old:
        return new
    if isinstance(value, dict):
        return {key: _replaced(item, old, new) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_replaced(item, old, new) for item in value)
    return value


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for each in values:
            yield from _tensors(each)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


STACKS = _names("stack cat concat concatenate hstack vstack dstack column_stack")
"""What puts values beside each other, by name."""

_WRITES = _names("__setitem__ copy_")

_MOVES = _names(
    "view view_as reshape reshape_as flatten unflatten ravel permute transpose swapaxes swapdims "
    "movedim moveaxis t T mT adjoint squeeze unsqueeze expand expand_as broadcast_to getitem "
    "narrow select index_select gather take_along_dim chunk split split_with_sizes tensor_split "
    "hsplit vsplit dsplit unbind unfold diagonal flip fliplr flipud roll rot90 tile repeat "
    "repeat_interleave pixel_shuffle pixel_unshuffle channel_shuffle atleast_1d atleast_2d "
    "atleast_3d contiguous clone detach"
)
"""Functions of which each element of the result is one of the argument's."""

_REPLAYED = _MOVES | _names(
    "sum mean nansum nanmean cumsum amax max aminmax avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d max_pool1d max_pool2d max_pool3d "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"
)
"""These, and those that combine elements so that a share of 0 or 1 stays above 0."""

_LAST = _names("linear matmul mm bmm mv")
"""Functions that combine elements along the last axis of their first argument."""

_SAMPLEWISE = _LAST | _names(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d lstm gru rnn_tanh "
    "rnn_relu"
)
"""Functions that leave samples apart."""

_LAYERS = _SAMPLEWISE | _names(
    "bilinear rmatmul dot einsum tensordot addmm addbmm baddbmm addmv cumprod logcumsumexp"
)
"""Functions that combine elements, though their results may have the shape of the argument."""
