"""Time of `flexure.jet` against one forward pass and against nested forward mode.

Convolutional networks and perceptrons with smooth activations; ReLU networks steered at beta .8.
CPU time with one thread; the arms take turns in one process, and ratios are medians of the ratios
within a round. Nested forward mode (`torch.func.jvp` in itself) runs once, where asked for: its
cost grows by a factor with every order. The pretrained ResNet-20 where FLEXURE_DATA is set,
otherwise random weights: what is timed does not depend on them.

    FLEXURE_DATA=... python benchmarks/jets.py
    python benchmarks/jets.py --small --rounds 2   # perceptrons only
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp

import flexure
from flexure.models.resnet import CifarResNet

TARGET = 10.0  # forward passes that order 4 may cost, where linear algebra dominates


def networks(small: bool) -> Iterator[tuple[str, Callable[[Tensor], Tensor], Tensor]]:
    """Name, scalar field and points."""
    for width in (256, 1024):
        for activation in (nn.Tanh, nn.SiLU, nn.GELU, nn.Softplus, nn.ReLU):
            model = perceptron(width, activation)
            x = torch.randn(128, width)
            name = activation.__name__
            if activation is nn.ReLU:
                flexure.steer(model, beta=0.8, example=x)
                name = "ReLU steered"
            yield f"MLP {width} {name}", first_output(model), x
    if not small:
        model, x = resnet(), torch.randn(16, 3, 32, 32)
        flexure.steer(model, beta=0.8, example=x)
        yield "ResNet-20 steered", first_output(model), x


def perceptron(width: int, activation: type[nn.Module]) -> nn.Module:
    """Three hidden layers of this width."""
    hidden = [layer for _ in range(3) for layer in (nn.Linear(width, width), activation())]
    return nn.Sequential(*hidden, nn.Linear(width, 1)).eval()


def resnet() -> nn.Module:
    """ResNet-20."""
    data = os.environ.get("FLEXURE_DATA")
    if data is None:
        return CifarResNet(20).eval()
    weights = Path(data) / "resnet-cifar10" / "resnet20.safetensors"
    return flexure.load_model(f"flexure:resnet20?weights={weights}").model.eval()


def first_output(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Its first output as a scalar field."""
    return lambda x: model(x)[:, 0]


def nested(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, order: int) -> Tensor:
    """The highest derivative by forward mode nested in itself."""

    def derivative(g: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: jvp(g, (x,), (v,))[1]

    for _ in range(order):
        f = derivative(f)
    return f(x)


def seconds(run: Callable[[], Any]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--order", type=int, default=4)
    parser.add_argument("--nested", action="store_true", help="time nested forward mode too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"order {options.order}; forward passes: jet (target {TARGET:g}), nested forward mode")
    for name, f, x in networks(options.small):
        report(name, f, x, options)


def report(name: str, f: Callable[[Tensor], Tensor], x: Tensor, options: Any) -> None:
    """Prints one line."""
    v, order = torch.randn_like(x), options.order
    with torch.no_grad():
        f(x), flexure.jet(f, x, v, order=order)
        rounds = [
            (seconds(lambda: f(x)), seconds(lambda: flexure.jet(f, x, v, order=order)))
            for _ in range(options.rounds)
        ]
        passes = statistics.median(jet / forward for forward, jet in rounds)
        rival = ""
        if options.nested:
            typical = statistics.median(forward for forward, _ in rounds)
            rival = f"{rival_seconds(f, x, v, order) / typical:9.1f}"
    forward = 1e3 * min(forward for forward, _ in rounds)
    print(f"{name:24} forward {forward:7.2f} ms {passes:6.1f} {rival}", flush=True)


def rival_seconds(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, order: int) -> float:
    """CPU time of nested forward mode, nan where torch cannot nest it (SiLU's, for one)."""
    try:
        nested(f, x, v, 2)
        return seconds(lambda: nested(f, x, v, order))
    except NotImplementedError:
        return float("nan")


if __name__ == "__main__":
    main()
