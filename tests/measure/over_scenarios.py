"""Measurements that run the same in one process and in several; also a worker's program.

Run as a program: `over_scenarios FOLDER RANK COUNT`, one of several processes; writes what each
returned.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from flexure.measure.over import over
from flexure.per_sample import PerSample


@dataclass(frozen=True)
class Noisy(PerSample):
    """Something of everything: one value, several, a share, a setting, and what pools."""

    value: Tensor
    powers: Tensor
    right: Tensor
    label: Tensor
    scale: float

    @property
    def root_mean_square(self) -> float:
        return float(self.value.double().square().mean().sqrt())


def noisy(scale: float, x: Tensor, y: Tensor, *, generator: Generator) -> Noisy:
    noise = torch.randn(len(x), generator=generator)
    value = scale * (x.sum(1) + noise)
    return Noisy(
        converged=value > -1,
        value=value,
        powers=torch.stack([value**n for n in (1, 2, 3)], 1),
        right=value > 0,
        label=y,
        scale=scale,
    )


MEASURE = functools.partial(noisy, 0.5)


def batches(count: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Of different sizes."""
    generator = torch.Generator().manual_seed(1)
    sizes = [4, 4, 1, 7, 2][:count]
    return [(torch.randn(n, 3, generator=generator), torch.arange(n)) for n in sizes]


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failing(rank: int) -> str:
    """Only the second process fails, at its first batch."""
    measured = []

    def measure(x: Tensor, y: Tensor, *, generator: Generator) -> Noisy:
        measured.append(len(x))
        if rank == 1:
            raise ValueError("boom")
        return MEASURE(x, y, generator=generator)

    return f"{refused(lambda: over(measure, batches()))} after {len(measured)}"


def unpicklable() -> str:
    @dataclass(frozen=True)
    class Local(PerSample):
        pass

    def measure(x: Tensor, *, generator: Generator) -> Local:
        return Local(torch.ones(len(x)) > 0)

    return refused(lambda: over(measure, batches()))


def kept(rank: int) -> tuple[list[int], list[int], bool]:
    """Which batches a process keeps, and which it measures when it has kept one of them."""
    mine: dict[int, Noisy] = {}
    whole = over(MEASURE, batches(), kept=mine)
    had = sorted(mine)
    del mine[max(mine)]
    measured: list[int] = []

    def measure(x: Tensor, y: Tensor, *, generator: Generator) -> Noisy:
        measured.append(len(x))
        return MEASURE(x, y, generator=generator)

    again = over(measure, batches(), kept=mine)
    same = all(torch.equal(v, again.result.samples()[k]) for k, v in whole.result.samples().items())
    return had, measured, same


def work(folder: Path, rank: int, count: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count
    )
    told: list[tuple[str, int, int]] = []
    found: dict[str, Any] = {
        "all": over(MEASURE, batches(), seed=3, progress=lambda *step: told.append(step)),
        "iterator": over(MEASURE, iter(batches()), seed=3),
        "few": over(MEASURE, batches(1)),
        "told": told,
        "kept": kept(rank),
        "empty": refused(lambda: over(MEASURE, [])),
        "failing": failing(rank),
        "unpicklable": unpicklable(),
        "sharded": refused(lambda: over(MEASURE, batches()[rank::count])),
        "shorter": refused(lambda: over(MEASURE, batches(4 if rank else 5))),
        "much shorter": refused(lambda: over(MEASURE, batches(1 if rank else 5))),
        "other last": refused(
            lambda: over(MEASURE, [*batches(4), (torch.full((2, 3), float(rank)), torch.ones(2))])
        ),
        "none on one": refused(lambda: over(MEASURE, batches(0 if rank else 1))),
    }
    torch.save(found, folder / f"found-{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo may abort where one process tears down before the other


if __name__ == "__main__":
    # Under its importable name, so that what it sends can be read.
    from tests.measure import over_scenarios

    over_scenarios.work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
