"""A small training, started over and over by a warm process: what `test_kill.py` kills.

The process has imported everything and forks one child per line of its input, `FOLDER EPOCHS
WHAT CALL`. The child trains the network (WHAT is `network`) or an adaptation of it (`adaptation`),
with its state in FOLDER, and leaves its result in FOLDER/result. CALL is
`never`, or `NAME:K`: the child then kills itself at its K-th call of `os.NAME`, between the steps
of a save. Answers: the child's process number, a dot for every update, and how the child ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
from typing import Any

import accelerate  # noqa: F401  # so that the children need not import it
import torch
from torch import nn

import flexure
from flexure.contracts import Step
from flexure.train import Checkpoint, cosine, fit
from flexure.train.checkpoint import save_state


def network() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(4 * 16, 3),
    )


def data(count: int, seed: int) -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 3
    noise = torch.randn(count, 1, 6, 6, generator=generator)
    return torch.utils.data.TensorDataset(noise + 0.4 * y.view(-1, 1, 1, 1), y)


def train(folder: str, epochs: int, what: str) -> None:
    """Seven batches in an epoch, two of them in an update: the last update has one alone."""
    model = network()
    groups: Any = model.parameters()
    if what == "adaptation":
        with contextlib.redirect_stdout(sys.stderr):
            adaptation = flexure.adapt(model, flexure.TrainableCT(), example=data(2, 1)[:][0])
        groups = adaptation.parameter_groups()
    loader = torch.utils.data.DataLoader(data(40, 1), batch_size=6, shuffle=True)
    rate = cosine(4 * epochs, warmup=3)

    def tell(step: Step) -> torch.Tensor:
        if step.positions[0] == 0:  # the first of the batches of an update
            os.write(sys.stdout.fileno(), b".")
        return step.x

    history = fit(
        model,
        loader,
        epochs=epochs,
        seed=3,
        val=list(torch.utils.data.DataLoader(data(30, 2), batch_size=15)),
        optimizer=torch.optim.Adam(groups, lr=1e-2),
        perturb=tell,
        schedule=rate,
        accumulate=2,
        keep="best",
        checkpoint=Checkpoint(folder, every=1),
    )
    told = dataclasses.asdict(history)
    del told["seconds"]  # all else must be the same
    tree = {"model": dict(model.state_dict()), "history": told}
    save_state(os.path.join(folder, "result"), tree)


def die_at(call: str) -> None:
    """Makes this process kill itself at a call of a function of `os`."""
    name, _, count = call.partition(":")
    true, left = getattr(os, name), [int(count)]

    def deadly(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return true(*arguments)

    setattr(os, name, deadly)


def warm_up() -> None:
    """Imports what a first step imports, without starting a thread: forks must be safe."""
    torch.set_num_threads(1)
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    torch.optim.Adam([parameter]).step()


def serve() -> None:
    warm_up()
    for line in sys.stdin:
        folder, epochs, what, call = line.split()
        child = os.fork()
        if child == 0:
            try:
                if call != "never":
                    die_at(call)
                train(folder, int(epochs), what)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        status = os.waitpid(child, 0)[1]
        print(f"\nended {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    serve()
