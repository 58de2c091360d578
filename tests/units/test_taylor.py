"""Taylor coefficients of the units against mpmath, and how a tensor class takes units over."""

from __future__ import annotations

from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor, nn

from flexure.units import centered_softplus, ctu
from flexure.units.functional import follows
from flexure.units.taylor import (
    centered_softplus_coefficients,
    ctu_coefficients,
    sigmoid_coefficients,
    sigmoid_derivatives,
)

ORDER = 6
POINTS = (-3.0, -0.4, 0.0, 1e-8, 0.7, 5.0)


def exact(function: Any, at: float) -> list[float]:
    with mpmath.workdps(60):
        return [float(c) for c in mpmath.taylor(function, mpmath.mpf(at), ORDER)]


def compare(found: list[Tensor], function: Any) -> None:
    expected = torch.tensor([exact(function, at) for at in POINTS], dtype=torch.float64).T
    scale = expected.abs().amax(1, keepdim=True)
    assert float(((torch.stack(found) - expected).abs() / scale).max()) < 1e-13


def points() -> Tensor:
    return torch.tensor(POINTS, dtype=torch.float64)


def test_sigmoid() -> None:
    compare(sigmoid_coefficients(points(), ORDER), lambda x: 1 / (1 + mpmath.exp(-x)))
    far = sigmoid_derivatives(torch.tensor([-1e3, 1e3]), ORDER)
    assert float(torch.stack(far)[1:].abs().max()) == 0.0


@pytest.mark.parametrize(("beta", "c"), [(0.0, 0.3), (0.5, 1.0), (0.8, 0.0), (0.9, 0.5)])
@pytest.mark.parametrize("tensors", [False, True])
def test_ctu(beta: float, c: float, tensors: bool) -> None:
    def reference(x: Any) -> Any:
        w = 1 - mpmath.mpf(beta)
        gated = x / (1 + mpmath.exp(-mpmath.mpf(beta) * x / w))
        return c * gated + (1 - mpmath.mpf(c)) * w * mpmath.log1p(mpmath.exp(x / w))

    dials: tuple[Any, Any] = (beta, c)
    if tensors:
        dials = tuple(torch.full((len(POINTS),), d, dtype=torch.float64) for d in dials)
    compare(ctu_coefficients(points(), *dials, ORDER), reference)


@pytest.mark.parametrize("beta", [0.5, 5.0])
def test_centered_softplus(beta: float) -> None:
    compare(
        centered_softplus_coefficients(points(), beta, ORDER),
        lambda x: mpmath.log((1 + mpmath.exp(beta * x)) / 2) / beta,
    )


def test_order_zero_is_the_unit() -> None:
    x = points()
    assert torch.equal(ctu_coefficients(x, 0.7, 0.5, 0)[0], ctu(x, 0.7))
    assert torch.equal(centered_softplus_coefficients(x, 3.0, 0)[0], centered_softplus(x, 3.0))


def test_gradients_in_the_dials() -> None:
    x = points()
    beta = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    c = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def coefficients(beta: Tensor, c: Tensor) -> Tensor:
        return torch.stack(ctu_coefficients(x, beta, c, 3))

    assert torch.autograd.gradcheck(coefficients, (beta, c))


class Asking(Tensor):
    """Answers every unit with its name and dials."""

    @classmethod
    def unit(cls, name: str, x: Any, *dials: Any, **options: Any) -> Any:
        return name, dials, options


def test_a_tensor_class_with_rules_is_asked() -> None:
    x = torch.ones(3).as_subclass(Asking)
    assert follows(x)
    assert not follows(torch.ones(3))
    assert not follows(nn.Parameter(torch.ones(3)))
    assert ctu(x, 0.5, 0.25) == ("ctu", (0.5, 0.25), {"inplace": False})
    assert centered_softplus(x, 2.0) == ("centered_softplus", (2.0,), {})
