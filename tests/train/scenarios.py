"""Trainings that run the same in one process and in several; also a worker's program.

Run as a program: `scenarios.py FOLDER RANK`, one of two processes; writes what each returned.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from flexure.contracts import Step
from flexure.train import Checkpoint, fit


def data(count: int = 45) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    y = torch.arange(count) % 3
    return torch.randn(count, 4, generator=generator) + y[:, None], y


def loader(batch_size: int = 7) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*data()), batch_size=batch_size, shuffle=True
    )


def network(*, norm: bool = False, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 16),
        nn.BatchNorm1d(16) if norm else nn.Identity(),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(16, 3),
    )


def gradient_norm(step: Step) -> Tensor:
    """Mean over samples of the squared norm of the loss's gradient: needs second derivatives."""
    x = step.x.detach().requires_grad_()
    losses = nn.functional.cross_entropy(step.model(x), step.y, reduction="sum")
    (gradient,) = torch.autograd.grad(losses, x, create_graph=True)
    return gradient.square().sum(1).mean()


def root_of_mean(step: Step) -> Tensor:
    """Not linear in the mean over all processes' samples."""
    return step.global_mean(step.output.square().sum(1)).sqrt()


def noise_of_positions(step: Step) -> Tensor:
    """Draws one number a sample, from what does not depend on the processes."""
    generator = torch.Generator().manual_seed(step.seed + step.index)
    drawn = torch.rand(1000, generator=generator)[step.positions]
    return (drawn * step.output.square().sum(1)).mean()


def weight_norm(step: Step) -> Tensor:
    """Depends on no sample."""
    return sum(parameter.square().sum() for parameter in step.model.parameters())


def sharpness_aware(backward: Callable[[], float], optimizer: torch.optim.Optimizer) -> float:
    """Two gradients an update: that of the point a short way up is used here."""
    value = backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    up = [0.05 * p.grad / p.grad.norm() for p in parameters]
    with torch.no_grad():
        for p, e in zip(parameters, up, strict=True):
            p += e
    backward()
    with torch.no_grad():
        for p, e in zip(parameters, up, strict=True):
            p -= e
    optimizer.step()
    return value


def shifted(step: Step) -> Tensor:
    return step.x + 0.1 * step.x.sign()


PENALTIES = {gradient_norm: 0.3, root_of_mean: 0.2, noise_of_positions: 0.1, weight_norm: 0.01}

SETTINGS = {
    "plain": {},
    "penalties": {"penalties": PENALTIES},
    "everything": {
        "penalties": PENALTIES,
        "perturb": shifted,
        "update": sharpness_aware,
        "accumulate": 2,
        "clip": 0.5,
        "schedule": lambda step: 1 / (1 + step),
    },
}


def trained(name: str) -> dict:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    history = fit(
        model,
        loader(),
        epochs=3,
        seed=5,
        val=[data(20)],
        keep="last",
        optimizer=optimizer,
        **SETTINGS[name],
    )
    return {"weights": model.state_dict(), "history": history}


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def too_small() -> str:
    x, y = data()
    return refused(lambda: fit(network(), [(x, y), (x[:1], y[:1])], epochs=1, seed=0))


def without_gradient(rank: int) -> str:
    """A parameter that the objective depends on in the first process only."""
    model = network()
    model.register_parameter("lonely", nn.Parameter(torch.ones(())))

    def sometimes(step: Step) -> Tensor:
        return step.model.lonely if rank == 0 else step.output.sum() * 0

    return refused(lambda: fit(model, loader(), epochs=1, seed=0, penalties={sometimes: 1.0}))


def sharded_twice(rank: int) -> str:
    x, y = data(40)
    return refused(lambda: fit(network(), [(x[rank::2], y[rank::2])], epochs=1, seed=0))


def not_finite(rank: int) -> str:
    x, y = data(40)
    x[0] = torch.nan  # in the first process's share
    return refused(lambda: fit(network(), [(x, y)], epochs=1, seed=0))


def one_sided(rank: int) -> dict[str, str]:
    """What each process says where only the second one fails, or has fewer batches."""

    def penalty(step: Step) -> Tensor:
        if rank == 1 and step.index == 2:
            raise ValueError("boom\nand more")
        return root_of_mean(step)

    def detached(output: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(output, y)
        return loss.detach() if rank == 1 else loss

    def alone(step: Step) -> Tensor:
        return root_of_mean(step) if rank == 0 else step.output.sum() * 0

    def report(*_: object) -> None:
        raise ValueError("a full disk")

    x, y = data(40)
    pieces = list(zip(x.split(10), y.split(10), strict=True))
    val = [(x, y + (9 if rank else 0))]
    given = {
        "penalty": {"penalties": {penalty: 1.0}},
        "graph": {"loss": detached},
        "exchange": {"penalties": {alone: 1.0}},
        "labels": {"val": val},
        "progress": {"progress": report},
    }
    said = {
        name: refused(lambda s=settings: fit(network(), pieces, epochs=2, seed=0, **s))
        for name, settings in given.items()
    }
    fewer = pieces[:3] if rank else pieces
    said["fewer"] = refused(lambda: fit(network(), fewer, epochs=1, seed=0))
    return said


def with_norm_and_dropout(rank: int) -> dict:
    """Weights and statistics agree although each process measures and draws its own."""
    model = network(norm=True, dropout=0.3)
    if rank:
        nn.init.zeros_(model[0].weight)  # the first one's weights are taken
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        history = fit(model, loader(9), epochs=2, seed=0, val=[data(9), data(1)])
    said_of = [str(w.message) for w in said if "BatchNorm" in str(w.message)]
    return {"weights": model.state_dict(), "history": history, "said": said_of}


def interrupted(folder: Path) -> dict:
    """Ends by an error amid an epoch, and goes on."""
    results = []
    for stop in (None, 9):
        count = 0

        def stopping(step: Step, stop: int | None = stop) -> Tensor:
            nonlocal count
            count += 1
            if count == stop:
                raise RuntimeError("stopped")
            return step.output.sum() * 0

        place = Checkpoint(folder / f"run-{stop}", every=2)
        for _ in range(2):
            model = network(norm=True, dropout=0.3)
            try:
                fit(
                    model,
                    loader(9),
                    epochs=3,
                    seed=0,
                    penalties={stopping: 1.0},
                    checkpoint=place,
                )
            except RuntimeError:
                continue
        results.append(model.state_dict())
    return {"undisturbed": results[0], "resumed": results[1]}


def work(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    found = {name: trained(name) for name in SETTINGS}
    found["too small"] = too_small()
    found["without gradient"] = without_gradient(rank)
    found["sharded twice"] = sharded_twice(rank)
    found["not finite"] = not_finite(rank)
    found["one-sided"] = one_sided(rank)
    found["norm"] = with_norm_and_dropout(rank)
    found["interrupted"] = interrupted(folder)
    torch.save(found, folder / f"found-{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo may abort where one process tears down before the other


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
