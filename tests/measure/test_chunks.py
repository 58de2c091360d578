"""Chunks fit their budget, on computations whose memory is known and on real ones."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import flexure
from flexure.contracts import FlexureError
from flexure.measure.chunks import chunk_within
from flexure.measure.products import PRODUCTS
from flexure.memory import peak_bytes


def phases(*parts: tuple[int, int]):
    """A computation with phases of a + b·k bytes each."""

    def run(k: int) -> None:
        for fixed, each in parts:
            torch.empty(fixed + each * k, dtype=torch.uint8)

    return run


PART = st.tuples(st.integers(0, 5000), st.integers(0, 160))


@settings(max_examples=30, deadline=None)
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


def test_what_costs_nothing_is_not_cut() -> None:
    assert chunk_within(0, phases((0, 0)), batch=7) == 7


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


def network(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A small network and 16 inputs: memory mostly of activations, of the basis, or of weights."""
    if kind == "convolutions":
        body = [
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Softplus(),
            nn.Conv2d(8, 8, 3),
            nn.Softplus(),
        ]
        tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
        return nn.Sequential(*body, *tail), torch.randn(16, 3, 12, 12)
    width, dimension = (4, 1600) if kind == "wide input" else (400, 20)
    body = [nn.Linear(dimension, width), nn.Softplus(), nn.Linear(width, width), nn.Softplus()]
    return nn.Sequential(*body, nn.Linear(width, 4)), torch.randn(16, dimension)


def smallest(run: Callable[[int], object]) -> int:
    """The budget that an error names."""
    with pytest.raises(FlexureError, match="memory budget of at least") as told:
        run(1000)
    found = re.search(r"at least ([\d,]+) bytes", str(told.value))
    assert found is not None
    return int(found[1].replace(",", ""))


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("kind", ["convolutions", "wide input", "many weights"])
def test_curvature_fits_its_budget(kind: str, products: str) -> None:
    model, x = network(kind)
    y = torch.arange(16) % 4
    found: list[flexure.Curvature] = []

    def run(budget: int | None) -> None:
        options = {"products": products, "tol": 1e-7, "max_products": 6, "check": False}
        found.append(flexure.curvature(model, x, y, memory=budget, **options))

    all_at_once, least = peak_bytes(lambda: run(None)), smallest(run)
    for budget in (least, (least + all_at_once) // 2, 2 * all_at_once):
        used = peak_bytes(lambda: run(budget))  # noqa: B023
        assert used <= budget
        # What a chunk need not hold is used: not just one sample at a time.
        assert used > min(budget, all_at_once) / 3
    for name, value in found[0].samples().items():
        for other in found[1:]:
            if value.is_floating_point():
                torch.testing.assert_close(other.samples()[name], value, rtol=1e-3, atol=1e-4)


def test_the_check_fits_the_budget_too() -> None:
    model, x = network("convolutions")
    x, y = x[:9], torch.arange(9) % 4

    def run(budget: int) -> None:
        flexure.curvature(model, x, y, memory=budget)

    least = smallest(run)
    assert peak_bytes(lambda: run(least)) <= least
