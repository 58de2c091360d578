"""The batches of one epoch: the same ones for the same epoch, from any batch on.

What a batch looks like is not known here, apart from its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from flexure.contracts import Batches, DataError
from flexure.data.batches import PreparedBatches
from flexure.processes import Processes
from flexure.train.checkpoint import rng_state, set_rng_state
from flexure.train.identity import digest

__all__ = ["Feed"]


class Feed:
    """Hands out the batches of each epoch, several at a time, and can start amid an epoch."""

    def __init__(
        self, batches: Batches, *, at_once: int, processes: Processes, resumable: bool
    ) -> None:
        self._batches = batches
        self._at_once = at_once
        self._processes = processes
        self._resumable = resumable
        self._start: dict[str, Any] | None = None
        self._first: dict[str, Any] | None = None

    def __len__(self) -> int:
        """Batches in an epoch; 0 where nobody knows."""
        try:
            return len(self._batches)  # type: ignore[arg-type]
        except TypeError:
            return 0

    @property
    def generators(self) -> int:
        """How many generators of its own decide the order of the batches."""
        return len(_generators(self._batches))

    def check(self, position: dict[str, Any]) -> None:
        """Checks, by drawing it again, that the first batch of a saved epoch is still the same.

        Args:
            position: what `tree` returned: of the epoch that ran, or else of the one before.

        Raises:
            DataError: it is another one.
        """
        self._first = first = position["first"]
        if first is None:
            return
        now = self._state()
        self._restore(first["start"])
        _announce(self._batches, first["epoch"])
        self._check_first(list(islice(self._batches, 1)))
        self._restore(now)

    def groups(self, epoch: int, *, resumed: dict[str, Any] | None) -> Iterator[list[Any]]:
        """The batches of an epoch, `at_once` in each list, and what remains in the last.

        Args:
            epoch: its number, from 0.
            resumed: what `tree` returned amid this epoch; None: from its first batch.

        Raises:
            DataError: there are none, fewer than were done already, or others on other processes.
        """
        if resumed is not None:
            self._restore(resumed["start"])
        if self._resumable:  # not for nothing: an epoch may be a single small batch
            self._start = self._state()
        _announce(self._batches, epoch)
        batches = iter(self._batches)
        done = 0 if resumed is None else resumed["done"]
        if done:
            self._check_first(list(islice(batches, 1)))
        if sum(1 for _ in islice(batches, done - 1 if done else 0)) < done - 1:
            raise DataError(
                f"expected at least the {done} batches that epoch {epoch} of the checkpoint has "
                f"done, got fewer; train on the same data, or choose another folder"
            )
        if resumed is not None and done:
            set_rng_state(resumed["now"])
        first = True
        while True:
            group = list(islice(batches, self._at_once))
            self._check_same(group, first)
            if not group:
                break
            if first and not done and self._resumable:
                self._first = {"epoch": epoch, "start": self._start, "digest": digest(group[:1])}
            first = False
            yield group
        if first and not done:
            raise DataError("expected at least one batch in every epoch, got none")

    def tree(self, done: int) -> dict[str, Any]:
        """Where an epoch is after `done` batches, for a file; call it before the next is drawn."""
        start = self._start if done else self._state()
        return {"start": start, "done": done, "now": rng_state(), "first": self._first}

    def _state(self) -> dict[str, Any]:
        """Of all generators that decide the order of the batches."""
        return {"rng": rng_state(), "own": [own.get_state() for own in _generators(self._batches)]}

    def _restore(self, state: dict[str, Any]) -> None:
        set_rng_state(state["rng"])
        for generator, own in zip(_generators(self._batches), state["own"], strict=True):
            generator.set_state(own)

    def _check_first(self, drawn: list[Any]) -> None:
        first = self._first
        if first is not None and digest(drawn) != first["digest"]:
            raise DataError(
                f"expected the data of the checkpoint, got another first batch in epoch "
                f"{first['epoch']}; train on the same data in the same order (batches that shuffle "
                f"must restart with the generators of torch, Python or numpy, a `generator` of "
                f"their own or `set_epoch`), or choose another folder"
            )

    def _check_same(self, group: list[Any], first: bool) -> None:
        processes = self._processes
        if processes.count == 1:
            return
        own = [0.0] * (2 * processes.count)
        own[2 * processes.index] = float(len(group))
        own[2 * processes.index + 1] = float(digest(group) if first else 0)
        found = processes.sums(own)
        if len(set(found[::2])) > 1:
            raise DataError(
                f"expected as many batches on each of the {processes.count} processes, got "
                f"{', '.join(f'{n:.0f} on process {i}' for i, n in enumerate(found[::2]))} in the "
                f"same update; give each process the whole batches"
            )
        if len(set(found[1::2])) > 1:
            raise DataError(
                f"expected the same batches on all {processes.count} processes, got different "
                f"ones; give each the whole batches in the same order (no DistributedSampler): "
                f"each takes its own share of the rows"
            )


def _parts(batches: Batches) -> list[Any]:
    """A loader and what it is made of, each once."""
    sampler, batch_sampler, dataset = (
        getattr(batches, name, None) for name in ("sampler", "batch_sampler", "dataset")
    )
    found = (batches, sampler, batch_sampler, getattr(batch_sampler, "sampler", None), dataset)
    return list({id(part): part for part in found if part is not None}.values())


def _announce(batches: Batches, epoch: int) -> None:
    """Tells loaders and samplers the number of the epoch, where they ask for it."""
    if isinstance(batches, PreparedBatches):
        batches.epoch = epoch
    for part in _parts(batches):
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)


def _generators(batches: Batches) -> list[torch.Generator]:
    """The generators that a loader or its samplers own."""
    found = [getattr(part, "generator", None) for part in _parts(batches)]
    own = {id(g): g for g in found if isinstance(g, torch.Generator)}
    return list(own.values())
