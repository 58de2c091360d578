"""A file of nested containers of tensors and plain values, whole after a kill at any moment.

What is stored in it, and when, is not known here.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexure.contracts import FlexureError

__all__ = ["check_tree", "load_state", "save_state"]

STATE = "state.safetensors"
FORMAT = "1"


def save_state(folder: str | os.PathLike[str], tree: Any) -> None:
    """Writes `tree` so that a reader finds the old state or the new one, whole, and never a mix.

    That holds after a kill or a loss of power at any moment. What killed runs left over in the
    folder is removed; two runs that share a folder get an error, not each other's state.

    Args:
        folder: made where it is missing.
        tree: None, a bool, int, float or str, a tensor, or a dict (with str keys), list or tuple
            of such. Values come back bit by bit, tensors on the CPU, contiguous, each with memory
            of its own and without a gradient; other mappings come back as dicts.

    Raises:
        FlexureError: the folder cannot be written, or something in `tree` cannot be stored; the
            message says where it is. The old state is then unchanged.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save

    store = _Store()
    skeleton = json.dumps(_encode(tree, store, "state"), allow_nan=False)
    check = str(_checksum(skeleton, store.tensors))
    metadata = {"library": "flexure", "format": FORMAT, "skeleton": skeleton, "checksum": check}
    where = Path(folder)
    own = where / f".{STATE}.{os.getpid()}-{threading.get_ident()}.tmp"
    try:
        where.mkdir(parents=True, exist_ok=True)
        for left in where.glob(f".{STATE}.*.tmp"):
            left.unlink(missing_ok=True)
        # Not save_file: it writes through a temporary file with a name of its own choice.
        with own.open("wb") as file:
            file.write(save(store.tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        with safe_open(own, "pt"):  # what could not be read again must not replace the old state
            pass
        os.replace(own, where / STATE)
        _sync_folder(where)
    except (OSError, SafetensorError) as error:
        remedy = "choose a folder that can be written and that no other run uses"
        if isinstance(error, FileNotFoundError) and where.is_dir():
            remedy = (
                "most likely another training that runs now uses this folder and has removed what "
                "this one was writing; end one of them, or give each a folder of its own"
            )
        raise FlexureError(
            f"could not save the training state in {where}: {error}; {remedy}"
        ) from error
    finally:
        with suppress(OSError):
            own.unlink(missing_ok=True)


def load_state(folder: str | os.PathLike[str]) -> Any | None:
    """What `save_state` wrote last, or None where there is no state. Nothing is unpickled.

    Raises:
        FlexureError: the file is damaged, or not a state that flexure wrote.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(folder) / STATE
    try:
        # Read at once: safe_open opens a path twice, and a save between would mix two states.
        content = path.read_bytes()
        # Copies: these tensors are not aligned as torch's own memory is, and sums depend on that
        # in their last bit.
        tensors = {name: tensor.clone() for name, tensor in load(content).items()}
        metadata = _metadata(content)
        if metadata.get("library") != "flexure" or metadata.get("format") != FORMAT:
            raise ValueError(f"not a state of format {FORMAT} of this library")
        skeleton = metadata["skeleton"]
        if metadata["checksum"] != str(_checksum(skeleton, tensors)):
            raise ValueError("its content does not have its checksum")
        return _decode(json.loads(skeleton), tensors)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FlexureError(
            f"{path} is damaged: {error}; remove it to start the training anew"
        ) from error


def check_tree(tree: Any, name: str) -> None:
    """Checks, without copying anything, that `save_state` takes `tree`, called `name`.

    Raises:
        FlexureError: something in it cannot be stored; the message says where it is.
    """
    _encode(tree, _check_storable, name)


class _Store:
    """Collects tensors, ready to be written; a tensor's name is its number."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._memory: set[int] = set()

    def __call__(self, tensor: Tensor, path: str) -> str:
        """Its name in the file."""
        _check_storable(tensor, path)
        flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        memory = flat.untyped_storage().data_ptr()
        name = str(len(self.tensors))
        self.tensors[name] = flat.clone() if memory in self._memory else flat
        self._memory.add(memory)
        return name


def _check_storable(tensor: Tensor, path: str) -> str:
    kind = next((kind for kind, is_it in _NOT_STORABLE.items() if is_it(tensor)), None)
    if kind is not None:
        raise FlexureError(
            f"expected dense tensors with values, of a dtype that safetensors files have, got a "
            f"{kind} tensor at {path}; leave it out or convert it"
        )
    return ""


_NOT_STORABLE: dict[str, Callable[[Tensor], bool]] = {
    "meta": lambda tensor: tensor.is_meta,
    "quantised": lambda tensor: tensor.is_quantized,
    "sparse": lambda tensor: tensor.layout != torch.strided,
    "complex128": lambda tensor: tensor.dtype == torch.complex128,
}


def _metadata(content: bytes) -> dict[str, str]:
    """Of a whole safetensors file: a little-endian length of 8 bytes, then the header in JSON."""
    (length,) = struct.unpack("<Q", content[:8])
    return dict(json.loads(content[8 : 8 + length]).get("__metadata__", {}))


def _encode(value: Any, store: Callable[[Tensor, str], str], path: str) -> Any:
    """JSON for `value`; `store` takes its tensors with their paths, and returns names for them."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        # In hexadecimal, for Python refuses decimal forms of more than 4,300 digits.
        return int(value) if abs(value) < 2**63 else {"int": hex(value)}
    if isinstance(value, float):
        number = float(value)
        return number if math.isfinite(number) else {"float": struct.pack(">d", number).hex()}
    if isinstance(value, Tensor):
        return {"tensor": store(value, path)}
    if type(value) in (list, tuple):
        items = [_encode(item, store, f"{path}[{i}]") for i, item in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {k: _encode(v, store, f"{path}[{k!r}]") for k, v in value.items()}}
    raise FlexureError(
        f"expected tensors, numbers, strings, None, and lists, tuples and dicts (with str keys) "
        f"of them, got {type(value).__name__} at {path}; leave it out or convert it"
    )


def _decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value behind what `_encode` returned."""
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    return _DECODERS[kind](content, tensors)


_DECODERS: dict[str, Callable[[Any, Mapping[str, Tensor]], Any]] = {
    "dict": lambda content, tensors: {k: _decode(v, tensors) for k, v in content.items()},
    "tuple": lambda content, tensors: tuple(_decode(item, tensors) for item in content),
    "tensor": lambda content, tensors: tensors[content],
    "int": lambda content, _: int(content, 16),
    "float": lambda content, _: struct.unpack(">d", bytes.fromhex(content))[0],
}


def _checksum(skeleton: str, tensors: Mapping[str, Tensor]) -> int:
    """Of all that a file holds: a disk may lie where the format itself shows no damage."""
    total = zlib.crc32(skeleton.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def _sync_folder(folder: Path) -> None:
    # Without it a loss of power may undo the renaming; where folders cannot be opened (Windows),
    # the old state is then found, whole.
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
