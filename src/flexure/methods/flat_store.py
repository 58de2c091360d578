"""Finished trainings of a comparison on disk, one file each, with all values of single samples.

The folder and its fingerprint are `store`'s; what a run is, `flat_result.py`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from flexure.contracts import FlexureError
from flexure.measure.over import Summary
from flexure.methods.flat_methods import FlatMethod
from flexure.methods.flat_result import FlatRun
from flexure.methods.measures import MEASURES
from flexure.record import to_json
from flexure.store import Store

__all__ = ["FlatStore"]

_PLAIN = ("robust", "probabilities")
_MEASURED = ("test", "train")


class FlatStore:
    """The finished runs of one comparison.

    Args:
        folder: made where it is missing.
        fingerprint: what every run depends on, by name; methods and seeds are not part of it, so
            that more of them can be asked for later.

    Raises:
        FlexureError: the folder cannot be written, or holds runs of another comparison.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, str]) -> None:
        self._store = Store(folder, fingerprint, holds="runs", work="comparison")

    def get(self, method: FlatMethod, seed: int) -> FlatRun | None:
        """The stored run; None if there is none, or it is damaged.

        Raises:
            FlexureError: the file holds another run than its name says.
        """
        key = _key(method, seed)
        tensors, numbers = self._store.get(key), self._store.numbers(key)
        if tensors is None or numbers is None:
            return None
        if numbers.get("is") != self._identity(method, seed):
            raise FlexureError(
                f"expected {str(self._store.path(key))!r} to hold the run that its name says, got "
                f"another one; delete the file, or give another folder"
            )
        try:
            found = _read(numbers, tensors)
        except (KeyError, TypeError, IndexError):
            return None
        self._drop_state(method, seed)  # an interrupt may have come between the two in `put`
        return found

    def put(self, run: FlatRun, method: FlatMethod) -> None:
        """Stores a finished run, and drops the state that it went on from."""
        numbers: dict[str, Any] = {"is": self._identity(method, run.seed), "measures": {}}
        tensors = {name: t for name in _PLAIN if (t := getattr(run, name)) is not None}
        for field in fields(FlatRun):
            if field.name not in (*_PLAIN, *_MEASURED):
                numbers[field.name] = to_json(getattr(run, field.name))
        for split in _MEASURED:
            for measure, summary in getattr(run, split).items():
                key = f"{split}/{measure}"
                settings, labels = summary.result.settings(), summary.labels
                numbers["measures"][key] = {"settings": to_json(settings), "labels": labels}
                for name, value in summary.result.samples().items():
                    tensors[f"{key}/{name}"] = value
        whole = {name: value.contiguous() for name, value in tensors.items()}
        self._store.put(_key(method, run.seed), whole, numbers)
        self._drop_state(method, run.seed)

    def checkpoint(self, method: FlatMethod, seed: int) -> Path:
        """The folder for the state of a run that is not finished."""
        return self._store.folder / f"{_key(method, seed)}.checkpoint"

    def _drop_state(self, method: FlatMethod, seed: int) -> None:
        shutil.rmtree(self.checkpoint(method, seed), ignore_errors=True)

    def _identity(self, method: FlatMethod, seed: int) -> dict[str, Any]:
        """What a file must be of; compared as JSON values."""
        strengths = to_json(dict(method.strengths))
        return {
            "method": method.name,
            "strengths": strengths,
            "seed": seed,
            "comparison": self._store.digest,
        }


def _key(method: FlatMethod, seed: int) -> str:
    """A file name."""
    text = json.dumps(dict(method.strengths), sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return f"{method.name}-{digest}-{seed}"


def _read(numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FlatRun:
    given: dict[str, Any] = {name: tensors.get(name) for name in _PLAIN}
    for split in _MEASURED:
        given[split] = {
            key.partition("/")[2]: _summary(key, told, tensors)
            for key, told in numbers["measures"].items()
            if key.startswith(f"{split}/")
        }
    rest = [f.name for f in fields(FlatRun) if f.name not in given]
    return FlatRun(**given, **{name: _frozen(numbers[name]) for name in rest})


def _summary(key: str, told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Summary[Any]:
    kind = MEASURES[key.partition("/")[2]].result
    values = {f.name: t for f in fields(kind) if (t := tensors.get(f"{key}/{f.name}")) is not None}
    settings = {name: _frozen(value) for name, value in told["settings"].items()}
    return Summary(kind(**values, **settings), told["labels"])


def _frozen(value: Any) -> Any:
    """A JSON value as it was in a frozen result: there, sequences are tuples."""
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return value
