"""The error along a boundary curve against integrals known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flexure
from flexure.calling import seeded
from flexure.contracts import FlexureError
from flexure.measure.boundary import BoundaryError, boundary_error
from flexure.models.mlp import MLP
from tests.measure.untouched import untouched


def circle(samples: int, radius: float = 1.0) -> Tensor:
    t = 2 * torch.pi * torch.arange(samples, dtype=torch.float64) / samples
    return radius * torch.stack([t.cos(), t.sin()], dim=1)


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda x: x[:, 0], 4.0),
        (lambda x: x[:, 0] + 2, 4 * math.pi),
        (lambda x: 3 * x.norm(dim=1) - 3, 0.0),
        (lambda x: x[:, 0] * x[:, 1], 2.0),
    ],
)
def test_unit_circle(f: Callable[[Tensor], Tensor], expected: float) -> None:
    found = boundary_error(f, circle(2000))
    assert found.error == pytest.approx(expected, abs=1e-5)
    assert found.length == pytest.approx(2 * math.pi, abs=1e-5)
    assert found.mean == pytest.approx(expected / (2 * math.pi), abs=1e-5)


def test_second_order() -> None:
    coarse, fine = (boundary_error(lambda x: x[:, 0] + 2, circle(n)).error for n in (50, 100))
    wrong = [abs(e - 4 * math.pi) for e in (coarse, fine)]
    assert wrong[0] / wrong[1] == pytest.approx(4, rel=0.01)


def test_open_curve_is_not_closed() -> None:
    line = torch.linspace(0, 1, 11, dtype=torch.float64)[:, None] * torch.tensor([3.0, 4.0])
    found = boundary_error(lambda x: x[:, 0], line, closed=False)
    assert found.error == pytest.approx(7.5)  # 5 long, 0 to 3
    assert found.length == pytest.approx(5)
    assert boundary_error(lambda x: x[:, 0], line).length == pytest.approx(10)


def test_network_against_a_fine_grid() -> None:
    with seeded(0):
        model = MLP((2, 7, 7, 2)).double()
    with untouched(model):
        found = boundary_error(model, circle(4000))

    t = (torch.arange(400_000, dtype=torch.float64) + 0.3) / 400_000 * 2 * torch.pi
    with torch.no_grad():
        logits = model(torch.stack([t.cos(), t.sin()], dim=1))
    expected = 2 * math.pi * (logits[:, 1] - logits[:, 0]).abs().mean().item()
    assert found.error == pytest.approx(expected, rel=1e-5)


def test_outputs_of_a_model() -> None:
    points = circle(12)
    with seeded(0):
        two = nn.Linear(2, 2).double()
    one = nn.Linear(2, 1).double()
    one.weight.data = two.weight.data[1:] - two.weight.data[:1]
    one.bias.data = two.bias.data[1:] - two.bias.data[:1]
    torch.testing.assert_close(
        boundary_error(two, points).values, boundary_error(one, points).values
    )
    flat = nn.Sequential(one, nn.Flatten(0))
    assert boundary_error(flat, points).error == boundary_error(one, points).error
    with pytest.raises(FlexureError, match=r"P = 12 points, got \(12, 3\)"):
        boundary_error(nn.Linear(2, 3).double(), points)
    with pytest.raises(FlexureError, match=r"\(P,\) from f for P = 12"):
        boundary_error(lambda x: x, points)


def test_chunks_and_joining() -> None:
    whole = boundary_error(lambda x: x[:, 0], circle(20))
    cut = boundary_error(lambda x: x[:, 0], circle(20), chunk=7)
    assert cut.error == whole.error
    parts = [whole.taken(slice(0, 3)), whole.taken(slice(3, None))]
    assert BoundaryError.joined(parts).error == whole.error


def test_value_that_is_not_finite_is_not_hidden() -> None:
    found = boundary_error(lambda x: 1 / x[:, 0], torch.tensor([[1.0], [0.0], [2.0]]))
    assert found.converged.tolist() == [True, False, True]
    assert not math.isfinite(found.error)


def test_too_few_points() -> None:
    with pytest.raises(FlexureError, match="at least 3 points along the boundary, got 2"):
        boundary_error(lambda x: x[:, 0], circle(2))
    with pytest.raises(FlexureError, match="at least 2"):
        boundary_error(lambda x: x[:, 0], circle(1), closed=False)
    with pytest.raises(FlexureError, match="points that differ"):
        boundary_error(lambda x: x[:, 0], torch.ones(5, 2))
    with pytest.raises(FlexureError, match="points that differ"):
        boundary_error(lambda x: x[:, 0], torch.full((5, 2), torch.nan))


def test_training_on_the_circles_lowers_it() -> None:
    """[CT] Fig. 2's task: classes inside radius 1/2 and between 3/2 and 2; the boundary is 1."""
    rng = np.random.default_rng(0)
    radius = np.concatenate([0.5 * rng.random(200) ** 0.5, 1.5 + 0.5 * rng.random(200)])
    angle = 2 * np.pi * rng.random(400)
    x = torch.tensor(
        np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1), dtype=torch.float32
    )
    y = (torch.arange(400) >= 200).long()
    with seeded(0):
        model = MLP((2, 7, 2))
    points = circle(200).float()
    flexure.fit(model, [(x, y)], epochs=300, seed=0)
    trained = boundary_error(model, points)
    model.head.bias.data[1] += 5.0  # all of the boundary on one side
    assert boundary_error(model, points).error > trained.error
