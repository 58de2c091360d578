"""Time, memory and accuracy of `flexure.curvature` against the papers' estimator.

The rival is the estimator of [LCNN] written down literally: plain cross-entropy, a random start,
ten power iterations by double backprop with 1e-6 added to every norm, and the value |uᵀHu|, which
is its last product (eleven in all); and the same with ‖Hu‖. Both sides are compared with the same
library at float64, run to a residual of 1e-8 (at most 200 products), on every image.

On the pretrained ResNet-20 and lossless CIFAR-10 test images where FLEXURE_DATA is set, otherwise
on random weights and noise. As it is (ReLU), steered at beta .9 and .7, and with every ReLU
replaced by a centered softplus (beta 5). "flexure" takes products by double backward,
"forward-over-reverse" is the other mode of `flexure.curvature`; both include the check of second
derivatives, whose share is told.

Time is CPU time with one thread and wall time with several; the arms take turns in one process,
and ratios are medians of the ratios within a round. Peak memory is what is held beyond the network
and the images (`flexure.memory.peak_bytes`).

    FLEXURE_DATA=... python benchmarks/curvature.py
    python benchmarks/curvature.py --small --rounds 2   # 8 images, ReLU only
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flexure
from flexure.measure.checks import check_field
from flexure.measure.curvature import Curvature
from flexure.measure.fields import measuring, scalar_field
from flexure.memory import peak_bytes
from flexure.models.preprocess import CIFAR
from flexure.models.resnet import CifarResNet

TARGET = 2.5  # times as fast as the published estimator, on the ReLU network and 64 images
MIB = 2**20
PUBLISHED, NORM = "published |uᵀHu|", "published ‖Hu‖"
OURS, FORWARD = "flexure", "forward-over-reverse"


class CenteredSoftplus(nn.Module):
    """log((1 + exp(beta·x))/2)/beta."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        """Applies it."""
        return flexure.units.centered_softplus(x, self.beta)


def published(model: nn.Module, x: Tensor, y: Tensor, *, norm: bool) -> dict[str, Tensor]:
    """Gradient norm, Hessian norm and C of each sample as the paper's code computes them."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x, create_graph=True)
    ones = (-1, *[1] * (x.dim() - 1))
    u = torch.randn_like(x)
    u = u / (u.flatten(1).norm(dim=1).view(ones) + 1e-6)
    for _ in range(10):
        (u,) = torch.autograd.grad((g * u).sum(), x, retain_graph=True)
        u = u / (u.flatten(1).norm(dim=1).view(ones) + 1e-6)
    (image,) = torch.autograd.grad((g * u).sum(), x)
    length = g.detach().flatten(1).norm(dim=1)
    along = (u * image).flatten(1).sum(1).abs()
    hessian = image.flatten(1).norm(dim=1) if norm else along
    return {
        "gradient_norm": length,
        "hessian_norm": hessian,
        "normalized": hessian / (length + 1e-6),
    }


def ours(model: nn.Module, x: Tensor, y: Tensor, **options: object) -> dict[str, Tensor]:
    return flexure.curvature(model, x, y, **options).samples()  # type: ignore[arg-type]


ARMS: dict[str, Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]] = {
    PUBLISHED: partial(published, norm=False),
    NORM: partial(published, norm=True),
    OURS: ours,
    FORWARD: partial(ours, products="forward-over-reverse"),
}


def relu_network() -> nn.Module:
    """The pretrained ResNet-20, or one with random weights."""
    folder = os.environ.get("FLEXURE_DATA")
    if not folder:
        torch.manual_seed(0)
        return CifarResNet(20).eval()
    file = next((Path(folder) / "resnet-cifar10").glob("*resnet20*.safetensors"))
    return flexure.load_model(f"flexure:resnet20?weights={file}").model


def networks() -> dict[str, Callable[[], nn.Module]]:
    example = torch.zeros(1, 3, 32, 32)

    def steered(beta: float) -> nn.Module:
        model = relu_network()
        flexure.steer(model, beta=beta, example=example)
        return model

    def smooth() -> nn.Module:
        model = relu_network()
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.ReLU):
                    setattr(parent, name, CenteredSoftplus(5.0))
        return model

    return {
        "ReLU": relu_network,
        "steered, beta .9": partial(steered, 0.9),
        "steered, beta .7": partial(steered, 0.7),
        "centered softplus, beta 5": smooth,
    }


def images(count: int) -> tuple[Tensor, Tensor]:
    """Preprocessed images and their labels, or noise."""
    folder = os.environ.get("FLEXURE_DATA")
    if not folder:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(count, 3, 32, 32, generator=generator)
        return x, torch.randint(10, (count,), generator=generator)
    with np.load(Path(folder) / "cifar10-lossless" / "test846.npz") as data:
        pictures = torch.from_numpy(data["images"][:count]).permute(0, 3, 1, 2)
        return torch.stack([CIFAR(p) for p in pictures]), torch.from_numpy(data["labels"][:count])


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def times(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, round by round, in turn."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for index in range(rounds + 1):
        for name in order if index % 2 else order[::-1]:
            start = clock()
            calls[name]()
            if index:  # the first is for warming up
                found[name].append(clock() - start)
    return found


def errors(got: Tensor, true: Tensor) -> str:
    """Median and worst relative error."""
    error = ((got.double() - true) / true).abs()
    return f"{error.median():8.1e} {error.max():8.1e}"


def checking(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """The finite-difference check alone."""
    with measuring(model):
        field = scalar_field(model, x, y)
        check_field(field.taken, field.x, model=model)


def tell(name: str, model: nn.Module, x: Tensor, y: Tensor, rounds: int) -> None:
    calls: dict[str, Callable[[], object]] = {
        arm: partial(run, model, x, y) for arm, run in ARMS.items()
    }
    torch.manual_seed(0)
    results = {arm: run(model, x, y) for arm, run in ARMS.items()}
    wide = copy.deepcopy(model).double()
    true: Curvature = flexure.curvature(wide, x.double(), y, tol=1e-8, max_products=200)
    sure = true.converged & (true.hessian_norm > 0)
    found = times(calls | {"check": partial(checking, model, x, y)}, rounds)
    print(f"\n{name}: {int(sure.sum())} of {len(x)} images with a converged reference")
    print(
        f"{'':<20} {'s':>7} {'MiB':>7} {'‖H‖ median':>11} {'worst':>8} {'C median':>9} {'worst':>8}"
    )
    for arm, call in calls.items():
        got = results[arm]
        hessian = errors(got["hessian_norm"][sure], true.hessian_norm[sure])
        c = errors(got["normalized"][sure], true.normalized[sure])
        seconds = statistics.median(found[arm])
        print(f"{arm:<20} {seconds:7.3f} {peak_bytes(call) / MIB:7.1f}    {hessian}  {c}")
    for arm in (OURS, FORWARD):
        got = results[arm]
        print(
            f"{arm}: {got['products'].double().mean():.1f} products on average, "
            f"{int(got['converged'].sum())} of {len(x)} converged"
        )
    ratio = statistics.median(a / b for a, b in zip(found[PUBLISHED], found[OURS], strict=True))
    share = statistics.median(a / b for a, b in zip(found["check"], found[OURS], strict=True))
    verdict = (
        f", target {TARGET}: {'met' if ratio >= TARGET else 'MISSED'}"
        if name == "ReLU" and len(x) == 64
        else ""
    )
    print(f"published / flexure: {ratio:.2f} times{verdict}; the check's share: {share:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(networks()), default=None)
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="8 images, ReLU only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    count = options.images or (8 if options.small else 64)
    weights = "pretrained" if os.environ.get("FLEXURE_DATA") else "random weights, noise for images"
    print(f"ResNet-20 ({weights}), {count} images, {options.threads} thread(s)")
    x, y = images(count)
    made = networks()
    for name in options.networks or (["ReLU"] if options.small else list(made)):
        tell(name, made[name](), x, y, options.rounds)


if __name__ == "__main__":
    main()
