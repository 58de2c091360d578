"""Balls: projections against a slow reference, directions by their definition, random points."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexure.attacks.draws import SampleGenerators, normal, uniform
from flexure.attacks.norms import NORMS, check_eps, norm_named, project
from flexure.contracts import FlexureError
from tests.reference.projection import on_both

UNIT = (0.0, 1.0)
FREE = (-math.inf, math.inf)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-3, 8 / 255, 0.5])
def test_half_precision_keeps_to_the_ball(norm: str, dtype: torch.dtype, eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(50, 30, generator=generator).to(dtype)
    for spread in (1e-3, 0.1, 1e4):
        changed = (x.float() + spread * torch.randn(50, 30, generator=generator)).to(dtype)
        found = project(changed, x, norm=norm, eps=eps, limits=UNIT)
        assert found.dtype == dtype
        size = norm_named(norm).size(found.double() - x.double())
        assert float(size.max()) <= eps * (1 + 1e-6)
        assert bool(((found >= 0) & (found <= 1)).all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("limits", [UNIT, FREE, (0.0, math.inf)])
@pytest.mark.parametrize("spread", [0.01, 0.3, 3.0, 10.0])
def test_projection_is_that_of_the_slow_reference(norm: str, limits, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6, 7, generator=generator, dtype=torch.float64)
    x[0, :3] = torch.tensor([0.0, 1.0, 0.5])
    changed = x + spread * torch.randn(6, 7, generator=generator, dtype=torch.float64)
    found = project(changed, x, norm=norm, eps=0.4, limits=limits)
    for row, centre, point in zip(found, x, changed, strict=True):
        expected = on_both(point, centre, norm, 0.4, limits)
        torch.testing.assert_close(row, expected, atol=1e-9, rtol=0)


@settings(max_examples=150, deadline=None)
@given(
    norm=st.sampled_from(list(NORMS)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    shape=st.sampled_from([(1, 1), (3, 2), (2, 3, 5, 4), (1, 400)]),
    exponent=st.floats(-12, 3),
    spread=st.floats(-12, 6),
    seed=st.integers(0, 2**20),
)
def test_both_constraints_hold_in_spite_of_rounding(
    norm, dtype, shape, exponent, spread, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator).to(dtype)
    x = torch.where(torch.rand(shape, generator=generator) < 0.2, x.round(), x)
    changed = x + (10**spread) * torch.randn(shape, generator=generator).to(dtype)
    eps = 10**exponent
    found = project(changed, x, norm=norm, eps=eps, limits=UNIT)
    assert found.dtype == dtype
    assert ((found >= 0) & (found <= 1)).all()
    assert (norm_named(norm).size(found.double() - x.double()) <= eps * (1 + 1e-6)).all()
    again = project(found, x, norm=norm, eps=eps, limits=UNIT)
    torch.testing.assert_close(again, found, atol=1e-6 * eps, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_extreme_changes(norm: str) -> None:
    x = torch.full((3, 4), 0.5)
    far = torch.tensor([[1e30, -1e30, 1e30, 0.5], [0.5] * 4, [3e38, 0.5, 0.5, 0.5]])
    found = project(far, x, norm=norm, eps=0.1, limits=UNIT)
    assert found.isfinite().all()
    assert torch.equal(found[1], x[1])
    assert (norm_named(norm).size(found - x) <= 0.1 * (1 + 1e-6)).all()
    assert float(norm_named(norm).size(found - x)[0]) == pytest.approx(0.1, rel=1e-4)
    assert torch.equal(project(far, x, norm=norm, eps=0.0, limits=UNIT), x)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1.0, 1e-40, 1e-25, 1e30])
def test_direction_has_norm_one_and_rises_fastest(norm: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = scale * torch.randn(5, 8, generator=generator)
    row = norm_named(norm)
    direction = row.direction(gradient)
    # 1e-40 is denormal: few of its digits are left.
    torch.testing.assert_close(row.size(direction), torch.ones(5).double(), atol=1e-5, rtol=0)
    rise = (gradient / scale * direction).sum(1)
    points = row.point(torch.randn(500, 8, generator=generator), torch.ones(500))
    assert (rise[:, None] >= (gradient / scale) @ points.T - 1e-4).all()
    assert torch.equal(row.direction(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_random_points_fill_the_ball_evenly() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = torch.Size([4000, 3])
    for norm, row in NORMS.items():
        points = row.point(normal(shape, generator), uniform(shape[:1], generator))
        share = row.size(points) ** 3  # uniform in [0, 1], whatever the norm
        assert float(share.max()) <= 1 + 1e-6, norm
        assert float(share.mean()) == pytest.approx(0.5, abs=0.02)
        assert float(points.mean(0).abs().max()) < 0.03


def test_draws_of_a_sample_do_not_depend_on_the_others() -> None:
    numbers = torch.tensor([5, 2, 9])
    shape = torch.Size([3, 2, 17])
    together = normal(shape, SampleGenerators((3, 1), numbers))
    for row, number in enumerate(numbers):
        alone = normal(torch.Size([1, 2, 17]), SampleGenerators((3, 1), number[None]))
        assert torch.equal(alone[0], together[row])
    assert not torch.equal(together[0], together[1])
    other = normal(shape, SampleGenerators((3, 2), numbers))
    assert not torch.equal(other[0], together[0])
    negative = SampleGenerators((-1,), numbers)
    assert torch.rand(2, generator=negative).shape == (2,)  # a generator for anyone


@pytest.mark.parametrize("eps", [-0.1, math.inf, math.nan, True])
def test_radii_that_are_none(eps) -> None:
    with pytest.raises(FlexureError, match="finite radius"):
        check_eps(eps)


def test_unknown_norm() -> None:
    with pytest.raises(FlexureError, match="one of l2, linf, got 'l1'"):
        norm_named("l1")
