"""A frozen network's features at any setting of the dials: from memory, from disk, or computed.

Which settings are wanted, and what is trained on them, is not known here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from flexure.contracts import FlexureError
from flexure.methods.features import FeatureReader
from flexure.methods.samples import Samples
from flexure.methods.steer import Steering
from flexure.progress import ProgressReporter
from flexure.store import Store

__all__ = ["Backbone", "Clock", "Dial", "Pair"]

Dial: TypeAlias = "tuple[float, float] | None"
"""(beta, c); None: the untouched network."""

Pair: TypeAlias = "tuple[Tensor, Tensor]"
"""Features of the train and of the validation samples, (N, D) each."""


class Clock:
    """Adds up the seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Times what runs inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent


class Backbone:
    """Features by dial setting, each computed once.

    Attributes:
        expected: how many settings will be asked for, for progress.
    """

    def __init__(
        self,
        reader: FeatureReader,
        steering: Steering,
        splits: Mapping[str, Samples],
        store: Store | None,
        clock: Clock,
        reporter: ProgressReporter,
    ) -> None:
        self._reader, self._steering, self._splits = reader, steering, splits
        self._store, self._clock, self._reporter = store, clock, reporter
        self._known: dict[Dial, Pair] = {}
        self._checked = False
        self.expected = 0

    @property
    def evaluated(self) -> int:
        """Dial settings whose train and validation features are known."""
        return sum(dial is not None for dial in self._known)

    def pair(self, dial: Dial) -> Pair:
        """Train and validation features."""
        if dial in self._known:
            return self._known[dial]
        stored = None if self._store is None else self._store.get(_name(dial))
        if stored is None or not self._whole(stored):
            with self._clock("features"):
                stored = {split: self._read(split, dial) for split in ("train", "val")}
            if self._store is not None:
                self._store.put(_name(dial), stored)
        elif not self._checked:
            self._check(dial, stored["train"])
        self._known[dial] = stored["train"], stored["val"]
        self._reporter("features", self.evaluated, max(self.expected, self.evaluated))
        return self._known[dial]

    def test(self, dial: Dial) -> Tensor:
        """Test features, (N, D). Never asked for before the choice is made."""
        with self._clock("test"):
            return self._read("test", dial)

    def _whole(self, stored: Mapping[str, Tensor]) -> bool:
        splits = [(stored.get(split), len(self._splits[split])) for split in ("train", "val")]
        return all(x is not None and x.dim() == 2 and len(x) == n for x, n in splits)

    def _check(self, dial: Dial, stored: Tensor) -> None:
        """Compares stored features with computed ones, once: code may change between two runs."""
        fresh = self._read("train", dial, first=True)
        old = stored[: len(fresh)]
        tiny = 1e-3 * float(fresh.abs().mean())
        if old.shape != fresh.shape or not torch.allclose(old, fresh, rtol=1e-3, atol=tiny):
            raise FlexureError(
                f"expected the stored features of {_name(dial)} to be what the model gives, got "
                f"others: the model's code has changed; give another folder to resume from"
            )
        self._checked = True

    def _read(self, split: str, dial: Dial, *, first: bool = False) -> Tensor:
        if dial is None:
            self._steering.remove()
            return self._reader(self._splits[split], "the untouched network", first=first)
        beta, c = dial
        self._steering.dial(beta, c)
        return self._reader(self._splits[split], f"beta {beta:g}, c {c:g}", first=first)


def _name(dial: Dial) -> str:
    """A file name."""
    return "untouched" if dial is None else f"beta{dial[0]!r}-c{dial[1]!r}"
