"""Time of one epoch of training by each method, against that of standard training.

Standard is the paper's baseline, softplus with beta 1000. Every method trains its own copy of one
network with random weights by `flexure.fit`, SGD with momentum, on the same random images; the
methods take turns in one process, and ratios are medians of the ratios within a round. Time is CPU
time with one thread, wall time with several. Nothing is validated or saved in the epoch.

    python benchmarks/lcnn.py                        # ResNet-20, batches of 128
    python benchmarks/lcnn.py --network resnet18 --batches 3 --rounds 3
    python benchmarks/lcnn.py --methods standard,lcnn --rounds 9
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

import flexure
from flexure.calling import seeded
from flexure.methods.flat_methods import STANDARD, FlatMethod, flat_methods
from flexure.models import CifarResNet, resnet18

NETWORKS = {"resnet20": lambda: CifarResNet(20), "resnet18": resnet18}
METHODS = "standard,relu,lcnn,gradreg,lcnn+gradreg,cure,crr,at,sam"
TARGETS = {("lcnn", STANDARD): 1.10, ("lcnn+gradreg", "gradreg"): 1.15}
PAPER = {
    ("lcnn", STANDARD): 1.6,
    ("lcnn+gradreg", "gradreg"): 1.3,
    ("gradreg", STANDARD): 2.7,
    ("lcnn+gradreg", STANDARD): 3.5,
    ("cure", STANDARD): 5.0,
    ("at", STANDARD): 5.0,
}


class Arm:
    """One method: its network and optimiser."""

    def __init__(self, method: FlatMethod, network: str, x: torch.Tensor, residual: str) -> None:
        self.method = method
        with seeded(0):
            self.model: nn.Module = NETWORKS[network]()
        method.change(self.model, x[:2], residual=residual)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4
        )

    def epoch(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """One pass over the batches."""
        flexure.fit(
            self.model,
            batches,
            epochs=1,
            seed=0,
            penalties=self.method.penalties(),
            perturb=self.method.perturb(),
            update=self.method.update(),
            optimizer=self.optimizer,
        )


def times(
    arms: dict[str, Arm], batches: list[tuple[torch.Tensor, torch.Tensor]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each method's epoch, round by round, in turn."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in arms}
    order = list(arms)
    for index in range(rounds + 1):
        for name in order if index % 2 else order[::-1]:
            if name not in found:
                continue
            start = clock()
            try:
                arms[name].epoch(batches if index else batches[:1])
            except flexure.FlexureError as error:  # random weights and images
                print(f"{name}: no time, {error}")
                del found[name]
                continue
            if index:  # the first is for warming up
                found[name].append(clock() - start)
    return found


def ratio(found: dict[str, list[float]], name: str, base: str) -> tuple[float, float, float]:
    """Median, smallest and largest ratio within a round."""
    ratios = [a / b for a, b in zip(found[name], found[base], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def tell(found: dict[str, list[float]], batches: int) -> None:
    print(f"{'method':<14} {'s/batch':>8}  relative to")
    for name, seconds in found.items():
        told = []
        for base in (STANDARD, "gradreg"):
            if base not in found or base == name:
                continue
            wanted, paper = TARGETS.get((name, base)), PAPER.get((name, base))
            if base != STANDARD and wanted is None:
                continue
            middle, low, high = ratio(found, name, base)
            text = f"{base} {middle:.3f} ({low:.3f} to {high:.3f}"
            text += f"; paper {paper}" if paper else ""
            text += f"; at most {wanted:.2f}: " if wanted else ""
            text += ("met" if middle <= wanted else "MISSED") if wanted else ""
            told.append(text + ")")
        print(f"{name:<14} {statistics.median(seconds) / batches:8.3f}  {', '.join(told)}")


def main() -> None:
    """Prints seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=8, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--residual", default="mean", help="residual sums of LCNNs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    shape = (options.batches, options.batch_size, 3, 32, 32)
    x = torch.randn(shape, generator=generator)
    y = torch.randint(10, shape[:2], generator=generator)
    batches = list(zip(x, y, strict=True))
    methods = flat_methods(options.methods.split(","), None)
    arms = {m.name: Arm(m, options.network, x[0], options.residual) for m in methods}
    size = f"{options.batches} batches of {options.batch_size} a round"
    print(f"{options.network}, {size}, {options.rounds} rounds, {options.threads} thread(s)")
    tell(times(arms, batches, options.rounds), options.batches)


if __name__ == "__main__":
    main()
