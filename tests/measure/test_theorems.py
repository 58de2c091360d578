"""The paper's bounds: what holds, and the counterexamples to what was printed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexure.contracts import FlexureError
from flexure.measure.theorems import (
    lemma1_bound,
    output_change_bound,
    relative_gradient_bound,
    theorem1_proxy,
)

DOUBLE = torch.float64
positive = st.floats(0, 50)


def derivatives(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    return first.detach(), second


def composed(functions: list[Callable[[Tensor], Tensor]], x: Tensor) -> tuple[Any, list, list]:
    """|f''/f'| of the composition, and those of its functions with their slopes, where they are."""

    def whole(t: Tensor) -> Tensor:
        for f in functions:
            t = f(t)
        return t

    first, second = derivatives(whole, x)
    curvatures, slopes = [], []
    for f in functions:
        one, two = derivatives(f, x)
        curvatures.append((two / one).abs())
        slopes.append(one.abs())
        x = f(x)
    return (second / first).abs(), curvatures, slopes


def printed_lemma1(curvatures: list, slopes: list) -> Any:
    """As printed: the product runs to j = i."""
    return sum(
        c * math.prod(slopes[: i + 1], start=torch.ones((), dtype=DOUBLE))
        for i, c in enumerate(curvatures)
    )


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(["softplus", "tanh", "exp", "cubic", "scale"]), min_size=1, max_size=5)
)
def test_lemma_1_bounds_compositions(names: list[str]) -> None:
    functions = {
        "softplus": F.softplus,
        "tanh": torch.tanh,
        "exp": lambda t: torch.exp(0.3 * t),
        "cubic": lambda t: t + 0.01 * t**3,
        "scale": lambda t: -0.4 * t + 0 * t**2,
    }
    x = torch.linspace(-2, 2, 41, dtype=DOUBLE)
    truth, curvatures, slopes = composed([functions[name] for name in names], x)
    bound = lemma1_bound(curvatures, slopes)
    assert bool((truth <= bound * (1 + 1e-9) + 1e-12).all())


def test_lemma_1_is_attained_and_as_printed_is_false() -> None:
    truth, curvatures, slopes = composed([F.softplus], torch.zeros(1, dtype=DOUBLE))
    assert truth.item() == pytest.approx(0.5)
    assert lemma1_bound(curvatures, slopes).item() == pytest.approx(0.5)
    assert printed_lemma1(curvatures, slopes).item() == pytest.approx(0.25)  # below the truth
    functions = [F.softplus, F.softplus, F.softplus]
    truth, curvatures, slopes = composed(functions, torch.linspace(-3, 3, 7, dtype=DOUBLE))
    # All of softplus' second derivatives are positive: the triangle inequality is an equality.
    torch.testing.assert_close(lemma1_bound(curvatures, slopes), truth)
    assert bool((printed_lemma1(curvatures, slopes) < truth).all())
    assert lemma1_bound([1.0, 2.0], [3.0, 100.0]) == 7.0


def test_theorem_1_is_a_proxy_that_its_counterexample_passes() -> None:
    def f(x: Tensor) -> Tensor:
        return F.softplus(x) + F.softplus(-x)

    gradient, hessian = derivatives(f, torch.tensor([0.0, 1e-3, 1.0], dtype=DOUBLE))
    # x -> (x, -x), softplus, sum: C of softplus is at most 1, the linear maps have norm sqrt(2).
    root = math.sqrt(2)
    proxy = theorem1_proxy([2, 2, 1], [0.0, 1.0, 0.0], [root, 1.0, root])
    assert proxy == pytest.approx(2 * root)
    assert gradient[0] == 0
    assert hessian[0] == pytest.approx(0.5)
    assert hessian[1] / gradient[1] > 300 * proxy
    assert "Not a bound" in (theorem1_proxy.__doc__ or "")


def test_theorem_1_proxy_is_equation_2() -> None:
    assert theorem1_proxy([4, 3], [0.5, 2.0], [10.0, 0.1]) == pytest.approx(4 * 5 + 3 * 2 * 1.0)


@settings(max_examples=100, deadline=None)
@given(positive, positive)
def test_proposition_1_is_tighter_than_printed(radius: float, curvature: float) -> None:
    bound, a = relative_gradient_bound(radius, curvature), radius * curvature
    if a < 700:
        assert bound == pytest.approx(float(mpmath.expm1(mpmath.mpf(a))), rel=1e-12)
        assert bound <= a * math.exp(a) * (1 + 1e-15)
    assert bound >= a


def test_proposition_1_at_its_ends() -> None:
    assert relative_gradient_bound(1e-12, 1e-3) == pytest.approx(1e-15, rel=1e-12)
    assert relative_gradient_bound(100.0, 100.0) == math.inf
    assert relative_gradient_bound(0.0, math.inf) == 0.0
    assert relative_gradient_bound(1.0, math.inf) == math.inf
    values = relative_gradient_bound(torch.tensor([0.0, 0.1]), 2.0)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor([0.0, math.expm1(0.2)]))


@settings(max_examples=60, deadline=None)
@given(positive, st.floats(1e-300, 50), st.floats(1e-3, 50))
def test_proposition_2_by_its_formula(radius: float, curvature: float, gradient: float) -> None:
    a = radius * curvature
    if a > 700:
        return
    with mpmath.workdps(50):
        exact = gradient * mpmath.expm1(mpmath.mpf(radius) * curvature) / curvature
    assert output_change_bound(radius, curvature, gradient) == pytest.approx(float(exact), rel=1e-9)


def test_proposition_2_at_its_ends() -> None:
    assert output_change_bound(0.3, 0.0, 2.0) == pytest.approx(0.6, rel=1e-15)
    assert output_change_bound(0.3, 1e-200, 2.0) == pytest.approx(0.6, rel=1e-15)
    assert output_change_bound(1e3, 1e3, 1.0) == math.inf
    assert output_change_bound(1.0, math.inf, 1.0) == math.inf
    assert output_change_bound(0.0, math.inf, 1.0) == 0.0
    assert output_change_bound(1e3, 1e3, 0.0) == 0.0
    assert output_change_bound(1.0, math.inf, 0.0) == math.inf
    values = output_change_bound(
        torch.tensor([0.1, 0.2]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])
    )
    assert values.tolist() == pytest.approx([0.1, math.expm1(0.2)])


def test_integers_do_not_cut_numbers_short() -> None:
    """They are float64: a number in their dtype would be rounded down, and the bound with it."""
    radius = torch.tensor([1, 2])
    found = relative_gradient_bound(radius, 2.9)
    assert found.dtype == DOUBLE
    assert found.tolist() == pytest.approx([math.expm1(2.9), math.expm1(5.8)], rel=1e-14)
    found = output_change_bound(torch.tensor([1]), 2.9, 0.9)
    assert found.item() == pytest.approx(0.9 * math.expm1(2.9) / 2.9, rel=1e-14)
    mixed = relative_gradient_bound(torch.tensor([0.5]), torch.tensor([2]))
    assert mixed.item() == pytest.approx(math.expm1(1), rel=1e-14)
    wider = relative_gradient_bound(torch.tensor([0.5]), torch.tensor([0.1], dtype=DOUBLE))
    assert wider.dtype == DOUBLE
    assert lemma1_bound([torch.tensor([3])], [0.5]).item() == 3


def test_propositions_are_attained_by_the_exponential() -> None:
    """f = exp(c·x) has C = c everywhere, so both propositions are equalities along +x."""
    c, x, radius = 3.0, torch.tensor([0.2], dtype=DOUBLE), 0.7
    f, gradient = torch.exp(c * x), c * torch.exp(c * x)
    moved = torch.exp(c * (x + radius))
    change = ((c * moved - gradient) / gradient).item()
    assert relative_gradient_bound(radius, c) == pytest.approx(change, rel=1e-12)
    assert output_change_bound(radius, c, gradient.item()) == pytest.approx((moved - f).item())


def test_propositions_hold_on_a_curved_function() -> None:
    weight = torch.randn(6, 4, dtype=DOUBLE)
    out = torch.randn(6, dtype=DOUBLE)

    def f(x: Tensor) -> Tensor:
        return torch.tanh(x @ weight.mT) @ out + 3 * x.sum(-1)

    x, step = torch.randn(4, dtype=DOUBLE), torch.randn(4, dtype=DOUBLE)
    step = 0.3 * step / step.norm()
    gradients, ratios = [], []
    for t in torch.linspace(0, 1, 101, dtype=DOUBLE):
        at = x + t * step
        gradients.append(torch.autograd.functional.jacobian(f, at))
        hessian = torch.autograd.functional.hessian(f, at)
        ratios.append((torch.linalg.matrix_norm(hessian, 2) / gradients[-1].norm()).item())
    curvature, norm = 1.01 * max(ratios), gradients[0].norm().item()
    change = (gradients[-1] - gradients[0]).norm().item() / norm
    assert change <= relative_gradient_bound(0.3, curvature)
    assert abs((f(x + step) - f(x)).item()) <= output_change_bound(0.3, curvature, norm)


@pytest.mark.parametrize(
    "call",
    [
        lambda: lemma1_bound([], []),
        lambda: lemma1_bound([1.0], [1.0, 2.0]),
        lambda: lemma1_bound([-1.0], [1.0]),
        lambda: theorem1_proxy([1], [1.0, 1.0], [1.0, 1.0]),
        lambda: relative_gradient_bound(-0.1, 1.0),
        lambda: relative_gradient_bound(0.1, math.nan),
        lambda: relative_gradient_bound(torch.tensor([0.1, math.nan]), 1.0),
        lambda: lemma1_bound([torch.tensor([math.nan])], [1.0]),
        lambda: output_change_bound(0.1, torch.tensor([-1.0]), 1.0),
    ],
)
def test_refusals(call: Callable[[], Any]) -> None:
    with pytest.raises(FlexureError, match=r"expected .* got .*; "):
        call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_dtypes_are_rounded_up_to(dtype: torch.dtype) -> None:
    radius = torch.linspace(0.01, 2, 200).to(dtype)
    curvature, gradient = torch.tensor(1.7, dtype=dtype), torch.tensor(0.3, dtype=dtype)
    for bound, exact in (
        (
            relative_gradient_bound(radius, curvature),
            relative_gradient_bound(radius.double(), curvature.double()),
        ),
        (
            output_change_bound(radius, curvature, gradient),
            output_change_bound(radius.double(), curvature.double(), gradient.double()),
        ),
    ):
        assert bound.dtype == dtype
        assert bool((bound.double() >= exact).all())
        assert bool((bound.double() <= exact * (1 + torch.finfo(dtype).eps)).all())
        assert bool((bound.double() < exact * (1 + 1e-9)).any()) or dtype != torch.float32


def test_rounded_bounds_are_differentiable() -> None:
    radius = torch.tensor([0.3], requires_grad=True)
    relative_gradient_bound(radius, 2.0).sum().backward()
    assert radius.grad.item() == pytest.approx(2 * math.exp(0.6), rel=1e-6)


def test_an_infinite_curvature_says_nothing_even_behind_a_flat_function() -> None:
    for as_value in (float, lambda v: torch.tensor(v, dtype=DOUBLE)):
        curvatures, slopes = [as_value(1.0), as_value(math.inf)], [as_value(0.0), as_value(1.0)]
        assert float(lemma1_bound(curvatures, slopes)) == math.inf
        assert float(theorem1_proxy([1, 1], curvatures, slopes)) == math.inf
        # An affine function bends nothing, however steep what is before it.
        assert float(lemma1_bound([as_value(1.0), as_value(0.0)], [math.inf, 1.0])) == 1.0
        assert float(lemma1_bound([1.0, 1.0, 1.0], [as_value(math.inf), 0.0, 1.0])) == math.inf
        assert float(lemma1_bound([1.0, as_value(0.3)], [0.1, 1.0])) == pytest.approx(
            1.03, rel=1e-15
        )
