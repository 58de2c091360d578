"""What attacks draw: one generator a sample, so that neither batches nor processes change it.

What is done with it is the attacks' business.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

__all__ = ["SampleGenerators", "normal", "seed_of", "uniform"]


class SampleGenerators(torch.Generator):
    """A generator for an attack on some samples, with one of its own for each of them.

    An attack that knows of `each` draws for every sample apart: what a sample gets depends on
    `stream` and on its number alone. To any other it is a generator, seeded by `stream` and the
    first number.

    Attributes:
        each: one a sample.
        stream: as given. Of the harness (`robust_accuracy`): the user's seed and the attack's place
            among the attacks of the call. An attack that cannot draw for each sample apart, such as
            one of another library, seeds that library with `stream[0]`.

    Args:
        stream: integers that tell this use from others: a seed, an update's number, ...
        numbers: (B,) each sample's own, such as its position in the data.
    """

    each: list[torch.Generator]
    stream: tuple[int, ...]

    def __new__(cls, stream: Iterable[int], numbers: Tensor) -> SampleGenerators:
        """A generator of the CPU."""
        return super().__new__(cls)

    def __init__(self, stream: Iterable[int], numbers: Tensor) -> None:
        self.stream = tuple(stream)
        common = [value % 2**64 for value in self.stream]
        self.each = [
            torch.Generator().manual_seed(seed_of([*common, number])) for number in numbers.tolist()
        ]
        self.manual_seed(seed_of([*common, *numbers[:1].tolist()]))


def normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Standard normal numbers (B, *sample), float32 on the CPU."""
    if not isinstance(generator, SampleGenerators):
        return torch.randn(shape, generator=generator)
    return torch.stack([torch.randn(shape[1:], generator=own) for own in generator.each])


def uniform(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1) of shape (B, *sample), float32 on the CPU."""
    if not isinstance(generator, SampleGenerators):
        return torch.rand(shape, generator=generator)
    return torch.stack([torch.rand(shape[1:], generator=own) for own in generator.each])


def seed_of(words: list[int]) -> int:
    """A seed of 63 bits made of integers, each of at least 0."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
