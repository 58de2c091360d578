"""The softplus modules, and what learning beta costs and keeps: sums, nodes, memory."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import flexure
from flexure.contracts import FlexureError
from flexure.memory import saved_bytes
from flexure.surgery.install import install, plan
from flexure.units import (
    CenteredSoftplus,
    Softplus,
    bends,
    blocked,
    centered_softplus,
    module_unit_bounds,
    plain,
)
from flexure.units.catalogue import read_module
from tests.reference.units import exact_centered_softplus
from tests.units.shared import DOUBLE

BAD = [0.0, -1.0, math.nan, math.inf, "5", None, torch.ones(3), -0.0, True, 1e-50, 1e39]


@pytest.mark.parametrize("beta", [1e-6, 1e-2, 0.7, 5.0, 1000.0])
def test_beta_is_what_was_asked_for(beta: float) -> None:
    for dtype, digits in ((torch.float32, 1e-6), (DOUBLE, 1e-13)):
        unit = CenteredSoftplus(beta, dtype=dtype)
        assert unit.beta.item() == pytest.approx(beta, rel=digits)
        assert unit.beta.shape == ()
    assert CenteredSoftplus(torch.tensor(beta)).beta.item() == pytest.approx(beta, rel=1e-6)


def test_published_start() -> None:
    assert CenteredSoftplus().beta.item() == pytest.approx(5.0)
    assert CenteredSoftplus().raw_beta.dtype == torch.float32


@given(st.floats(-80, 1e6))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_beta_is_positive_whatever_the_parameter(raw: float) -> None:
    unit = CenteredSoftplus(dtype=DOUBLE)
    with torch.no_grad():
        unit.raw_beta.fill_(raw)
    assert 0 < unit.beta.item() < math.inf
    torch.testing.assert_close(unit.beta, F.softplus(unit.raw_beta, threshold=40))
    (slope,) = torch.autograd.grad(unit.beta, unit.raw_beta)
    assert slope.item() == pytest.approx(1 / (1 + math.exp(-raw)), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("raw", [-1e30, -800.0, -110.0, -87.0, 3e38])
def test_beta_stays_positive_where_its_exponential_is_0(raw: float, dtype: torch.dtype) -> None:
    unit = CenteredSoftplus(dtype=dtype)
    with torch.no_grad():
        unit.raw_beta.fill_(raw)
    assert torch.finfo(dtype).tiny <= unit.beta.item() < math.inf
    x = torch.tensor([-3.0, 0.0, 2.0], dtype=dtype, requires_grad=True)
    y = unit(x)
    assert bool(y.isfinite().all())
    grads = torch.autograd.grad(y.sum(), (x, unit.raw_beta))
    assert all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("beta", [1.2e-38, 1e-30, 3.4e38])
def test_betas_at_the_ends_of_float32(beta: float) -> None:
    assert CenteredSoftplus(beta).beta.item() == pytest.approx(beta, rel=1e-4)
    assert bool(CenteredSoftplus(beta)(torch.ones(2)).isfinite().all())
    Softplus(beta)(torch.ones(2))
    assert CenteredSoftplus(1e-50, dtype=DOUBLE).beta.item() == pytest.approx(1e-50)


@pytest.mark.parametrize("cls", [CenteredSoftplus, Softplus])
@pytest.mark.parametrize("beta", BAD, ids=str)
def test_refuses_betas_that_are_not_positive(cls: type[nn.Module], beta: object) -> None:
    with pytest.raises(FlexureError, match="positive finite number"):
        cls(beta)


@pytest.mark.parametrize("beta", [1e-6, 0.3, 5.0, 1000.0])
def test_values_and_derivatives_against_exact_ones(beta: float) -> None:
    unit = CenteredSoftplus(beta, dtype=DOUBLE)
    for value in (-3.0, -1e-3, 0.0, 0.2, 40.0):
        x = torch.tensor(value, dtype=DOUBLE, requires_grad=True)
        y = unit(x)
        by_x, by_beta = torch.autograd.grad(y, (x, unit.raw_beta))
        exact = exact_centered_softplus(value, unit.beta.item())
        reached = 1 - math.exp(-unit.beta.item())  # of beta by raw_beta
        assert y.item() == pytest.approx(exact[0], rel=1e-12, abs=1e-15)
        assert by_x.item() == pytest.approx(exact[1], rel=1e-12)
        assert by_beta.item() == pytest.approx(exact[2] * reached, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 4), (130, 70)])
@pytest.mark.parametrize("beta", [1e-6, 0.5, 5.0])
def test_gradients_of_both_orders(shape: tuple[int, ...], beta: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=DOUBLE, requires_grad=True)
    dial = torch.tensor(beta, dtype=DOUBLE, requires_grad=True)
    if x.numel():
        fast = {"fast_mode": True}
        assert gradcheck(centered_softplus, (x, dial), **fast)
        assert gradgradcheck(centered_softplus, (x, dial), **fast)
    else:
        by_x, by_beta = torch.autograd.grad(centered_softplus(x, dial).sum(), (x, dial))
        assert by_x.shape == shape
        assert by_beta == 0


@pytest.mark.parametrize("beta", [0.0, 0.3, 5.0, math.inf])
@pytest.mark.parametrize("asks", ["x", "beta", "both"])
def test_derivatives_of_derivatives_are_those_of_the_formula(beta: float, asks: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 50, dtype=DOUBLE, requires_grad=True)
    g, v, w = (torch.randn(3, 50, dtype=DOUBLE, requires_grad=True) for _ in range(3))
    dial = torch.tensor(beta, dtype=DOUBLE, requires_grad=True)
    first = {"x": (x,), "beta": (dial,), "both": (x, dial)}[asks]
    if math.isinf(beta) and asks != "x":
        pytest.skip("the formula itself has no second derivative in beta at its end")
    found = []
    for f in (centered_softplus, plain.centered_softplus):
        grads = torch.autograd.grad(f(x, dial), first, g, create_graph=True)
        objective = sum((t * (v if t.dim() else 0.7)).sum() for t in grads)
        for again in (False, True):  # by hand, and with a graph of its own
            second = torch.autograd.grad(
                objective,
                (x, g, dial),
                create_graph=again,
                retain_graph=True,
                materialize_grads=True,
            )
            found.append(second)
        if math.isfinite(beta):
            total = sum((t * (w if t.dim() else 0.3)).sum() for t in second)
            third = torch.autograd.grad(total, (x, g, dial), materialize_grads=True)
            found.append(third)
    half = len(found) // 2
    for a, b in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def one_tensor(beta: float, spread: float, weights: str) -> tuple[float, float, float]:
    """The gradient in beta taken fast and in float64, and the sum of magnitudes."""
    torch.manual_seed(4)
    x = spread * torch.randn(64, 64, 16)
    g = {"ones": torch.ones_like, "signs": torch.randn_like, "x": torch.clone}[weights](x)
    dial = torch.tensor(beta, requires_grad=True)
    (fast,) = torch.autograd.grad(centered_softplus(x, dial), dial, g)
    slopes = plain.centered_softplus_slopes(x.double(), dial.detach().double())[1]
    return fast.item(), (slopes * g).sum().item(), (slopes * g).abs().sum().item()


@pytest.mark.parametrize("beta", [1e-4, 0.09, 0.11, 0.5, 5.0, 15.0, 17.0, 1000.0, 1e6])
@pytest.mark.parametrize("spread", [0.02, 1.0, 50.0])
@pytest.mark.parametrize("weights", ["ones", "signs", "x"])
def test_the_gradient_in_beta_of_a_large_tensor(beta: float, spread: float, weights: str) -> None:
    fast, exact, magnitude = one_tensor(beta, spread, weights)
    assert abs(fast - exact) <= 4e-6 * magnitude


@pytest.mark.parametrize("beta", [0.5, 1.1, 5.0, 15.0, 30.0])
def test_values_of_a_large_tensor_are_those_of_its_pieces(beta: float) -> None:
    """Which torch's own kernel makes where its error, a rounding of 1/beta, is small."""
    torch.manual_seed(5)
    x = torch.cat([torch.randn(1 << 14), 1e-3 * torch.randn(1 << 10), torch.zeros(1)])
    whole = centered_softplus(x, beta)
    pieces = torch.cat([centered_softplus(piece, beta) for piece in x.split(1 << 12)])
    exact = plain.centered_softplus(x.double(), beta)
    for found in (whole, pieces):
        error, size = (found - exact).abs(), 1 / beta + x.abs()
        assert (error <= 2e-7 * size).all()
        assert error.mean() <= 5e-8 * size.mean()


def test_a_fused_kernel_is_taken_where_it_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("_centered_fused", "_centered_values"):
        real = getattr(blocked, name)
        monkeypatch.setattr(
            blocked, name, lambda *a, _n=name, _f=real: (calls.append(_n), _f(*a))[1]
        )
    for x, beta, expected in (
        (torch.randn(1 << 14), 5.0, "_centered_fused"),
        (torch.randn(1 << 14), 0.5, "_centered_values"),  # it would cancel
        (torch.randn(1 << 14), 50.0, "_centered_values"),  # slow where powers underflow
        (torch.randn(1 << 14, dtype=DOUBLE), 5.0, "_centered_values"),
        (torch.randn(1 << 10), 5.0, "_centered_values"),
        (torch.randn(1 << 14), torch.rand(1 << 14) + 5, "_centered_values"),
        (torch.full((1 << 14,), math.nan), 5.0, "_centered_values"),
    ):
        calls.clear()
        centered_softplus(x, beta)
        assert set(calls) == {expected}


def test_single_precision_is_taken_where_it_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("single_sums", "double_sums", "difference"):
        real = getattr(bends, name)
        monkeypatch.setattr(bends, name, lambda *a, _n=name, _f=real: (calls.append(_n), _f(*a))[1])
    for beta, size, expected in (
        (5.0, 1 << 14, "difference"),
        (20.0, 1 << 14, "single_sums"),  # the difference would cancel
        (0.01, 1 << 14, "double_sums"),  # it would cancel
        (5.0, 1 << 10, "double_sums"),  # few errors to average out
    ):
        calls.clear()
        dial = torch.tensor(beta, requires_grad=True)
        centered_softplus(torch.randn(size), dial).sum().backward()
        assert set(calls) == {expected}


def test_nan_and_inf_inputs_in_a_large_tensor() -> None:
    x = torch.randn(1 << 14)
    x[0], x[1] = math.inf, -math.inf
    dial = torch.tensor(5.0, requires_grad=True)
    y = centered_softplus(x, dial)
    y[2:].sum().backward()
    assert y[0] == math.inf
    assert y[1].item() == pytest.approx(-math.log(2) / 5)
    assert dial.grad.isfinite()
    x[0] = math.nan
    y = centered_softplus(x, dial)
    assert y[0].isnan()


def test_a_gradient_in_the_input_alone_takes_no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """A penalty on gradients asks for these; the sums would cost more than the rest."""
    x, unit = torch.randn(1 << 14, requires_grad=True), CenteredSoftplus()

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(bends, "single_sums", never)
    monkeypatch.setattr(bends, "double_sums", never)
    monkeypatch.setattr(bends, "difference", never)
    monkeypatch.setattr(plain, "centered_softplus_slopes", never)
    for create_graph in (False, True):
        torch.autograd.grad(unit(x).sum(), x, create_graph=create_graph)
    unit(x).sum().backward(inputs=[x])
    assert unit.raw_beta.grad is None
    (gradient,) = torch.autograd.grad(unit(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert unit.raw_beta.grad.isfinite()


@pytest.mark.parametrize("shape", [(300, 70), (4, 8, 32, 32)])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("leaf", [False, True])
def test_both_gradients_of_a_large_tensor(
    shape: tuple[int, ...], permuted: bool, leaf: bool
) -> None:
    """In one sweep, whatever the layouts, and again and with a graph from the same values."""
    torch.manual_seed(6)
    x = torch.randn(shape)
    x = (x.transpose(0, 1) if permuted else x).requires_grad_(not leaf)
    dial = torch.tensor([3.0], requires_grad=True)
    y = centered_softplus(x, dial)
    g = torch.randn(y.shape)
    wanted = (dial,) if leaf else (dial, x)
    fast, again = (torch.autograd.grad(y, wanted, g, retain_graph=True) for _ in range(2))
    slow = torch.autograd.grad(y, wanted, g, create_graph=True)
    alone = torch.autograd.grad(y, dial, g)
    for a, b, c in zip(fast, again, slow, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone[0], fast[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.001, 0.05, 1.0, 100.0])
@pytest.mark.parametrize("size", [8191, 8192, 100_000])
def test_its_values_may_be_overwritten(size: int, scale: float) -> None:
    """As those of activations that it takes the place of: dropout in place, sums in place."""
    torch.manual_seed(0)
    unit, x = CenteredSoftplus(), (scale * torch.randn(size)).requires_grad_()
    wanted = torch.autograd.grad((2.0 * unit(x)).sum(), (x, unit.raw_beta))
    found = torch.autograd.grad(unit(x).mul_(2.0).sum(), (x, unit.raw_beta))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_keep_no_values(use_reentrant: bool) -> None:
    unit, x = CenteredSoftplus(), torch.randn(1 << 16, requires_grad=True)

    def run() -> Tensor:
        return torch.utils.checkpoint.checkpoint(unit, x, use_reentrant=use_reentrant)

    assert run().grad_fn is not None
    (wanted,) = torch.autograd.grad(unit(x).sum(), unit.raw_beta)
    run().sum().backward()
    torch.testing.assert_close(unit.raw_beta.grad, wanted, rtol=1e-5, atol=1e-6)


def test_between_convolutions_nothing_but_their_inputs_is_saved() -> None:
    """The unit's values, which its gradient in beta takes, are what the next convolution saves."""
    x, unit = torch.randn(4, 8, 16, 16), CenteredSoftplus()
    first, last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    own = (x, *first.parameters(), *last.parameters())
    bytes_saved = saved_bytes(lambda: last(unit(first(x))), exclude=own)
    assert bytes_saved <= 2 * x.nbytes + 16


def test_only_the_input_of_a_small_tensor_is_saved() -> None:
    x, unit = torch.randn(4, 3, 8, 8, requires_grad=True), CenteredSoftplus()
    saved: set[tuple[int, int]] = set()

    def pack(t: Tensor) -> Tensor:
        saved.add((t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        unit(x)
    assert sum(size for _, size in saved) <= x.nbytes + 16


@pytest.mark.parametrize("unit", [CenteredSoftplus(2.0), Softplus(10.0)], ids=["centered", "plain"])
def test_as_a_unit_of_a_network(unit: nn.Module) -> None:
    x = torch.randn(3, 5, requires_grad=True)
    y = unit(x, slope=0.3)
    hidden = x * 1.0
    assert unit(hidden, inplace=True) is hidden
    assert torch.equal(hidden, y)
    a, b = (torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for out in (hidden, y))
    assert torch.equal(a, b)
    for twin in (copy.deepcopy(unit), pickle.loads(pickle.dumps(unit))):
        assert torch.equal(twin(x), y)
    torch._dynamo.reset()
    compiled = torch.compile(unit, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = unit(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=0.02, atol=0.02)
    torch.testing.assert_close(torch.vmap(unit)(x), y)
    _, tangent = torch.func.jvp(unit, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, b)


def test_a_cast_keeps_beta_wide() -> None:
    unit = CenteredSoftplus(0.1234567).bfloat16()
    assert unit.raw_beta.dtype == torch.float32
    assert unit.beta.item() == pytest.approx(0.1234567, rel=1e-6)
    assert unit(torch.randn(3).bfloat16()).dtype == torch.bfloat16
    assert unit.double().raw_beta.dtype == DOUBLE


def test_says_what_it_is() -> None:
    assert repr(CenteredSoftplus(0.25)) == "CenteredSoftplus(beta=0.25)"
    assert "beta=10.0" in repr(Softplus(10.0))


@pytest.mark.parametrize("beta", [10.0, 1000.0])
def test_softplus_is_torch_own(beta: float) -> None:
    x = torch.randn(100, requires_grad=True)
    unit = Softplus(beta)
    assert torch.equal(unit(x), F.softplus(x, beta))
    assert type(unit(x).grad_fn) is type(F.softplus(x, beta).grad_fn)
    spec, params = read_module(unit)
    assert (spec.name, params) == ("softplus", {"beta": beta})


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.act(self.first(x)) - 0.1))


@pytest.mark.parametrize("make", [CenteredSoftplus, lambda: Softplus(10.0)])
def test_installed_at_swapped_and_routed_sites(make) -> None:
    model, x = Functional(), torch.randn(6, 4)
    report = flexure.sites(model, x)
    placed = install(model, plan(report, report.sites, complete=True), lambda *_: make())
    assert len(placed.units) == 2
    unit = next(iter(placed.units.values()))
    expected = model.last(unit(unit(model.first(x)) - 0.1))
    torch.testing.assert_close(model(x), expected)
    placed.remove()


def test_the_census_leaves_it_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(3, 4), CenteredSoftplus(), nn.Linear(4, 4), Softplus(10.0))
    report = flexure.sites(model, torch.randn(2, 3))
    assert [site.activation for site in report.sites] == ["softplus"]
    assert "a beta of its own" in str(report)
    assert module_unit_bounds(model[1]).curvature == pytest.approx(1.25)


@pytest.mark.parametrize("make", [CenteredSoftplus, lambda: Softplus(10.0)])
def test_measures_see_through_it(make) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        flexure.layers.LipschitzBatchNorm(3, gamma=1.5),
        make(),
        nn.Flatten(),
        nn.Linear(48, 3),
    ).double()
    model(3 * torch.randn(30, 2, 6, 6, dtype=DOUBLE))
    model.eval()
    x, y = torch.randn(4, 2, 6, 6, dtype=DOUBLE), torch.tensor([0, 1, 2, 0])
    measured = flexure.curvature(model, x, y)
    bound = flexure.hessian_bound(model, (2, 6, 6))
    assert bool((measured.hessian_norm <= bound.cross_entropy).all())

    def f(x: Tensor) -> Tensor:
        return model(x)[:, 1]

    v = torch.randn_like(x)
    jet = flexure.jet(f, x, v, order=2)
    h = 1e-4
    torch.testing.assert_close(jet[0], f(x))
    torch.testing.assert_close(
        jet[1], (f(x + h * v) - f(x - h * v)) / (2 * h), rtol=1e-5, atol=1e-7
    )
    second = (f(x + h * v) - 2 * f(x) + f(x - h * v)) / h**2
    torch.testing.assert_close(jet[2], second, rtol=1e-4, atol=1e-5)
