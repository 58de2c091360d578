"""Finished batches of measures on disk: one file a batch, which resumes bit by bit.

The folder and its fingerprint are `store`'s; what the values mean is the measures' business.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import fields
from typing import Any, TypeVar

from flexure.per_sample import PerSample
from flexure.store import Store

__all__ = ["KeptBatches", "MeasuredStore"]

Result = TypeVar("Result", bound=PerSample)


class MeasuredStore:
    """The finished batches of one measurement.

    Args:
        folder: made where it is missing.
        fingerprint: what the values of every batch depend on, by name; which measures were asked
            for is not part of it, so that more of them can be asked for later.

    Raises:
        FlexureError: the folder cannot be written, or holds batches of another measurement.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, str]) -> None:
        self._store = Store(folder, fingerprint, holds="batches", work="measurement")

    def of(self, place: int, measure: str, result: type[Result]) -> KeptBatches[Result]:
        """The batches of one measure of one model, the `place`-th of the measurement."""
        return KeptBatches(self._store, f"{measure}-{place}", result)


class KeptBatches(MutableMapping[int, Result]):
    """Results by the index of their batch, as `over` takes them; a damaged file counts as none."""

    def __init__(self, store: Store, prefix: str, result: type[Result]) -> None:
        self._store, self._prefix, self._result = store, prefix, result

    def __getitem__(self, index: int) -> Result:
        tensors, settings = (
            read(self._key(index)) for read in (self._store.get, self._store.numbers)
        )
        if tensors is None or settings is None:
            raise KeyError(index)
        values = tensors | {name: _frozen(value) for name, value in settings.items()}
        if values.keys() != {field.name for field in fields(self._result)}:
            raise KeyError(index)
        return self._result(**values)

    def __setitem__(self, index: int, result: Result) -> None:
        tensors = {name: value.contiguous() for name, value in result.samples().items()}
        self._store.put(self._key(index), tensors, result.settings())

    def __delitem__(self, index: int) -> None:
        try:
            self._store.path(self._key(index)).unlink()
        except FileNotFoundError as error:
            raise KeyError(index) from error

    def __iter__(self) -> Iterator[int]:
        paths = self._store.folder.glob(f"{self._prefix}-*.safetensors")
        return iter(sorted(int(path.stem.rpartition("-")[2]) for path in paths))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _key(self, index: int) -> str:
        return f"{self._prefix}-{index:06d}"


def _frozen(value: Any) -> Any:
    """A JSON value as it was in a frozen result: there, sequences are tuples."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
