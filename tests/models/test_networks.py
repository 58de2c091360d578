"""CIFAR ResNets and the MLP."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flexure.contracts import FlexureError
from flexure.models import DEPTHS, MLP, CifarResNet


@pytest.mark.parametrize(
    ("name", "count"),
    # He et al. 2015, table 6, in full.
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
    ],
)
def test_parameter_counts(name: str, count: int) -> None:
    model = CifarResNet(DEPTHS[name])
    assert sum(p.numel() for p in model.parameters()) == count
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == DEPTHS[name]


def calls_of(model: nn.Module, kind: type[nn.Module], x: torch.Tensor) -> dict[str, int]:
    calls = {path: 0 for path, module in model.named_modules() if isinstance(module, kind)}

    def count(path: str):
        return lambda *_: calls.__setitem__(path, calls[path] + 1)

    for path in calls:
        model.get_submodule(path).register_forward_hook(count(path))
    model(x)
    return calls


def test_one_activation_module_per_call() -> None:
    made = []

    class Activation(nn.SiLU):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    for model, x, expected in (
        (CifarResNet(20, activation=Activation), torch.zeros(1, 3, 32, 32), 19),
        (MLP((4, 5, 6, 2), Activation), torch.zeros(1, 4), 2),
    ):
        made.clear()
        calls = calls_of(model, Activation, x)
        assert list(calls.values()) == [1] * expected
        assert not any(isinstance(m, nn.ReLU) for m in model.modules())


def reference_resnet20(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The network written out flat, from the paper."""

    def conv_bn(x: torch.Tensor, path: str, number: int, stride: int = 1) -> torch.Tensor:
        y = F.conv2d(x, state[f"{path}conv{number}.weight"], stride=stride, padding=1)
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(y, *(state[f"{path}bn{number}.{name}"] for name in names))

    x = F.relu(conv_bn(x, "", 1))
    for stage in (1, 2, 3):
        for block in range(3):
            path = f"layer{stage}.{block}."
            down = stage > 1 and block == 0
            y = F.relu(conv_bn(x, path, 1, stride=2 if down else 1))
            y = conv_bn(y, path, 2)
            if down:
                zeros = torch.zeros_like(x[:, : x.shape[1] // 2, ::2, ::2])
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
            x = F.relu(x + y)
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


def test_forward_against_a_flat_reference() -> None:
    model = CifarResNet(20, num_classes=7).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x), reference_resnet20(model.state_dict(), x))


def test_mlp_against_a_flat_reference() -> None:
    model = MLP((6, 5, 4, 3))
    x = torch.randn(7, 1, 2, 3)
    first, second = (m for m in model.body if isinstance(m, nn.Linear))
    expected = model.head(F.relu(second(F.relu(first(x.reshape(7, 6))))))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x[0].flatten()), expected[0])
    assert isinstance(MLP((6, 2)).head, nn.Linear)
    assert MLP((6, 2))(x).shape == (7, 2)


def test_wrong_sizes() -> None:
    for depth in (0, 2, 18, 21):
        with pytest.raises(FlexureError, match="6n"):
            CifarResNet(depth)
    with pytest.raises(FlexureError, match="0 classes"):
        CifarResNet(20, num_classes=0)
    for sizes in ((), (3,), (3, 0, 2)):
        with pytest.raises(FlexureError, match="all positive"):
            MLP(sizes)
