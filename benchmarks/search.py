"""Cost of a whole search over beta on one core, against the published protocol beta by beta.

The rival is written down literally: for each beta, equation 8 with the published 1e-6, a
DataLoader without workers that loads and preprocesses every image again, features of train,
validation and test data, then 20 epochs of Adam. It is spared what is not the protocol's: features
are taken without gradients, in the published batches of 32 (of 8 to 128 among the fastest for it),
and its probe indexes tensors instead of using a loader. Rival and library take turns in one
process.

    python benchmarks/search.py                  # MNIST t10k, three seeds, the rival on 6 betas
    python benchmarks/search.py --rival-betas 31 # the rival on every beta
    python benchmarks/search.py --small          # scikit-learn's digits, one seed

The pretrained CIFAR ResNet-20 and MNIST are taken from the folder FLEXURE_DATA; without it a
ResNet-20 with random weights and the digits stand in, with a note.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from flexure.data import Splits, batches, load_data, split
from flexure.methods.search import BETAS, search_beta
from flexure.models import CIFAR, CifarResNet, load_weights

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.reference.probe import train_sequentially

BATCH = 32
GRID = (*BETAS, 1.0)
TARGETS = {"exact": 0.7, "interpolated": 0.2}


class LiteralCTU(nn.Module):
    """Equation 8 as published, with 1e-6 added to 1 - beta."""

    def __init__(self, beta: float, c: float = 0.5) -> None:
        super().__init__()
        self.beta, self.c = beta, c

    def forward(self, x: Tensor) -> Tensor:
        """c · x·sigmoid(eta·x) + (1 - c) · softplus(gamma·x)/gamma."""
        scale = 1 - self.beta + 1e-6
        silu = torch.sigmoid(self.beta * x / scale) * x
        return self.c * silu + (1 - self.c) * F.softplus(x / scale) * scale


class Prepared(Dataset[tuple[Tensor, int]]):
    """Images that are loaded and preprocessed whenever they are asked for."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return CIFAR(self.data[index]), int(self.data.labels[index])


def publish(model: CifarResNet, splits: Splits, beta: float, seed: int) -> tuple[float, float]:
    """The published protocol at one beta: validation and test accuracy."""
    backbone = copy.deepcopy(model)
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(parent, name, LiteralCTU(beta))
    backbone.linear = nn.Identity()
    found: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for part in (splits.train, splits.val, splits.test):
            pairs = [(backbone(x), y) for x, y in DataLoader(Prepared(part), batch_size=BATCH)]
            found.append((torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])))
    (x, y), (x_val, y_val), (x_test, y_test) = found
    probe = train_sequentially(x, y, val_features=x_val, val_labels=y_val, seed=seed)
    with torch.no_grad():
        return probe.accuracy, float((probe.layer(x_test).argmax(1) == y_test).float().mean())


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, CPU seconds and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def search(model: CifarResNet, splits: Splits, seed: int, **settings: Any) -> Any:
    train, val, test = (
        batches(part, preprocess=CIFAR, batch_size=BATCH)
        for part in (splits.train, splits.val, splits.test)
    )
    return search_beta(model, train=train, val=val, test=test, seed=seed, **settings)


class Rival:
    """The published protocol at some betas, in portions, so that rival and library take turns."""

    def __init__(self, model: CifarResNet, splits: Splits, seed: int, betas: list[float]) -> None:
        self.model, self.splits, self.seed, self.betas = model, splits, seed, betas
        self.costs: dict[float, float] = {}
        self.scores: dict[float, float] = {}
        self.walls: list[float] = []

    def portion(self, number: int, of: int = 3) -> None:
        """Times every third beta."""
        for beta in self.betas[number::of]:
            (score, _), cpu, wall = timed(
                lambda b=beta: publish(self.model, self.splits, b, self.seed)
            )
            self.costs[beta], self.scores[beta] = cpu, score
            self.walls.append(wall)

    @property
    def total(self) -> float:
        """CPU seconds for the whole grid."""
        return statistics.fmean(self.costs.values()) * len(GRID)


def run(model: CifarResNet, data: Any, seed: int, sizes: Any, rival_betas: int) -> dict[str, float]:
    splits = split(data, seed=seed, sizes=sizes)
    counts = "/".join(str(len(part)) for part in (splits.train, splits.val, splits.test))
    print(f"\nseed {seed}: train/val/test {counts}")
    step = (len(GRID) - 1) / max(1, rival_betas - 1)
    rival = Rival(model, splits, seed, [GRID[round(i * step)] for i in range(rival_betas)])
    ours: dict[str, tuple[Any, float, float]] = {}
    rival.portion(0)
    with tempfile.TemporaryDirectory() as folder:
        ours["exact"] = timed(lambda: search(model, splits, seed, resume=folder))
        published = search(model, splits, seed, resume=folder, protocol="published")
    rival.portion(1)
    ours["interpolated"] = timed(lambda: search(model, splits, seed, features="interpolated"))
    rival.portion(2)
    return tell(rival, ours, published)


def tell(
    rival: Rival, ours: dict[str, tuple[Any, float, float]], published: Any
) -> dict[str, float]:
    """Prints one seed's costs; returns their ratios to the rival's."""
    complete, costs = len(rival.costs) == len(GRID), rival.costs.values()
    how = "" if complete else f", EXTRAPOLATED from {len(costs)} of them"
    print(
        f"  published, beta by beta: {rival.total:7.1f} CPU s for {len(GRID)} betas{how} (per beta "
        f"{min(costs):.2f} ... {max(costs):.2f} CPU s, {statistics.fmean(rival.walls):.2f} wall s)"
    )
    ratios = {}
    for name, (result, cpu, wall) in ours.items():
        ratios[name] = cpu / rival.total
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in result.timing.items())
        print(
            f"  {name}: {cpu:.1f} CPU s = {ratios[name]:.3f} of it (target {TARGETS[name]}); "
            f"wall s: {stages}, all {wall:.1f}; features used: {result.features.used}, "
            f"{result.features.evaluated} of {result.features.total} evaluated\n    {result}"
        )
        for check in result.features.checks:
            print(
                f"    held out beta {check.beta:g}: features off by {check.feature_error:.2%}, "
                f"score by {check.score_error:.4f} (standard error {check.standard_error:.4f})"
            )
    by_beta = dict(zip(published.betas, published.scores, strict=True))
    gap = max(abs(by_beta[beta] - score) for beta, score in rival.scores.items())
    print(
        f"  protocol='published' on our features: best beta {published.best_beta:g}; validation "
        f"accuracies differ from the rival's by at most {gap:.4f} at {len(costs)} betas"
    )
    if complete:
        print(f"  the rival's best: {max(rival.scores, key=lambda b: (rival.scores[b], b)):g}")
    return ratios


def load(target: str) -> tuple[CifarResNet, Any, Any]:
    model = CifarResNet(20).eval()
    folder = os.environ.get("FLEXURE_DATA")
    if folder:
        load_weights(model, Path(folder) / "resnet-cifar10" / "resnet20.safetensors")
    else:
        print("NOTE: FLEXURE_DATA is not set: random weights, scikit-learn's digits")
    if target == "mnist" and folder:
        return model, load_data(f"idx:{Path(folder) / 'mnist-t10k'}"), {"test": 2000}
    return model, load_data("sklearn:digits"), {"test": 0.2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="digits, one seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--rival-betas", type=int, default=None, help="betas the rival is timed on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    seeds = options.seeds or ([42] if options.small else [42, 43, 44])
    rival_betas = min(options.rival_betas or (3 if options.small else 6), len(GRID))
    model, data, sizes = load("digits" if options.small else "mnist")
    warm = split(data, seed=0, sizes={"test": 100, "val": 100, "train": 200})
    publish(model, warm, 0.9, 0)
    search(model, warm, 0, betas=[0.9])

    ratios = [run(model, data, seed, sizes, rival_betas) for seed in seeds]
    print()
    for name, target in TARGETS.items():
        values = [ratio[name] for ratio in ratios]
        verdict = "met" if max(values) <= target else "MISSED"
        print(
            f"{name}: {', '.join(f'{value:.3f}' for value in values)} of the published protocol's "
            f"CPU time on one core; target at most {target}: {verdict}"
        )


if __name__ == "__main__":
    main()
