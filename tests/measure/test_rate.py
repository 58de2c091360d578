"""The curvature rate against closed forms, a slow reference and finite differences."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import flexure
from flexure.calling import seeded
from flexure.contracts import FlexureError
from flexure.measure.rate import CurvatureRate, curvature_rate
from flexure.models.mlp import MLP
from tests.measure.untouched import untouched
from tests.reference import rate as reference

FREQUENCIES, AMPLITUDES = (1.0, 3.0, 7.0), (1.0, 0.5, 0.1)


def sines(x: Tensor) -> Tensor:
    return sum(a * torch.sin(w * x[:, 0]) for w, a in zip(FREQUENCIES, AMPLITUDES, strict=True))


def pole(x: Tensor) -> Tensor:
    return 1 / (1 - x[:, 0])


def period(samples: int = 64) -> Tensor:
    return 2 * torch.pi * torch.arange(samples, dtype=torch.float64)[:, None] / samples


def network(seed: int, sizes: tuple[int, ...], activation: Callable[[], nn.Module]) -> nn.Module:
    with seeded(seed):
        return MLP(sizes, activation).double().eval()


def points(samples: int, dimension: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, dimension, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("highest", "expected"), [(4, 1.6208), (8, 1.8397), (32, 1.9380)])
def test_band_limited_signal(highest: int, expected: float) -> None:
    orders = tuple(range(1, highest + 1))
    found = curvature_rate(sines, period(), orders=orders, directions=1)
    exact = [reference.log_norm_of_sines(n, FREQUENCIES, AMPLITUDES) for n in orders]
    assert found.log_norms.tolist() == pytest.approx(exact, abs=1e-9)
    assert found.rate == pytest.approx(reference.slope(orders, exact), abs=1e-9)
    assert found.rate == pytest.approx(expected, abs=5e-5)


def test_orders_far_apart() -> None:
    found = curvature_rate(lambda x: torch.exp(2 * x[:, 0]), period(), orders=(1, 21, 170))
    assert found.rate == pytest.approx(math.log(2), abs=1e-9)
    assert found.converged.all()


@pytest.mark.parametrize("orders", [(1, 2, 3, 4), (2, 5), (1, 3, 4, 8)])
def test_radius_of_convergence(orders: tuple[int, ...]) -> None:
    x = torch.full((1, 1), 0.3, dtype=torch.float64)
    found = curvature_rate(pole, x, orders=orders, normalization="factorial")
    assert found.rate == pytest.approx(-math.log(0.7), abs=1e-10)
    assert found.fit_residual < 1e-10
    assert math.isnan(found.error)


def test_normalizations_differ_by_a_constant() -> None:
    model = network(0, (3, 5, 4), nn.Tanh)
    raw = curvature_rate(model, points(5, 3))
    factorial = curvature_rate(model, points(5, 3), normalization="factorial")
    assert raw.rate - factorial.rate == pytest.approx(1.0632773780, abs=5e-11)
    assert raw.with_normalization("factorial").rate == factorial.rate
    assert raw.with_normalization("raw").rate == raw.rate
    with pytest.raises(FlexureError, match="'raw', 'factorial', got 'cooked'"):
        raw.with_normalization("cooked")


@pytest.mark.parametrize("reduction", ["rms", "sup"])
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_agrees_with_nested_forward_mode(classes: int, reduction: str) -> None:
    model, x = network(1, (3, 6, classes), nn.Softplus), points(4, 3)
    with untouched(model, x):
        found = curvature_rate(model, x, directions=3, reduction=reduction)
    generator = torch.Generator().manual_seed(0)
    top = model(x).argmax(1)

    def field(inputs: Tensor) -> Tensor:
        out = model(inputs)
        return out[:, 0] if classes == 1 else out.softmax(1)[torch.arange(4), top]

    squares = []
    for _ in range(3):
        v = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        v = v / v.norm(dim=1, keepdim=True)
        squares.append(reference.nested_jet(field, x, v, order=4)[1:].T.square())
    expected = np.stack([s.detach().numpy() for s in squares])
    expected = expected.mean(0) if reduction == "rms" else expected.max(0)
    np.testing.assert_allclose(found.squares.numpy(), expected, rtol=1e-9)
    pooled = expected.mean(0) if reduction == "rms" else expected.max(0)
    logs = [
        math.log(s) / 2 + math.log(reference.calibration(n, 3)) for n, s in enumerate(pooled, 1)
    ]
    assert found.rate == pytest.approx(reference.slope((1, 2, 3, 4), logs), rel=1e-9)


def test_agrees_with_finite_differences() -> None:
    model, x = network(2, (3, 8, 1), nn.Tanh), points(6, 3)
    found = curvature_rate(model, x, orders=(1, 2), directions=1)
    v = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = v / v.norm(dim=1, keepdim=True)
    first, second = reference.central_difference(lambda x: model(x)[:, 0].detach(), x, v, 1e-4)
    torch.testing.assert_close(found.squares[:, 0], first.square(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.squares[:, 1], second.square(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("dimension", "shift"), [(2, -0.10), (784, -2.56)])
def test_calibration_removes_the_dimension(dimension: int, shift: float) -> None:
    a = torch.zeros(dimension, dtype=torch.float64)
    a[:2] = torch.tensor([0.6, 0.8])
    x = points(1, dimension).expand(4000, -1)  # many directions at one point, of a rank-one field
    found = curvature_rate(lambda x: torch.exp(x @ a), x, directions=16)
    plain = replace(found, calibrate=False)
    exact = [math.log(reference.calibration(n, dimension)) for n in range(1, 5)]
    assert plain.rate - found.rate == pytest.approx(-reference.slope((1, 2, 3, 4), exact))
    assert plain.rate - found.rate == pytest.approx(shift, abs=0.005)
    assert abs(found.rate) < 4 * found.error < 0.15  # D^n exp(a x) = exp(a x) a^n, of norm exp(a x)


def test_no_calibration_in_one_dimension() -> None:
    x = period(8)
    found = curvature_rate(sines, x)
    assert found.rate == curvature_rate(sines, x, calibrate=False).rate


def test_relu_is_refused() -> None:
    model, x = network(0, (3, 5, 3), nn.ReLU), points(4, 3)
    with untouched(model, x), pytest.raises(FlexureError, match=r"(?s)body\.1.*steer"):
        curvature_rate(model, x)


def test_max_pooling_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten()).double()
    x = torch.rand(2, 1, 6, 6, dtype=torch.float64)
    with pytest.raises(FlexureError, match="2"):
        curvature_rate(model, x)


def test_steering_makes_relu_measurable() -> None:
    model, x = network(0, (3, 5, 3), nn.ReLU), points(4, 3)
    with flexure.steer(model, beta=0.8, example=x):
        assert math.isfinite(curvature_rate(model, x).rate)


@pytest.mark.parametrize(("degree", "vanishing"), [(1, (2, 3, 4)), (2, (3, 4))])
def test_polynomials_end(degree: int, vanishing: tuple[int, ...]) -> None:
    def power(x: Tensor) -> Tensor:
        out = x
        for _ in range(degree - 1):
            out = out * x
        return out.sum(1)

    found = curvature_rate(power, points(5, 3))
    assert found.rate == -math.inf
    assert found.vanishing == vanishing
    assert found.log_norms[degree - 1].isfinite()
    assert found.log_norms[degree:].isneginf().all()
    assert f"vanishing at the orders {', '.join(map(str, vanishing))}" in str(found)


def test_constant() -> None:
    found = curvature_rate(lambda x: x.sum(1) * 0 + 3, points(5, 3))
    assert found.vanishing == (1, 2, 3, 4)
    assert found.rate == -math.inf


def test_order_that_vanishes_below_others() -> None:
    found = curvature_rate(lambda x: torch.sin(x).sum(1), torch.zeros(2, 1, dtype=torch.float64))
    assert found.vanishing == (2, 4)
    with pytest.raises(FlexureError, match=r"orders \[2, 4\] of \[1, 2, 3, 4\]"):
        _ = found.rate
    assert "vanishing at the orders 2, 4" in str(found)


def test_samples_that_are_not_finite_are_flagged() -> None:
    x = torch.tensor([[0.3], [1.0], [0.5], [float("nan")]], dtype=torch.float64)
    found = curvature_rate(pole, x)
    assert found.converged.tolist() == [True, False, True, False]
    assert found.rate == curvature_rate(pole, x[[0, 2]]).rate
    assert "2 of 4 samples" in str(found)
    nothing = curvature_rate(pole, x[[1, 3]])
    assert math.isnan(nothing.rate)
    assert "0 of 2 samples" in str(nothing)


def test_float32_does_not_overflow() -> None:
    x = torch.full((3, 1), 30.0)
    found = curvature_rate(lambda x: torch.exp(2.0 * x).sum(1), x)  # squares: 1e52, beyond float32
    assert found.converged.all()
    assert found.rate == pytest.approx(math.log(2), abs=1e-5)


def test_sure_sample_keeps_its_derivatives() -> None:
    """p = 1 - 1e-17 in float32: 1 - p and its derivatives are lost in a softmax."""
    w = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = w
    x = torch.tensor([[10.0, 0.0]])
    found = curvature_rate(model, x, directions=4).squares
    exact = curvature_rate(copy.deepcopy(model).double(), x.double(), directions=4).squares
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=0.0)
    assert exact.min() > 0


def sure_linear(dtype: torch.dtype, margin: float) -> tuple[nn.Module, Tensor]:
    """Two classes; p = sigmoid(m), m = w.x, with m = `margin` at every sample."""
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, 0.25], [0.0, 0.0]])
    return model.to(dtype), torch.tensor([[margin, 0.0], [margin - 1, 4.0]], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [120.0, 300.0, 800.0, 1e4])
def test_no_margin_is_too_sure(dtype: torch.dtype, margin: float) -> None:
    """p = 1 - e^-m + ...: |D^n p| is e^-m |w.v|^n, which no dtype has at these margins."""
    model, x = sure_linear(dtype, margin)
    found = curvature_rate(model, x)
    assert found.converged.all()
    assert found.log_norms.mean().item() == pytest.approx(-margin, rel=0.1)
    plane = curvature_rate(lambda x: torch.exp(-x[:, 0] - 0.25 * x[:, 1]), 0 * x)
    assert found.rate == pytest.approx(plane.rate, abs=1e-4 if dtype == torch.float32 else 1e-9)
    assert plane.rate == pytest.approx(0.0, abs=0.3)
    assert math.isfinite(found.error)


def test_sure_and_unsure_samples_pool() -> None:
    """In float32 as in float64, and those that are sure add nothing."""
    model, x = sure_linear(torch.float32, 120.0)
    x = torch.cat([x, x / 100])
    found = curvature_rate(model, x)
    exact = curvature_rate(copy.deepcopy(model).double(), x.double())
    torch.testing.assert_close(found.log_squares, exact.log_squares, rtol=1e-4, atol=1e-3)
    assert found.rate == pytest.approx(exact.taken(slice(2, None)).rate, abs=1e-4)
    assert found.effective_samples.max() <= 2 + 1e-9


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1.0, 1e160, 1e300])
def test_squares_beyond_float64(scale: float) -> None:
    x = torch.linspace(0.0, 1.0, 7, dtype=torch.float64)[:, None]
    found = curvature_rate(lambda x: scale * torch.exp(2 * x[:, 0]), x)
    assert found.converged.all()
    assert found.rate == pytest.approx(math.log(2), abs=1e-9)
    assert found.fit_residual < 1e-9
    assert found.error == pytest.approx(0.0, abs=1e-9)
    assert found.effective_samples.tolist() == pytest.approx(
        curvature_rate(lambda x: torch.exp(2 * x[:, 0]), x).effective_samples.tolist()
    )
    halves = found.taken(slice(0, 3)), found.taken(slice(3, None))
    assert CurvatureRate.joined(halves).rate == found.rate


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.exp(-x[:, 0].square()),  # at 20: value and derivatives
        lambda x: 1.0 + torch.exp(1e-12 * x[:, 0]),  # the fourth alone
        lambda x: torch.softmax(torch.stack([6 * x[:, 0], 0 * x[:, 0]], 1), 1)[:, 1],
    ],
)
def test_what_underflows_in_f_is_no_polynomial(f: Callable[[Tensor], Tensor]) -> None:
    x = torch.full((3, 1), 20.0)
    found = curvature_rate(f, x)
    assert not found.converged.any()
    assert math.isnan(found.rate)
    assert "not defined: derivatives overflow or underflow" in str(found)
    wide = curvature_rate(f, x.double())
    assert wide.converged.all()
    assert math.isfinite(wide.rate)


def test_chunks_and_batches() -> None:
    model, x = network(1, (3, 6, 3), nn.Tanh), points(7, 3)
    whole = curvature_rate(model, x, directions=3)
    for chunk in (1, 2, 7, 100):
        cut = curvature_rate(model, x, directions=3, chunk=chunk)
        torch.testing.assert_close(cut.squares, whole.squares, rtol=1e-12, atol=0.0)
    joined = CurvatureRate.joined([whole.taken(slice(0, 2)), whole.taken(slice(2, None))])
    assert joined.rate == whole.rate
    assert joined.error == whole.error


def test_streamed() -> None:
    """Over batches the squares are pooled, not the batches' rates."""
    model, x = network(1, (3, 6, 3), nn.Tanh), points(7, 3)
    x[4:] *= 5
    measure = partial(curvature_rate, model, directions=2)
    found = flexure.over(measure, [(x[:4],), (x[4:],)], seed=3).result
    halves = found.taken(slice(0, 4)), found.taken(slice(4, 7))
    assert CurvatureRate.joined(halves).rate == found.rate
    squared = [half.log_norms.mul(2).exp() for half in halves]
    torch.testing.assert_close(
        found.log_norms.mul(2).exp(), (4 * squared[0] + 3 * squared[1]) / 7, rtol=1e-12, atol=0.0
    )
    assert abs(found.rate - (halves[0].rate + halves[1].rate) / 2) > 0.05


def test_generator() -> None:
    model, x = network(1, (3, 6, 3), nn.Tanh), points(4, 3)
    seeded_0 = torch.Generator().manual_seed(0)
    first = curvature_rate(model, x, generator=seeded_0)
    assert torch.equal(first.squares, curvature_rate(model, x).squares)
    second = curvature_rate(model, x, generator=seeded_0)
    assert not torch.equal(first.squares, second.squares)


def test_error_is_that_of_other_samples() -> None:
    generator = torch.Generator().manual_seed(3)
    model = network(5, (2, 8, 3), nn.Tanh)
    rates, errors = [], []
    for _ in range(60):
        x = torch.randn(40, 2, generator=generator, dtype=torch.float64)
        found = curvature_rate(model, x, directions=2, generator=generator)
        rates.append(found.rate)
        errors.append(found.error)
    spread = float(np.std(rates, ddof=1))
    assert float(np.mean(errors)) == pytest.approx(spread, rel=0.35)


def test_error_is_the_jackknife() -> None:
    found = curvature_rate(network(5, (2, 8, 3), nn.Tanh), points(6, 2), directions=2)
    rates = [found.taken(torch.arange(6) != i).rate for i in range(6)]
    assert found.error == pytest.approx(math.sqrt(5 / 6 * 6 * np.var(rates)), rel=1e-9)


def test_effective_samples() -> None:
    squares = torch.tensor([[1.0, 4.0], [1.0, 0.0], [1.0, 0.0], [1.0, 4.0]], dtype=torch.float64)
    found = CurvatureRate(torch.ones(4).bool(), squares.log(), (1, 2), "raw", True, 3, 2, "rms")
    assert found.effective_samples.tolist() == [4.0, 2.0]
    assert "4 of 4 samples (2.0 effective)" in str(found)
    assert replace(found, log_squares=(0 * squares).log()).effective_samples.tolist() == [0.0, 0.0]
    assert found.taken(slice(0, 0)).effective_samples.tolist() == [0.0, 0.0]


def test_sup_is_at_least_rms() -> None:
    model, x = network(5, (2, 8, 3), nn.Tanh), points(6, 2)
    rms, sup = (curvature_rate(model, x, reduction=reduction) for reduction in ("rms", "sup"))
    assert (sup.log_norms > rms.log_norms).all()
    assert math.isnan(sup.error)
    halves = sup.taken(slice(0, 3)), sup.taken(slice(3, None))
    assert torch.equal(sup.log_norms, torch.maximum(*(half.log_norms for half in halves)))


def test_training_mode_is_put_back() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(), nn.Linear(4, 2)
    )
    model.double().train()
    x = points(4, 3)
    with untouched(model, x):
        found = curvature_rate(model, x)
    assert torch.equal(found.squares, curvature_rate(model.eval(), x).squares)


class Masked(nn.Module):
    """Takes keyword arguments, returns an object, and wants its sample's own mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, *, embeds: Tensor, mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layer(torch.tanh(embeds * mask[:, None])))


@pytest.mark.parametrize("chunk", [None, 2])
def test_other_inputs_are_held(chunk: int | None) -> None:
    model, x, mask = Masked(), points(5, 3), torch.tensor([0, 1, 2, 3, 4])
    found = curvature_rate(model, {"embeds": x, "mask": mask}, chunk=chunk)
    assert found.squares[0].tolist() == [0.0] * 4
    top = model(embeds=x, mask=mask).logits.argmax(1, keepdim=True)

    def probability(x: Tensor) -> Tensor:
        return model(embeds=x, mask=mask).logits.softmax(1).gather(1, top)[:, 0]

    single = curvature_rate(probability, x)
    torch.testing.assert_close(found.squares, single.squares, rtol=1e-9, atol=1e-25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"orders": (1,)}, r"at least two orders.*got \[1\]"),
        ({"orders": (0, 1)}, "from 1"),
        ({"orders": (1, 1, 2)}, "increase"),
        ({"orders": (2, 1)}, "increase"),
        ({"orders": (1, 2.0)}, "whole numbers"),
        ({"orders": ()}, "at least two"),
        ({"directions": 0}, "directions"),
        ({"chunk": 0}, "chunk"),
        ({"normalization": "none"}, "'raw', 'factorial', got 'none'"),
        ({"reduction": "max"}, "'rms', 'sup', got 'max'"),
    ],
)
def test_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(FlexureError, match=message):
        curvature_rate(sines, period(4), **settings)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(0, 3),
        torch.zeros(3, 2, dtype=torch.int64),
        torch.zeros(3, 2, dtype=torch.bfloat16),
        (torch.zeros(3, 2), torch.zeros(3, 2)),
    ],
)
def test_inputs(x: object) -> None:
    with pytest.raises(FlexureError, match="expected"):
        curvature_rate(sines, x)


def test_outputs() -> None:
    x = points(4, 3)
    with pytest.raises(FlexureError, match=r"\(B,\) from f for B = 4 samples, got \(4, 3\)"):
        curvature_rate(torch.sin, x)
    model = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (1, 12)))
    with pytest.raises(FlexureError, match=r"the model for B = 4 samples, got \(1, 12\)"):
        curvature_rate(model, x)


@settings(max_examples=15, deadline=None)
@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    batch=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_exponential_of_a_plane(
    shape: list[int], batch: int, dtype: torch.dtype, scale: float
) -> None:
    """D^n exp(s x) along v is (s v)^n exp(s x), whatever the shape."""
    x = torch.zeros(batch, *shape, dtype=dtype)

    def f(x: Tensor) -> Tensor:
        return torch.exp(scale * x.flatten(1)[:, 0])

    found = curvature_rate(f, x, orders=(1, 2, 3), directions=1)
    steps = (found.squares[:, 1:] / found.squares[:, :-1]).sqrt()
    torch.testing.assert_close(steps[:, 0], steps[:, 1], rtol=1e-4, atol=0.0)
    assert (steps <= scale * (1 + 1e-5)).all()
    assert found.converged.all()
    assert found.dimension == math.prod(shape)


@pytest.mark.slow
def test_steered_resnet(real_data: Path) -> None:
    """Finite, reproducible, and rising towards ReLU."""
    weights = real_data / "resnet-cifar10" / "resnet20.safetensors"
    model = flexure.load_model(f"flexure:resnet20?weights={weights}")
    images = np.load(real_data / "cifar10-lossless" / "test846.npz")["images"][:8]
    x = torch.stack([model.preprocess(torch.from_numpy(i).permute(2, 0, 1)) for i in images])
    rates = []
    for beta in (0.7, 0.9):
        with flexure.steer(model.model, beta=beta, example=x[:2]), untouched(model.model, x):
            found = curvature_rate(model.model, x, directions=2)
            rates.append(found.rate)
            assert found.converged.all()
    assert rates[0] < rates[1]
