"""How many samples at a time fit a stated memory budget.

What is computed is the caller's; bytes are counted by `memory.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flexure.contracts import BudgetError
from flexure.memory import peak_bytes

__all__ = ["chunk_within"]

PROBE = 8
"""Samples of the second measurement. What a computation needs whatever its number of samples is
then counted an eighth for each; more samples would bring little, and cost more."""


def chunk_within(
    budget: int,
    run: Callable[[int], Any],
    *,
    batch: int,
    held: int = 0,
    device: torch.device | str = "cpu",
) -> int:
    """The largest number of samples at a time that is sure to fit a budget.

    Memory p(k) of k samples is the largest of its phases, each a + b·k with a, b >= 0 (what does
    not depend on the samples, and what each needs), so p(k)/k never grows:
    p(k) <= (k/n)·p(n) for every k >= n. The peak is measured at n = 1, and at the n <= 8 that this
    is sure to allow; a line through two measurements could be too low.

    Args:
        budget: bytes that may be held at one time beyond what is there when this is called.
        run: computes as many samples as it is given, with all that it may ever need (a Lanczos
            basis at its full length); called at most twice, its result is dropped.
        batch: samples that there are.
        held: bytes that the caller will hold besides, whatever the chunk.
        device: where `run` computes.

    Returns:
        From 1 to `batch`.

    Raises:
        BudgetError: not even one sample fits; the message names the smallest budget that works.
    """
    free = budget - held
    size, peak = 1, peak_bytes(lambda: run(1), device=device)
    if peak > free:
        raise BudgetError(
            f"expected a memory budget of at least {peak + held:,} bytes (one sample at a time), "
            f"got {budget:,}; raise it, or choose fewer products or a lighter way to compute them",
            peak + held,
        )
    sure = free // max(peak, 1)
    if sure > 1 and batch > 1:
        size = min(PROBE, sure, batch)
        peak = max(peak, peak_bytes(lambda: run(size), device=device))
    return max(1, min(batch, free * size // peak)) if peak else batch
