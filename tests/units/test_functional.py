"""The units against 40-digit references, at extremes and at the ends of the dials."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from flexure.contracts import FlexureError
from flexure.units import plain
from flexure.units.functional import (
    MAX_SLOPE_EXCESS,
    balanced_c,
    centered_softplus,
    check_dial,
    ctu,
    ctu_curvature,
    ctu_curvature_bound,
    ctu_slope,
    ctu_slope_range,
)
from tests.reference.units import exact_ctu, published_ctu
from tests.units.shared import DOUBLE, DTYPES, anything, as_dials, dial, tensors


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


# Accuracy


@given(x=anything, beta=dial, c=dial, dtype=st.sampled_from(DTYPES))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_value_and_slope_are_those_of_eq_8(
    x: float, beta: float, c: float, dtype: torch.dtype
) -> None:
    largest = torch.finfo(dtype).max
    given_x = torch.full((2,), min(max(x, -largest), largest), dtype=dtype)
    exact = exact_ctu(given_x[0].item(), beta, c)
    for kind in ("number", "scalar", "per channel"):
        inputs = given_x.clone().requires_grad_()
        y = ctu(inputs, *as_dials(beta, c, kind))
        y.sum().backward()
        size = abs(given_x[0].item()) + (1 - beta)
        near = 4 * eps(torch.float32 if dtype != DOUBLE else DOUBLE) * size + eps(dtype) * abs(
            exact.value
        )
        assert y.dtype == dtype
        # below the smallest normal number, half precision has steps of its own
        tiny = torch.finfo(dtype).tiny
        assert abs(y[0].item() - exact.value) <= near + tiny
        slope_error = 2e-6 if dtype != DOUBLE else 1e-14
        assert abs(inputs.grad[0].item() - exact.slope) <= slope_error + eps(dtype)


@given(x=st.floats(-40, 40), beta=dial, c=dial)
@example(x=0.0, beta=1.0, c=0.25)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_derivative_is_that_of_eq_8(x: float, beta: float, c: float) -> None:
    exact = exact_ctu(x, beta, c)
    given_x, b, mix = tensors(x, beta, c)
    y = ctu(given_x, b, mix)
    fast = torch.autograd.grad(y, (given_x, b, mix), retain_graph=True)
    differentiable = torch.autograd.grad(y, (given_x, b, mix), create_graph=True)
    # u = x·beta/(1-beta) is known to one rounding: so are functions of it, times their slope in u
    scale = 1 + abs(x) / max(1 - beta, 1e-30)
    for got in (fast, differentiable):
        assert got[0].item() == pytest.approx(exact.slope, abs=2e-14)
        assert got[1].item() == pytest.approx(exact.by_beta, abs=1e-13 * (1 + abs(x)) ** 2)
        assert got[2].item() == pytest.approx(exact.by_c, abs=1e-14 * (1 + abs(x)))
    assert ctu_slope(given_x, b, mix).item() == pytest.approx(exact.slope, abs=2e-14)
    curvature = ctu_curvature(given_x, b, mix).item()
    assert curvature == pytest.approx(exact.curvature, rel=1e-12 * min(scale, 800), abs=1e-14)


@pytest.mark.parametrize("beta", [0.45, 0.5, 0.7, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("c", [0.0, 0.5, 1.0])
def test_agrees_with_the_published_expression(beta: float, c: float) -> None:
    x = torch.cat([torch.linspace(-30, 30, 6001), torch.tensor([-1e4, 1e4])])
    error = (ctu(x, beta, c).double() - published_ctu(x, beta, c)).abs() / (1 + x.abs())
    assert error.max() <= 1e-6


def test_small_half_precision_dials_are_not_distorted() -> None:
    """1 - beta in bfloat16 would be 17 % off at 0.99."""
    x = torch.linspace(-0.1, 0.1, 101, dtype=torch.bfloat16)
    y = ctu(x, torch.tensor(0.99), torch.tensor(0.5))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, ctu(x.double(), 0.99).to(torch.bfloat16), atol=0, rtol=2**-8)


def test_large_half_precision_inputs_do_not_overflow() -> None:
    x = torch.tensor([65504.0, -65504.0, 60000.0], dtype=torch.float16)
    assert torch.equal(ctu(x, 0.99), torch.relu(x))


# The ends of the dials


def test_beta_one_is_relu_with_all_its_derivatives() -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 1e-45, 3.0, math.inf, -math.inf], requires_grad=True)
    shapes: list[float | Tensor] = [1.0, torch.tensor(1.0), torch.ones(7)]
    for beta in shapes:
        y = ctu(x, beta, 0.5)
        assert torch.equal(y, F.relu(x))
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        assert torch.equal(slope, (x > 0).float())
        assert torch.equal(torch.autograd.grad(slope.sum(), x)[0], torch.zeros(7))
        assert torch.equal(torch.autograd.grad(ctu(x, beta).sum(), x)[0], (x > 0).float())
        assert not ctu_curvature(x, beta).any()


def test_beta_zero_and_c_one_is_half_of_x() -> None:
    x = torch.tensor([-2.5, 0.0, 1e-20, 7.0, 3e38])
    for beta, c in ((0.0, 1.0), (torch.tensor(0.0), torch.tensor(1.0)), (torch.zeros(5), 1.0)):
        assert torch.equal(ctu(x, beta, c), x / 2)


def test_other_named_points() -> None:
    x = torch.linspace(-20, 20, 1001, dtype=DOUBLE)
    torch.testing.assert_close(ctu(x, 0.5, 1.0), F.silu(x))
    torch.testing.assert_close(ctu(x, 0.8, 0.0), F.softplus(x, 5.0, 100.0))
    torch.testing.assert_close(ctu(x, 1.702 / 2.702, 1.0), x * torch.sigmoid(1.702 * x))


def test_ends_inside_a_tensor_of_dials_are_exact_and_free_of_nan() -> None:
    beta = torch.tensor([0.0, 1.0, 0.5, 1 - 2**-24, 1.0], requires_grad=True)
    c = torch.tensor([1.0, 0.5, 1.0, 0.0, 1.0], requires_grad=True)
    column = torch.tensor([-3e38, -1e15, -1.0, 0.0, 1e-30, 2.0, 1e15, 3e38])
    x = column[:, None].repeat(1, 5).requires_grad_()
    for f in (ctu, plain.ctu):
        y = f(x, beta, c)
        assert torch.equal(y[:, 0], x[:, 0] / 2)
        assert torch.equal(y[:, [1, 4]], F.relu(x[:, [1, 4]]))
        (by_x,) = torch.autograd.grad(y, x, torch.full_like(y, 1e-3), retain_graph=True)
        assert by_x.isfinite().all()
        assert torch.equal(by_x[:, 1], 1e-3 * (x[:, 1] > 0))
        # the derivative in beta is x²/4 at beta = 0: that of 3e38 is out of range
        by_beta, by_c = torch.autograd.grad(y[1:-1].sum(), (beta, c))
        assert by_beta.isfinite().all()
        assert by_c.isfinite().all()
        # At beta = 1, only x = 0 moves, by (1-c)·log 2.
        assert by_beta[1].item() == pytest.approx(-0.5 * math.log(2))
        assert by_c[1].item() == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_infinite_inputs_have_their_limits(dtype: torch.dtype, per_channel: bool) -> None:
    x = torch.tensor([math.inf, -math.inf, 1.0], dtype=dtype, requires_grad=True)
    beta = torch.full((3,), 0.8) if per_channel else 0.8
    y = ctu(x, beta)
    y.sum().backward()
    assert y.tolist()[:2] == [math.inf, 0.0]
    assert x.grad.tolist()[:2] == [1.0, 0.0]
    assert ctu(torch.tensor(math.nan, dtype=dtype), 0.8).isnan()


def test_infinite_inputs_do_not_spoil_the_gradients_of_the_dials() -> None:
    beta, c = tensors(0.8, 0.5, dtype=torch.float32)
    grads = torch.autograd.grad(
        ctu(torch.tensor([math.inf, -math.inf, 1.0]), beta, c)[2], (beta, c)
    )
    expected = torch.autograd.grad(ctu(torch.tensor([1.0]), beta, c).sum(), (beta, c))
    assert torch.equal(torch.stack(grads), torch.stack(expected))


# Balance, bounds


@pytest.mark.parametrize("beta", [0.3, 0.5, 0.8, 0.95])
def test_balanced_c_cancels_the_area_between_the_unit_and_relu(beta: float) -> None:
    x = torch.linspace(-400, 400, 1_600_001, dtype=DOUBLE)
    area = torch.trapezoid(ctu(x, beta, "balanced") - torch.relu(x), x)
    assert abs(area) < 3e-8  # the rule's own error at the kink is step²/12
    assert balanced_c(beta) == beta**2 / (1 + beta**2)
    assert torch.trapezoid(ctu(x, beta, 0.5) - torch.relu(x), x).abs() > 1e-4


def test_balanced_c_passes_its_gradient_to_beta() -> None:
    x, (beta,) = torch.linspace(-3, 3, 7, dtype=DOUBLE), tensors(0.7)
    assert gradcheck(lambda b: ctu(x, b, "balanced"), (beta,))


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("c", [0.0, 0.5, 1.0])
def test_bounds_hold_and_are_attained_where_they_say(beta: float, c: float) -> None:
    x = (1 - beta) * torch.linspace(-60, 60, 240_001, dtype=DOUBLE)
    slope, curvature = ctu_slope(x, beta, c), ctu_curvature(x, beta, c)
    low, high = ctu_slope_range(c)
    assert low <= slope.min()
    assert slope.max() <= high + 1e-15
    if c == 1.0 and beta >= 0.2:
        assert slope.max() == pytest.approx(1 + MAX_SLOPE_EXCESS, abs=1e-7)
        assert slope.min() == pytest.approx(-MAX_SLOPE_EXCESS, abs=1e-7)
    bound = ctu_curvature_bound(beta, c)
    assert curvature.abs().max() == pytest.approx(bound, rel=1e-12)
    assert curvature[120_000] == pytest.approx(bound, rel=1e-12)


def test_bounds_at_the_end_and_for_tensors() -> None:
    assert abs(MAX_SLOPE_EXCESS - 0.0998393201) < 5e-11
    assert ctu_curvature_bound(1.0) == math.inf
    bound = ctu_curvature_bound(torch.tensor([0.5, 1.0]), 0.5)
    assert bound.tolist() == [0.5, math.inf]
    assert ctu_slope_range(torch.tensor([0.0, 1.0]))[1][0] == 1.0


# Bad input


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ctu(x, 1.5),
        lambda x: ctu(x, -1e-9),
        lambda x: ctu(x, math.nan),
        lambda x: ctu(x, 0.5, 1.01),
        lambda x: ctu(x, 0.5, math.nan),
        lambda x: ctu(x, 0.5, "half"),
        lambda x: ctu(x, None),
        lambda x: ctu(x, torch.tensor(1)),
        lambda x: ctu(x.long(), 0.5),
        lambda x: ctu(x.to(torch.complex64), 0.5),
        lambda x: ctu(x, torch.rand(2)),
        lambda x: ctu(x, torch.rand(2, 1, 3)),
        lambda x: ctu_slope(x, 2.0),
        lambda x: centered_softplus(x, -1.0),
        lambda x: centered_softplus(x, math.nan),
        lambda x: centered_softplus(x.long(), 1.0),
        lambda x: check_dial(torch.tensor([0.5, 1.2])),
        lambda x: check_dial(0.5, torch.tensor(math.nan)),
        lambda x: check_dial(torch.tensor(1)),
        lambda x: check_dial("balanced"),
        lambda x: torch.vmap(lambda row: ctu(row, torch.ones(2)))(x),
    ],
)
def test_bad_input(call: Callable[[Tensor], object]) -> None:
    with pytest.raises(FlexureError, match=r"expected .* got .*;"):
        call(torch.randn(2, 3))


def test_good_dials_pass() -> None:
    check_dial(1.0, "balanced")
    check_dial(torch.tensor([0.0, 1.0]), 0)
    check_dial(torch.nn.Parameter(torch.rand(3, 1, 1)), torch.tensor(0.5))
