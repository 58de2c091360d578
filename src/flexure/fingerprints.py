"""Digests of models, tensors and settings: what tells that stored work belongs to them.

Where digests are written, and what they are compared with, is `store`'s business.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["content", "described", "fingerprint", "tensor_digest"]

_BYTES = 16


def fingerprint(model: nn.Module) -> str:
    """Digest of a model's class and description, and of its tensors with their names."""
    digest = hashlib.blake2b(f"{_kind(model)} {_lasting(repr(model))}".encode(), digest_size=_BYTES)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(content(tensor))
    return digest.hexdigest()


def content(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def tensor_digest(tensor: Tensor) -> str:
    """Digest of a tensor's shape, dtype and values."""
    digest = hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype} ".encode(), digest_size=_BYTES)
    digest.update(content(tensor))
    return digest.hexdigest()


def described(value: Any) -> str:
    """A text that is the same for the same settings, in another run of Python too.

    Of a dataclass, its fields with their names; of models, tensors and arrays of NumPy, digests; of
    functions, their code, defaults and the values that they enclose; of objects without a `repr` of
    their own, their attributes; of anything else its `repr`, without addresses in memory. What
    these do not show, does not tell two apart: what a function reads from its module, say.
    """
    return _described(value, ())


def _described(value: Any, around: tuple[int, ...]) -> str:
    """The text; of what it is inside of, by identity, no more than its class."""
    if id(value) in around:
        return f"{_kind(value)}(...)"

    def inner(part: Any) -> str:
        return _described(part, (*around, id(value)))

    for kind, text in _TEXTS.items():
        if isinstance(value, kind):
            return text(value, inner)
    if is_dataclass(value) and not isinstance(value, type):
        inside = ", ".join(f"{f.name}={inner(getattr(value, f.name))}" for f in fields(value))
        return f"{_kind(value)}({inside})"
    own: Any = type(value)
    if own.__repr__ is object.__repr__ and hasattr(value, "__dict__"):
        return f"{_kind(value)}({inner(vars(value))})"
    return _lasting(repr(value))


def _of_array(value: np.ndarray[Any, Any]) -> str:
    head = f"array {value.shape} {value.dtype} "
    if value.dtype.hasobject:
        return f"{head}{described(value.tolist())}"
    return hashlib.blake2b(head.encode() + value.tobytes(), digest_size=_BYTES).hexdigest()


def _of_function(value: FunctionType, inner: _Inner) -> str:
    cells = value.__closure__ or ()
    held = [inner(cell.cell_contents) if _is_filled(cell) else "" for cell in cells]
    given = inner([value.__defaults__, value.__kwdefaults__])
    return f"{value.__module__}.{value.__qualname__}({inner(value.__code__)}, {given}, {held})"


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # of a name that has no value yet
        return False


def _of_code(value: CodeType, inner: _Inner) -> str:
    """Digest of what runs, wherever it is written."""
    parts = [value.co_names, value.co_varnames, value.co_freevars, value.co_consts]
    text = f"{value.co_argcount} {value.co_flags} {[inner(part) for part in parts]}"
    return hashlib.blake2b(text.encode() + value.co_code, digest_size=_BYTES).hexdigest()


def _of_mapping(value: Mapping[Any, Any], inner: _Inner) -> str:
    return f"{{{', '.join(f'{inner(key)}: {inner(item)}' for key, item in value.items())}}}"


_Inner: TypeAlias = Callable[[Any], str]

_TEXTS: Mapping[Any, Callable[[Any, _Inner], str]] = {
    str | bytes: lambda value, inner: repr(value),
    nn.Module: lambda value, inner: fingerprint(value),
    Tensor: lambda value, inner: tensor_digest(value),
    np.ndarray: lambda value, inner: _of_array(value),
    FunctionType: _of_function,
    CodeType: _of_code,
    MethodType: lambda value, inner: f"{inner(value.__self__)}.{inner(value.__func__)}",
    partial: lambda value, inner: f"partial{inner([value.func, value.args, value.keywords])}",
    tuple | list: lambda value, inner: f"[{', '.join(map(inner, value))}]",
    Mapping: _of_mapping,
    set | frozenset: lambda value, inner: f"set{sorted(map(inner, value))}",
}
"""Class -> (value, what describes its parts) -> text, the first that fits."""


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _lasting(text: str) -> str:
    """Without addresses, which differ from run to run."""
    return re.sub(r"0x[0-9a-f]+", "", text)
