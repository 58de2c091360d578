"""Features on disk, so that an interrupted search resumes without losing a finished setting.

Each finished setting is one safetensors file, written atomically. A fingerprint of everything that
the features depend on keeps files of different searches apart.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from flexure.contracts import FlexureError
from flexure.record import check_writable, write_bytes, write_json

__all__ = ["FeatureStore"]

_FINGERPRINT = "fingerprint.json"


class FeatureStore:
    """A folder of features.

    Args:
        folder: made where it is missing.
        fingerprint: what the features depend on, by name.

    Raises:
        FlexureError: the folder cannot be written, or holds the features of something else.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, str]) -> None:
        self.folder = check_writable(folder)
        path = self.folder / _FINGERPRINT
        if not path.exists():
            if any(self.folder.glob("*.safetensors")):
                raise FlexureError(
                    f"expected {str(self.folder)!r} to name what its features belong to, got no "
                    f"{_FINGERPRINT}; give another folder to resume from, or delete this one"
                )
            write_json(path, dict(fingerprint))
        found = _read(path)
        different = [key for key in fingerprint if found.get(key) != fingerprint[key]]
        if different:
            raise FlexureError(
                f"expected {str(self.folder)!r} to hold features of this search, got one with "
                f"another {', '.join(different)}; give another folder to resume from, or delete "
                f"this one"
            )

    def get(self, setting: str) -> dict[str, Tensor] | None:
        """What was stored for a setting; None if nothing was, or the file is damaged."""
        try:
            return dict(load(self._path(setting).read_bytes()))
        except (OSError, SafetensorError):
            return None

    def put(self, setting: str, tensors: Mapping[str, Tensor]) -> None:
        """Stores a finished setting."""
        write_bytes(self._path(setting), save(dict(tensors)))

    def _path(self, setting: str) -> Path:
        return self.folder / f"{setting}.safetensors"


def _read(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FlexureError(
            f"expected {str(path)!r} to name what the folder's features belong to, got a file that "
            f"cannot be read ({error}); delete the folder, or give another one"
        ) from error
    return found if isinstance(found, dict) else {}
