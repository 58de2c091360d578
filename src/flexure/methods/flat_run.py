"""One training of a comparison: a network by one method from one seed, and what is measured of it.

Which runs there are, and what is kept of them, is `flat.py`'s.
"""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from flexure.calling import seeded
from flexure.contracts import FlexureError
from flexure.fingerprints import fingerprint
from flexure.methods.flat_measured import measured
from flexure.methods.flat_methods import FlatMethod
from flexure.methods.flat_result import FlatRun
from flexure.methods.flat_task import FlatTask
from flexure.record import write_bytes
from flexure.train.fit import fit

__all__ = ["Report", "changed_network", "train_flat_once", "weights_digest"]

Report = Callable[[str, int, int], None]
"""(stage, done, total)."""


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
        weights: file for the final weights; what is there is deleted first, so that after a
            failure it is not taken for this run's.
        report: is told how far it has come.

    Returns:
        The run; where training raised an error, one that says which (`FlatRun.failure`).

    Raises:
        FlexureError: the method does not fit the network.
        DataError: the data cannot be used.
    """
    if weights is not None:
        weights.unlink(missing_ok=True)
    written = None
    with _noted() as told:
        start = fingerprint(task.start(seed))
        network, changed = changed_network(task, method, seed)
        model = task.space.wrap(network)
        found = _trained(task, method, seed, model, _inside(folder, "training"), report)
        if found["failure"] is None:
            if weights is not None:
                state = {name: value.contiguous() for name, value in network.state_dict().items()}
                write_bytes(weights, save({k: v.cpu().clone() for k, v in state.items()}))
                written = weights_digest(weights)
            found |= measured(task, network, store=_inside(folder, "measured"), report=report)
    trained = [p for p in network.parameters() if p.requires_grad]
    return FlatRun(
        method=method.name,
        seed=seed,
        start=start,
        parameters=sum(p.numel() for p in trained),
        **found,
        changed=changed,
        weights=written,
        warnings=tuple(dict.fromkeys(told)),
    )


def weights_digest(file: Path) -> str | None:
    """Digest of a file of weights; None where there is none."""
    try:
        return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
    except FileNotFoundError:
        return None


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


def changed_network(
    task: FlatTask, method: FlatMethod, seed: int
) -> tuple[nn.Module, dict[str, int]]:
    """A new network, changed as the method says, and how much of it was."""
    network = task.start(seed)
    with seeded(seed):  # vectors that power iterations start with
        changed = method.change(network, task.example, residual=task.residual)
    return network, changed


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
