"""What tells one training from another: descriptions of what plugs in, digests of tensors.

Which of them must agree for a training to go on is `flexure.train.resume`'s.
"""

from __future__ import annotations

import functools
import types
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexure.calling import map_tensors

__all__ = ["describe", "digest"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def describe(value: Any, own: Collection[int] = ()) -> str:
    """A description that is the same in another process, and another for other settings.

    Functions are described by their qualified names, dataclasses by their fields, tensors and
    modules by a digest of their values, other objects by their class and plain attributes. Two
    functions of one name, or two closures with other contents, are not told apart.

    Args:
        value: what plugs into a training.
        own: the `id` of tensors that training itself changes: their values are left out.
    """
    for kinds, description in _DESCRIPTIONS:
        if isinstance(value, kinds):
            return description(value, own)
    return _object(value, own)


def digest(value: Any, start: int = 0) -> int:
    """CRC-32 of the bytes, dtypes and shapes of all tensors in a structure, in their order."""

    def add(leaf: Tensor) -> Tensor:
        nonlocal start
        start = zlib.crc32(f"{leaf.dtype} {tuple(leaf.shape)}".encode(), start)
        dense = leaf.detach() if leaf.layout == torch.strided else leaf.detach().to_dense()
        flat = dense.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        start = zlib.crc32(flat.view(torch.uint8).numpy().data, start)
        return leaf

    map_tensors(value, add)
    return start


def _object(value: Any, own: Collection[int]) -> str:
    """Of a dataclass its fields, of anything else its plain attributes."""
    if is_dataclass(value):
        given = {entry.name: getattr(value, entry.name) for entry in fields(value)}
    else:
        attributes = getattr(value, "__dict__", {})
        given = {key: item for key, item in attributes.items() if isinstance(item, _PLAIN)}
    listed = ", ".join(f"{key}={describe(item, own)}" for key, item in given.items())
    return f"{_name(type(value))}({listed})"


def _module(value: nn.Module, own: Collection[int]) -> str:
    tensors = [*value.parameters(), *value.buffers()]
    values = digest([tensor for tensor in tensors if id(tensor) not in own])
    settings = {key: item for key, item in vars(value).items() if key != "training"}
    listed = ", ".join(f"{k}={v!r}" for k, v in settings.items() if isinstance(v, _PLAIN))
    return f"{_name(type(value))}({listed}) with values {values:08x}"


def _tensor(value: Tensor, own: Collection[int]) -> str:
    values = "" if id(value) in own else f" with values {digest(value):08x}"
    return f"tensor {tuple(value.shape)}{values}"


def _mapping(value: Mapping[Any, Any], own: Collection[int]) -> str:
    return f"{{{', '.join(f'{key!r}: {describe(item, own)}' for key, item in value.items())}}}"


def _sequence(value: Any, own: Collection[int]) -> str:
    return f"({', '.join(describe(item, own) for item in value)})"


def _partial(value: functools.partial[Any], own: Collection[int]) -> str:
    given = describe((value.args, value.keywords), own)
    return f"partial of {describe(value.func, own)} with {given}"


def _method(value: types.MethodType, own: Collection[int]) -> str:
    return f"{_name(value.__func__)} of {describe(value.__self__, own)}"


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


_DESCRIPTIONS: tuple[tuple[Any, Callable[[Any, Collection[int]], str]], ...] = (
    (_PLAIN, lambda value, own: repr(value)),
    (Tensor, _tensor),
    (nn.Module, _module),
    (Mapping, _mapping),
    ((tuple, list), _sequence),
    (functools.partial, _partial),
    (types.MethodType, _method),
    ((types.FunctionType, types.BuiltinFunctionType, type), lambda value, own: _name(value)),
)
