"""One run of a comparison: a method put into the network, trained, tried on test inputs, removed.

Which runs there are, what is kept of them and what is chosen by them is `tune`'s. Test labels are
not known here.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from flexure.calling import call_model, evaluating, logits_of
from flexure.contracts import Batches, Example, FlexureError
from flexure.memory import peak_bytes
from flexure.methods.adapt import Adaptation, adapt
from flexure.methods.arms import PROBE, Arm, Trial
from flexure.methods.features import device_of
from flexure.methods.tune_result import Run
from flexure.surgery.sites import Where
from flexure.train.fit import Schedule, fit

__all__ = ["Task", "check_arm", "train_once"]


@dataclass(frozen=True)
class Task:
    """What all runs of a comparison share.

    Attributes:
        model: the pretrained network; each run leaves it as it was.
        train: seed -> the training batches in that seed's order.
        val: what the epoch is chosen on.
        test: inputs to predict in the end, in order, with labels that are not read; or None.
        example: an input to find activations with.
        head: path of the module that is replaced by a new one.
        classes: number of classes.
        where: the activation sites to adapt, by the methods that adapt activations.
        epochs: of each run.
        schedule: factor on every learning rate at each step.
        head_learning_rate: of every arm's head.
    """

    model: nn.Module
    train: Callable[[int], Batches]
    val: Batches
    test: Batches | None
    example: Example
    head: str
    classes: int
    where: Where
    epochs: int
    schedule: Schedule | None
    head_learning_rate: float


def check_arm(task: Task, arm: Arm, seed: int) -> None:
    """Puts each setting of an arm into the model and takes it out again, to find out if it can.

    Raises:
        FlexureError: it cannot; of the same kind as the method's own error.
    """
    for trial in arm.trials:
        try:
            with _noted():  # its runs will warn of the same
                _adapted(task, trial, seed).remove()
        except FlexureError as error:
            if arm.name == PROBE:  # no comparison is without it
                raise
            raise type(error)(
                f"the arm {arm.name!r} does not fit: {error}; or leave it out, by naming the "
                f"others in arms= (--arms)"
            ) from error


def train_once(
    task: Task,
    arm: str,
    trial: Trial,
    seed: int,
    *,
    adapter: str | os.PathLike[str] | None = None,
    state: str | os.PathLike[str] | None = None,
    measured: bool = False,
    report: Callable[[int], None] = lambda done: None,
) -> Run:
    """Trains one setting of one arm from one seed, and leaves the model as it was.

    Args:
        task: what all runs share.
        arm: the arm's name.
        trial: the setting.
        seed: of the head, the adapter's first values, and the order of the samples.
        adapter: folder to save what was learned in.
        state: folder for the state of the training; where it holds one, that goes on.
        measured: whether to measure the memory of a step.
        report: is told how many steps are done.

    Returns:
        The run; where training raised an error, one that says which (`Run.failure`).

    Raises:
        FlexureError: the method cannot be put into the model.
    """
    adaptation = _adapted(task, trial, seed)
    found: dict[str, Any] = {"arm": arm, "setting": trial.label, "seed": seed}
    try:
        with _noted() as told:
            found |= _sizes(adaptation) | _trained(task, adaptation, seed, state, report)
            done = found["failure"] is None
            found["predictions"] = _predictions(task) if done else _NOTHING
            found |= {"betas": _values(adaptation.betas()), "cs": _values(adaptation.cs())}
            if adapter is not None and done:
                adaptation.save(adapter)
            # The last, for it goes on training.
            found["step_bytes"] = _step_bytes(task, adaptation, seed) if measured and done else None
    finally:
        adaptation.remove()
    return Run(**found, warnings=tuple(dict.fromkeys(told)))


def _adapted(task: Task, trial: Trial, seed: int) -> Adaptation:
    with redirect_stdout(StringIO()):  # one line for each of many runs helps nobody
        return adapt(
            task.model,
            trial.method,
            example=task.example,
            head=task.head,
            classes=task.classes,
            where=task.where if trial.adapts_activations else None,
            name=_NAME,
            seed=seed,
        )


_NAME = "flexure.tune"
_NOTHING = torch.empty(0, dtype=torch.int64)


def _sizes(adaptation: Adaptation) -> dict[str, int]:
    groups = adaptation.parameter_groups()
    whole = sum(parameter.numel() for group in groups for parameter in group["params"])
    return {"parameters": adaptation.count, "head_parameters": whole - adaptation.count}


def _trained(
    task: Task,
    adaptation: Adaptation,
    seed: int,
    state: str | os.PathLike[str] | None,
    report: Callable[[int], None],
) -> dict[str, Any]:
    """What `fit` did, or why it could not."""
    try:
        history = fit(
            task.model,
            task.train(seed),
            epochs=task.epochs,
            seed=seed,
            val=task.val,
            optimizer=torch.optim.Adam(adaptation.parameter_groups(task.head_learning_rate)),
            schedule=task.schedule,
            keep="best",
            checkpoint=state,
            progress=lambda stage, done, total: report(done),
        )
    except FlexureError as error:
        if type(error) is not FlexureError:  # the data's or the model's, whatever the setting
            raise
        empty: tuple[float, ...] = ()
        return {
            "losses": empty, "val_accuracy": empty, "kept": 0, "seconds": 0.0,
            "failure": str(error),
        }  # fmt: skip
    return {
        "losses": history.epoch_losses,
        "val_accuracy": history.val_accuracy,
        "kept": 1 + (history.best_epoch or 0),
        "seconds": history.seconds,
        "failure": None,
    }


def _predictions(task: Task) -> Tensor:
    """(N,) int64: the class of each test sample."""
    if task.test is None:
        return _NOTHING
    rows = []
    with evaluating(task.model), torch.no_grad():
        for x, _ in task.test:
            rows.append(logits_of(call_model(task.model, x)).argmax(-1).cpu())
    return torch.cat(rows)


def _step_bytes(task: Task, adaptation: Adaptation, seed: int) -> int:
    """Peak memory of one training step: forward, backward, and the first update by Adam."""
    batch = next(iter(task.train(seed)))
    optimizer = torch.optim.Adam(adaptation.parameter_groups(task.head_learning_rate))
    return peak_bytes(
        lambda: fit(task.model, [batch], epochs=1, seed=seed, optimizer=optimizer),
        device=device_of(task.model),
    )


def _values(sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {site: value.detach().to("cpu", torch.float32, copy=True).flatten()
            for site, value in sites.items()}  # fmt: skip


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
