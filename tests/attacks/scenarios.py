"""Adversarial trainings that run the same in one process and in two; also a worker's program.

Run as a program: `scenarios.py FOLDER RANK`, one of two processes; writes what each returned.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from flexure.attacks import PGD, Adversarial
from flexure.contracts import Perturbation
from flexure.train import fit
from tests.train.scenarios import data, loader, network

PERTURBATIONS = {
    "l2": Adversarial(eps=0.5),
    "linf": Adversarial(PGD("linf", steps=2), eps=0.2),
    "bounds": Adversarial(eps=0.5, bounds=(-10, 10)),
}

__all__ = ["PERTURBATIONS", "data", "network", "trained"]


def trained(perturb: Perturbation | None, **settings) -> dict:
    """A small network after a few epochs, with the losses of all updates."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    history = fit(
        model, loader(), epochs=4, seed=5, perturb=perturb, optimizer=optimizer, **settings
    )
    return {"model": model, "losses": history.losses}


def work(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    found = {}
    for name, perturb in PERTURBATIONS.items():
        result = trained(perturb)
        found[name] = {"weights": result["model"].state_dict(), "losses": result["losses"]}
    torch.save(found, folder / f"found-{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo may abort where one process tears down before the other


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
