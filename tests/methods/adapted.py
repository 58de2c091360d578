"""What the tests of adaptations share: a network with everything in it, every method, training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexure.contracts import AdaptationMethod
from flexure.methods.adapt import Adaptation, adapt
from flexure.methods.catalogue import METHODS

SETTINGS: dict[str, dict[str, Any]] = {"steered_probe": {"beta": 0.8}}
"""Of methods that have no default."""


def method(name: str) -> AdaptationMethod:
    return METHODS[name](**SETTINGS.get(name, {}))


class Net(nn.Module):
    """BatchNorm, dropout, a module, a function, one module called twice, a learned slope."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.dropout = nn.Dropout(0.5)
        self.reused = nn.ReLU(inplace=True)
        self.middle = nn.Conv2d(4, 4, 3)
        self.slope = nn.PReLU(4)
        self.last = nn.Linear(16, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.act(self.norm(self.conv(x))))
        x = self.slope(self.middle(self.reused(self.conv(F.relu(x[:, :2] + 1))) + x))
        return self.head(self.reused(self.last(x.flatten(1))))


def net() -> Net:
    torch.manual_seed(5)
    model = Net()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(8, 2, 4, 4, generator=generator)
    return x, torch.arange(8) % 3


def put(model: nn.Module, row: str, /, **options: Any) -> Adaptation:
    options.setdefault("example", batch()[0])
    return adapt(model, method(row), **options)


def train(adaptation: Adaptation, steps: int = 3, rate: float | None = None) -> None:
    """Some steps in train mode with Adam, at the groups' own rates unless one is given."""
    x, y = batch()
    groups = adaptation.parameter_groups()
    if rate is not None:
        groups = [{**group, "lr": rate} for group in groups]
    optimizer = torch.optim.Adam(groups)
    adaptation.model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(adaptation.model(x), y).backward()
        optimizer.step()


def contents(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def state(model: nn.Module) -> dict[str, object]:
    """All that a model is: structure, tensors, hooks, flags, modes, attributes.

    Not which adaptations it has: those that are disabled are kept on it.
    """
    found: dict[str, object] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[path] = id(module), type(module)
        for key, value in module.__dict__.items():
            if key == "_flexure_adaptations":
                continue
            found[f"{path}!{key}"] = (
                list(value.values()) if "_hook" in key and value else repr(value)
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"{name}?"] = id(tensor), tensor.requires_grad, str(tensor.grad), tensor.data_ptr()
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
