"""Centered softplus against its exact values, at its ends, and its derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from flexure.units import layout, plain
from flexure.units.functional import centered_softplus
from tests.reference.units import exact_centered_softplus
from tests.units.shared import DOUBLE, anything


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few dozen elements, so that small tensors have many, the last one short."""
    monkeypatch.setattr(layout, "CPU_BLOCK", 32)


@given(
    x=anything, beta=st.one_of(st.floats(1e-12, 1e4), st.sampled_from([0.0, 1e-6, 5.0, math.inf]))
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_centered_softplus_is_accurate(x: float, beta: float) -> None:
    for dtype, eps in ((torch.float32, 2e-7), (DOUBLE, 5e-16)):
        given_x = torch.tensor(x, dtype=torch.float32).to(dtype).requires_grad_()
        b = torch.tensor(beta, dtype=dtype)
        value, slope, _ = exact_centered_softplus(given_x.item(), b.item())
        for dial in (b.item(), b, b.reshape(1)):
            y = centered_softplus(given_x.reshape(1), dial)
            (got,) = torch.autograd.grad(y.sum(), given_x)
            assert abs(y.item() - value) <= 4 * eps * abs(given_x.item()) + 1e-32
            assert abs(got.item() - slope) <= 8 * eps


@pytest.mark.parametrize("beta", [0.0, 1e-6, 1e-3, 0.02, 0.5, 1.0, 40.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_centered_softplus_beta_gradient_is_accurate(beta: float, dtype: torch.dtype) -> None:
    x = torch.tensor([-30.0, -1.0, -1e-4, 0.0, 1e-4, 0.3, 1.0, 30.0, 3e4], dtype=dtype)
    b = torch.tensor(beta, dtype=dtype).requires_grad_()
    for one in x:
        exact = exact_centered_softplus(one.item(), b.item())[2]
        (fast,) = torch.autograd.grad(centered_softplus(one, b), b)
        (slow,) = torch.autograd.grad(centered_softplus(one, b), b, create_graph=True)
        assert fast.item() == pytest.approx(exact, rel=1e-6 if dtype == torch.float32 else 1e-11)
        assert slow.item() == pytest.approx(exact, rel=1e-4 if dtype == torch.float32 else 1e-11)


@pytest.mark.usefixtures("small_blocks")
def test_centered_softplus_derivatives() -> None:
    x = torch.randn(2, 3, 40, dtype=DOUBLE)
    x[0, 0, :3] = 0.0
    for beta in (torch.tensor(0.3), torch.tensor([[0.1], [2.0], [30.0]]), torch.rand(40) * 9):
        inputs = (x.clone().requires_grad_(), beta.double().requires_grad_())
        assert gradcheck(centered_softplus, inputs, fast_mode=True)
        assert gradgradcheck(centered_softplus, inputs, fast_mode=True)


def test_centered_softplus_ends_inside_a_tensor() -> None:
    x = torch.tensor([[-2.0], [0.0], [3.0]]).repeat(1, 3).requires_grad_()
    beta = torch.tensor([0.0, math.inf, 5.0], requires_grad=True)
    for f in (centered_softplus, plain.centered_softplus):
        y = f(x, beta)
        assert torch.equal(y[:, 0], x[:, 0] / 2)
        assert torch.equal(y[:, 1], F.relu(x[:, 1]))
        by_x, by_beta = torch.autograd.grad(y.sum(), (x, beta))
        assert torch.equal(by_x[:, :2], torch.tensor([[0.5, 0.0], [0.5, 0.0], [0.5, 1.0]]))
        assert by_beta[0].item() == pytest.approx(13 / 8)
        assert by_beta[1].item() == 0.0
