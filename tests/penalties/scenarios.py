"""Trainings with penalties and SAM, the same in one process and in several; a worker's program.

Run as a program: `scenarios.py FOLDER RANK`, one of two processes; writes what each returned.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from flexure.contracts import Step
from flexure.penalties import CURE, CurvatureRate, GradientNorm, LowCurvature
from flexure.train import SAM, fit
from flexure.units.smooth import CenteredSoftplus
from tests.penalties.steps import labelled


def largest(step: Step) -> Tensor:
    """Depends on the largest value in all processes alone."""
    values = step.output.square().sum(1)
    return step.global_mean((values / step.global_max(values)).sqrt())


SETTINGS = {
    **{
        type(penalty).__name__: {"penalties": {penalty: 0.5}, "accumulate": accumulate}
        for penalty, accumulate in (
            (LowCurvature(), 2),
            (GradientNorm(), 2),
            (CURE(), 1),
            (CurvatureRate(), 1),
        )
    },
    "largest": {"penalties": {largest: 0.5}},
    "SAM": {"update": SAM(rho=0.1), "clip": 0.5, "penalties": {GradientNorm(): 0.1}},
    "ASAM": {"update": SAM(rho=0.5, adaptive=True), "accumulate": 2},
}


def trained(name: str) -> dict:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 6), CenteredSoftplus(2.0), nn.Linear(6, 3)).double()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.05}, {"params": [*model[1:].parameters()]}],
        lr=0.1,
        momentum=0.9,
    )
    x, y = labelled(67)
    history = fit(
        model,
        list(zip(x.split(9), y.split(9), strict=True)),
        epochs=2,
        seed=5,
        optimizer=optimizer,
        **SETTINGS[name],
    )
    return {
        "weights": model.state_dict(),
        "losses": history.losses,
        "penalties": history.penalties,
    }


def work(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    found = {name: trained(name) for name in SETTINGS}
    torch.save(found, folder / f"found-{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo may abort where one process tears down before the other


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
