"""One training of a comparison: a network by one method from one seed, and what is measured of it.

Which runs there are, and what is kept of them, is `flat.py`'s.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from flexure.calling import call_model, check_logits, evaluating, logits_of, seeded, unwritten
from flexure.contracts import DataError, FlexureError
from flexure.methods.features import fingerprint
from flexure.methods.flat_measured import measured
from flexure.methods.flat_methods import FlatMethod
from flexure.methods.flat_result import FlatRun
from flexure.methods.flat_task import FlatTask
from flexure.record import write_bytes
from flexure.train.fit import fit

__all__ = ["Report", "check_method", "train_flat_once"]

Report = Callable[[str, int, int], None]
"""(stage, done, total)."""


def check_method(task: FlatTask, method: FlatMethod, seed: int, classes: int) -> None:
    """Applies a method to a network that is then dropped, to find out whether it can be.

    Raises:
        FlexureError: it cannot, or the network does not take the data or has too few classes.
    """
    try:
        with _noted():  # its runs will warn of the same
            network = _changed(task, method, seed)
    except FlexureError as error:
        raise type(error)(
            f"the method {method.name!r} does not fit: {error}; or leave it out"
        ) from error
    model = task.space.wrap(network)
    with evaluating(model), unwritten(model), torch.no_grad():
        logits = check_logits(logits_of(call_model(model, task.example)), None)
    if logits.shape[1] < classes:
        raise DataError(
            f"expected a network of the {classes} classes of the data, got one of "
            f"{logits.shape[1]}; make it with as many outputs (?num_classes={classes}, or the last "
            f"of ?sizes=)"
        )


def train_flat_once(
    task: FlatTask,
    method: FlatMethod,
    seed: int,
    *,
    folder: Path | None = None,
    weights: Path | None = None,
    report: Report = lambda stage, done, total: None,
) -> FlatRun:
    """Trains a network, and measures it.

    Args:
        task: what all runs share.
        method: how it is changed and trained.
        seed: of the initial weights, the order of the samples, and all that training draws.
        folder: for the state of a run that is not finished; where it holds one, that goes on.
        weights: file for the final weights.
        report: is told how far it has come.

    Returns:
        The run; where training raised an error, one that says which (`FlatRun.failure`).

    Raises:
        FlexureError: the method does not fit the network.
        DataError: the data cannot be used.
    """
    with _noted() as told:
        start = fingerprint(task.start(seed))
        network = _changed(task, method, seed)
        model = task.space.wrap(network)
        found = _trained(task, method, seed, model, _inside(folder, "training"), report)
        if found["failure"] is None:
            if weights is not None:
                state = {name: value.contiguous() for name, value in network.state_dict().items()}
                write_bytes(weights, save({k: v.cpu().clone() for k, v in state.items()}))
            found |= measured(task, network, store=_inside(folder, "measured"), report=report)
    trained = [p for p in network.parameters() if p.requires_grad]
    return FlatRun(
        method=method.name,
        seed=seed,
        start=start,
        parameters=sum(p.numel() for p in trained),
        **found,
        warnings=tuple(dict.fromkeys(told)),
    )


class _Timed:
    """Batches that know how long each whole pass over them took, what was done with them included.

    Attributes:
        seconds: of each pass that came to its end.
    """

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self.seconds: list[float] = []

    def set_epoch(self, epoch: int) -> None:
        """See `Shuffled`."""
        self._batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        start = time.perf_counter()
        yield from self._batches
        self.seconds.append(time.perf_counter() - start)


def _changed(task: FlatTask, method: FlatMethod, seed: int) -> nn.Module:
    """A new network, changed as the method says."""
    network = task.start(seed)
    with seeded(seed):  # vectors that power iterations start with
        method.change(network, task.example, residual=task.residual)
    return network


def _trained(
    task: FlatTask,
    method: FlatMethod,
    seed: int,
    model: nn.Module,
    state: Path | None,
    report: Report,
) -> dict[str, Any]:
    """What `fit` did, or why it could not."""
    batches = _Timed(task.train(seed))
    recipe = task.recipe
    try:
        history = fit(
            model,
            batches,
            epochs=recipe.epochs,
            seed=seed,
            val=task.val,
            penalties=method.penalties(),
            perturb=method.perturb(),
            update=method.update(),
            optimizer=recipe.made(model),
            schedule=task.schedule,
            keep="best" if recipe.keep == "best" else "last",
            clip=recipe.clip,
            checkpoint=state,
            progress=report,
        )
    except FlexureError as error:
        if type(error) is not FlexureError:  # the data's or the model's, whatever the method
            raise
        return _FAILED | {"failure": " ".join(str(error).split())}
    best = history.best_epoch if recipe.keep == "best" else None
    kept = recipe.epochs if best is None else best + 1
    each = batches.seconds or [history.seconds / recipe.epochs]
    return {
        "losses": history.epoch_losses,
        "val_accuracy": history.val_accuracy,
        "val_loss": history.val_loss,
        "penalties": dict(history.penalties),
        "learning_rates": tuple(rates[0] for rates in history.learning_rates),
        "kept": kept,
        "seconds": history.seconds,
        "seconds_per_epoch": sum(each) / len(each),
        "failure": None if math.isfinite(history.val_loss[kept - 1]) else _DIVERGED,
    }


_DIVERGED = (
    "expected a finite loss on validation data after training, got another; lower the learning "
    "rate, clip gradients, or lower the weight of the penalty"
)


_FAILED: dict[str, Any] = {
    "losses": (), "val_accuracy": (), "val_loss": (), "penalties": {}, "learning_rates": (),
    "kept": 0, "seconds": 0.0, "seconds_per_epoch": None,
}  # fmt: skip


def _inside(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / name


@contextmanager
def _noted() -> Iterator[list[str]]:
    """Collects the texts of warnings meant for users; shows none of them."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield texts
        finally:
            texts += [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
