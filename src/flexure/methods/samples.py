"""One split of labelled data, read and checked once, then handed out again and again.

Splits are compared by content, so that the same sample under another object is recognised. What
is computed from the samples is not known here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexure.calling import map_tensors, rows_of
from flexure.contracts import Batches, DataError
from flexure.fingerprints import content

__all__ = [
    "Samples",
    "check_disjoint",
    "check_labels",
    "read_samples",
]

_TOLERATED_OVERLAP = 0.01
"""Share of samples that may also occur in another split: data sets do hold a few duplicates."""

_TOLERATED_SAMPLES = 2
"""So many may in any case: one duplicate in iris is more than 1 % of a small split."""


@dataclass(frozen=True)
class Samples:
    """A split whose inputs can be iterated, the same ones in the same order each time.

    Attributes:
        name: what to call it in messages.
        labels: (N,) int64.
        digests: N digests of the inputs; other labels do not make other samples.
    """

    name: str
    labels: Tensor
    digests: tuple[bytes, ...]
    _batches: Batches = field(repr=False)
    _verify: bool = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self) -> Iterator[tuple[Any, int]]:
        """Yields each batch's input and its number of samples.

        Raises:
            DataError: they differ from those of the first reading, or have another order.
        """
        start = 0
        for x, y in self._batches:
            end = start + len(y)
            if self._verify and self.digests[start:end] != tuple(_digests(x, len(y))):
                raise DataError(
                    f"expected the {self.name} batches to be the same in every pass, got other "
                    f"samples or another order; switch shuffling and random augmentation off"
                )
            yield x, len(y)
            start = end
        if start != len(self):
            raise DataError(
                f"expected {len(self)} {self.name} samples in every pass, got {start}; give a list "
                f"of batches, or an iterable that starts again"
            )

    @property
    def fingerprint(self) -> str:
        """Digest of all samples in their order."""
        return hashlib.blake2b(b"".join(self.digests), digest_size=16).hexdigest()


def read_samples(batches: Batches, name: str, *, cache_bytes: int) -> Samples:
    """Reads a split once, and keeps its inputs where they are small enough.

    Preprocessing often costs as much as a small network; what fits is preprocessed only once.

    Args:
        batches: iterable of `(x, y)`.
        name: what to call it in messages.
        cache_bytes: keep inputs up to this size in memory.

    Raises:
        DataError: no samples; labels that are not (B,) non-negative integers; inputs that do not
            have one row per label.
    """
    if not hasattr(type(batches), "__iter__") and not hasattr(type(batches), "__getitem__"):
        raise DataError(
            f"expected the {name} data as an iterable of batches (x, y), got "
            f"{type(batches).__name__}; give a list of batches or a data loader"
        )
    once = iter(batches) is batches
    # A loader may hand out one buffer again and again; in a list it cannot be filled anew.
    copied = not isinstance(batches, list | tuple)
    kept: list[tuple[Any, Tensor]] | None = []
    labels: list[Tensor] = []
    digests: list[bytes] = []
    size = 0
    for number, item in enumerate(batches):
        x, y = _checked(item, name, number)
        y = y.to("cpu", torch.int64, copy=True)
        labels.append(y)
        digests += _digests(x, len(y))
        size += sum(leaf.nbytes for leaf in _leaves(x))
        if size > cache_bytes and not once:
            kept = None
        if kept is not None:
            kept.append((map_tensors(x, torch.Tensor.clone) if copied else x, y))
    if not digests:
        raise DataError(f"expected {name} samples, got none; give at least one batch")
    verify = kept is None
    return Samples(name, torch.cat(labels), tuple(digests), kept or batches, verify)


def check_labels(train: Samples, *others: Samples) -> int:
    """The number of classes.

    Raises:
        DataError: fewer than two classes; classes that are not numbered 0, 1, 2, ...; a class in
            another split that training data lacks.
    """
    known = sorted(set(train.labels.tolist()))
    if len(known) < 2:
        raise DataError(f"expected at least two classes in the train data, got only class {known}")
    if known != list(range(len(known))):
        raise DataError(
            f"expected the {len(known)} classes of the train data to be numbered 0 ... "
            f"{len(known) - 1}, got {_shown(known)}; renumber them without gaps"
        )
    for other in others:
        unknown = sorted(set(other.labels.tolist()) - set(known))
        if unknown:
            raise DataError(
                f"expected only the {len(known)} classes of the train data in {other.name}, got "
                f"{_shown(unknown)}; split so that every class is in train"
            )
        if len(set(other.labels.tolist())) < 2:
            raise DataError(f"expected at least two classes in {other.name}, got one")
    return len(known)


def check_disjoint(first: Samples, second: Samples) -> int:
    """The number of samples that two splits share, whatever their labels.

    Raises:
        DataError: more than 1 % of the smaller split, and more than 2 samples.
    """
    small, large = sorted((first, second), key=len)
    known = set(large.digests)
    shared = sum(digest in known for digest in small.digests)
    if shared > max(_TOLERATED_OVERLAP * len(small), _TOLERATED_SAMPLES):
        raise DataError(
            f"expected {first.name} and {second.name} to hold different samples, got {shared} of "
            f"the {len(small)} in {small.name} in both; what is trained on, chosen by and reported "
            f"must be disjoint"
        )
    return shared


def _checked(item: Any, name: str, number: int) -> tuple[Any, Tensor]:
    where = f"{name} batch {number}"
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise DataError(f"expected {where} to be a pair (x, y), got {type(item).__name__}")
    x, y = item
    if not isinstance(y, Tensor) or y.dim() != 1 or y.is_floating_point() or y.dtype == torch.bool:
        got = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise DataError(f"expected the labels of {where} as a (B,) integer tensor, got {got}")
    if len(y) == 0:
        raise DataError(f"expected samples in {where}, got none; leave empty batches out")
    if int(y.min()) < 0:
        raise DataError(f"expected labels >= 0 in {where}, got {int(y.min())}; drop such samples")
    leaves = list(_leaves(x))
    if not any(rows_of(leaf) == len(y) for leaf in leaves) or (
        isinstance(x, Tensor) and len(x) != len(y)
    ):
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves) or type(x).__name__
        raise DataError(
            f"expected {where} to have one row per label, got {len(y)} labels and inputs {shapes}; "
            f"stack the inputs into tensors with the batch first"
        )
    return x, y


def _digests(x: Any, batch: int) -> Iterator[bytes]:
    """One digest per sample, of the bytes of its row in every tensor."""
    rows = [leaf.detach().cpu() for leaf in _leaves(x) if rows_of(leaf) == batch]
    for i in range(batch):
        digest = hashlib.blake2b(digest_size=16)
        for leaf in rows:
            row = leaf[i]
            digest.update(f"{tuple(row.shape)}{row.dtype}".encode())
            digest.update(content(row))
        yield digest.digest()


def _leaves(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        for key in sorted(x):
            yield from _leaves(x[key])
    elif isinstance(x, tuple | list):
        for value in x:
            yield from _leaves(value)


def _shown(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
