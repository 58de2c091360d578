"""Digests of models, tensors and settings: what tells that stored work belongs to them.

Where digests are written, and what they are compared with, is `store`'s business.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

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

    Of a dataclass, its fields with their names; of models and tensors, digests; of anything else
    its `repr`, without addresses in memory: what that does not show, does not tell two apart.
    """
    if isinstance(value, nn.Module):
        return fingerprint(value)
    if isinstance(value, Tensor):
        return tensor_digest(value)
    if is_dataclass(value) and not isinstance(value, type):
        inside = ", ".join(f"{f.name}={described(getattr(value, f.name))}" for f in fields(value))
        return f"{_kind(value)}({inside})"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(described, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {described(item)}' for key, item in value.items())}}}"
    return _lasting(repr(value))


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _lasting(text: str) -> str:
    """Without addresses, which differ from run to run."""
    return re.sub(r"0x[0-9a-f]+", "", text)
