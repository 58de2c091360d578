"""Memory and time of one training step of Trainable CT, against its rivals.

Arms: Trainable CT as published (equation 8 written down literally, its dials sigmoids of the
parameters, in torch's own layers, BatchNorm in train mode), Trainable CT, LoRA of rank 1, the
linear probe and full finetuning, each on its own copy of a network with random weights, shaped
like torchvision's ResNet-18 and ResNet-50.

Memory is what autograd keeps for backward, the input included, parameters and buffers excluded
(`flexure.memory.saved_bytes`), and the most that a step holds at one time (`peak_bytes`). Time is
that of forward, backward and Adam step, CPU time with one thread and wall time with several; the
arms take turns in one process, and ratios are medians of the ratios within a round.

    python -m flexure.units.kernels && python benchmarks/tuning.py
    python benchmarks/tuning.py --no-kernels   # pure Python
    python benchmarks/tuning.py --small        # 64x64, batch 4
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexure.memory import peak_bytes, saved_bytes
from flexure.methods.adapt import adapt
from flexure.methods.baselines import FullFinetune, LinearProbe
from flexure.methods.lora import LoRA
from flexure.methods.trainable_ct import TrainableCT
from flexure.surgery import install, plan, sites
from flexure.units.kernels import load

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.networks import resnet18, resnet50

HEAD, MIB = "fc", 2**20
NETWORKS = {"resnet18": resnet18, "resnet50": resnet50}
OURS, FULL, LORA, PUBLISHED = (
    "Trainable CT",
    "full finetuning",
    "LoRA r=1",
    "published Trainable CT",
)
METHODS = {OURS: TrainableCT(), LORA: LoRA(rank=1), "probe": LinearProbe(), FULL: FullFinetune()}
MEMORY_TARGETS = {"resnet18": 160}  # at batch 8, 224x224
TIME_TARGETS = {LORA: 1.0, FULL: 0.85}


class PublishedCTU(nn.Module):
    """Equation 8 as published, with 1e-6 added to 1 - beta, in 4-D."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.raw_beta = nn.Parameter(torch.logit(torch.full((channels, 1, 1), 0.8)))
        self.raw_c = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """c · x·sigmoid(eta·x) + (1 - c) · softplus(gamma·x)/gamma."""
        with torch._C.DisableTorchFunction():  # its softplus is no activation of the network's
            beta, c = torch.sigmoid(self.raw_beta), torch.sigmoid(self.raw_c)
            width = 1 - beta + 1e-6
            scaled = x / width
            return c * torch.sigmoid(beta * scaled) * x + (1 - c) * F.softplus(scaled) * width


class Arm:
    """One way to train: a network, its optimiser, and one batch."""

    def __init__(self, name: str, network: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = copy.deepcopy(network), x, y
        self.optimizer = torch.optim.Adam(self._install(name))
        self.model.train()
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.count = sum(p.numel() for p in held)

    def _install(self, name: str) -> Any:
        if name != PUBLISHED:
            with contextlib.redirect_stdout(None):  # the table tells the counts
                adaptation = adapt(self.model, METHODS[name], example=self.x[:1], head=HEAD)
            return adaptation.parameter_groups()
        self.model.requires_grad_(False).get_submodule(HEAD).requires_grad_(True)
        report = sites(self.model, self.x[:1])
        chosen = plan(report, report.sites, complete=True)
        install(self.model, chosen, lambda site, old: PublishedCTU(site.channels))
        return [p for p in self.model.parameters() if p.requires_grad]

    def loss(self) -> Tensor:
        """Cross-entropy on the batch."""
        return F.cross_entropy(self.model(self.x), self.y)

    def step(self) -> None:
        """One update."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def memory(self) -> tuple[float, float]:
        """MiB kept for backward, and MiB at the peak of a step."""
        own = [*self.model.parameters(), *self.model.buffers(), self.y]
        self.step()  # the optimiser's state is there from now on
        return saved_bytes(self.loss, exclude=own) / MIB, peak_bytes(self.step) / MIB


def times(arms: dict[str, Arm], rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each arm, round by round, in turn."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in arms}
    order = list(arms)
    for index in range(rounds + 1):
        for name in order if index % 2 else order[::-1]:
            start = clock()
            arms[name].step()
            if index:  # the first is for warming up
                found[name].append(clock() - start)
    return found


def verdict(value: float, target: float | None) -> str:
    if target is None:
        return ""
    return f", target at most {target}: {'met' if value <= target else 'MISSED'}"


def tell(network: str, arms: dict[str, Arm], rounds: int, full_size: bool) -> None:
    memory = {name: arm.memory() for name, arm in arms.items()}
    found = times(arms, rounds)
    print(f"{'':<24} {'parameters':>10} {'MiB kept':>9} {'MiB peak':>9} {'s/step':>8}")
    for name, arm in arms.items():
        kept, peak = memory[name]
        seconds = statistics.median(found[name])
        print(f"{name:<24} {arm.count:>10,} {kept:9.1f} {peak:9.1f} {seconds:8.3f}")
    target = MEMORY_TARGETS.get(network) if full_size else None
    print(f"kept by {OURS}: {memory[OURS][0]:.1f} MiB{verdict(memory[OURS][0], target)}")
    for rival in (LORA, FULL, PUBLISHED):
        ratio = statistics.median(a / b for a, b in zip(found[OURS], found[rival], strict=True))
        print(f"time / {rival}: {ratio:.3f}{verdict(ratio, TIME_TARGETS.get(rival))}")


def kernel_in_use() -> str:
    library = load()
    return library._name if library else "not in use (python -m flexure.units.kernels builds it)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--size", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="64x64, batch 4")
    parser.add_argument("--no-kernels", action="store_true", help="pure Python throughout")
    options = parser.parse_args()
    if options.no_kernels:
        os.environ["FLEXURE_KERNELS"] = "0"
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    batch = options.batch or (4 if options.small else 8)
    size = options.size or (64 if options.small else 224)
    print(f"compiled kernel: {kernel_in_use()}\n{options.threads} thread(s)")
    for name in options.networks:
        print(f"\n{name}, batch {batch}, {size}x{size}, {options.rounds} rounds")
        network = NETWORKS[name]()
        x, y = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
        arms = {arm: Arm(arm, network, x, y) for arm in (*METHODS, PUBLISHED)}
        tell(name, arms, options.rounds, (batch, size) == (8, 224))


if __name__ == "__main__":
    main()
