"""The units under forward mode, torch.func, compile, export, autocast and function modes."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from flexure.memory import peak_bytes, saved_bytes
from flexure.units import autograd, layout, plain
from flexure.units.functional import centered_softplus, ctu, ctu_curvature, ctu_slope
from tests.reference.units import exact_ctu
from tests.units.shared import DOUBLE, as_dials

NEXT_TO_ZERO = torch.tensor([0.0, 0.4, -1.7, 6.0], dtype=DOUBLE)


def nested_jvp(f: Callable[[Tensor], Tensor], order: int) -> Callable[[Tensor], Tensor]:
    for _ in range(order):
        f = (lambda inner: lambda x: torch.func.jvp(inner, (x,), (torch.ones_like(x),))[1])(f)
    return f


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(("beta", "c"), [(0.6, 0.3), (0.9, 0.0), (0.0, 1.0), (1.0, 0.5)])
def test_nested_forward_mode(order: int, beta: float, c: float) -> None:
    exact = exact_derivative(beta, c, order)
    per_channel = torch.full((4,), beta, dtype=DOUBLE)
    for dial in (beta, torch.tensor(beta, dtype=DOUBLE), per_channel):
        got = nested_jvp(lambda x, dial=dial: ctu(x, dial, c), order)(NEXT_TO_ZERO)
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)


def exact_derivative(beta: float, c: float, order: int) -> Tensor:
    if beta == 1.0:
        return (NEXT_TO_ZERO > 0).double() if order == 1 else torch.zeros(4, dtype=DOUBLE)

    def f(x: mpmath.mpf) -> mpmath.mpf:
        w = 1 - mpmath.mpf(beta)
        gated = c * x / (1 + mpmath.exp(-beta * x / w))
        return gated + (1 - c) * w * mpmath.log(1 + mpmath.exp(x / w))

    with mpmath.workdps(60):
        exact = [float(mpmath.diff(f, x, order)) for x in NEXT_TO_ZERO.tolist()]
    return torch.tensor(exact, dtype=DOUBLE)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("beta", [0.0, 1e-6, 1.0, 30.0])
def test_nested_forward_mode_of_centered_softplus(order: int, beta: float) -> None:
    x = NEXT_TO_ZERO
    s = torch.sigmoid(beta * x)
    exact = [
        s,
        beta * s * (1 - s),
        beta**2 * s * (1 - s) * (1 - 2 * s),
        beta**3 * s * (1 - s) * (1 - 6 * s + 6 * s * s),
    ][order - 1]
    for dial in (beta, torch.tensor(beta, dtype=DOUBLE)):
        got = nested_jvp(lambda x, dial=dial: centered_softplus(x, dial), order)(x)
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9 * max(1.0, beta**order))


def test_dual_numbers() -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(NEXT_TO_ZERO, torch.ones(4, dtype=DOUBLE))
        tangent = forward_ad.unpack_dual(ctu(dual, 0.6, 0.3)).tangent
        beta = forward_ad.make_dual(torch.tensor(0.6), torch.tensor(1.0))
        by_beta = forward_ad.unpack_dual(ctu(NEXT_TO_ZERO, beta.double(), 0.3)).tangent
    torch.testing.assert_close(tangent, ctu_slope(NEXT_TO_ZERO, 0.6, 0.3))
    expected = [exact_ctu(x, torch.tensor(0.6).item(), 0.3).by_beta for x in NEXT_TO_ZERO.tolist()]
    torch.testing.assert_close(by_beta, torch.tensor(expected, dtype=DOUBLE))


def test_vmap_over_inputs_and_over_dials() -> None:
    x = torch.randn(5, 7)
    torch.testing.assert_close(torch.vmap(lambda row: ctu(row, 0.8))(x), ctu(x, 0.8))
    betas = torch.tensor([0.0, 0.5, 0.9, 1.0])
    got = torch.vmap(lambda b: ctu(x, b))(betas)
    torch.testing.assert_close(got, torch.stack([ctu(x, b.item()) for b in betas]))
    per_sample = torch.vmap(torch.func.grad(lambda row: ctu(row, 0.8).sum()))(x)
    torch.testing.assert_close(per_sample, ctu_slope(x, 0.8))


def test_hessian_by_torch_func() -> None:
    x = torch.randn(4, dtype=DOUBLE)
    hessian = torch.func.hessian(lambda x: ctu(x, 0.8).sum())(x)
    torch.testing.assert_close(hessian, torch.diag(ctu_curvature(x, 0.8)))


@pytest.mark.parametrize("kind", ["number", "scalar", "per channel"])
def test_compiles_as_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    size = (3, 1, 1) if kind == "per channel" else ()
    beta = 0.8 if kind == "number" else torch.full(size, 0.8, requires_grad=True)
    c = 0.5 if kind == "number" else torch.full(size, 0.5, requires_grad=True)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    inputs = [t for t in (x, beta, c) if isinstance(t, Tensor)]
    compiled = torch.compile(
        lambda x: ctu(x * 1.0, beta, c, inplace=True), fullgraph=True, backend="aot_eager"
    )
    y, expected = compiled(x), ctu(x, beta, c)
    torch.testing.assert_close(y, expected)
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiles_with_the_default_backend() -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    beta = torch.full((3, 1, 1), 0.8, requires_grad=True)
    y = torch.compile(ctu, fullgraph=True)(x, beta, 0.5)
    torch.testing.assert_close(y, ctu(x, beta, 0.5))
    got = torch.autograd.grad(y.sum(), (x, beta))
    expected = torch.autograd.grad(ctu(x, beta, 0.5).sum(), (x, beta))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Unit(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = torch.nn.Parameter(torch.full((3, 1, 1), 0.8))

    def forward(self, x: Tensor) -> Tensor:
        return ctu(x, self.beta, "balanced") + centered_softplus(ctu(x, 0.9), 5.0)


@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict: bool) -> None:
    unit, x = Unit(), torch.randn(2, 3, 4, 4)
    program = torch.export.export(unit, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), unit(x))


class Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: set[object] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.called.add(func)
        return func(*args, **(kwargs or {}))


def activations() -> set[object]:
    names = ("relu", "relu_", "clamp", "clamp_", "clamp_min", "clamp_min_", "silu", "silu_", "gelu")
    names += ("softplus", "relu6", "leaky_relu", "hardtanh", "threshold", "elu", "mish", "prelu")
    names += ("maximum", "max", "fmax", "hardswish", "sigmoid", "sigmoid_", "tanh")
    homes = (torch, F, Tensor, torch._C._nn, torch.special)
    return {getattr(home, name) for home in homes for name in names if hasattr(home, name)}


@pytest.mark.parametrize("kind", ["number", "scalar", "per channel"])
@pytest.mark.parametrize("path", ["fast", "plain"])
def test_no_activation_is_seen_by_a_mode(kind: str, path: str) -> None:
    x = torch.randn(4, 2, requires_grad=True)
    for beta in (0.8, 1.0):
        dials = as_dials(beta, 0.5, kind)
        recorder = Recorder()
        with recorder:
            if path == "fast":
                y = ctu(x, *dials) + centered_softplus(x, 5.0)
                y.sum().backward()
            else:
                torch.func.jvp(
                    lambda x, d=dials: ctu(x, *d) + centered_softplus(x, 5.0), (x,), (x,)
                )
                grad = torch.autograd.grad(ctu(x, *dials).sum(), x, create_graph=True)[0]
                grad.sum().backward()
        assert not recorder.called & activations()


def test_autocast() -> None:
    x = torch.randn(8, 8, requires_grad=True)
    beta = torch.tensor(0.9, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = x @ x
        y = ctu(hidden, beta)
        z = centered_softplus(hidden, beta)
        slow = plain.ctu(hidden, beta, 0.5)
    assert y.dtype == z.dtype == hidden.dtype == torch.bfloat16
    torch.testing.assert_close(y, slow)
    y.sum().backward()
    assert beta.grad.dtype == torch.float32


UNITS: dict[str, Callable[[Tensor], Tensor]] = {
    "numbers": lambda x: ctu(x, 0.7, 0.3),
    "scalar tensors": lambda x: ctu(x, torch.tensor(0.7, dtype=DOUBLE), "balanced"),
    "per column": lambda x: ctu(x, torch.tensor([0.0, 0.5, 0.9, 1.0], dtype=DOUBLE), 0.3),
    "per row": lambda x: ctu(x, torch.linspace(0.1, 0.9, 3, dtype=DOUBLE)[:, None], 1.0),
    "in place": lambda x: ctu(x * 1.0, 0.7, inplace=True),
    "ReLU": lambda x: ctu(x, 1.0),
    "centered softplus": lambda x: centered_softplus(x, 3.0),
    "centered softplus, per column": lambda x: centered_softplus(
        x, torch.tensor([0.0, 1.0, 5.0, torch.inf], dtype=DOUBLE)
    ),
}


def field_of(unit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Units inside of units, products and residual sums of them."""
    return lambda x: (unit(x) * unit(2 * x) + unit(x - unit(x).sin())).sum()


@pytest.mark.parametrize("name", UNITS)
def test_forward_over_reverse_is_the_dense_hessian(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autograd, "PIECE", 5)  # three pieces
    torch.manual_seed(3)
    f, x = field_of(UNITS[name]), torch.randn(3, 4, dtype=DOUBLE)
    v = torch.randn_like(x)
    expected = torch.func.hessian(f)(x).reshape(12, 12) @ v.flatten()
    leaf = x.clone().requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(leaf, v)
        y = f(dual)
        # reverse over forward, then forward over reverse
        (mixed,) = torch.autograd.grad(forward_ad.unpack_dual(y).tangent, leaf, retain_graph=True)
        for create_graph in (True, False):
            (gradient,) = torch.autograd.grad(y, dual, create_graph=create_graph)
            product = forward_ad.unpack_dual(gradient).tangent
            torch.testing.assert_close(product.flatten(), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(mixed.flatten(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", UNITS)
def test_all_mixtures_of_both_modes(name: str) -> None:
    torch.manual_seed(3)
    x = torch.randn(3, 4, dtype=DOUBLE, requires_grad=True)
    checks = {"check_forward_ad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(UNITS[name], x, check_batched_grad=True, **checks)
    assert torch.autograd.gradgradcheck(UNITS[name], x, check_fwd_over_rev=True)


def test_dials_that_need_derivatives_have_them_in_forward_mode() -> None:
    x = torch.randn(3, 4, dtype=DOUBLE)
    dials = [torch.tensor(v, dtype=DOUBLE) for v in (0.7, 0.4)]
    moves = [torch.randn_like(t) for t in (x, *dials)]

    def f(x: Tensor, beta: Tensor, c: Tensor) -> Tensor:
        return (ctu(x, beta, c).square() + centered_softplus(x, 4 * beta).sin()).sum()

    _, expected = torch.func.jvp(torch.func.grad(f, (0, 1, 2)), (x, *dials), tuple(moves))
    leaves = [t.clone().requires_grad_() for t in (x, *dials)]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, move) for t, move in zip(leaves, moves, strict=True)]
        got = torch.autograd.grad(f(*duals), duals)
        tangents = [forward_ad.unpack_dual(t).tangent for t in got]
    torch.testing.assert_close(tuple(tangents), expected)


@pytest.mark.parametrize("name", ["numbers", "scalar tensors", "centered softplus"])
def test_forward_mode_saves_the_input_and_its_tangent(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autograd, "PIECE", 1 << 14)
    monkeypatch.setattr(layout, "CPU_BLOCK", 1 << 14)
    unit, x = UNITS[name], torch.randn(32, 4, 32, 32, dtype=DOUBLE)
    direction, g = torch.randn_like(x), torch.ones_like(x)

    def run() -> Tensor:
        return unit(forward_ad.make_dual(leaf, direction))

    leaf = x.clone().requires_grad_()
    with forward_ad.dual_level():
        # x for the value's graph and, as the leaf needs a gradient, the direction for the tangent's
        assert x.nbytes <= saved_bytes(run) <= 2 * x.nbytes + 16
        dual, weight = forward_ad.make_dual(leaf, direction), forward_ad.make_dual(g, g)
        y = unit(dual)
        # value and tangent, and what is made piece by piece
        assert peak_bytes(lambda: unit(dual)) <= 2.5 * x.nbytes

        def back() -> object:
            return torch.autograd.grad(y, dual, weight, retain_graph=True)

        assert peak_bytes(back) <= 4 * x.nbytes
