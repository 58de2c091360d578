"""Measures whole data sets: batch after batch, in one process or several.

Only per-sample values are kept. What is done with them is in `summary.py`; how a batch is measured
is the measure's business.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor

from flexure.calling import map_tensors
from flexure.contracts import DataError, FlexureError
from flexure.measure.summary import PairedDifference, Summary
from flexure.per_sample import PerSample
from flexure.processes import Processes, current_processes
from flexure.progress import Progress, ProgressReporter

__all__ = ["PairedDifference", "Summary", "over"]

Result = TypeVar("Result", bound=PerSample)


def over(
    measure: Callable[..., Result],
    batches: Iterable[Any],
    *,
    seed: int = 0,
    progress: Progress = None,
    kept: MutableMapping[int, Result] | None = None,
) -> Summary[Result]:
    """A measure's values for every sample of the data.

    Several processes (`accelerate launch`, `torchrun`) each measure whole batches, in turn, and
    all get the same result, to the bit that of one process: everything random in a batch is drawn
    from a generator of that batch. All must be given the same batches in the same order; more
    processes than batches have nothing to do. An error in one ends all.

    A measure that checks derivatives (`flexure.curvature`, `check=True`) does so in every batch,
    which small batches pay for. To check once, call the measure on a few samples yourself, and
    give `over` the measure with `check=False`.

    Args:
        measure: `measure(x, y, *, generator)` or `measure(x, *, generator)`, giving a `PerSample`;
            `functools.partial(flexure.curvature, model)`, say. Which of the two it is, its
            signature says; one that can do without labels gets them where there are some.
        batches: of `(x, y)`; for a measure without labels `(x,)`, a tensor or a dict will do. Read
            once; their sizes may differ.
        seed: of everything random.
        progress: True: a bar on stderr, of the first process. A callable: (stage, done, total).
        kept: results of batches by their index, from 0: those that are there are not measured
            again, the others are put there at once, so that long work can go on where it ended.
            Each process looks for its own batches in its own `kept`. That they are results of the
            same measure on the same data is the caller's care; their sizes are checked.

    Returns:
        The values on the CPU, and their means, intervals and quantiles.

    Raises:
        DataError: no batches, one that is empty, of an unknown form or not of tensors, labels
            missing that the measure needs, or other batches on other processes.
        FlexureError: the measure cannot be called so or gives something else; its own errors; an
            error in another process.
    """
    caller = _Caller.of(measure)
    processes = current_processes()
    with (
        processes.together(),
        closing(ProgressReporter(progress if processes.is_first else None)) as reporter,
    ):
        work = _Work(caller, processes, seed, {} if kept is None else kept)
        total = _length(batches)
        for batch in batches:
            work.take(batch)
            reporter("measure", work.done, max(total, work.done))
        return work.summary()


@dataclass(frozen=True)
class _Caller(Generic[Result]):
    """How a measure is called: with labels, without, or either way."""

    measure: Callable[..., Result]
    with_labels: bool
    without_labels: bool

    @classmethod
    def of(cls, measure: Callable[..., Result]) -> _Caller[Result]:
        try:
            signature = inspect.signature(measure)
        except (TypeError, ValueError) as error:
            raise FlexureError(
                f"expected a measure whose arguments are known, got {measure!r}; wrap it in a "
                f"function (x, y, *, generator)"
            ) from error
        found = cls(measure, _binds(signature, 2), _binds(signature, 1))
        if not (found.with_labels or found.without_labels):
            raise FlexureError(
                f"expected a measure (x, y, *, generator) or (x, *, generator), got one with the "
                f"arguments {signature}; bind the others with functools.partial"
            )
        return found

    def __call__(self, x: Any, y: Any, index: int, generator: Generator) -> Result:
        if self.with_labels and (y is not None or not self.without_labels):
            if y is None:
                raise DataError(
                    f"expected batches (x, y), since the measure takes labels, got batch {index} "
                    f"without; give labels"
                )
            return self.measure(x, y, generator=generator)
        return self.measure(x, generator=generator)


class _Work(Generic[Result]):
    """What this process has measured, and how much of the data has gone by."""

    def __init__(
        self,
        caller: _Caller[Result],
        processes: Processes,
        seed: int,
        kept: MutableMapping[int, Result],
    ) -> None:
        self._caller, self._processes, self._seed, self._kept = caller, processes, seed, kept
        self._parts: dict[int, Result] = {}
        self._labels: int | None = 0
        self._seen = 0
        self.done = 0

    def take(self, batch: Any) -> None:
        """Measures the next batch, or leaves it to another process."""
        index, processes = self.done, self._processes
        x, y = _parted(batch, index)
        if self._labels is not None:
            self._labels = _digest(y, self._labels) if isinstance(y, Tensor) else None
        if processes.count > 1:
            self._seen = _digest((x, y), self._seen)
            if index == 0:
                self._check_same("first batch")
        if index % processes.count == processes.index:
            self._parts[index] = self._measured(index, x, y)
        if index % processes.count == processes.count - 1:
            processes.wait()  # now and then, so that an error ends all soon
        self.done += 1

    def summary(self) -> Summary[Result]:
        """All that the processes have measured."""
        if self._processes.count > 1:
            self._check_same("batches")
        found: dict[int, Result] = {}
        for gathered in self._processes.gathered(self._parts, "results"):
            found |= gathered
        if not found:
            raise DataError("expected at least one batch, got none; give data")
        parts = [found[index] for index in sorted(found)]
        kinds = sorted({type(part).__name__ for part in parts})
        if len(kinds) > 1:
            raise FlexureError(
                f"expected results of one measure, got {', '.join(kinds)}; keep the results of "
                f"each measure apart"
            )
        return Summary(type(parts[0]).joined(parts), self._labels)

    def _measured(self, index: int, x: Any, y: Any) -> Result:
        rows = _rows(x if y is None else y, index)
        part = self._kept.get(index)
        if part is not None:
            _check(part, rows, f"the kept batch {index}")
            return part
        found = self._caller(x, y, index, _generator(self._seed, index))
        _check(found, rows, f"batch {index}")
        self._kept[index] = part = _on_cpu(found)
        return part

    def _check_same(self, what: str) -> None:
        told = self._processes.gathered((self.done, self._seen), f"digests of the {what}")
        if len(set(told)) > 1:
            counts = ", ".join(str(done) for done, _ in told)
            raise DataError(
                f"expected the same batches on all {self._processes.count} processes, got other "
                f"{what} (numbers of batches: {counts}); give the whole data to each process, "
                f"unsharded and in the same order"
            )


def _binds(signature: inspect.Signature, positional: int) -> bool:
    try:
        signature.bind(*[None] * positional, generator=None)
    except TypeError:
        return False
    return True


def _parted(batch: Any, index: int) -> tuple[Any, Any]:
    """The inputs of a batch, and its labels or None."""
    if isinstance(batch, Tensor | Mapping):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) in (1, 2):
        return batch[0], batch[1] if len(batch) == 2 else None
    size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
    raise DataError(
        f"expected batches (x, y), got a {type(batch).__name__}{size} as batch {index}; inputs of "
        f"several tensors are a tuple in x"
    )


def _rows(tree: Any, index: int) -> int:
    """The samples of a batch: those of the first tensor in it."""
    sizes: list[int] = []

    def note(leaf: Tensor) -> Tensor:
        if leaf.dim():
            sizes.append(len(leaf))
        return leaf

    map_tensors(tree, note)
    if not sizes:
        raise DataError(
            f"expected tensors of samples in every batch, got {_kind(tree)} in batch {index}; "
            f"convert it with torch.as_tensor"
        )
    if not sizes[0]:
        raise DataError(f"expected samples in every batch, got none in batch {index}; drop it")
    return sizes[0]


def _kind(tree: Any) -> str:
    return f"a {type(tree).__module__}.{type(tree).__name__}"


def _check(part: Any, rows: int, where: str) -> None:
    if not isinstance(part, PerSample):
        raise FlexureError(
            f"expected the measure to give a PerSample, got {type(part).__name__} for {where}; "
            f"derive its result from flexure.per_sample.PerSample"
        )
    if len(part) != rows:
        raise FlexureError(
            f"expected values of the {rows} samples of {where}, got {len(part)}; a measure gives "
            f"one row a sample, and kept results are those of the same batches"
        )


def _on_cpu(part: Result) -> Result:
    """Without graphs, and without what the values are views of."""
    return replace(
        part, **{name: value.detach().cpu().clone() for name, value in part.samples().items()}
    )


def _generator(seed: int, index: int) -> Generator:
    """The batch's own, whoever measures it."""
    state = np.random.SeedSequence([seed % 2**64, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def _digest(tree: Any, start: int) -> int:
    """CRC-32 of all tensors' values, going on from `start`."""

    def add(leaf: Tensor) -> Tensor:
        nonlocal start
        flat = leaf.detach().cpu().contiguous().reshape(-1)
        start = zlib.crc32(flat.view(torch.uint8).numpy().data, start)
        return leaf

    map_tensors(tree, add)
    return start


def _length(batches: Iterable[Any]) -> int:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # an iterator, or a loader of a stream
        return 0
