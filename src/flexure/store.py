"""Finished parts of long work on disk, so that it resumes without losing one of them.

Each finished part is one safetensors file, written atomically, with its numbers as JSON in the
file's header. A fingerprint of everything that the parts depend on keeps files of different work
apart.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from flexure.contracts import FlexureError
from flexure.record import check_writable, to_json, write_bytes, write_json

__all__ = ["Store"]

_FINGERPRINT = "fingerprint.json"
_NUMBERS = "numbers"
_DIGEST = 32  # hexadecimal digits


class Store:
    """A folder of finished parts.

    Args:
        folder: made where it is missing.
        fingerprint: what the parts depend on, by name.
        holds: what the parts are, for messages.
        work: what they are parts of, for messages.

    Attributes:
        folder: where the parts are.
        digest: of the fingerprint, hexadecimal.

    Raises:
        FlexureError: the folder cannot be written, or holds parts of something else.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        fingerprint: Mapping[str, str],
        *,
        holds: str = "features",
        work: str = "search",
    ) -> None:
        text = json.dumps(dict(fingerprint), sort_keys=True)
        self.digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self.folder = check_writable(folder)
        path = self.folder / _FINGERPRINT
        if not path.exists():
            if any(self.folder.glob("*.safetensors")):
                raise FlexureError(
                    f"expected {str(self.folder)!r} to name what its {holds} belong to, got no "
                    f"{_FINGERPRINT}; give another folder to resume from, or delete this one"
                )
            write_json(path, dict(fingerprint))
        found = _read(path, holds)
        different = [key for key in fingerprint if found.get(key) != fingerprint[key]]
        if different:
            raise FlexureError(
                f"expected {str(self.folder)!r} to hold {holds} of this {work}, got one with "
                f"another {_differences(different, found, fingerprint)}; give another folder, or "
                f"delete {str(self.folder)!r} to start anew"
            )

    def get(self, part: str) -> dict[str, Tensor] | None:
        """What was stored for a part; None if nothing was, or the file is damaged."""
        try:
            return dict(load(self.path(part).read_bytes()))
        except (OSError, SafetensorError):
            return None

    def numbers(self, part: str) -> Any:
        """The numbers that were stored with a part, as JSON values; None if there are none."""
        try:
            data = self.path(part).read_bytes()
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            return json.loads(header["__metadata__"][_NUMBERS])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, part: str, tensors: Mapping[str, Tensor], numbers: Any = None) -> None:
        """Stores a finished part; `numbers` is anything `record.to_json` takes."""
        metadata = None if numbers is None else {_NUMBERS: json.dumps(to_json(numbers))}
        write_bytes(self.path(part), save(dict(tensors), metadata))

    def path(self, part: str) -> Path:
        """The file of a part."""
        return self.folder / f"{part}.safetensors"


def _differences(names: list[str], there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """What differs, with both values where people can read them."""
    return ", ".join(
        name if _is_digest(here[name]) else f"{name} ({there.get(name)} there, {here[name]} here)"
        for name in names
    )


def _is_digest(value: str) -> bool:
    return len(value) >= _DIGEST and set(value) <= set("0123456789abcdef")


def _read(path: Path, holds: str) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FlexureError(
            f"expected {str(path)!r} to name what the folder's {holds} belong to, got a file that "
            f"cannot be read ({error}); delete the folder, or give another one"
        ) from error
    return found if isinstance(found, dict) else {}
