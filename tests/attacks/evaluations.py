"""Evaluations under attack that run the same in one process and in two; also a worker's program.

Run as a program: `evaluations.py FOLDER RANK`, one of two processes; writes what each returned.
"""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flexure.attacks import APGD, FAB, PGD, Bounded, Robustness, Square, robust_accuracy
from flexure.contracts import FlexureError

SIZES: list[int] = []
"""Of the batches that `Moves` was run on."""

STOP: dict[str, int] = {}
"""After how many further batches `Moves` is interrupted; empty: never."""


class Interrupted(BaseException):
    """Like a person's Ctrl-C, which no `except Exception` sees."""


class Noisy(nn.Module):
    """Adds noise that it draws from the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 0.1 * torch.randn_like(x))


@dataclass(frozen=True)
class Moves:
    """Moves all samples by eps in the same random directions, up and down."""

    number: int
    norm: str = "linf"

    def run(self, model, x, y, *, eps, generator) -> Tensor:
        if STOP.get("after") == 0:
            raise Interrupted
        STOP.update({key: left - 1 for key, left in STOP.items()})
        SIZES.append(len(x))
        warnings.warn(f"{self.number} moved {len(x)} samples", UserWarning, stacklevel=1)
        return x + eps * directions(self.number, x[0])


@dataclass(frozen=True)
class Draws:
    """Moves each sample by what it draws, from its own generator, and from the global one."""

    norm: str = "linf"

    def run(self, model, x, y, *, eps, generator) -> Tensor:
        own = torch.stack([torch.randn(x.shape[1:], generator=each) for each in generator.each])
        return x + eps * (own + torch.randn_like(x)).sign()


@dataclass(frozen=True)
class Fails:
    """Raises where it gets the first sample."""

    norm: str = "linf"

    def run(self, model, x, y, *, eps, generator) -> Tensor:
        if bool((x == samples()[0][8]).all(1).any()):
            raise ValueError("out of paper")
        return x


def directions(number: int, like: Tensor) -> Tensor:
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(number))
    return drawn.to(like).sign()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3))


def samples(count: int = 40, *, wrong: int = 8) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = network()(x).argmax(1)
    y[:wrong] = (y[:wrong] + 1) % 3
    return x, y


def evaluated(model: nn.Module | None = None, **settings) -> Robustness:
    """A small network under two attacks, in several batches."""
    x, y = samples()
    given = {"attack": [Moves(1), Moves(2), PGD("linf", steps=3)], "eps": 0.1, "seed": 3}
    bounded = Bounded(network() if model is None else model)
    return robust_accuracy(bounded, x, y, **(given | {"batch_size": 7} | settings))


LIBRARY = [
    APGD("linf", steps=3), APGD("linf", "targeted", steps=2, targets=2),
    FAB("linf", steps=3, targets=2), Square("linf", queries=20),
]  # fmt: skip
"""Attacks of another library, which seed themselves and draw for a batch as a whole."""

EVALUATIONS = {
    "cascade": lambda: evaluated(),
    "every": lambda: evaluated(every=True),
    "noisy": lambda: evaluated(Noisy(), attack=[Moves(1), Draws(), PGD("linf", steps=2)]),
    "library": lambda: evaluated(attack=LIBRARY, eps=0.03),
    "one batch": lambda: evaluated(batch_size=None),
}


def without_seconds(found: Robustness) -> dict[str, object]:
    """What does not depend on the machine's speed."""
    tensors = {key: value.tolist() for key, value in found.samples().items()}
    return {k: v for k, v in (tensors | found.settings()).items() if k != "seconds_by"}


def work(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    found: dict[str, object] = {}
    for name, run in EVALUATIONS.items():
        SIZES.clear()
        found[name] = without_seconds(run()), list(SIZES)
    for name in ("kept", "resumed"):
        SIZES.clear()
        found[name] = without_seconds(evaluated(resume=folder / "batches")), list(SIZES)
    for name, settings in (("error", {"attack": Fails()}), ("other", {"seed": rank})):
        try:
            evaluated(**settings)
        except (FlexureError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    torch.save(found, folder / f"found-{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo may abort where one process tears down before the other


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
