"""What is remembered of the converged singular vectors of one weight, by input size and dtype.

How they are found is in `layer_operator.py`, and what for in `spectral_norm.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ENTRIES", "Memory"]

ENTRIES = 4
"""Sizes and dtypes that are remembered."""


class Memory:
    """Directions G of a weight's values; none of values that it had before."""

    def __init__(self) -> None:
        """Empty."""
        self._entries: list[_Entry] = []

    def find(self, weight: Tensor, size: tuple[int, ...]) -> Tensor | None:
        """What was kept for these values, this dtype and input size."""
        for entry in self._entries:
            if entry.size == size and entry.holds(weight):
                return entry.direction
        return None

    def keep(self, weight: Tensor, size: tuple[int, ...], direction: Tensor) -> None:
        """Remembers G, and forgets that of other values in the same dtype."""
        others = [
            entry
            for entry in self._entries
            if entry.weight.dtype != weight.dtype or (entry.size != size and entry.holds(weight))
        ]
        own = [entry.weight for entry in others if entry.weight.dtype == weight.dtype]
        entry = _Entry(own[0] if own else weight.clone(), size, direction)
        self._entries = [entry, *others[: ENTRIES - 1]]

    def clear(self) -> None:
        """Forgets everything."""
        self._entries = []


@dataclass(frozen=True)
class _Entry:
    """Where the norm of one weight is taken, for one input size."""

    weight: Tensor
    size: tuple[int, ...]
    direction: Tensor

    def holds(self, weight: Tensor) -> bool:
        """Whether it is of these values, in their dtype and on their device."""
        own = self.weight
        alike = (own.dtype, own.device) == (weight.dtype, weight.device)
        return alike and torch.equal(own, weight)
