"""The Sobolev semi-norm against closed forms and full derivative tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flexure.calling import seeded
from flexure.contracts import FlexureError
from flexure.measure.sobolev import SobolevSeminorm, sobolev_seminorm
from flexure.models.mlp import MLP
from tests.measure.untouched import untouched
from tests.reference.sobolev import squared_norms


def network(seed: int, sizes: tuple[int, ...], activation: Callable[[], nn.Module]) -> nn.Module:
    with seeded(seed):
        return MLP(sizes, activation).double().eval()


def points(samples: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, *shape, generator=generator, dtype=torch.float64)


def test_quadratic_form() -> None:
    """f = x^T A x / 2: gradient A x, Hessian A everywhere, nothing above."""
    a = points(3, 3)
    a = a + a.T
    x = points(5, 3)
    found = sobolev_seminorm(lambda x: (x @ a * x).sum(1) / 2, x, order=3)
    gradients = (x @ a).square().sum(1)
    torch.testing.assert_close(found.squares[:, 0], gradients)
    torch.testing.assert_close(found.squares[:, 1], a.square().sum().expand(5))
    assert found.squares[:, 2].tolist() == [0.0] * 5
    total = gradients.mean() + a.square().sum()
    assert found.seminorm == pytest.approx(total.sqrt().item(), rel=1e-12)
    assert found.norms[1].item() == pytest.approx(a.norm().item(), rel=1e-12)


def test_signal_over_a_period() -> None:
    """sin(w x): |f|_{H^n} = w^n / sqrt(2)."""
    x = 2 * torch.pi * torch.arange(16, dtype=torch.float64)[:, None] / 16
    found = sobolev_seminorm(lambda x: torch.sin(3 * x[:, 0]), x, order=4)
    assert found.exact
    expected = [3**n / math.sqrt(2) for n in range(1, 5)]
    assert found.norms.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("probes", [1, 16])
def test_the_first_order_alone(probes: int) -> None:
    x = points(5, 2, 3)
    found = sobolev_seminorm(lambda x: x.square().flatten(1).sum(1), x, order=1, probes=probes)
    assert found.exact
    torch.testing.assert_close(found.squares, 4 * x.square().flatten(1).sum(1, keepdim=True))


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus])
def test_exact_in_few_dimensions(activation: Callable[[], nn.Module]) -> None:
    model, x = network(0, (3, 5, 4), activation), points(4, 3)
    with untouched(model, x):
        found = sobolev_seminorm(model, x, order=3, probes=9)
    top = model(x).argmax(1)
    expected = torch.cat(
        [
            squared_norms(lambda s, k=k: model(s).softmax(1)[:, k], x[i : i + 1], 3)
            for i, k in enumerate(top)
        ]
    )
    assert found.exact
    torch.testing.assert_close(found.squares, expected.detach(), rtol=1e-9, atol=1e-15)


def test_estimate_is_unbiased_and_as_sure_as_it_says() -> None:
    model, probes = network(1, (4, 6, 1), nn.Tanh), 3
    x = points(1, 4)
    exact = sobolev_seminorm(model, x, order=3).squares[0]
    copies = x.expand(3000, -1)
    found = sobolev_seminorm(model, copies, order=3, probes=probes, check=False)
    assert not found.exact
    torch.testing.assert_close(found.squares[:, 0], exact[0].expand(3000), rtol=1e-9, atol=0)
    for n in (2, 3):
        estimates = found.squares[:, n - 1]
        wrong_by = (estimates.mean() - exact[n - 1]) / (estimates.std() / math.sqrt(3000))
        assert abs(wrong_by.item()) < 4
        largest = math.sqrt((3 ** (n - 1) - 1) / probes)
        assert 0 < estimates.std().item() / exact[n - 1].item() < 1.1 * largest


def test_errors_are_those_of_other_samples() -> None:
    model = network(1, (3, 6, 2), nn.Tanh)
    generator = torch.Generator().manual_seed(3)
    runs = [
        sobolev_seminorm(
            model,
            torch.randn(50, 3, generator=generator, dtype=torch.float64),
            generator=generator,
            probes=2,
            check=False,
        )
        for _ in range(60)
    ]
    spread = torch.stack([run.norms for run in runs]).std(0)
    torch.testing.assert_close(
        torch.stack([run.errors for run in runs]).mean(0), spread, rtol=0.35, atol=0
    )
    assert runs[0].taken(slice(0, 1)).errors.isnan().all()


@pytest.mark.parametrize("probes", [2, 16])
def test_chunks_and_batches(probes: int) -> None:
    model, x = network(1, (3, 6, 2), nn.Tanh), points(5, 3)
    whole = sobolev_seminorm(model, x, probes=probes)
    for chunk in (1, 2, 9):
        cut = sobolev_seminorm(model, x, probes=probes, chunk=chunk)
        torch.testing.assert_close(cut.squares, whole.squares, rtol=1e-12, atol=0)
    joined = SobolevSeminorm.joined([whole.taken(slice(0, 2)), whole.taken(slice(2, None))])
    assert joined.seminorm == whole.seminorm


def test_relu_has_only_a_gradient() -> None:
    """[CT] app. C.1: the second derivative of a ReLU network is zero where it exists."""
    model, x = network(1, (3, 6, 1), nn.ReLU), points(5, 3)
    with untouched(model, x):
        found = sobolev_seminorm(model, x)
    assert found.squares[:, 1].tolist() == [0.0] * 5
    assert found.seminorm == pytest.approx(found.norms[0].item())


def test_constant_and_plane() -> None:
    x = points(4, 2)
    plane = sobolev_seminorm(lambda x: 3 * x[:, 0] + 4 * x[:, 1], x)
    assert plane.norms.tolist() == pytest.approx([5.0, 0.0])
    constant = sobolev_seminorm(lambda x: torch.ones(len(x), dtype=x.dtype), x, check=False)
    assert constant.seminorm == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sure_samples_keep_their_derivatives(dtype: torch.dtype) -> None:
    """p = 1 - e^-m + ..., m = 120: |grad p| = e^-m |w|, |D^2 p| = e^-m |w|^2; in float32 both 0."""
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    x = torch.tensor([[40.0, 0.0]], dtype=dtype)
    found = sobolev_seminorm(model.to(dtype), x)
    assert found.norms.tolist() == pytest.approx([5 * math.exp(-120), 25 * math.exp(-120)])


def test_samples_that_are_not_finite_are_flagged() -> None:
    x = torch.tensor([[0.5], [1.0]], dtype=torch.float64)
    found = sobolev_seminorm(lambda x: 1 / (1 - x[:, 0]), x, check=False)
    assert found.converged.tolist() == [True, False]
    assert found.norms.tolist() == pytest.approx([4.0, 16.0])


def test_wrong_second_derivatives_are_refused() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: object, g: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * g

    with pytest.raises(FlexureError, match="second derivative is missing or wrong"):
        sobolev_seminorm(lambda x: Square.apply(x).sum(1), points(4, 2))


@pytest.mark.parametrize("setting", ["order", "probes", "chunk"])
def test_settings(setting: str) -> None:
    with pytest.raises(FlexureError, match=setting):
        sobolev_seminorm(lambda x: x.sum(1), points(2, 2), **{setting: 0})


@settings(max_examples=15, deadline=None)
@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    probes=st.integers(1, 30),
)
def test_rank_one(shape: list[int], dtype: torch.dtype, scale: float, probes: int) -> None:
    """D^n exp(s x_1) at 0 has one entry, s^n: every chain of signs gives it exactly."""
    x = torch.zeros(2, *shape, dtype=dtype)
    found = sobolev_seminorm(
        lambda x: torch.exp(scale * x.flatten(1)[:, 0]), x, order=3, probes=probes, check=False
    )
    assert found.norms.tolist() == pytest.approx([scale**n for n in (1, 2, 3)], rel=1e-4)
