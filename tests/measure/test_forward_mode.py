"""Forward-over-reverse: what stands in for torch's functions, and what the mode holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import flexure
from flexure.measure.curvature import curvature
from flexure.measure.fields import measuring, scalar_field
from flexure.measure.forward_mode import ForwardMode
from flexure.measure.products import PRODUCTS
from flexure.memory import peak_bytes, saved_bytes
from flexure.models.resnet import CifarResNet

DOUBLE = torch.float64


def overwritten(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """What is written in place is read again under its old name."""

    def run(x: Tensor) -> Tensor:
        x = x * 1.5
        view = x[:, 1:]
        y = function(x)
        return y + x + F.pad(view, (0, 0, 1, 0))

    return run


def group_norm(x: Tensor) -> Tensor:
    weight, bias = torch.linspace(-1, 2, 4, dtype=DOUBLE), torch.linspace(1, 2, 4, dtype=DOUBLE)
    return F.group_norm(x, 2, weight, bias=bias, eps=0.1) + F.group_norm(x, 4)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "silu, in place": overwritten(lambda x: F.silu(x, inplace=True)),
    "mish": F.mish,
    "mish, in place": overwritten(nn.Mish(inplace=True)),
    "group norm": group_norm,
    "relu": lambda x: F.relu(x) + torch.relu(-x) ** 2 + (x - 1).relu().sin(),
    "relu, in place": overwritten(nn.ReLU(inplace=True)),
    "relu, in place on a view": lambda x: (lambda c: (F.relu_(c[:, ::2]), c.square())[1])(x * 1.0),
    "relu, overwritten method": overwritten(lambda x: x.relu_().square()),
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "layer norm": lambda x: F.layer_norm(x, (6,)),
    "softmax": lambda x: x.softmax(1),
    "max pool": lambda x: F.max_pool1d(x, 2).repeat(1, 1, 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_products_are_those_of_double_backward(name: str) -> None:
    torch.manual_seed(1)
    function, x, v = FUNCTIONS[name], *torch.randn(2, 3, 4, 6, dtype=DOUBLE)

    def field(x: Tensor) -> Tensor:
        return (function(x) * function(x.sin())).square().sum((1, 2))

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(field(leaf * 1.0).sum(), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(gradient, leaf, v)
    made = PRODUCTS["forward-over-reverse"](scalar_field(nn.Identity(), x, field=field))
    torch.testing.assert_close(made.values, field(x))
    torch.testing.assert_close(made.gradient, gradient.detach())
    torch.testing.assert_close(made(v, torch.arange(3)), expected)


def test_relu_is_relu_where_values_are_extreme() -> None:
    x = torch.tensor([[-torch.inf, -0.0, 0.0, 1e-45, torch.inf, torch.nan]], requires_grad=True)
    with ForwardMode():
        y, expected = F.relu(x), F.relu(x.detach())
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    (slope,) = torch.autograd.grad(y, x, torch.full_like(y, torch.inf))
    assert slope[0, :5].tolist() == [0, 0, 0, torch.inf, torch.inf]


def test_function_transforms_inside_fields_are_left_alone() -> None:
    x, v = torch.randn(2, 3, 4, dtype=DOUBLE)

    def field(x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: (F.relu(row) * row.sin()).sum())(x)

    first, second = (
        make(scalar_field(nn.Identity(), x, field=field)) for make in PRODUCTS.values()
    )
    rows = torch.arange(3)
    torch.testing.assert_close(first(v, rows), second(v, rows))


def test_fields_that_are_gradients() -> None:
    """A field may differentiate within itself."""
    x, v = torch.randn(2, 3, 4, dtype=DOUBLE)
    unit = nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 1)).double()

    def field(x: Tensor) -> Tensor:
        y = unit(x).sum() + F.relu(x).square().sum() + flexure.units.ctu(x, 0.7).square().sum()
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        return gradient.square().sum(1)

    first, second = (make(scalar_field(unit, x, field=field)) for make in PRODUCTS.values())
    rows = torch.arange(3)
    torch.testing.assert_close(first(v, rows), second(v, rows))


def test_relu_saves_a_byte_an_element_and_tangents_have_no_graph() -> None:
    x, v = torch.randn(2, 8, 4, 16, 16)
    leaf = x.clone().requires_grad_()

    def run() -> Tensor:
        y = F.relu(forward_ad.make_dual(leaf, v).clone())
        return F.relu(-y * 2.0)

    with forward_ad.dual_level():
        with ForwardMode():
            assert saved_bytes(run) == 2 * x.numel()
            y = flexure.units.ctu(F.softplus(run()), 0.7) * 1.0
        assert not forward_ad.unpack_dual(y).tangent.requires_grad


def networks() -> dict[str, Callable[[], nn.Module]]:
    def steered(beta: float, c: float) -> nn.Module:
        model = CifarResNet(20).eval()
        flexure.steer(model, beta=beta, c=c, example=torch.zeros(1, 3, 32, 32))
        return model

    class Softplus(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return flexure.units.centered_softplus(x, 5.0)

    return {
        "ReLU": lambda: CifarResNet(20).eval(),
        "steered": lambda: steered(0.9, 0.5),
        "steered, one part": lambda: steered(0.7, 0.0),
        "centered softplus": lambda: CifarResNet(20, activation=Softplus).eval(),
    }


@pytest.mark.parametrize(("name", "share"), zip(networks(), (0.65, 0.4, 0.55, 0.85), strict=True))
def test_it_holds_less_than_double_backward(name: str, share: float) -> None:
    torch.manual_seed(0)
    model, x = networks()[name](), torch.randn(2, 3, 32, 32)
    v, rows = torch.randn_like(x), torch.arange(2)
    with measuring(model):
        field = scalar_field(model, x, torch.tensor([0, 1]))

        def held(how: str) -> int:
            return peak_bytes(lambda: PRODUCTS[how](field)(v, rows))

        assert held("forward-over-reverse") <= share * held("double-backward")
        both = [make(field)(v, rows) for make in PRODUCTS.values()]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4 * both[0].abs().max().item())


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Mish, nn.GELU, nn.ReLU, nn.ELU])
def test_curvature_of_every_smooth_activation(activation: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 4)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), norm, activation(), nn.Flatten(), nn.Linear(64, 3)
    ).double()
    x, y = torch.randn(4, 2, 6, 6, dtype=DOUBLE), torch.tensor([0, 1, 2, 0])
    first, second = (curvature(model, x, y, products=how, max_products=60) for how in PRODUCTS)
    torch.testing.assert_close(first.normalized, second.normalized, rtol=1e-8, atol=1e-10)
    assert second.converged.all()


def test_what_has_no_forward_derivative_is_named() -> None:
    class Strange(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return grad * ctx.saved_tensors[0].cos()

    x = torch.randn(3, 4, dtype=DOUBLE)
    with pytest.raises(flexure.FlexureError, match=r"forward mode AD.*another way"):
        curvature(
            nn.Identity(),
            x,
            field=lambda x: Strange.apply(x).sum(1),
            products="forward-over-reverse",
        )
