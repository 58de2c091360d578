"""Finished runs of a comparison on disk: one file a run, and its adapter beside it.

The folder and its fingerprint are `store`'s; what a run is, `tune_result`'s.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flexure.contracts import FlexureError
from flexure.methods.arms import Trial
from flexure.methods.tune_result import Run
from flexure.record import to_json
from flexure.store import Store

__all__ = ["RunStore"]

_TENSORS = ("predictions", "betas", "cs")


class RunStore:
    """The finished runs of one comparison.

    Args:
        folder: made where it is missing.
        fingerprint: what every run depends on, by name; arms and seeds are not part of it, so
            that more of them can be asked for later.

    Raises:
        FlexureError: the folder cannot be written, or holds runs of another comparison.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, str]) -> None:
        self._store = Store(folder, fingerprint, holds="runs", work="comparison")

    def get(self, arm: str, trial: Trial, seed: int, *, samples: int, adapter: bool) -> Run | None:
        """The stored run; None if there is none, or it is incomplete or damaged.

        Args:
            arm: the arm's name.
            trial: the setting.
            seed: of the run.
            samples: test samples that it must have predictions of.
            adapter: whether what it learned must be there too.

        Raises:
            FlexureError: the file holds another run than its name says.
        """
        key = _key(arm, trial, seed)
        tensors, numbers = self._store.get(key), self._store.numbers(key)
        if tensors is None or numbers is None:
            return None
        if numbers.get("is") != self._identity(arm, trial, seed):
            raise FlexureError(
                f"expected {str(self._store.path(key))!r} to hold the run that its name says, got "
                f"another one; delete the file, or give another folder"
            )
        try:
            run = _read(numbers, tensors)
        except (KeyError, TypeError, IndexError):
            return None
        if run.failure is not None:
            return run
        there = not adapter or self.adapter(arm, trial, seed).exists()
        return run if there and len(run.predictions) == samples else None

    def put(self, run: Run, trial: Trial) -> None:
        """Stores a finished run."""
        numbers = run.to_dict()
        for name in _TENSORS:
            numbers.pop(name, None)
        numbers["is"] = self._identity(run.arm, trial, run.seed)
        numbers["sites"] = {"betas": list(run.betas), "cs": list(run.cs)}
        tensors = {"predictions": run.predictions}
        tensors |= {f"betas/{site}": values for site, values in run.betas.items()}
        tensors |= {f"cs/{site}": values for site, values in run.cs.items()}
        self._store.put(_key(run.arm, trial, run.seed), tensors, numbers)

    def adapter(self, arm: str, trial: Trial, seed: int) -> Path:
        """The folder for what a run learned."""
        return self._store.folder / f"{_key(arm, trial, seed)}.adapter"

    def checkpoint(self, arm: str, trial: Trial, seed: int) -> Path:
        """The folder for the state of a run that is not finished."""
        return self._store.folder / f"{_key(arm, trial, seed)}.checkpoint"

    def _identity(self, arm: str, trial: Trial, seed: int) -> dict[str, Any]:
        """What a file must be of; compared as JSON values."""
        settings = to_json(trial.settings)
        return {"arm": arm, "settings": settings, "seed": seed, "comparison": self._store.digest}


def _key(arm: str, trial: Trial, seed: int) -> str:
    """A file name."""
    return f"{arm}-{trial.digest}-{seed}"


def _read(numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Run:
    own = {name: numbers[name] for name in Run.__dataclass_fields__ if name not in _TENSORS}
    lists = {name: tuple(value) for name, value in own.items() if isinstance(value, list)}
    # Files keep tensors in an order of their own; the network's is in the numbers.
    sites: dict[str, Any] = {
        dial: {site: tensors[f"{dial}/{site}"] for site in numbers["sites"][dial]}
        for dial in ("betas", "cs")
    }
    return Run(**(own | lists), predictions=tensors["predictions"], **sites)
