"""Bounds of the input Hessian: never below what is found, tight where they can be."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

import flexure
from flexure.contracts import FlexureError
from flexure.measure.bound_rules import Graph, Signal, bent
from flexure.measure.bounds import HessianBound, hessian_bound
from tests.measure.untouched import untouched
from tests.reference.dense_hessian import (
    climbed,
    cross_entropy_hessian,
    largest_combination,
    logit_hessians,
    logit_jacobian,
    norm,
)

ROUNDING = 1 + 1e-12


class Smooth(nn.Module):
    """An activation of flexure's as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def centered(beta: float = 5.0) -> nn.Module:
    return Smooth(lambda x: flexure.units.centered_softplus(x, beta))


def ctu(beta: float, c: float = 0.5) -> nn.Module:
    return flexure.units.CTU(beta=beta, c=c)


def mlp(activation: Callable[[], nn.Module], *widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inside, outside in pairwise(widths):
        layers += [nn.Linear(inside, outside), activation()]
    return nn.Sequential(*layers[:-1])


def worn(model: nn.Module) -> nn.Module:
    """With BatchNorm statistics and factors as after training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.3, 2.0)
            nn.init.normal_(module.weight, 0.5)
            nn.init.normal_(module.bias)
    return model


class Residual(nn.Module):
    """Residual sums, one activation and one layer called twice, an in-place sum, a mean."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.body = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.act = activation
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        for _ in range(2):
            y = self.body(x)
            y += x
            x = self.act(y)
        return self.head(x.mean((2, 3)))


class Branches(nn.Module):
    """Concatenation, slices, permutations, scaling, chunks, pads, a shortcut as option A."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(2, 2, 2, stride=2)
        self.two = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
        self.head = nn.Linear(24, 3)
        self.scale = nn.Parameter(torch.randn(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 3))
        y = torch.cat([torch.tanh(self.one(x)), self.two(x)], dim=1)
        y = self.scale * (y - 0.5) / 1.5 + short
        first, second = F.softplus(y).chunk(2, dim=1)
        y = torch.stack([second, 2 - first], dim=1).flatten(1, 2)
        return self.head(y.permute(0, 2, 3, 1).reshape(len(x), -1))


class Upwards(nn.Module):
    """Transposed convolution, interpolation, pooling, circular padding, products by a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")
        self.up = nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.norm = nn.BatchNorm2d(2)
        self.register_buffer("mix", torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.down(x))
        x = F.silu(self.norm(self.up(F.avg_pool2d(x, 2))))
        x = F.interpolate(x, scale_factor=2, mode="bilinear")
        return torch.sigmoid(F.adaptive_avg_pool2d(x, 2).flatten(1)) @ self.mix


class Functional(nn.Module):
    """Activations called as functions: what steering routes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x), inplace=True)
        return self.head(F.leaky_relu(x.flatten(1), 0.1))


def convnet(activation: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(3),
        activation(),
        nn.Dropout(0.5),
        nn.AvgPool2d(2),
        nn.Conv2d(3, 4, 1),
        activation(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def per_channel() -> nn.Module:
    """Units with a dial a channel, with calibration, and for a LeakyReLU and a ReLU6."""
    tuned = flexure.units.CTU(
        beta=torch.tensor([0.2, 0.7, 0.9]), c=torch.tensor([1.0, 0.0, 0.4]), axis=-1, channels=3
    )
    tuned.correct(torch.tensor([0.6, -1.4, 1.0]), torch.randn(3))
    trained = flexure.units.TrainableCTU("leaky_relu", params={"slope": 0.3}, channels=3, axis=-1)
    capped = flexure.units.CTU("clamp", beta=0.6, params={"cap": 1.0})
    return nn.Sequential(
        nn.Linear(2, 3), tuned, nn.Linear(3, 3), trained, nn.Linear(3, 3), capped, nn.Linear(3, 2)
    )


def steered() -> nn.Module:
    model = Functional()
    flexure.steer(model, beta=0.7, c="balanced", example=torch.zeros(2, 1, 4, 4))
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tanh": (lambda: mlp(nn.Tanh, 3, 4, 4, 3), (3,)),
    "softplus": (lambda: mlp(lambda: nn.Softplus(3.0), 2, 5, 2), (2,)),
    "centered softplus": (lambda: mlp(centered, 3, 4, 2), (3,)),
    "elu": (lambda: mlp(nn.ELU, 2, 4, 2), (2,)),
    "ctu .5 1": (lambda: mlp(lambda: ctu(0.5, 1.0), 3, 4, 3), (3,)),
    "ctu .9 .5": (lambda: mlp(lambda: ctu(0.9), 2, 4, 4, 2), (2,)),
    "ctu .8 0": (lambda: mlp(lambda: ctu(0.8, 0.0), 2, 4, 2), (2,)),
    "per channel": (per_channel, (2,)),
    "routed": (steered, (1, 4, 4)),
    "convnet": (lambda: convnet(lambda: ctu(0.7)), (1, 5, 5)),
    "convnet centered": (lambda: convnet(centered), (1, 5, 5)),
    "residual": (lambda: Residual(centered(2.0)), (1, 3, 3)),
    "residual ctu": (lambda: Residual(ctu(0.6)), (1, 3, 3)),
    "branches": (Branches, (2, 4, 4)),
    "upwards": (Upwards, (1, 4, 4)),
}


def built(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    make, shape = NETWORKS[name]
    return worn(make()).double().eval(), shape


def check(bound: HessianBound, model: nn.Module, x: Tensor) -> None:
    hessians = logit_hessians(model, x)
    jacobian = logit_jacobian(model, x)
    for each, hessian in zip(bound.logits.tolist(), hessians, strict=True):
        assert norm(hessian) <= each * ROUNDING
    assert largest_combination(hessians) <= bound.vector * ROUNDING
    assert norm(jacobian) <= bound.lipschitz * ROUNDING
    for label in range(len(hessians)):
        assert norm(cross_entropy_hessian(model, x, label)) <= bound.cross_entropy * ROUNDING
        error = model(x[None])[0].softmax(0) - F.one_hot(torch.tensor(label), len(hessians))
        assert float((error @ jacobian).detach().norm()) <= bound.gradient * ROUNDING


@pytest.mark.parametrize("name", NETWORKS)
def test_never_below_dense_hessians(name: str) -> None:
    model, shape = built(name)
    bound = hessian_bound(model, shape)
    assert len(bound.logits) == model(torch.zeros(1, *shape).double()).shape[1]
    for width in (0.0, 0.3, 1.0, 3.0):
        check(bound, model, width * torch.randn(shape).double())


@pytest.mark.parametrize("name", ["tanh", "centered softplus", "ctu .9 .5", "ctu .5 1", "residual"])
def test_never_below_hessians_that_ascent_finds(name: str) -> None:
    model, shape = built(name)
    bound = hessian_bound(model, shape)

    def size(x: Tensor) -> Tensor:
        total = logit_hessians(model, x, create_graph=True)[0]
        return torch.linalg.matrix_norm(total, 2)

    starts = [torch.randn(shape).double() for _ in range(2)]
    ends = [climbed(size, start, 25, 0.1) for start in starts]
    assert sum(size(x).item() for x in ends) > 1.2 * sum(size(x).item() for x in starts)
    for x in ends:
        check(bound, model, x)


def one_unit(activation: nn.Module, w1: Tensor, w2: float, bias: float = 0.3) -> nn.Module:
    model = nn.Sequential(nn.Linear(len(w1), 1), activation, nn.Linear(1, 1)).double()
    with torch.no_grad():
        model[0].weight.copy_(w1[None])
        model[0].bias.fill_(bias)
        model[2].weight.fill_(w2)
    return model


@pytest.mark.parametrize(
    ("activation", "peak", "at"),
    [
        (nn.Tanh(), 4 / (3 * math.sqrt(3)), math.atanh(1 / math.sqrt(3))),
        (centered(5.0), 5 / 4, 0.0),
        (ctu(0.8, 0.5), (0.5 * 0.8 / 2 + 0.5 / 4) / 0.2, 0.0),
        (ctu(0.5, 1.0), 0.5, 0.0),
        (nn.Sigmoid(), 1 / (6 * math.sqrt(3)), math.log(2 + math.sqrt(3))),
    ],
)
def test_attained_by_one_unit(activation: nn.Module, peak: float, at: float) -> None:
    w1 = torch.tensor([0.6, -1.1, 2.0], dtype=torch.float64)
    model = one_unit(activation, w1, -1.7)
    bound = hessian_bound(model, (3,))
    expected = 1.7 * peak * float(w1.square().sum())
    assert bound.vector == pytest.approx(expected, rel=1e-9)
    assert bound.logits.tolist() == pytest.approx([expected], rel=1e-9)
    x = w1 * (at - 0.3) / w1.square().sum()
    attained = norm(logit_hessians(model, x)[0])
    assert attained == pytest.approx(bound.vector, rel=1e-9)
    assert attained <= bound.vector
    (row,) = bound.contributions
    assert (row.name, row.share) == ("1", 1.0)
    assert row.curvature == pytest.approx(peak)
    assert row.sensitivity == pytest.approx(1.7)
    assert row.lipschitz == pytest.approx(float(w1.norm()))


def test_one_hidden_layer_is_the_better_of_two_closed_forms() -> None:
    model = mlp(nn.Tanh, 3, 6, 4).double()
    first, last = model[0].weight.detach(), model[2].weight.detach()
    peak = 4 / (3 * math.sqrt(3))
    squared = norm(first) ** 2
    rows = first.square().sum(1)
    bound = hessian_bound(model, (3,))
    for k, each in enumerate(bound.logits.tolist()):
        by_norm = peak * float(last[k].abs().max()) * squared
        by_units = peak * float(last[k].abs() @ rows)
        assert each == pytest.approx(min(by_norm, by_units), rel=1e-4)
    assert bound.lipschitz <= norm(first) * norm(last) * (1 + 1e-4)
    (row,) = bound.contributions
    assert row.sensitivity == pytest.approx(float(last.norm(dim=0).max()))
    assert row.lipschitz == pytest.approx(norm(first), rel=1e-4)


def test_units_in_parallel_are_exact() -> None:
    # Orthogonal inputs: the norm of a block-diagonal Hessian is that of its largest block.
    model = mlp(nn.Tanh, 3, 3, 1).double()
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
        model[2].weight.copy_(weights[None])
    assert hessian_bound(model, (3,)).vector == pytest.approx(2 * 4 / (3 * math.sqrt(3)), rel=1e-4)


def test_a_gradient_of_one_sign_is_bounded_exactly() -> None:
    # All slopes are 1 at 0, and no weight cancels another: only the backward pass sees it.
    model = mlp(nn.Tanh, 3, 5, 1).double()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.abs_()
            layer.bias.zero_()
    attained = norm(logit_jacobian(model, torch.zeros(3).double()))
    assert hessian_bound(model, (3,)).lipschitz == pytest.approx(attained, rel=1e-9)


def test_combinations_of_logits_that_share_no_unit_are_bounded_exactly() -> None:
    model = mlp(nn.Tanh, 1, 2, 2).double()
    with torch.no_grad():
        model[0].weight.fill_(1.5)
        model[2].weight.copy_(torch.eye(2))
    peak = 4 / (3 * math.sqrt(3))
    bound = hessian_bound(model, (1,))
    assert bound.logits.tolist() == pytest.approx([1.5**2 * peak] * 2)
    assert bound.vector == pytest.approx(math.sqrt(2) * 1.5**2 * peak)


@pytest.mark.parametrize("height", [1.0, 0.2, -3.0])
def test_two_layers_add_up(height: float) -> None:
    # f = c·φ(b·φ(a x)): c·peak·(b·slope·a)² from the outer unit, c·slope·b·peak·a² from the inner.
    a, b, c = 1.5, 0.7, 2.0
    slope, peak = abs(height), abs(height) * 4 / (3 * math.sqrt(3))
    model = mlp(lambda: Smooth(lambda x: height * torch.tanh(x)), 1, 1, 1, 1).double()
    with torch.no_grad():
        for layer, value in zip(model[::2], (a, b, c), strict=True):
            layer.weight.fill_(value)
    bound = hessian_bound(model, (1,))
    inner, outer = bound.contributions
    assert inner.curvature == pytest.approx(peak)
    assert inner.bound == pytest.approx(c * slope * b * peak * a**2)
    assert outer.bound == pytest.approx(c * peak * (b * slope * a) ** 2)
    assert bound.vector == pytest.approx(inner.bound + outer.bound)
    assert bound.lipschitz == pytest.approx(c * slope * b * slope * a)
    assert inner.share + outer.share == pytest.approx(1.0)
    assert (inner.name, outer.name) == ("1", "3")


@pytest.mark.parametrize("name", ["tanh", "convnet", "residual", "branches"])
def test_scales_with_outputs_and_inputs(name: str) -> None:
    model, shape = built(name)
    plain = hessian_bound(model, shape)
    louder = hessian_bound(nn.Sequential(model, Smooth(lambda z: -3.0 * z + 1.0)), shape)
    nearer = hessian_bound(nn.Sequential(Smooth(lambda x: 2.0 * (x - 0.4)), model), shape)
    assert torch.allclose(louder.logits, 3.0 * plain.logits, rtol=1e-4)
    assert louder.lipschitz == pytest.approx(3.0 * plain.lipschitz, rel=1e-4)
    assert torch.allclose(nearer.logits, 4.0 * plain.logits, rtol=1e-4)
    assert nearer.lipschitz == pytest.approx(2.0 * plain.lipschitz, rel=1e-4)


def test_invariant_under_rescaling_of_parameters_that_keeps_the_function() -> None:
    # Linear layers in a row: (s W2)(W1 / s).
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    before = hessian_bound(model, (3,))
    with torch.no_grad():
        model[2].weight *= 8.0
        model[3].weight /= 8.0
    assert torch.allclose(hessian_bound(model, (3,)).logits, before.logits, rtol=1e-6)


def test_logits_and_their_combinations() -> None:
    for name in ("tanh", "convnet", "branches"):
        model, shape = built(name)
        bound = hessian_bound(model, shape)
        assert bool((bound.logits <= bound.vector * ROUNDING).all())
        assert bound.vector <= float(bound.logits.norm()) * len(bound.contributions) ** 0.5
        assert sum(row.bound for row in bound.contributions) == pytest.approx(bound.vector)
        for row in bound.contributions:
            most = row.curvature * row.sensitivity * row.lipschitz**2
            assert row.bound <= most * ROUNDING


def test_cross_entropy_constants() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 5 * torch.randn(3000, 4, generator=generator, dtype=torch.float64)
    p = torch.cat([logits.softmax(1), torch.tensor([[0.5, 0.5, 0, 0]], dtype=torch.float64)])
    curved = torch.linalg.matrix_norm(torch.diag_embed(p) - p[:, :, None] * p[:, None], 2)
    assert float(curved.max()) == pytest.approx(0.5, abs=1e-12)
    steep = (p - F.one_hot(torch.tensor(0), 4)).norm(dim=1)
    assert 1.41 < float(steep.max()) <= math.sqrt(2)
    model, shape = built("tanh")
    bound = hessian_bound(model, shape)
    expected = math.sqrt(2) * bound.vector + bound.lipschitz**2 / 2
    assert bound.cross_entropy == pytest.approx(expected, rel=1e-15)
    assert bound.gradient == pytest.approx(math.sqrt(2) * bound.lipschitz, rel=1e-15)


def test_affine_networks_do_not_bend() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(4, 2)).double()
    bound = hessian_bound(model, (3,))
    assert bound.vector == 0.0
    assert bound.logits.tolist() == [0.0, 0.0]
    assert bound.contributions == ()
    assert bound.lipschitz >= norm(model[2].weight @ model[0].weight)
    assert "affine" in str(bound)


def test_merges_normalisation_into_the_layer_before() -> None:
    model, shape = built("convnet")
    merged = convnet(lambda: ctu(0.7)).double().eval()
    merged.load_state_dict(model.state_dict())
    factors = model[1].weight / (model[1].running_var + model[1].eps).sqrt()
    with torch.no_grad():
        merged[0].weight *= factors[:, None, None, None]
        merged[1].weight.fill_(1.0)
        merged[1].running_var.fill_(1.0 - model[1].eps)
    expected = hessian_bound(merged, shape)
    assert torch.allclose(hessian_bound(model, shape).logits, expected.logits, rtol=1e-9)


def test_a_layer_used_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
            super().__init__()
            self.first, self.second, self.act = first, second, nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.act(self.first(self.act(self.first(x))))) + x[:, :1]

    first, second = nn.Linear(3, 3).double(), nn.Linear(3, 1).double()
    bound = hessian_bound(Twice(first, second), (3,))
    plain = nn.Sequential(first, nn.Tanh(), first, nn.Tanh(), second)
    assert bound.vector == pytest.approx(hessian_bound(plain, (3,)).vector)
    assert [row.name for row in bound.contributions] == ["act", "act"]


MAPS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], bool]] = {
    "permute": (lambda x: x.permute(0, 2, 3, 1).transpose(1, 2), (2, 3, 4), True),
    "slices": (lambda x: x[:, 1:, ::2][:, :, :, [2, 0]], (2, 3, 4), True),
    "a copied index": (lambda x: x[:, [0, 0, 1]], (2,), True),
    "expand": (lambda x: x.unsqueeze(2).expand(-1, -1, 3), (2,), True),
    "repeat": (lambda x: x.repeat(1, 2), (3,), True),
    "flip and roll": (lambda x: x.flip(1).roll(1, 2), (3, 2), True),
    "mean": (lambda x: x.mean((2, 3)), (2, 3, 4), True),
    "mean of a dtype": (lambda x: x.mean(-1, dtype=torch.float64), (2, 3), True),
    "sum": (lambda x: x.sum(1), (5, 2), True),
    "pool": (lambda x: F.avg_pool2d(x, 2), (2, 4, 4), True),
    "pool that overlaps": (lambda x: F.avg_pool2d(x, 3, 1, 1), (1, 4, 4), False),
    "adaptive pool": (lambda x: F.adaptive_avg_pool2d(x, 2), (2, 4, 4), True),
    "uneven pool": (lambda x: F.adaptive_avg_pool1d(x, 2), (1, 5), False),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), (1, 2, 2), True),
    "bilinear": (lambda x: F.interpolate(x, size=5, mode="bilinear"), (1, 3, 3), False),
    "zero padding": (lambda x: F.pad(x, (1, 2), value=3.0), (1, 3), True),
    "reflect padding": (lambda x: F.pad(x, (1, 1), mode="reflect"), (1, 4), True),
    "unfold": (lambda x: F.unfold(x, 2, stride=2), (1, 4, 4), True),
    "chunks": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), (4,), False),
    "split and stack": (lambda x: torch.stack(x.split(1, 1), 1), (2, 3), False),
    "where": (lambda x: torch.where(torch.tensor([True, False]), x, 2.0 - x), (2,), False),
    "masked": (lambda x: x.masked_fill(torch.tensor([True, False, False]), -9.0), (3,), True),
    "twice itself": (lambda x: x + x, (3,), True),
    "minus": (lambda x: 1 - 3 * x / 2, (3,), True),
    "alpha": (lambda x: torch.sub(torch.add(x, x, alpha=3), x, alpha=-2), (2,), True),
    "per element": (lambda x: x * torch.tensor([1.0, -4.0, 2.0]), (3,), True),
    "broadcast": (lambda x: x.unsqueeze(2) * torch.tensor([3.0, 4.0]), (2,), False),
    "cat with a constant": (lambda x: torch.cat([x, torch.ones(1, 2)], 1), (3,), True),
    "both halves": (lambda x: torch.cat([3 * x, 4 * x], 1), (2,), True),
    "matrix": (lambda x: x @ torch.tensor([[1.0, 2.0], [0.0, -3.0]]).double(), (2,), True),
    "matrix on the left": (lambda x: torch.ones(2, 3).double() @ x, (3, 4), True),
    "einsum": (lambda x: torch.einsum("bi,ij->bj", x, torch.eye(3).double() * 2), (3,), True),
    "constant's dtype": (
        lambda x: 2 * x + torch.ones(3).type_as(x) * torch.ones(3).to(x),
        (3,),
        True,
    ),
    "more axes": (lambda x: x * torch.ones(1, 1, 1).double(), (3,), True),
    "in place": (lambda x: x.clone().mul_(2.0).add_(x), (3,), True),
    "copied into": (lambda x: torch.zeros_like(x) + x.clone().copy_(2 * x), (3,), True),
}


@pytest.mark.parametrize("name", MAPS)
def test_norms_of_linear_maps(name: str) -> None:
    function, shape, exact = MAPS[name]
    model = Smooth(lambda x: function(x).flatten(1))
    model.register_parameter("dtype", nn.Parameter(torch.zeros(()).double()))
    bound = hessian_bound(model, shape)
    dense = logit_jacobian(model, torch.randn(shape).double())
    assert bound.lipschitz >= norm(dense) / ROUNDING
    assert bound.vector == 0.0
    if exact:
        assert bound.lipschitz == pytest.approx(norm(dense), rel=1e-4)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear, more axes": (lambda: nn.Linear(3, 2), (4, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=2, dilation=2), (2, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), (2, 5, 6)),
    "conv2d same": (lambda: nn.Conv2d(2, 2, 3, padding="same"), (2, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 3, 3)),
    "reflect": (lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), (1, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 4, 3, 2, 1, 1, groups=2), (2, 3, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 3, 2, dilation=2), (2, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scaled", [False, True])
def test_norms_of_layers(name: str, scaled: bool) -> None:
    make, shape = LAYERS[name]
    layer = make()
    channels = layer(torch.zeros(1, *shape)).shape[-1 if "linear" in name else 1]
    factors = torch.linspace(-1, 3, channels).double()
    if "linear" not in name:
        factors = factors.reshape(-1, *(1,) * (len(shape) - 1))
    parts = [layer, *([Smooth(lambda y: factors * y)] if scaled else []), nn.Flatten()]
    model = nn.Sequential(*parts).double()
    bound = hessian_bound(model, shape)
    dense = logit_jacobian(model, torch.randn(shape).double())
    # Small layers are bounded by their own matrix; reflect padding is a map of its own.
    slack = 2.0 if name == "reflect" else 1 + 1e-3
    assert norm(dense) / ROUNDING <= bound.lipschitz <= slack * norm(dense)
    assert bool((bound.logits == 0).all())


def test_many_logits_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shape = built("branches")
    expected = hessian_bound(model, shape)
    monkeypatch.setattr("flexure.measure.bounds._ROW_ELEMENTS", 1)
    in_turns = hessian_bound(model, shape)
    assert torch.allclose(in_turns.logits, expected.logits, rtol=1e-12)
    assert in_turns.vector == pytest.approx(expected.vector)


def pooled_unit() -> nn.Module:
    params = {"kernel_size": 2, "stride": 2, "padding": 0, "ceil_mode": False}
    return flexure.units.CTU("max_pool1d", beta=0.7, params=params)


REFUSED: dict[str, tuple[nn.Module, str, str]] = {
    "relu": (nn.ReLU(), "relu in module '1' (ReLU)", "steer"),
    "leaky": (nn.LeakyReLU(), "leaky_relu", "centered_softplus"),
    "unit": (flexure.units.CTU(beta=1.0), "flexure.units.ctu in module '1'", "beta < 1"),
    "elu": (nn.ELU(0.5), "elu", "jumps"),
    "layer norm": (nn.LayerNorm(4), "layer_norm in module '1' (LayerNorm)", "no bound"),
    "softmax": (nn.Softmax(1), "softmax", "no bound"),
    "max": (nn.MaxPool1d(2), "max_pool1d", "AvgPool"),
    "pool unit": (pooled_unit(), "soft_maximum", "AvgPool"),
    "product": (Smooth(lambda x: x * torch.tanh(x)), "mul", "two values"),
    "quotient": (Smooth(lambda x: 1 / x), "div", "no bound"),
    "matrix product": (Smooth(lambda x: x @ x.mT @ x), "matmul", "two values"),
    "square": (Smooth(lambda x: x**2), "pow", "no bound"),
    "dropout": (Smooth(lambda x: F.dropout(x, 0.5)), "dropout", "eval"),
    "statistics": (nn.BatchNorm1d(4, track_running_stats=False), "batch_norm", "statistics"),
    "branch": (Smooth(lambda x: x if x.sum() > 0 else -x), "gt", "branch"),
    "transformer": (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), "in module", "no bound"),
    "threshold": (nn.Softplus(threshold=2.0), "softplus in module '1'", "threshold"),
    "arguments": (Smooth(lambda x: torch.dropout(x, 0.5, train=False)), "dropout", "not known"),
    "bits": (Smooth(lambda x: x.view(torch.int32)), "view", "ordinary"),
    "random": (Smooth(lambda x: F.dropout(x, 0.5)), "dropout", "model.eval()"),
    "unknown": (Smooth(torch.lgamma), "lgamma in module '1'", "no rule"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name_with_advice(name: str) -> None:
    module, where, advice = REFUSED[name]
    model = nn.Sequential(nn.Linear(3, 4), module, nn.Linear(4, 2))
    with untouched(model), pytest.raises(flexure.FlexureError) as caught:
        hessian_bound(model, (3,))
    assert where in str(caught.value)
    assert advice in str(caught.value)


def test_refuses_outputs_that_are_no_logits() -> None:
    with pytest.raises(flexure.FlexureError, match="shape"):
        hessian_bound(nn.Conv1d(1, 1, 1), (1, 4))
    with pytest.raises(flexure.FlexureError, match="depend on the input"):
        hessian_bound(Smooth(lambda x: torch.zeros(1, 2)), (1,))


@pytest.mark.parametrize("name", ["convnet", "routed", "per channel", "residual"])
def test_leaves_the_model_as_it_was(name: str) -> None:
    model = built(name)[0].float().train()
    with untouched(model):
        hessian_bound(model, NETWORKS[name][1])


def test_training_mode_is_evaluated_in_eval_mode() -> None:
    model, shape = built("convnet")
    expected = hessian_bound(model, shape)
    assert torch.equal(hessian_bound(model.train(), shape).logits, expected.logits)


def test_does_not_depend_on_what_is_global() -> None:
    model, shape = built("convnet")
    expected = hessian_bound(model, shape)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hessian_bound(model, shape).logits, expected.logits)
    with torch.device("meta"):
        assert torch.equal(hessian_bound(model, shape).logits, expected.logits)


def test_half_precision_weights_are_taken_as_they_are() -> None:
    model = mlp(nn.Tanh, 3, 4, 2).bfloat16()
    assert torch.equal(
        hessian_bound(model, (3,)).logits, hessian_bound(model.double(), (3,)).logits
    )


def test_overflow_is_inf_and_said() -> None:
    model = mlp(nn.Tanh, 2, 2, 2).double()
    with torch.no_grad():
        model[0].weight.fill_(1e200)
    bound = hessian_bound(model, (2,))
    assert bound.vector == math.inf
    assert "overflowed" in bound.summary


def test_looseness_and_normalized() -> None:
    model, shape = built("tanh")
    bound = hessian_bound(model, shape)
    x = torch.randn(8, *shape).double()
    y = torch.randint(3, (8,))
    measured = flexure.curvature(model, x, y, tol=1e-8)
    largest = float(measured.hessian_norm.max())
    dense = max(norm(cross_entropy_hessian(model, a, int(b))) for a, b in zip(x, y, strict=True))
    assert largest == pytest.approx(dense, rel=1e-6)
    assert bound.looseness(measured) == pytest.approx(bound.cross_entropy / largest)
    assert bound.looseness(2.0) == pytest.approx(bound.cross_entropy / 2)
    assert bound.looseness(measured) >= 1
    assert bound.looseness(torch.tensor([2.0, math.nan])) == pytest.approx(bound.cross_entropy / 2)
    assert bound.normalized(0.5) == pytest.approx(2 * bound.cross_entropy)
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(flexure.FlexureError, match="positive"):
            bound.normalized(wrong)
        with pytest.raises(flexure.FlexureError, match="positive"):
            bound.looseness(wrong)


def test_prints_a_table() -> None:
    model, shape = built("convnet")
    bound = hessian_bound(model, shape)
    lines = str(bound).splitlines()
    assert lines[0].split()[0] == "activation"
    assert [line.split()[0] for line in lines[2:4]] == ["2", "6"]
    assert lines[-1] == bound.summary
    assert f"{bound.cross_entropy:.4g}" in bound.summary


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, int]:
    """Stacks of layers of any kind, with shortcuts where shapes allow."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    width = size = draw(st.integers(1, 4))
    activations = [nn.Tanh, nn.SiLU, centered, lambda: ctu(0.85), lambda: ctu(0.3, 1.0)]
    layers: list[nn.Module] = []
    for kind in draw(st.lists(st.sampled_from(["wide", "bend", "skip", "join"]), max_size=4)):
        if kind == "bend":
            layers.append(draw(st.sampled_from(activations))())
            continue
        wider = width if kind == "skip" else draw(st.integers(1, 4))
        part = nn.Sequential(nn.Linear(width, wider), draw(st.sampled_from(activations))())
        layers.append(part if kind == "wide" else Around(part, join=kind == "join"))
        width = wider + width if kind == "join" else wider
    layers.append(nn.Linear(width, draw(st.integers(1, 3))))
    return nn.Sequential(*layers).double(), size


class Around(nn.Module):
    def __init__(self, part: nn.Module, join: bool) -> None:
        super().__init__()
        self.part, self.join = part, join

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.part(x)], 1) if self.join else x + self.part(x)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(networks(), st.floats(0.0, 4.0))
def test_never_below_for_any_architecture(drawn: tuple[nn.Module, int], width: float) -> None:
    model, size = drawn
    check(hessian_bound(model, (size,)), model, width * torch.randn(size).double())


def test_pretrained_resnet(real_data: Path) -> None:
    weights = real_data / "resnet-cifar10" / "resnet20.safetensors"
    model = flexure.load_model(f"flexure:resnet20?weights={weights}").model
    example = torch.randn(4, 3, 32, 32)
    flexure.steer(model, beta=0.7, example=example)
    with untouched(model):
        bound = hessian_bound(model, (3, 32, 32))
    assert len(bound.contributions) == 19
    measured = flexure.curvature(model, example, torch.arange(4))
    assert bound.looseness(measured) > 1
    assert math.isfinite(bound.cross_entropy)


@pytest.mark.parametrize(
    ("first", "last"), [(-560, 1000), (-700, 400), (-1000, 1000), (500, -700), (-1000, -1000)]
)
@pytest.mark.parametrize("convolution", [False, True])
def test_weights_whose_products_leave_float64(first: int, last: int, convolution: bool) -> None:
    def bounds(one: float, other: float) -> HessianBound:
        torch.manual_seed(0)
        layer: nn.Module = nn.Conv1d(1, 2, 3) if convolution else nn.Linear(5, 6)
        model = nn.Sequential(layer, nn.Flatten(), nn.Tanh(), nn.Linear(6, 2)).double()
        with torch.no_grad():
            layer.weight *= one
            model[-1].weight *= other
        return hessian_bound(model, (1, 5) if convolution else (5,))

    plain, found = bounds(1.0, 1.0), bounds(2.0**first, 2.0**last)
    power = 2 * first + last
    if power > -1000:
        expected = [math.ldexp(float(bound), power) for bound in plain.logits]
        assert found.logits.tolist() == pytest.approx(expected, rel=1e-12, abs=0)
        assert found.vector == pytest.approx(math.ldexp(plain.vector, power), rel=1e-12, abs=0)
    else:  # too small for a number: rounded up
        assert 0 < found.vector < 1e-300
        assert bool((found.logits > 0).all())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Softplus(beta=-1.0), (4,)),
        (nn.Sequential(nn.Tanh(), nn.AvgPool2d(2, divisor_override=-1), nn.Flatten()), (1, 4, 4)),
    ],
)
def test_negative_parameters_give_no_negative_bounds(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.Linear(4, 2)).double()
    x = torch.zeros((1, *shape), dtype=torch.float64)
    found = hessian_bound(model, shape)
    for k in range(2):
        for _ in range(5):
            x = torch.randn_like(x)
            hessian = torch.autograd.functional.hessian(lambda x, k=k: model(x)[0, k], x)
            exact = torch.linalg.matrix_norm(hessian.reshape(x.numel(), -1), 2)
            assert 0 < exact <= found.logits[k] * ROUNDING


@pytest.mark.parametrize(("slope", "curvature"), [(-1.0, 1.0), (1.0, -1.0), (math.nan, 1.0)])
def test_a_negative_largest_slope_or_curvature_is_refused(slope: float, curvature: float) -> None:
    signal = Signal(Graph(torch.Size([1, 2])), 0)
    with pytest.raises(FlexureError, match=r"expected a largest .* got .*; "):
        bent(signal, slope, curvature, "unit")


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (nn.CELU(-1.0), "module '1'.*positive alpha"),
        (nn.Softplus(threshold=5.0), "module '1'.*threshold"),
    ],
)
def test_parameters_without_bounds_are_refused(layer: nn.Module, says: str) -> None:
    with pytest.raises(FlexureError, match=says):
        hessian_bound(nn.Sequential(nn.Linear(2, 2), layer), (2,))


def test_what_was_compiled_runs_as_python() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    assert hessian_bound(torch.compile(model), (2,)).vector == hessian_bound(model, (2,)).vector


def test_a_model_of_buffers_alone() -> None:
    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.eye(2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.weight)

    assert hessian_bound(Buffers(), (2,)).lipschitz == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [2, (3,), (1, 2, 3), ("2",), None])
def test_refuses_a_shape_that_the_model_does_not_take(shape: Any) -> None:
    with pytest.raises(FlexureError, match=r"expected .* got .*; give"):
        hessian_bound(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), shape)


def test_shares_of_an_infinite_total_are_unknown() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    with torch.no_grad():
        model.double()[2].weight.fill_(1e250)
        model[0].weight.fill_(1e-60)
    found = hessian_bound(model, (2,))
    assert found.vector == math.inf
    assert math.isfinite(found.contributions[0].bound)
    assert all(math.isnan(each.share) for each in found.contributions)


@pytest.mark.parametrize(
    ("around", "name"),
    [
        (torch.vmap(lambda row: row**2), "aten.pow"),
        (torch.func.grad(lambda x: (x**3).sum()), "aten.pow"),
        (lambda x: x.as_subclass(Tensor), "aten.alias"),
        (torch.tensor, "aten.detach"),
    ],
)
def test_code_below_the_functions_of_torch_is_refused(around: Any, name: str) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x.tanh() + around(x))

    with pytest.raises(FlexureError, match=rf"bound of the Hessian can pass, got {name}"):
        hessian_bound(Around(), (2,))
