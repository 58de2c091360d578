"""Interpolation in beta: exact on polynomials, checked where it is worst."""

from __future__ import annotations

import math

import torch

from flexure.methods.interpolation import held_out, interpolate, nodes

GRID = tuple(round(0.70 + 0.01 * i, 2) for i in range(31))


def power(beta: float, degree: int) -> torch.Tensor:
    """A polynomial in the coordinate of the interpolation."""
    u = (1 - beta) ** 1.5
    return torch.tensor([u**degree, 3 - 2 * u**degree], dtype=torch.float64)


def test_polynomials_up_to_the_number_of_nodes_are_exact() -> None:
    known = nodes(GRID, 5)
    for degree in range(5):
        values = {beta: power(beta, degree) for beta in known}
        for beta in GRID:
            found = interpolate(values, beta)
            torch.testing.assert_close(found, power(beta, degree), atol=1e-12, rtol=0)
    values = {beta: power(beta, 5) for beta in known}
    assert (interpolate(values, 0.8) - power(0.8, 5)).abs().max() > 1e-8


def test_smooth_functions_of_beta_are_close() -> None:
    def smooth(beta: float) -> torch.Tensor:
        return torch.tensor([math.sin(5 * beta), beta**2, math.exp(-beta)], dtype=torch.float64)

    values = {beta: smooth(beta) for beta in nodes(GRID, 5)}
    for beta in GRID:
        assert (interpolate(values, beta) - smooth(beta)).abs().max() < 2e-2


def test_nodes_are_chebyshev_points_of_the_grid() -> None:
    assert nodes(GRID, 5) == (0.7, 0.73, 0.81, 0.92, 1.0)
    assert nodes((0.2, 0.9, 1.0), 5) == (0.2, 0.9, 1.0)


def test_held_out_betas_are_between_nodes_where_the_error_is_largest() -> None:
    known = nodes(GRID, 5)
    chosen = held_out(GRID, known, 2)
    assert len(chosen) == 2
    assert not set(chosen) & set(known)
    values = {beta: power(beta, 5) for beta in known}
    errors = {
        beta: float((interpolate(values, beta) - power(beta, 5)).abs().max()) for beta in GRID
    }
    assert max(errors, key=lambda beta: errors[beta]) in chosen
    assert held_out(known, known, 2) == ()
