"""Seeded stratified splits, views of data, and preprocessed batches.

Nothing here reads a file or touches the global random generators; images are augmented by
`augment`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flexure.contracts import DataError, FlexureError, LabelledData
from flexure.data.augment import Augmentation

__all__ = [
    "PreparedBatches",
    "Splits",
    "Subset",
    "batches",
    "only_classes",
    "split",
    "stratified_split",
]

_HELD_OUT = 0.2
"""Share of the training data held out where a split is missing: a fifth, as is usual."""


@dataclass(frozen=True, eq=False)
class Subset:
    """Some samples of a data set, in the given order, without a copy.

    Attributes:
        data: the data set.
        indices: `(n,)` int64 positions in it.
        keep: the class numbers of `data` that remain, in their new order; None: all.
        labels: `(n,)` int64, renumbered by `keep`.
        classes: the names of the remaining classes.

    Raises:
        DataError: a sample's class is not in `keep`.
    """

    data: LabelledData
    indices: Tensor
    keep: tuple[int, ...] | None = None
    labels: Tensor = field(init=False)
    classes: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        labels, classes = self.data.labels[self.indices], self.data.classes
        if self.keep is not None:
            numbers = torch.full((len(classes),), -1)
            numbers[list(self.keep)] = torch.arange(len(self.keep))
            labels, classes = numbers[labels], tuple(classes[old] for old in self.keep)
            if bool((labels < 0).any()):
                raise DataError(
                    f"expected only samples of the classes {classes}, got others; use only_classes"
                )
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "classes", classes)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        return self.data[int(self.indices[index])]


@dataclass(frozen=True, eq=False)
class Splits:
    """Data to train on, to choose by, and to report on: no sample is in two of them."""

    train: LabelledData
    val: LabelledData
    test: LabelledData


def only_classes(data: LabelledData, classes: Sequence[int]) -> Subset:
    """The samples of some classes, renumbered `0 ... len(classes) - 1` in the given order.

    Raises:
        DataError: a class that `data` lacks, or one given twice.
    """
    keep = tuple(classes)
    if len(set(keep)) != len(keep) or not set(keep) <= set(range(len(data.classes))):
        raise DataError(
            f"expected distinct classes in 0 ... {len(data.classes) - 1}, got {list(keep)}; "
            f"choose among them"
        )
    indices = torch.isin(data.labels, torch.tensor(keep, dtype=torch.int64)).nonzero().flatten()
    return Subset(data, indices, keep)


def stratified_split(
    labels: Tensor, sizes: Sequence[float] | Sequence[int], *, seed: int
) -> tuple[Tensor, ...]:
    """Disjoint random parts of `range(N)`, each with the classes in their overall proportion.

    Each class is shuffled and its samples spread evenly over [0, 1); cutting that line gives parts
    of exactly the wanted sizes, with each class within about one sample of its share.

    Args:
        labels: `(N,)` class numbers.
        sizes: one number a part: all fractions of N (float, above 0, sum at most 1), or all counts
            (int). Where they sum to the whole, every sample is in one part.
        seed: decides the shuffle, alone.

    Returns:
        The sorted `(n,)` int64 indices of each part.

    Raises:
        DataError: sizes that do not fit, or a class that would miss from a part.
    """
    total = len(labels)
    ends = _cuts(sizes, total)
    generator = torch.Generator().manual_seed(_stream(seed, 0))
    shuffled = torch.randperm(total, generator=generator)
    position = torch.empty(total, dtype=torch.float64)
    for label in sorted(set(labels.tolist())):
        members = (labels[shuffled] == label).nonzero().flatten()
        position[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    spread = shuffled[position.argsort(stable=True)]
    parts = tuple(
        spread[start:end].sort().values for start, end in zip([0, *ends], ends, strict=False)
    )
    _check_classes(labels, parts)
    return parts


def split(
    data: Mapping[str, LabelledData],
    *,
    seed: int,
    sizes: Mapping[str, float] | None = None,
) -> Splits:
    """Data to train on, to choose by and to report on, made from what a source has.

    Without a test split, a stratified fifth of the training data is held out first; without a
    validation split, a stratified fifth of what then remains. The source's
    own splits are never mixed.

    Args:
        data: splits as `load_data` gives them.
        seed: decides every random choice.
        sizes: how much to take for `"test"`, `"val"` and `"train"`, in this order: a count (int),
            or a fraction (float) of the source's split where it has one, of the remaining training
            data where not. A size left out follows the rule above; training takes all that is left.

    Raises:
        DataError: sizes that do not fit, or a class that would miss from a part.
    """
    wanted = dict(sizes or {})
    unknown = set(wanted) - {"train", "val", "test"}
    if unknown:
        raise DataError(f"expected sizes of train, val and test, got {sorted(unknown)}; rename")
    rest = data["train"]
    test, rest = _hold_out(rest, data.get("test"), wanted.get("test"), seed=seed)
    val, rest = _hold_out(rest, data.get("validation"), wanted.get("val"), seed=seed)
    train = _take(rest, wanted["train"], seed=seed) if "train" in wanted else rest
    return Splits(train, val, test)


def batches(
    data: LabelledData,
    *,
    preprocess: Callable[[Tensor], Tensor],
    batch_size: int,
    seed: int | None = None,
    shuffle: bool = False,
    device: torch.device | str | None = None,
    cache: bool = False,
    augment: Augmentation | None = None,
) -> PreparedBatches:
    """Batches `(x, y)` of preprocessed samples, to be iterated as often as wanted.

    Args:
        data: unprocessed samples.
        preprocess: one sample -> one model input, without the batch dimension.
        batch_size: samples a batch; the last batch may be smaller.
        seed: with `shuffle`, decides each epoch's order together with the epoch's number; with
            `augment`, what is done to each sample in each epoch.
        shuffle: a new order in each epoch; otherwise the data's.
        device: where the batches go; default: where `preprocess` leaves them.
        cache: preprocess everything once, at the first epoch, and keep it as one tensor.
        augment: random changes of the preprocessed images, new ones in each epoch; a function of
            the seed, the epoch and each sample's index in `data`, whatever the order and the size
            of the batches.

    Raises:
        FlexureError: a batch size below 1, or shuffling or augmenting without a seed.
        DataError: no samples.
    """
    if batch_size < 1:
        raise FlexureError(f"expected a batch size of at least 1, got {batch_size}; raise it")
    if (shuffle or augment is not None) and seed is None:
        purpose = "shuffle" if shuffle else "augment"
        raise FlexureError(f"expected a seed to {purpose} with, got None; pass seed=")
    if len(data) == 0:
        raise DataError("expected samples to make batches of, got none; check the data")
    return PreparedBatches(
        data,
        preprocess,
        batch_size,
        seed=seed,
        shuffle=shuffle,
        device=device,
        cache=cache,
        augment=augment,
    )


class PreparedBatches:
    """What `batches` returns. `epoch` counts the iterations begun; set it to resume."""

    def __init__(
        self,
        data: LabelledData,
        preprocess: Callable[[Tensor], Tensor],
        batch_size: int,
        *,
        seed: int | None,
        shuffle: bool,
        device: torch.device | str | None,
        cache: bool,
        augment: Augmentation | None,
    ) -> None:
        self.data = data
        self.preprocess = preprocess
        self.batch_size = batch_size
        self.epoch = 0
        self._order_seed = seed if shuffle else None
        self._augment = None if augment is None or seed is None else (augment, seed)
        self._device = device
        self._cache = cache
        self._cached: Tensor | None = None

    def __len__(self) -> int:
        return math.ceil(len(self.data) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # The order is fixed here, not at the first batch, so that two running epochs differ.
        order, change = self._order(), self._change()
        self.epoch += 1
        return self._run(order, change)

    def _order(self) -> Tensor:
        if self._order_seed is None:
            return torch.arange(len(self.data))
        generator = torch.Generator().manual_seed(_stream(self._order_seed, 1 + self.epoch))
        return torch.randperm(len(self.data), generator=generator)

    def _change(self) -> Callable[[Tensor, Tensor], Tensor]:
        """What this epoch does to prepared samples and their indices."""
        if self._augment is None:
            return lambda x, indices: x
        augment, seed = self._augment
        generator = torch.Generator().manual_seed(_stream(seed, 1 + self.epoch, _AUGMENTING))
        draws = augment.draws(len(self.data), generator)
        return lambda x, indices: augment(x, draws[indices])

    def _run(
        self, order: Tensor, change: Callable[[Tensor, Tensor], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if self._cache and self._cached is None:
            self._cached = self._prepare(torch.arange(len(self.data)))
        for indices in torch.split(order, self.batch_size):
            y = self.data.labels[indices]
            if self._cached is None:
                x = self._prepare(indices)
            else:
                x = self._cached[indices.to(self._cached.device)]
            yield change(x, indices), self._move(y)

    def _prepare(self, indices: Tensor) -> Tensor:
        """The preprocessed samples at `indices`, `(n, *shape)`."""
        items: list[Tensor] = []
        for index in indices.tolist():
            item = self.preprocess(self.data[index])
            if not isinstance(item, Tensor) or (items and item.shape != items[0].shape):
                got = tuple(item.shape) if isinstance(item, Tensor) else type(item).__name__
                first = f"{tuple(items[0].shape)} as before" if items else "a tensor"
                raise DataError(
                    f"expected preprocessing to give {first}, got {got} at sample {index}; "
                    f"use a preprocessing that resizes all samples to one shape"
                )
            items.append(item)
        return self._move(torch.stack(items))

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor if self._device is None else tensor.to(self._device)


_AUGMENTING = 1
"""Marks the streams that augmentation draws from, apart from those of the order."""


def _stream(seed: int, *numbers: int) -> int:
    """A seed for one purpose: `seed + number` would make neighbouring seeds repeat each other."""
    if seed < 0:
        raise FlexureError(f"expected a seed of at least 0, got {seed}; choose another")
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1, np.uint64)[0] >> 1)


def _cuts(sizes: Sequence[float] | Sequence[int], total: int) -> list[int]:
    """Where each part ends on the line of all samples."""
    counts = all(isinstance(size, int) for size in sizes)
    fractions = all(isinstance(size, float) for size in sizes)
    whole: float = total if counts else 1
    sums = [math.fsum(sizes[: i + 1]) for i in range(len(sizes))]
    if not (sizes and (counts or fractions) and min(sizes) > 0 and sums[-1] <= whole + 1e-9):
        raise DataError(
            f"expected positive counts (int) that sum to at most {total}, or positive fractions "
            f"(float) that sum to at most 1, got {list(sizes)}; lower them"
        )
    return [round(end) if counts else min(round(end * total), total) for end in sums]


def _check_classes(labels: Tensor, parts: Sequence[Tensor]) -> None:
    present = set(labels.tolist())
    for number, part in enumerate(parts):
        missing = sorted(present - set(labels[part].tolist()))
        if missing:
            raise DataError(
                f"expected every class in every part, got none of class {missing[0]} "
                f"({int((labels == missing[0]).sum())} samples in all) in part {number} of "
                f"{len(part)} samples; enlarge the part, or drop classes with few samples"
            )


def _hold_out(
    rest: LabelledData, own: LabelledData | None, size: float | None, *, seed: int
) -> tuple[LabelledData, LabelledData]:
    """A split, the source's own or held out of `rest`, and what remains of `rest`."""
    if own is not None:
        return (own if size is None else _take(own, size, seed=seed)), rest
    held = _HELD_OUT if size is None else size
    left = len(rest) - held if isinstance(held, int) else 1.0 - held
    first, second = stratified_split(rest.labels, [held, left], seed=seed)
    return Subset(rest, first), Subset(rest, second)


def _take(data: LabelledData, size: float, *, seed: int) -> LabelledData:
    if size == (len(data) if isinstance(size, int) else 1.0):
        return data
    (part,) = stratified_split(data.labels, [size], seed=seed)
    return Subset(data, part)
