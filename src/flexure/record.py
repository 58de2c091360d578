"""Result files: written atomically, as strict JSON, with what is needed to repeat the run.

What the numbers mean, and how they are shown, is not this module's business.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime, timezone
from enum import Enum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from flexure.contracts import FlexureError

__all__ = [
    "check_writable",
    "code_digest",
    "commit",
    "record",
    "to_json",
    "versions",
    "write_bytes",
    "write_json",
]

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

_PACKAGES = ("torch", "numpy", "flexure")
_SOURCES = (".py", ".c")


def record(*, config: Any, seed: int | None, numbers: Any) -> dict[str, Json]:
    """What a result file holds: the run's settings and numbers, and where they come from.

    Args:
        config: the settings that were used; anything `to_json` takes.
        seed: the seed of every random choice, None where there was none.
        numbers: the results; anything `to_json` takes.

    Returns:
        A dictionary with the keys `config`, `seed`, `numbers`, `versions`, `commit` (of the
        checkout that flexure runs from, None where there is none), `platform` and `date` (UTC,
        ISO 8601).

    Raises:
        FlexureError: something in `config` or `numbers` has no JSON form.
    """
    return {
        "config": to_json(config),
        "seed": seed,
        "numbers": to_json(numbers),
        "versions": to_json(versions()),
        "commit": commit(),
        "platform": platform.platform(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_json(path: str | os.PathLike[str], payload: Any) -> Path:
    """Writes `payload` as JSON; a reader sees the old file or the whole new one, never a part.

    Args:
        path: the file; its folder is made where it is missing.
        payload: anything `to_json` takes.

    Returns:
        The path.

    Raises:
        FlexureError: the folder cannot be written, or `payload` has no JSON form. The file that
            was there before is then unchanged.
    """
    text = json.dumps(to_json(payload), indent=2, ensure_ascii=False, allow_nan=False)
    return write_bytes(path, text.encode() + b"\n")


def write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Writes `content` atomically: a temporary file in the same folder, synced, then renamed.

    Raises:
        FlexureError: the folder cannot be written.
    """
    path = Path(path)
    folder = check_writable(path.parent)
    # Not mkstemp: its files are private to the user, and a result is an ordinary file.
    temporary = folder / f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise FlexureError(f"could not write {path}: {error}; choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """Makes `folder` where it is missing, and makes sure that files can be written in it.

    Call it before long work, so that the work is not lost at its end.

    Returns:
        The folder.

    Raises:
        FlexureError: it is not a folder, or files cannot be written in it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".flexure-"):
            pass
    except OSError as error:
        raise FlexureError(
            f"expected a folder that can be written, got {str(folder)!r} "
            f"({error.strerror or error}); choose another folder or change its permissions"
        ) from error
    return folder


def to_json(value: Any) -> Json:
    """`value` in strict JSON terms.

    Tensors and arrays become nested lists, dataclasses dictionaries of their public fields,
    objects with a `to_dict` what that returns, paths, devices and dtypes strings, sets sorted
    lists. JSON has no nan and no infinities: they become the strings `"nan"`, `"inf"` and
    `"-inf"`, which Python's `float` reads back.

    Raises:
        FlexureError: there is no such form.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Enum):
        return to_json(value.value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, torch.Tensor):
        return to_json(value.detach().cpu().tolist())
    if isinstance(value, np.ndarray | np.bool_):
        return to_json(value.tolist())
    if isinstance(value, Path | torch.device | torch.dtype):
        return str(value)
    return _container_to_json(value)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def commit() -> str | None:
    """The git commit of the checkout that flexure runs from, with `-dirty` where it was changed.

    None where flexure is installed without its repository, or git is missing.
    """
    here = Path(__file__).resolve()
    # An installation inside someone else's repository must not report that repository's commit.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    head = _git(here.parent, "rev-parse", "HEAD")
    changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    return head and head + ("-dirty" if changed else "")


@cache
def code_digest() -> str:
    """Digest of flexure's own source files, their names included: the same for the same code."""
    root = Path(__file__).resolve().parent
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in root.rglob("*") if path.suffix in _SOURCES):
        content = path.read_bytes()
        name = path.relative_to(root).as_posix()
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _container_to_json(value: Any) -> Json:
    if callable(getattr(value, "to_dict", None)) and not isinstance(value, type):
        return to_json(value.to_dict())
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if not field.name.startswith("_")]
        return {name: to_json(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(to_json(key)): to_json(item)
                for key, item in value.items()}  # fmt: skip
    if isinstance(value, list | tuple | range):
        return [to_json(item) for item in value]
    if isinstance(value, set | frozenset):
        return [to_json(item) for item in sorted(value)]
    raise FlexureError(
        f"expected numbers, strings, tensors, dataclasses and containers of them, got "
        f"{type(value).__name__}, which has no JSON form; convert it first"
    )


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command, None where it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
