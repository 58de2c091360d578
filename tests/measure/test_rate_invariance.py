"""The curvature rate depends on the function alone, not on the parameters that write it down."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import flexure
from flexure.calling import seeded
from flexure.measure.rate import curvature_rate
from flexure.models.mlp import MLP


def network(seed: int, sizes: tuple[int, ...], activation: Callable[[], nn.Module]) -> nn.Module:
    with seeded(seed):
        return MLP(sizes, activation).double().eval()


def points(samples: int, dimension: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, dimension, generator=generator, dtype=torch.float64)


def permuted(model: nn.Module) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    model.body[0].weight.data = model.body[0].weight.data[order]
    model.body[0].bias.data = model.body[0].bias.data[order]
    model.head.weight.data = model.head.weight.data[:, order]


def flipped(model: nn.Module) -> None:
    """tanh is odd."""
    signs = torch.tensor([1.0, -1, -1, 1, -1], dtype=torch.float64)
    model.body[0].weight.data *= signs[:, None]
    model.body[0].bias.data *= signs
    model.head.weight.data *= signs


@pytest.mark.parametrize("change", [permuted, flipped])
def test_invariant_to_reparameterisation(change: Callable[[nn.Module], None]) -> None:
    model, x = network(3, (3, 5, 3), nn.Tanh), points(6, 3)
    other = copy.deepcopy(model)
    change(other)
    assert not torch.equal(other.body[0].weight, model.body[0].weight)
    assert curvature_rate(other, x).rate == pytest.approx(curvature_rate(model, x).rate, abs=1e-10)


def test_invariant_to_scales_that_cancel() -> None:
    """softplus_{b/s}(s z) = s softplus_b(z): weights before times s, after divided by s."""
    model, x, scale = network(3, (3, 5, 2), lambda: nn.Softplus(4.0)), points(6, 3), 8.0
    other = copy.deepcopy(model)
    other.body[0].weight.data *= scale
    other.body[0].bias.data *= scale
    other.body[1] = nn.Softplus(4.0 / scale)
    other.head.weight.data /= scale
    assert curvature_rate(other, x).rate == pytest.approx(curvature_rate(model, x).rate, abs=1e-9)


def test_invariant_to_the_scale_symmetry_of_ctu() -> None:
    """phi(s z; beta') = s phi(z; beta) with 1 - beta' = s (1 - beta) at c = 0."""
    x, scale, beta = points(6, 3), 1.5, 0.8
    model = network(4, (3, 5, 2), nn.ReLU)
    other = copy.deepcopy(model)
    other.body[0].weight.data *= scale
    other.body[0].bias.data *= scale
    other.head.weight.data /= scale
    with flexure.steer(model, beta=beta, c=0.0, example=x):
        found = curvature_rate(model, x)
    with flexure.steer(other, beta=1 - scale * (1 - beta), c=0.0, example=x):
        again = curvature_rate(other, x)
    assert again.rate == pytest.approx(found.rate, abs=1e-6)


def test_invariant_to_the_scale_of_the_output() -> None:
    model, x = network(3, (3, 5, 1), nn.Tanh), points(6, 3)
    scaled = curvature_rate(lambda x: -1e3 * model(x)[:, 0], x)
    assert scaled.rate == pytest.approx(curvature_rate(model, x).rate, abs=1e-10)
    assert scaled.error == pytest.approx(curvature_rate(model, x).error, rel=1e-9)


def test_scale_of_the_input_shifts_by_its_log() -> None:
    model, x = network(3, (3, 5, 1), nn.Tanh), points(6, 3)
    faster = curvature_rate(lambda x: model(3 * x)[:, 0], x / 3).rate
    assert faster == pytest.approx(curvature_rate(model, x).rate + math.log(3), abs=1e-10)
