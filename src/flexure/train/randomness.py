"""Where the random numbers of a training come from: the global generators, started at its seed.

Penalties and attacks draw from generators of their own, which are not known here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from flexure.processes import Processes
from flexure.train.checkpoint import rng_state, set_rng_state

__all__ = ["reproducible", "update_randomness"]


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Inside, the generators of torch, Python and numpy start at `seed`; they are put back."""
    before = rng_state()
    _start(seed)
    try:
        yield
    finally:
        set_rng_state(before)


@contextmanager
def update_randomness(seed: int, index: int, processes: Processes) -> Iterator[None]:
    """What an update (its number is `index`) draws from.

    One process: the same generators as the data. Several: generators of its own, so that all draw
    the same data however much each one's share draws, and no two have the same dropout.
    """
    if processes.count == 1:
        yield
        return
    shared = rng_state()
    stream = np.random.SeedSequence([seed % 2**64, index, processes.index])
    _start(int(stream.generate_state(1, np.uint64)[0] >> np.uint64(1)))
    try:
        yield
    finally:
        set_rng_state(shared)


def _start(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    # A device that nothing has used yet stays unused: its first use would claim memory on it.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
