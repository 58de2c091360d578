"""Finished batches of attacks on disk, so that an evaluation goes on where it was interrupted.

The folder and its fingerprint are `store`'s; what a batch is, and what is made of it, `rounds`'s.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from flexure.attacks.harness import Found, Harness
from flexure.contracts import Attack, FlexureError
from flexure.fingerprints import described, fingerprint, tensor_digest
from flexure.record import versions
from flexure.store import Store

__all__ = ["KeptBatches", "check_described", "histories", "identity", "key_of"]

_SCORES = "scores"
_DIGEST = "digest"
_LIBRARY = "pyautoattack"


class KeptBatches:
    """The finished batches of one evaluation; a damaged file counts as none.

    Args:
        folder: made where it is missing.
        parts: what every batch depends on, by name: `identity`.
        harness: whose ball stored inputs must be within.

    Raises:
        FlexureError: the folder cannot be written, or holds batches of another evaluation.
    """

    def __init__(
        self, folder: str | os.PathLike[str], parts: Mapping[str, str], harness: Harness
    ) -> None:
        self._store = Store(folder, parts, holds="batches", work="evaluation")
        self._harness = harness

    def scores(self) -> Tensor | None:
        """(B, 6), as `put_scores` was given, or None."""
        tensors, _ = self._intact(_SCORES)
        return tensors.get(_SCORES)

    def put_scores(self, scores: Tensor) -> None:
        """Stores what the model gives at the inputs themselves, and near them."""
        self._put(_SCORES, {_SCORES: scores}, {})

    def get(self, key: str, x: Tensor, numbers: Tensor) -> Found | None:
        """A batch of an attack, if it is there and is one of these samples.

        Args:
            key: attack, what came before it, and batch.
            x: (b, *shape), the inputs.
            numbers: (b,) the samples' places in all data.
        """
        tensors, said = self._intact(key)
        try:
            x_adv, right, stored = tensors["x_adv"], *_flags(tensors)
            seconds, told = float(said["seconds"]), tuple(map(str, said["warnings"]))
        except (KeyError, TypeError, ValueError):
            return None
        same = torch.equal(stored, numbers.cpu()) and right.shape == stored.shape
        if not same or x_adv.shape != x.shape or x_adv.dtype != x.dtype:
            return None
        if not self._harness.accepts(x_adv, x.cpu()):
            return None
        return Found(x_adv, right, seconds, told)

    def put(self, key: str, found: Found, numbers: Tensor) -> None:
        """Stores a batch."""
        tensors = {
            "x_adv": found.x_adv.contiguous(),
            "right": found.right,
            "numbers": numbers.cpu(),
        }
        self._put(key, tensors, {"seconds": found.seconds, "warnings": found.warnings})

    def _put(self, key: str, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
        self._store.put(key, tensors, {**said, _DIGEST: self._digest(key, tensors)})

    def _intact(self, key: str) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        """Tensors and what was said with them; none where they are not those that were stored."""
        tensors, said = self._store.get(key), self._store.numbers(key)
        if tensors is None or not isinstance(said, dict):
            return {}, {}
        same = said.get(_DIGEST) == self._digest(key, tensors)
        return (tensors, said) if same else ({}, {})

    def _digest(self, key: str, tensors: Mapping[str, Tensor]) -> str:
        """Of the values, whose they are, and of which evaluation: a copied file is none either."""
        return _digest_of(f"{self._store.digest} {key} {described(dict(sorted(tensors.items())))}")


def identity(harness: Harness, x: Tensor, y: Tensor, size: int) -> dict[str, str]:
    """All that the batches of any attack depend on, by name.

    Of the model: its class, its description (`repr`), its parameters and buffers. What these do not
    show of it is compared by its scores, at the inputs and near them (`KeptBatches.scores`).
    """
    library = versions()
    try:
        attacks = version(_LIBRARY)
    except PackageNotFoundError:
        attacks = "none"
    return {
        "model": fingerprint(harness.model),
        "inputs": tensor_digest(x),
        "labels": tensor_digest(y),
        "bounds": repr(harness.limits),
        "norm": harness.norm,
        "eps": repr(harness.eps),
        "seed": str(harness.seed),
        "batch size": str(size),
        "library": f"flexure {library['flexure']}, torch {library['torch']}, {_LIBRARY} {attacks}",
    }


def histories(attacks: Sequence[Attack], *, every: bool) -> Iterator[str]:
    """For each attack, a digest of it and of all that decides what it is run on.

    With survivors only, these are all attacks before it, so that attacks can be added at the end of
    an evaluation, and only those are run.
    """
    before = ""
    for place, attack in enumerate(attacks):
        past = f"every, {place}" if every else before
        text = f"{past}; {described(attack)}"
        before = _digest_of(text)
        yield before


def check_described(attacks: Sequence[Attack]) -> None:
    """Refuses attacks whose settings are not known, and could be others next time.

    Raises:
        FlexureError: one is no dataclass.
    """
    for attack in attacks:
        if not is_dataclass(attack):
            raise FlexureError(
                f"expected attacks that are dataclasses of their settings, to resume them, got "
                f"{attack!r}; make {type(attack).__name__} a frozen dataclass, or leave resume out"
            )


def key_of(name: str, history: str, index: int) -> str:
    """The key of a batch, which is a file's name."""
    return f"{re.sub(r'[^A-Za-z0-9-]+', '_', name)}-{history}-{index:06d}"


def _digest_of(text: str) -> str:
    """16 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _flags(tensors: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    right, numbers = tensors["right"], tensors["numbers"]
    if right.dtype != torch.bool:
        raise ValueError("not bool")
    return right, numbers
