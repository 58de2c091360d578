"""What an adaptation leaves alone stays as it is, and comes back in the model's own dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexure.methods.adapt import Adaptation, adapt
from flexure.methods.catalogue import METHODS
from tests.methods.adapted import contents, method, same

FROZEN = pytest.mark.parametrize("name", [n for n, row in METHODS.items() if row.freezes])
TRAINED = {"trainable_ct": {"1.1", "2.act"}, "lora": {"0.low_rank"}}
"""What each method trains in `network`; none of it has a mode to speak of."""

Z = torch.randn(16, 6, generator=torch.Generator().manual_seed(3))
Y = torch.arange(16) % 3


class Running(nn.Module):
    """A user's block: a mean that moves in train mode, around one activation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.5)
        return self.act(x - self.mean)


def network() -> nn.Sequential:
    """Containers without parameters of their own around each activation and the head."""
    torch.manual_seed(4)
    block = nn.Sequential(nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Dropout(0.5))
    classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))
    return nn.Sequential(nn.Linear(6, 8), block, Running(), classifier).eval()


def train(adaptation: Adaptation, steps: int = 3) -> None:
    optimizer = torch.optim.Adam(adaptation.parameter_groups(), lr=0.05)
    for _ in range(steps):
        adaptation.model.train()
        optimizer.zero_grad()
        F.cross_entropy(adaptation.model(Z), Y).backward()
        optimizer.step()


@FROZEN
def test_siblings_and_ancestors_of_what_is_trained_stay_in_eval_mode(name: str) -> None:
    model = network()
    before = contents(model)
    adaptation = adapt(model, method(name), example=Z, head="3.1")
    train(adaptation)
    follows = {path for path, m in model.named_modules() if m.training}
    assert follows == {"3.1"} | TRAINED.get(name, set())
    assert torch.equal(model(Z), model(Z))
    now = contents(model)
    kept = [key for key in before if not key.startswith("3.1.") and key in now]
    assert {"1.0.running_mean", "2.mean"} <= set(kept)
    assert all(torch.equal(before[key], now[key]) for key in kept)
    adaptation.remove()
    assert same(contents(model), before)


@FROZEN
def test_the_dropout_inside_a_trained_head_follows(name: str) -> None:
    model = network()
    adapt(model, method(name), example=Z, head="3")
    model.train()
    assert model[3][0].training
    assert not model[1][2].training
    assert not torch.equal(model(Z), model(Z))
