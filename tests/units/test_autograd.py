"""Derivatives of CTU to the third order, what it saves, in-place use, every memory layout."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from flexure.units import layout, plain
from flexure.units.functional import centered_softplus, ctu, ctu_curvature
from tests.units.shared import DOUBLE, tensors


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few dozen elements, so that small tensors have many, the last one short."""
    monkeypatch.setattr(layout, "CPU_BLOCK", 32)


# Autograd

PATTERNS = {
    "shared": ((), ()),
    "vector of one": ((1,), (1, 1, 1)),
    "channels on axis 1": ((3, 1, 1), (3, 1, 1)),
    "channels last": ((4,), (4,)),
    "one shared, one per channel": ((), (3, 1, 1)),
    "two different axes": ((3, 1, 1), (4,)),
    "every element": ((2, 3, 5, 4), (5, 1)),
}


def problem(beta_shape: tuple[int, ...], c_shape: tuple[int, ...], dtype: torch.dtype = DOUBLE):
    torch.manual_seed(1)
    x = 2 * torch.randn(2, 3, 5, 4, dtype=dtype)
    x[0, 0, 0] = 0.0  # exact zeros, where the even form has a kink
    beta = torch.rand(beta_shape, dtype=dtype) * 0.9
    return tuple(t.requires_grad_() for t in (x, beta, torch.rand(c_shape, dtype=dtype)))


@pytest.mark.parametrize("shapes", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.usefixtures("small_blocks")
def test_first_and_second_derivatives(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    inputs = problem(*shapes)
    assert gradcheck(ctu, inputs, fast_mode=True)
    assert gradgradcheck(ctu, inputs, fast_mode=True)


def test_derivatives_at_zero_for_certain() -> None:
    inputs = tensors(0.0, 0.7, 0.4)
    assert gradcheck(ctu, inputs)
    assert gradgradcheck(ctu, inputs)


def test_third_derivative_through_double_backward() -> None:
    x = torch.tensor([0.0, 0.3, -1.2], dtype=DOUBLE, requires_grad=True)
    y, third = ctu(x, 0.6, 0.7), None
    for _ in range(3):
        y = third = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
    h = 1e-4
    difference = (ctu_curvature(x + h, 0.6, 0.7) - ctu_curvature(x - h, 0.6, 0.7)) / (2 * h)
    torch.testing.assert_close(third, difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shapes", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_blocks")
def test_fast_and_plain_gradients_agree(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype
) -> None:
    x, beta, c = (t.detach().to(torch.float32) for t in problem(*shapes))
    x = x.to(dtype).requires_grad_()
    inputs = (x, beta.requires_grad_(), c.requires_grad_())
    grad = torch.randn(2, 3, 5, 4).to(dtype)
    fast = torch.autograd.grad(ctu(*inputs), inputs, grad)
    exact = tuple(t.detach().double().requires_grad_() for t in inputs)
    slow = torch.autograd.grad(plain.ctu(*exact), exact, grad.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b, t in zip(fast, slow, inputs, strict=True):
        assert a.dtype == t.dtype
        assert a.shape == t.shape
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_only_needed_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, beta, c = problem((), ())
    added: list[int] = []
    add = layout.Totals.add
    monkeypatch.setattr(
        layout.Totals, "add", lambda self, i, *rest: (added.append(i), add(self, i, *rest))[1]
    )
    for needs, sums in (((True, False, False), set()), ((True, True, False), {0, 1, 2})):
        inputs = [t.detach().requires_grad_(n) for t, n in zip((x, beta, c), needs, strict=True)]
        ctu(*inputs).sum().backward()
        assert [t.grad is not None for t in inputs] == list(needs)
        assert set(added) == sums
    added.clear()
    ctu(x.detach(), beta.detach(), c).sum().backward()
    assert set(added) == {1, 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_input_is_saved(dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, 8, 8, dtype=dtype, requires_grad=True)
    beta, c = torch.full((3, 1, 1), 0.8, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    saved: list[int] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ctu(x, beta, c)
        assert sum(saved) == x.numel() * x.element_size() + 3 * 4 + 4
        saved.clear()
        centered_softplus(x, 5.0)
        assert sum(saved) == x.numel() * x.element_size()


# In place


def test_in_place_is_relu_in_place() -> None:
    source = torch.randn(50, requires_grad=True)
    for beta in (0.8, torch.tensor(0.8), torch.full((50,), 0.8)):
        x = source * 1.0
        assert ctu(x, beta, inplace=True) is x
        assert torch.equal(x, ctu(source, beta))
        assert x.grad_fn is not None
        got = torch.autograd.grad(x.sum(), source)[0]
        assert torch.equal(got, torch.autograd.grad(ctu(source, beta).sum(), source)[0])


def test_in_place_has_second_derivatives() -> None:
    x, beta, c = problem((3, 1, 1), ())
    assert gradgradcheck(
        lambda *i: ctu(i[0] * 1.0, *i[1:], inplace=True), (x, beta, c), fast_mode=True
    )


def test_in_place_without_gradients_writes_through_any_layout() -> None:
    for cut in (slice(None), slice(None, None, 2)):
        base = torch.randn(6, 8).t()
        x, expected = base[cut], ctu(base[cut].clone(), 0.7)
        assert ctu(x, 0.7, inplace=True) is x
        assert torch.equal(base[cut], expected)
    half = torch.randn(9).half()
    expected = ctu(half, 0.7)
    assert torch.equal(ctu(half, 0.7, inplace=True), expected)


def test_in_place_on_something_needed_before_is_an_error() -> None:
    x = torch.randn(4, requires_grad=True)
    y = torch.exp(x)
    ctu(y, 0.8, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="leaf"):
        ctu(x, 0.8, inplace=True)


# Layouts

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "sliced": lambda x: x.repeat(1, 1, 1, 2)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "transposed, sliced": lambda x: x.repeat(2, 1, 1, 1).permute(3, 1, 2, 0)[..., :4],
    "offset": lambda x: x.flatten()[3:-5].unflatten(0, (4, -1))[:, :42].unflatten(1, (3, 7, 2)),
    "empty": lambda x: x[:0],
    "no dimensions": lambda x: x[0, 0, 0, 0],
}


@pytest.mark.parametrize("laid_out", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.usefixtures("small_blocks")
def test_layouts(laid_out: Callable[[Tensor], Tensor], per_channel: bool) -> None:
    source = torch.randn(4, 3, 5, 4, dtype=DOUBLE, requires_grad=True)
    x = laid_out(source)
    channels = x.shape[1] if x.dim() else 1
    size = (channels, 1, 1) if per_channel and x.dim() else ()
    beta = torch.linspace(0.2, 0.9, channels).expand(channels)[: channels if size else 1]
    beta = beta.reshape(size).double().requires_grad_()
    y, expected = ctu(x, beta, 0.5), plain.ctu(x, beta, 0.5)
    torch.testing.assert_close(y, expected)
    assert y.stride() == F.relu(x).stride()
    for grad in (torch.ones_like(y), torch.ones_like(y).as_strided(y.shape, (0,) * y.dim())):
        if y.numel() == 0:
            grad = torch.ones_like(y)
        got = torch.autograd.grad(y, (source, beta), grad, retain_graph=True)
        for a, b in zip(
            got, torch.autograd.grad(expected, (source, beta), grad, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_long_rows_and_short_rows_of_channels() -> None:
    """One dial value a row of memory where rows are long, dials repeated where they are short."""
    for size in (3, 16):
        x = torch.randn(2, 5, size, size, dtype=DOUBLE, requires_grad=True)
        beta = torch.rand(5, 1, 1, dtype=DOUBLE, requires_grad=True)
        assert layout.Layout.of(x, [beta]).varies == ("column" if size == 3 else "row")
        got = torch.autograd.grad(ctu(x, beta).sum(), (x, beta))
        for a, b in zip(
            got, torch.autograd.grad(plain.ctu(x, beta, 0.5).sum(), (x, beta)), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_third_derivatives_of_composed_centered_softplus_count_each_path_once():
    """Where the gradient that arrives depends on the input itself, as it does in networks."""
    x = torch.tensor([-1.0, 0.2, 0.7], dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def chain(unit):
        y = unit(unit(x, beta) * 1.5 - 0.3, beta).sum()
        for _ in range(3):
            (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return [y, *torch.autograd.grad(y.sum(), (x, beta))]

    def formula(x, beta):
        return torch.log1p(torch.exp(beta * x)) / beta - math.log(2) / beta

    for found, expected in zip(chain(centered_softplus), chain(formula), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
