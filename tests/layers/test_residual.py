"""The residual sum as a module."""

from __future__ import annotations

import math

import pytest
import torch

from flexure.contracts import FlexureError
from flexure.layers.residual import ResidualSum


@pytest.mark.parametrize("factor", [1.0, 0.5, -2.0])
def test_value_and_derivatives(factor: float) -> None:
    a, b = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True).unbind()
    layer = ResidualSum(factor)
    assert torch.equal(layer(a, b), factor * (a + b))
    assert torch.autograd.gradcheck(layer, (a, b[:1]))
    assert torch.autograd.gradgradcheck(layer, (a, b[:1]))
    assert layer.state_dict() == {}
    assert f"factor={factor:g}" in repr(layer)


@pytest.mark.parametrize("factor", [0.0, math.nan, math.inf, "a", None, True])
def test_bad_factors(factor: float) -> None:
    with pytest.raises(FlexureError, match=r"expected a factor .* got .*; give"):
        ResidualSum(factor)
