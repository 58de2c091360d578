"""The data of a comparison: its splits, read and checked, and training batches in a seed's order.

Reading one split is `samples`', shuffling `shuffled`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from flexure.calling import as_batches, map_tensors, take
from flexure.contracts import Batches, DataError, Example
from flexure.data.augment import Augmentation
from flexure.fingerprints import content
from flexure.methods.features import device_of
from flexure.methods.samples import Samples, check_disjoint, check_labels, read_samples
from flexure.methods.shuffled import InOrder, Shuffled, at, joined

__all__ = ["Train", "TuningData"]

_CACHE_BYTES = 2**31  # inputs of a split up to this size are prepared once and kept

Train: TypeAlias = "Batches | Callable[[int], Batches]"
"""Batches, or a function of the seed that returns batches shuffled anew in each epoch."""


class TuningData:
    """The splits of a comparison, read and checked; training data also in a seed's order.

    Args:
        model: tells where the batches go.
        train: batches, or a function of the seed that returns them.
        val: to choose by.
        test: to report on, or None.
        batch_size: training samples a step; not used where `train` is a function.
        seed: the first.
        augment: random changes of training images; not with a function as `train`.

    Attributes:
        splits: by name.
        shared: pair of splits -> samples in both.
        classes: number of classes.
        batch_size: training samples a step.
        steps: training steps an epoch.

    Raises:
        DataError: see `tune`.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Train,
        val: Batches,
        test: Batches | None,
        batch_size: int,
        seed: int,
        *,
        augment: Augmentation | None = None,
    ) -> None:
        self._augment = augment
        self._device = device_of(model)
        self._seed = seed
        self._given = train if callable(train) else None
        first = as_batches(train(seed) if callable(train) else train)
        given = {"train": first, "val": val} | ({} if test is None else {"test": test})
        _check_different(given)
        self.splits = {
            name: read_samples(batches, name, cache_bytes=self._cache(name))
            for name, batches in given.items()
        }
        self.shared = {
            f"{b}-{a}": check_disjoint(self.splits[a], self.splits[b])
            for a, b in combinations(self.splits, 2)
        }
        self.classes = check_labels(*self.splits.values())
        if self._given is None:
            self._take_in(self.splits["train"])
            self.batch_size = min(batch_size, len(self.splits["train"]))
            self.steps = len(self._shuffled(seed))
        else:
            sizes = [len(y) for _, y in self._given(seed)]
            self.batch_size, self.steps = max(sizes), len(sizes)

    def train(self, seed: int) -> Batches:
        """The training batches in a seed's order."""
        return self._shuffled(seed) if self._given is None else self._given(seed)

    def in_order(self, name: str) -> InOrder:
        """The batches of a split as they were given."""
        return InOrder(self.splits[name], self._device)

    def first_train(self, samples: int) -> list[tuple[Any, Tensor]]:
        """The first training samples in the canonical order, unchanged; not with a function."""
        rows = torch.arange(min(samples, len(self._y)))
        return [(at(self._x, rows, len(self._y)), self._y[rows])]

    def first(self) -> Example:
        """Two training samples, where the model is."""
        x, y = next(iter(self.train(self._seed)))
        example: Example = map_tensors(
            take(x, slice(0, 2), len(y)), lambda leaf: leaf.to(self._device, copy=True)
        )
        return example

    def digests(self) -> dict[str, str]:
        """What identifies the data that runs depend on: not the test labels, which they ignore."""
        found = {f"{name} data": split.fingerprint for name, split in self.splits.items()}
        for name in ("train", "val"):
            labels = hashlib.blake2b(content(self.splits[name].labels), digest_size=16)
            found[f"{name} labels"] = labels.hexdigest()
        return found

    def _take_in(self, split: Samples) -> None:
        """Keeps all training samples, in an order that the one they came in does not change."""
        keys = list(zip(split.digests, split.labels.tolist(), strict=True))
        order = sorted(range(len(split)), key=keys.__getitem__)
        rows = torch.tensor(order)
        self._x, self._y = at(joined(split), rows, len(split)), split.labels[rows]
        digests = tuple(split.digests[k] for k in order)
        # The inputs are kept above; a second copy would double the memory.
        self.splits["train"] = Samples("train", self._y, digests, (), False)

    def _shuffled(self, seed: int) -> Shuffled:
        return Shuffled(
            self._x,
            self._y,
            self.batch_size,
            seed=seed,
            device=self._device,
            augment=self._augment,
        )

    def _cache(self, name: str) -> int:
        return 0 if name == "train" and self._given is not None else _CACHE_BYTES


def _check_different(given: Mapping[str, Batches]) -> None:
    for first, second in combinations(given, 2):
        if given[first] is given[second]:
            raise DataError(
                f"expected different data as {first} and {second}, got the same object; what is "
                f"trained on, chosen by and reported must be disjoint"
            )
