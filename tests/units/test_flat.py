"""Leaky softplus, averages in the place of maxima, and what overwrites its input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from flexure.contracts import FlexureError
from flexure.units.flat import AveragePooling, LeakySoftplus, Overwriting
from flexure.units.smooth import CenteredSoftplus


def double(slope: float | nn.Parameter, beta: float = 3.0) -> LeakySoftplus:
    return LeakySoftplus(slope, beta, dtype=torch.float64)


@given(
    slope=st.floats(0, 1), beta=st.floats(1e-3, 1e3), x=st.floats(-1e3, 1e3, allow_subnormal=False)
)
@settings(max_examples=60, deadline=None)
def test_closed_form_and_slope(slope: float, beta: float, x: float) -> None:
    unit = double(slope, beta)
    at = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    beta = float(unit.beta.detach())
    softplus = torch.logaddexp(beta * at.detach(), torch.zeros_like(at)) - torch.log(
        torch.tensor(2.0, dtype=torch.float64)
    )
    expected = slope * at.detach() + (1 - slope) * softplus / beta
    torch.testing.assert_close(unit(at).detach(), expected, atol=1e-9, rtol=1e-9)
    (derivative,) = torch.autograd.grad(unit(at), at)
    assert slope - 1e-12 <= float(derivative) <= 1 + 1e-12


def test_gradients() -> None:
    slope = nn.Parameter(torch.tensor([0.1, 0.7, 1.3], dtype=torch.float64))
    unit = double(slope)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, raw: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(unit, {"raw_beta": raw, "weight": weight}, (x,))

    inputs = (x, unit.raw_beta, slope)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_limits() -> None:
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    torch.testing.assert_close(
        double(0.2, 1e9)(x).detach(), F.leaky_relu(x, 0.2), atol=1e-8, rtol=0
    )
    weight = nn.Parameter(torch.tensor([0.1, -0.4], dtype=torch.float64))
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(double(weight, 1e9)(x), F.prelu(x, weight), atol=1e-8, rtol=0)
    torch.testing.assert_close(double(1.0)(x), x)


def test_a_routed_calls_slope_and_place() -> None:
    unit, x = double(0.2), torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(unit(x, slope=0.5), double(0.5)(x))
    with torch.no_grad():
        kept, expected = x.clone(), unit(x)
        assert unit(kept, inplace=True) is kept
    torch.testing.assert_close(kept, expected)
    assert "slope=0.2, beta=3" in repr(unit)


@pytest.mark.parametrize("inplace", [False, True])
def test_overwriting(inplace: bool) -> None:
    x = torch.randn(4)
    unit = Overwriting(CenteredSoftplus(), inplace=inplace)
    with torch.no_grad():
        expected = CenteredSoftplus()(x.clone())
        for asked in (False, True):
            given_x = x.clone()
            assert (unit(given_x, inplace=asked) is given_x) == inplace
            torch.testing.assert_close(given_x, expected if inplace else x)


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_windows(spatial: int) -> None:
    params = {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}
    x = torch.randn(2, 3, *(6,) * spatial)
    unit = AveragePooling(spatial, params)
    largest = getattr(F, f"max_pool{spatial}d")(x, **params)
    assert unit(x).shape == largest.shape
    assert torch.equal(unit(x), getattr(F, f"avg_pool{spatial}d")(x, **params))
    other = {"kernel_size": 2}
    assert torch.equal(unit(x, **other), getattr(F, f"avg_pool{spatial}d")(x, 2))
    assert "kernel_size=3" in repr(unit)


def test_wrong_settings() -> None:
    with pytest.raises(FlexureError, match="dimensions"):
        AveragePooling(4, {})
    for beta in (0.0, -1.0, float("nan")):
        with pytest.raises(FlexureError, match="beta"):
            LeakySoftplus(0.1, beta)
