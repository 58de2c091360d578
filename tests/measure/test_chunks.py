"""Chunks fit their budget, on computations whose memory is known and on real ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexure.contracts import FlexureError
from flexure.measure.chunks import chunk_within
from flexure.memory import peak_bytes


def phases(*parts: tuple[int, int]):
    """A computation with phases of a + b·k bytes each."""

    def run(k: int) -> None:
        for fixed, each in parts:
            torch.empty(fixed + each * k, dtype=torch.uint8)

    return run


PART = st.tuples(st.integers(0, 5000), st.integers(0, 300))


@settings(max_examples=60, deadline=None)
@given(st.lists(PART, min_size=1, max_size=3), st.integers(1, 500), st.floats(1, 40), st.booleans())
def test_the_chunk_fits_and_is_not_much_too_small(
    parts: list[tuple[int, int]], batch: int, factor: float, holding: bool
) -> None:
    cost = lambda k: max(a + b * k for a, b in parts)  # noqa: E731
    held = 1234 if holding else 0
    budget = int(factor * cost(1)) + held
    chunk = chunk_within(budget, phases(*parts), batch=batch, held=held)
    assert 1 <= chunk <= batch
    assert cost(chunk) + held <= budget
    assert peak_bytes(lambda: phases(*parts)(chunk)) <= budget - held
    if all(a == 0 for a, _ in parts):
        assert chunk == batch or cost(chunk + 1) + held > budget


def test_a_phase_that_only_shows_at_many_samples_is_allowed_for() -> None:
    """A line through the costs of one and two samples would allow 900."""
    run = phases((10_000, 100), (0, 2_000))
    assert peak_bytes(lambda: run(chunk_within(100_000, run, batch=10_000))) <= 100_000


def test_the_smallest_budget_is_named_and_works() -> None:
    run = phases((1000, 500))
    with pytest.raises(FlexureError, match=r"at least 1,507 bytes"):
        chunk_within(1506, run, batch=3, held=7)
    assert chunk_within(1507, run, batch=3, held=7) == 1


def test_no_more_samples_than_there_are_are_computed() -> None:
    seen: list[int] = []
    assert chunk_within(10**9, seen.append, batch=3) == 3
    assert seen == [1, 3]
