"""Functions with kinks are found where the output depends on the input through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexure.measure.kinks import kinks
from flexure.methods.lcnn import to_lcnn

KINKED: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, ...]]] = {
    "function": (F.relu, ("relu",)),
    "method": (lambda x: x.clamp(min=0), ("clamp",)),
    "in place": (lambda x: (x + 0).relu_(), ("relu",)),
    "largest": (lambda x: x.max(1).values[:, None], ("max",)),
    "pooling": (lambda x: F.max_pool1d(x[:, None], 2)[:, 0], ("max_pool1d",)),
    "leaky": (nn.LeakyReLU(0.2), ("leaky_relu",)),
    "elu": (nn.ELU(0.5), ("elu",)),
    "two": (lambda x: x.abs() + x.relu() + F.relu(x), ("abs", "relu")),
    "smooth": (lambda x: F.softplus(x, 1000.0) + x.tanh() + nn.ELU()(x), ()),
    "normalised": (lambda x: F.normalize(F.layer_norm(x, (4,))), ()),
    "of no input": (lambda x: x * torch.ones(4).relu(), ()),
}


class Net(nn.Module):
    def __init__(self, bend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.bend = nn.Linear(3, 4), bend
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Any:
        return self.bend(self.layer(x)) * self.scale.clamp(min=0.5).mean()


@pytest.mark.parametrize("name", KINKED)
def test_kinks_on_the_way_from_the_input(name: str) -> None:
    bend, expected = KINKED[name]
    model = Net(bend)
    assert kinks(model, torch.rand(2, 3)) == expected
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_low_curvature_network_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    before = model[1].running_mean.clone()
    assert kinks(model, torch.rand(2, 3)) == ("relu",)
    assert torch.equal(model[1].running_mean, before)
    assert kinks(to_lcnn(model, example=torch.rand(2, 3)), torch.rand(2, 3)) == ()
