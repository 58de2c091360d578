"""Frozen adaptations and steered networks leave Python: torch.export, and ONNX with onnxruntime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flexure
from flexure import LoRA, TrainableCT
from flexure.models.resnet import CifarResNet
from tests.networks import BasicBlock


class Mixed(nn.Module):
    """LeakyReLU, PReLU, ReLU6, GELU and a functional ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3)
        self.leaky = nn.LeakyReLU(0.2)
        self.b = nn.Conv2d(4, 5, 3)
        self.capped = nn.ReLU6()
        self.c = nn.Conv2d(5, 5, 3, groups=5)
        self.gelu = nn.GELU()
        self.d = nn.Conv2d(5, 4, 1)
        self.learned = nn.PReLU(4)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.capped(self.b(self.leaky(self.a(x))))
        x = self.learned(self.d(self.gelu(self.c(x))))
        x = F.relu(self.norm(x)).flatten(2).mean(2)
        return self.head(x)


def blocks() -> nn.Module:
    """In-place ReLU modules called twice, as torchvision's, and max-pooling."""
    stem = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    body = [BasicBlock(4, 8, stride=2)]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))


# A network, and the shape of one input.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "shared ReLU modules": (blocks, (3, 12, 12)),
    "CIFAR ResNet": (lambda: CifarResNet(8), (3, 16, 16)),
    "many activations": (Mixed, (3, 10, 10)),
    "MLP": (mlp, (6,)),
}
METHODS = {
    "Trainable CT": TrainableCT(),
    "published Trainable CT": TrainableCT(parameterization="sigmoid", share=True),
    "LoRA": LoRA(rank=2, learning_rate=0.03),
}
QUICK = {
    ("shared ReLU modules", "Trainable CT"),
    ("many activations", "Trainable CT"),
    ("MLP", "LoRA"),
    ("MLP", "steering"),
}


def cases(networks, methods):
    """Every pair; the quick ones stand for the others, since converting takes seconds."""
    for network in networks:
        for method in methods:
            marks = () if (network, method) in QUICK else (pytest.mark.slow,)
            yield pytest.param(network, method, marks=marks, id=f"{network}-{method}")


def pretrained(name: str) -> tuple[nn.Module, Tensor]:
    """A network with running statistics as after training, and a batch for it."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the average of all batches
    for _ in range(3):
        model.train()(torch.randn(8, *shape))
    return model.eval(), torch.randn(4, *shape)


def adapted(model: nn.Module, x: Tensor, method) -> flexure.Adaptation:
    """Trained for a few steps, then frozen."""
    before = model(x)
    adaptation = flexure.adapt(model, method, example=x)
    optimizer = torch.optim.Adam(adaptation.parameter_groups())
    for step in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x + 0.1 * step), torch.arange(4) % 3).backward()
        optimizer.step()
    adaptation.freeze()
    assert distance(model(x), before) > 1e-2  # there is something to export
    assert distance(model(x)[:2], model(x)[2:]) > 1e-2
    return adaptation


@torch.no_grad()
def distance(a: Tensor, b: Tensor) -> float:
    """Relative to the scale of the logits."""
    return float((a - b).abs().max() / b.abs().max())


def check_torch_export(model: nn.Module, x: Tensor) -> None:
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (x, torch.cat([x, 2 * x, x[:1]])):
        assert distance(program.module()(batch), model(batch)) < 1e-5


def check_onnx(model: nn.Module, x: Tensor) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (x,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (argument,) = session.get_inputs()
    for batch in (x, torch.cat([x, 2 * x, x[:1]])):
        (found,) = session.run(None, {argument.name: batch.numpy()})
        assert found.dtype == np.float32
        assert distance(torch.from_numpy(found), model(batch)) < 1e-4


@pytest.mark.parametrize(("network", "method"), cases(NETWORKS, METHODS))
def test_a_frozen_adaptation_exports(network, method):
    model, x = pretrained(network)
    before = model(x)
    adaptation = adapted(model, x, METHODS[method])
    with torch.no_grad():
        check_torch_export(model, x)
        check_onnx(model, x)
    adaptation.remove()  # exporting has left the way back open
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(("network", "method"), cases(NETWORKS, ["steering"]))
def test_a_steered_network_exports(network, method):
    model, x = pretrained(network)
    settings = {"beta": 0.7, "c": "balanced", "calibration": [x], "match": "mean+std"}
    pooling = network == "shared ReLU modules"
    with flexure.steer(model, example=x, pooling=pooling, **settings), torch.no_grad():
        check_torch_export(model, x)
        check_onnx(model, x)
