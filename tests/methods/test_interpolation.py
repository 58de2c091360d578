"""Interpolation in beta: exact on polynomials, checked where it is worst."""

from __future__ import annotations

import pytest
import torch

from flexure.methods.interpolation import held_out, interpolate, nodes

GRID = tuple(round(0.70 + 0.01 * i, 2) for i in range(31))


def test_polynomials_up_to_the_number_of_nodes_are_exact() -> None:
    known = nodes(GRID, 5)
    for degree in range(5):
        values = {b: torch.tensor([b**degree, -2 * b**degree], dtype=torch.float64) for b in known}
        for beta in GRID:
            expected = torch.tensor([beta**degree, -2 * beta**degree], dtype=torch.float64)
            torch.testing.assert_close(interpolate(values, beta), expected, atol=1e-12, rtol=0)
    values = {b: torch.tensor([b**5], dtype=torch.float64) for b in known}
    assert abs(float(interpolate(values, 0.8)) - 0.8**5) > 1e-7


def test_nodes_are_chebyshev_points_of_the_grid() -> None:
    assert nodes(GRID, 5) == (0.7, 0.74, 0.85, 0.96, 1.0)
    assert nodes((0.2, 0.9, 1.0), 5) == (0.2, 0.9, 1.0)


def test_held_out_betas_are_between_nodes_where_the_error_is_largest() -> None:
    known = nodes(GRID, 5)
    chosen = held_out(GRID, known, 2)
    assert chosen == pytest.approx((0.8, 0.91), abs=0.015)
    assert not set(chosen) & set(known)
    values = {b: torch.tensor([b**5], dtype=torch.float64) for b in known}
    errors = {b: abs(float(interpolate(values, b)) - b**5) for b in GRID}
    assert max(errors, key=lambda beta: errors[beta]) in chosen
    assert held_out(known, known, 2) == ()
