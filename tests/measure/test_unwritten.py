"""No measure leaves a mark on a model that writes into itself when it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flexure
from flexure import FlexureError, jet
from tests.measure.untouched import untouched

X, Y = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 1])

HEAD = nn.Linear(2, 1).double()


class Writing(nn.Module):
    """Counts its calls in a buffer in place, in one that it binds anew, and in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        self.register_buffer("in_place", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("bound", torch.tensor([torch.nan, 1.0]))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.in_place += 1
        self.in_place.data += 1
        self.bound = self.bound + 1
        self.calls += 1
        self.last = self.in_place
        return self.net(x)


MEASURES: dict[str, Callable[[nn.Module], Any]] = {
    "curvature": lambda model: flexure.curvature(model, X, Y),
    "curvature_rate": lambda model: flexure.curvature_rate(model, X, orders=(1, 2), directions=2),
    "hessian_bound": lambda model: flexure.hessian_bound(model, (4,)),
    "gradient_change": lambda model: flexure.gradient_change(model, X, Y, radii=(0.1,)),
    "calibration": lambda model: flexure.calibration(model, X, Y),
    "jet": lambda model: jet(nn.Sequential(model, HEAD), X, X, order=2),
    "refused jet": lambda model: refused(nn.Sequential(model, nn.ReLU())),
}


def refused(model: nn.Module) -> None:
    with pytest.raises(FlexureError, match="relu"):
        jet(model, X, X, order=2)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("training", [True, False])
def test_what_a_model_writes_is_put_back(name: str, training: bool) -> None:
    model = Writing().train(training)
    with untouched(model):
        MEASURES[name](model)
    assert model.calls == 0
    assert not hasattr(model, "last")
    model(X)
    with untouched(model):
        MEASURES[name](model)
    assert model.calls == 1


def test_a_buffer_that_is_resized_is_put_back_and_so_are_those_after_it() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(2))
            self.register_buffer("total", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.cache.resize_(5).fill_(1.0)
            self.total += 1
            return x.square().sum(1)

    model = Growing()
    flexure.curvature(model, torch.randn(4, 3))
    assert model.cache.tolist() == [0.0, 0.0]
    assert model.total == 0
