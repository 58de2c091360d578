"""Stored samples as batches: in an order that a seed and the epoch decide, or in their own.

Reading and checking them is `samples`'; what is trained on them is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexure.calling import map_tensors, rows_of
from flexure.contracts import DataError
from flexure.data.augment import Augmentation
from flexure.methods.samples import Samples

__all__ = ["InOrder", "Shuffled", "at", "joined"]


class Shuffled:
    """Batches of stored samples in a new order each epoch, the same for the same seed.

    Attributes:
        epoch: the number of the next one, from 0.

    Args:
        x: all inputs, as `joined` gives them.
        y: (N,) int64 labels.
        batch_size: samples a batch; the last may be smaller.
        seed: decides each epoch's order, together with the epoch's number.
        device: where batches go.
        augment: random changes of each epoch's inputs, which must be prepared images; a function
            of the seed, the epoch and the sample alone.
    """

    def __init__(
        self,
        x: Any,
        y: Tensor,
        batch_size: int,
        *,
        seed: int,
        device: torch.device,
        augment: Augmentation | None = None,
    ) -> None:
        self.epoch = 0
        self._x, self._y, self._size = x, y, batch_size
        self._seed, self._device = seed, device
        self._augment = augment

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration that of an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self._y) / self._size)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        # The order is fixed here, not at the first batch, so that two running epochs differ.
        order = torch.randperm(len(self._y), generator=_generator(self._seed, self.epoch))
        draws = None
        if self._augment is not None:
            own = _generator(self._seed, self.epoch, _AUGMENTATION)
            draws = self._augment.draws(len(self._y), own)
        self.epoch += 1
        return self._run(order, draws)

    def _run(self, order: Tensor, draws: Tensor | None) -> Iterator[tuple[Any, Tensor]]:
        for rows in torch.split(order, self._size):
            x = at(self._x, rows, len(self._y))
            x = map_tensors(x, lambda leaf: leaf.to(self._device))
            if self._augment is not None and draws is not None:
                x = self._augment(x, draws[rows])
            yield x, self._y[rows].to(self._device)


class InOrder:
    """The batches of a split as they were given, at each iteration."""

    def __init__(self, samples: Samples, device: torch.device) -> None:
        self._samples, self._device = samples, device

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        start = 0
        for x, size in self._samples.inputs():
            y = self._samples.labels[start : start + size]
            # A copy: a network may write into its input, which later passes need.
            own = map_tensors(x, lambda leaf: leaf.to(self._device, copy=True))
            yield own, y.to(self._device)
            start += size


_AUGMENTATION = 1  # tells its stream from that of the order


def _generator(*words: int) -> torch.Generator:
    stream = np.random.SeedSequence(list(words)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(stream >> np.uint64(1)))


def at(x: Any, rows: Tensor, samples: int) -> Any:
    """Some samples, as copies: rows of every tensor that has one a sample, the others whole."""

    def take(leaf: Tensor) -> Tensor:
        return leaf[rows.to(leaf.device)] if rows_of(leaf) == samples else leaf.clone()

    return map_tensors(x, take)


def joined(samples: Samples) -> Any:
    """All inputs of a split as one: tensors with a row a sample along their first dimension.

    Raises:
        DataError: the batches' inputs are not alike: other shapes, other keys, or values besides
            the samples that differ.
    """
    batches = list(samples.inputs())
    return _join([x for x, _ in batches], [n for _, n in batches], samples.name)


def _join(parts: Sequence[Any], sizes: Sequence[int], name: str) -> Any:
    first = parts[0]
    kinds = {type(part) for part in parts}
    if len(kinds) > 1:
        raise _unlike(name, "types " + ", ".join(sorted(kind.__name__ for kind in kinds)))
    if isinstance(first, Tensor):
        return _join_tensors(parts, sizes, name)
    if isinstance(first, dict):
        if any(part.keys() != first.keys() for part in parts):
            raise _unlike(name, "keys")
        return {key: _join([part[key] for part in parts], sizes, name) for key in first}
    if isinstance(first, tuple | list):
        if any(len(part) != len(first) for part in parts):
            raise _unlike(name, "numbers of arguments")
        columns = zip(*parts, strict=True)
        return type(first)(_join(column, sizes, name) for column in columns)
    if any(part != first for part in parts):
        raise _unlike(name, "values besides the samples")
    return first


def _join_tensors(parts: Sequence[Tensor], sizes: Sequence[int], name: str) -> Tensor:
    own = [rows_of(p) == n for p, n in zip(parts, sizes, strict=True)]
    if all(own):
        shapes = {tuple(part.shape[1:]) for part in parts}
        if len(shapes) > 1:
            raise _unlike(name, "shapes " + " and ".join(map(str, sorted(shapes)[:2])))
        return torch.cat(list(parts))
    if any(own) or any(not torch.equal(part, parts[0]) for part in parts):
        raise _unlike(name, "values besides the samples")
    return parts[0]


def _unlike(name: str, what: str) -> DataError:
    return DataError(
        f"expected the {name} batches to hold inputs that can be shuffled together, got different "
        f"{what}; resize or pad all samples alike, or give train= as a function of the seed that "
        f"returns shuffled batches"
    )
