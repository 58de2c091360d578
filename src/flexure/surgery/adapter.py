"""Adapter files: `adapter_config.json` and `adapter_model.safetensors` in one folder.

The files of every method. What the structure and the tensors mean is the method's business; how a
plan of sites becomes a structure is `plan_file.py`'s. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexure.contracts import AdapterError, FlexureError
from flexure.record import write_bytes, write_json

__all__ = ["CONFIG", "TENSORS", "AdapterFile", "read_adapter", "write_adapter"]

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
FORMAT = 1
_DIGEST = "digest"
_OWN = frozenset({"format", "library", "method", "settings", _DIGEST})


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter folder holds.

    Attributes:
        method: which method wrote it.
        settings: the method's own, JSON values.
        structure: where things are in the model, JSON values; the keys `format`, `library`,
            `method`, `settings` and `digest` are taken.
        tensors: named tensors of the method.
    """

    method: str
    settings: Mapping[str, Any]
    structure: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def write_adapter(folder: str | os.PathLike[str], adapter: AdapterFile) -> None:
    """Writes both files, each atomically: a reader never sees half a file.

    Both are complete before either takes its place: an interrupted save leaves what was there. Each
    holds a digest of the tensors, so that files of two saves are told apart, and damage is seen.

    Raises:
        AdapterError: the folder cannot be written.
    """
    from safetensors.torch import save

    where = Path(folder)
    config = {
        "format": FORMAT,
        "library": "flexure",
        "method": adapter.method,
        "settings": adapter.settings,
        **adapter.structure,
    }
    # Copies: two names of one tensor, as of tied weights, are refused by the format.
    copies = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in adapter.tensors.items()
    }
    digest = _digest(copies)
    parts = {name: where / f".{name}.{os.getpid()}" for name in (TENSORS, CONFIG)}
    try:
        where.mkdir(parents=True, exist_ok=True)
        # Not save_file: its files are private to the user, and an adapter is an ordinary file.
        write_bytes(parts[TENSORS], save(copies, metadata={_DIGEST: digest}))
        write_json(parts[CONFIG], {**config, _DIGEST: digest})
        for name, part in parts.items():
            os.replace(part, where / name)
    except (OSError, FlexureError) as error:
        raise AdapterError(f"cannot write the adapter to {where}: {error}") from error
    finally:
        for part in parts.values():
            with suppress(OSError):
                part.unlink(missing_ok=True)


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFile:
    """Reads an adapter folder.

    Raises:
        AdapterError: a file is missing, damaged, or not flexure's.
    """
    where = Path(folder)
    config = _read_config(where / CONFIG)
    tensors = _read_tensors(where / TENSORS, config.get(_DIGEST))
    method, settings = config.get("method"), config.get("settings")
    if not isinstance(method, str) or not isinstance(settings, dict):
        raise AdapterError(
            f"{where / CONFIG} is damaged: expected a method and its settings, got {method!r} and "
            f"{settings!r}; save the adapter again"
        )
    structure = {key: value for key, value in config.items() if key not in _OWN}
    return AdapterFile(method, settings, structure, tensors)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"no adapter at {path.parent}: {path.name} is missing") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise AdapterError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("library") != "flexure":
        raise AdapterError(f"{path} is not a flexure adapter; it was written by another library")
    if config.get("format") != FORMAT:
        raise AdapterError(
            f"{path} has format {config.get('format')!r}, expected {FORMAT}; update flexure"
        )
    return config


def _read_tensors(path: Path, digest: object) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as opened:
            own = (opened.metadata() or {}).get(_DIGEST)
        tensors = dict(load_file(path))
    except FileNotFoundError as error:
        raise AdapterError(f"no adapter at {path.parent}: {path.name} is missing") from error
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} is damaged: {error}; save the adapter again") from error
    # Steerings were once saved without: then neither file has one.
    if own != digest:
        raise AdapterError(
            f"expected two files of one save in {path.parent}, got those of two, one of them "
            f"interrupted, or changed by another program; save the adapter again"
        )
    if own is not None and own != _digest(tensors):
        raise AdapterError(
            f"{path} is damaged: expected the tensors that were saved, of digest {own}, got others "
            f"of the same size; save the adapter again"
        )
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
