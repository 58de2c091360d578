"""What one forward pass shows of a network's weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexure.contracts import SiteError
from flexure.surgery.weight_uses import BareUse, weight_uses


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.same = self.conv
        self.bare = nn.Linear(3, 3)
        self.inner = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
        self.position = nn.Parameter(torch.zeros(1, 3))
        self.matrix = nn.Parameter(torch.eye(3))
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert self.unused.weight.shape == (3, 3)  # asking for a shape is no use
        x = self.same(F.max_pool2d(self.conv(x), 2)).mean((2, 3)) + self.position
        x = F.linear(x, self.bare.weight, self.bare.bias) @ self.matrix
        return self.inner(F.layer_norm(x, (3,)))


def test_everything_is_seen_and_nothing_changed() -> None:
    model = Net()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, 3, 8, 6)
    random = torch.random.get_rng_state()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    uses = weight_uses(model, x)
    assert uses.inputs["conv"] == ((2, 3, 8, 6), (2, 3, 4, 3))
    assert uses.inputs["inner.1"] == ((2, 3),)
    assert "unused" not in uses.inputs
    assert uses.used == {"conv.weight", "bare.weight", "inner.1.weight", "matrix"}
    assert uses.bare == (BareUse("bare.weight", "linear", ""),)
    assert uses.functions == (("", "layer_norm"),)
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    assert torch.equal(random, torch.random.get_rng_state())
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert hooks == after
    assert model.training


def test_layers_of_attention_that_run_without_a_call() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    uses = weight_uses(model, torch.randn(2, 3, 4))
    assert {"self_attn.out_proj.weight"} <= {use.weight for use in uses.bare}


def test_what_is_cut_from_a_weight_stands_for_it() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.turned = (nn.Parameter(torch.ones(3, 3)) for _ in range(2))
            self.token = nn.Parameter(torch.ones(1, 3))
            self.left, self.right = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.token.expand(len(x), -1), x], 0)
            x = F.linear(x @ self.turned.T, self.rows[:2].contiguous())
            return F.linear(x, torch.cat([self.left.weight, self.right.weight]))

    uses = weight_uses(Cut(), torch.zeros(2, 3))
    assert uses.used - {"right.weight"} == {"rows", "turned", "left.weight"}
    assert [use.function for use in uses.bare] == ["linear"]


def test_examples_that_do_not_run() -> None:
    with pytest.raises(SiteError, match="does not run"):
        weight_uses(Net(), torch.randn(2, 3))
