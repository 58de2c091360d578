"""The training loop: every network that this library trains itself is trained here.

What is minimised, with which optimiser and schedule, is the caller's; batching and shuffling are
too. How one update is made is in `update`, what is saved in `resume`. Changing activations
(`flexure.methods`) and evaluation of attacks do not live here.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from flexure.calling import as_batches, evaluating
from flexure.contracts import (
    Batches,
    FlexureError,
    Penalty,
    Perturbation,
    UpdateRule,
)
from flexure.processes import current_processes
from flexure.progress import Progress, ProgressReporter
from flexure.train.arguments import (
    asking_input_gradient,
    check_optimizer,
    check_settings,
    compute_in,
    cross_entropy,
    default_optimizer,
    device_of,
    named,
    place_of,
)
from flexure.train.checkpoint import Checkpoint
from flexure.train.feed import Feed
from flexure.train.history import History, Record
from flexure.train.randomness import reproducible, update_randomness
from flexure.train.resume import Saver, Weights, settings_of
from flexure.train.step import Loss, Run, TrainingStep, shares
from flexure.train.update import Objective, Updater
from flexure.train.validation import validate
from flexure.units.trainable import learned_saturation

__all__ = ["History", "Loss", "Schedule", "fit"]

Schedule = Callable[[int], float]
"""Update, counted from 0 -> factor on each of the optimiser's own learning rates."""

_MUCH_SATURATED = 0.05
"""The share that noise alone must not reach in 30,000 steps of Trainable CT."""


def fit(
    model: nn.Module,
    batches: Batches,
    *,
    epochs: int,
    seed: int,
    val: Batches | None = None,
    loss: Loss | None = None,
    penalties: Mapping[Penalty, float] | None = None,
    perturb: Perturbation | None = None,
    update: UpdateRule | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: Schedule | None = None,
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
    keep: Literal["best", "last"] = "best",
    accumulate: int = 1,
    clip: float | None = None,
    precision: Literal["bf16"] | None = None,
    progress: Progress = None,
) -> History:
    """Trains `model` in place on labelled batches, minimising loss + sum of weight·penalty.

    Same seed, same batches and same initial weights give the same trained weights: everything
    that draws from the default generators of torch, Python or numpy (dropout, a shuffling loader
    without a generator of its own) starts from `seed`, and those generators are put back
    afterwards. Loaders and samplers with `set_epoch` are told the epoch's number.

    Under `accelerate launch` or `torchrun` the processes train one model together: each gets
    process 0's weights, iterates the same batches, and takes its contiguous share of their rows
    (of every tensor in them that has as many rows as there are samples; other entries are passed
    whole). The result is that of one process with the same batches, up to rounding and except for
    what a layer draws (dropout) or measures (BatchNorm) within a share. An error in one process
    ends all of them.

    Args:
        model: trained in train mode, where it is; its modes are restored. Not wrapped for
            distributed training: the loop averages gradients itself.
        batches: `(x, y)` pairs, iterated once an epoch; moved to the model's device. With a
            checkpoint, an iterable that draws from a generator that is not in its `generator` or
            its samplers' must start anew in the same way in each epoch.
        epochs: passes over `batches`, at least 1.
        seed: see above.
        val: batches on which the loss, without penalties, is measured after every epoch, and the
            accuracy where their `y` are `(B,)` integers, the labels of `(B, classes)` logits. With
            the default loss they must be; with a loss of one's own other targets have no accuracy.
        loss: the mean loss over a batch; default: cross-entropy of the logits, `y` a `(B,)` int64
            tensor.
        penalties: penalty -> its weight. Those with `needs_input_gradient` share one gradient of
            the loss in the inputs, of the step's one forward pass; no part of the model may be
            compiled then.
        perturb: changes the inputs of each batch, once an update, before the loss and the
            penalties see them.
        update: default: one gradient, one step of the optimiser; `flexure.train.SAM` is another.
        optimizer: default `Adam(lr=1e-3)`, torch's own defaults, on all trainable parameters.
        schedule: factor on the learning rates at each update; default: constant.
        checkpoint: a folder of this run alone: its state is saved there at the end of each epoch
            (and more often with a `Checkpoint`), and a call with the same arguments goes on from
            there, bit by bit as if it had not been interrupted. What plugs in (loss, penalties,
            schedule, ...) must keep no state of its own. It is compared by `identity.describe`,
            data by the number of batches and by an epoch's first batch, which is drawn again.
        keep: `"best"`: with `val`, the model ends as it was after the epoch with the highest
            accuracy, or with the lowest loss where there is no accuracy, the first of several;
            `"last"`: as it was after the last.
        accumulate: batches that make one update, as if they were one; what is left over at the end
            of an epoch makes an update of its own. The objective is then the mean of the batches'
            objectives: for a penalty that is not linear in `step.global_mean` (its root, say),
            that is not the penalty of all their samples; use larger batches there.
        clip: largest norm of the gradient of all trained parameters together; default: any.
        precision: `"bf16"`: `step.output` and accuracy are computed under bfloat16 autocast, the
            loss in float32, and input gradients (`step.input_gradient`) are those of that output;
            a penalty's or perturbation's own calls of the model are not.
        progress: True: a bar on stderr, of the first process.

    Raises:
        FlexureError: arguments that do not fit; nothing to train; a loss or a gradient that is not
            finite (the message names the step and the largest gradient, the weights stay those of
            the last good step); in several processes, a trained parameter without a gradient, or
            an error in another one (the message names it); a checkpoint of another run.
        DataError: `batches` or `val` is empty, or not of pairs; a batch has fewer samples than
            there are processes; `val` has labels that are not of the model's classes.
    """
    check_settings(
        epochs=epochs, seed=seed, keep=keep, accumulate=accumulate, clip=clip, schedule=schedule
    )
    weighted, place = named(penalties or {}), place_of(checkpoint)
    autocast = compute_in(model, precision)
    processes = current_processes()
    with processes.together():
        run = Run(
            model,
            epochs,
            seed,
            processes,
            device_of(model),
            autocast,
            loss or cross_entropy,
            bool(asking_input_gradient(model, weighted)),
        )
        optimizer = optimizer if optimizer is not None else default_optimizer(model)
        check_optimizer(optimizer, update)
        updater = Updater(run, Objective(weighted), optimizer, rule=update, clip=clip)
        weights, record = Weights(model, updater.trained), Record(tuple(weighted))
        feed = Feed(
            as_batches(batches),
            at_once=accumulate,
            processes=processes,
            resumable=place is not None,
        )

        settings = partial(
            settings_of,
            weights,
            optimizer,
            processes,
            schedule=schedule,
            updates=epochs * -(-len(feed) // accumulate),
            plugs={
                "loss": run.loss,
                "penalties": weighted,
                "perturb": perturb,
                "update": update,
            },
            seed=seed,
            epochs=epochs,
            accumulate=accumulate,
            clip=clip,
            precision=precision,
            keep=keep,
            val=val is not None,
            processes=processes.count,
            batches=len(feed),
            generators=feed.generators,
        )
        saver = Saver(place, weights, optimizer, record, settings, processes)
        by_labels = partial(validate, run, labelled=loss is None)
        rates = _Rates(optimizer, schedule)
        loop = _Loop(run, feed, updater, perturb, rates, weights, record, saver, by_labels, keep)
        with closing(ProgressReporter(progress if processes.is_first else None)) as reporter:
            return loop(None if val is None else as_batches(val), reporter)


@dataclass(frozen=True)
class _Loop:
    """The parts of one `fit`, and the order in which they work."""

    run: Run
    feed: Feed
    updater: Updater
    perturb: Perturbation | None
    rates: _Rates
    weights: Weights
    record: Record
    saver: Saver
    validate: Callable[[Batches], tuple[float, float | None]]
    keep: str

    def __call__(self, val: Batches | None, reporter: ProgressReporter) -> History:
        run, record = self.run, self.record
        with reproducible(run.seed), _training(run.model), self.rates:
            started = time.perf_counter()
            position = self.saver.load(self.feed.check)
            started -= record.seconds
            _gather(run)
            if position is None:
                self._save(0, started)  # a place that cannot be written shows itself at once
            while record.epoch < run.epochs:
                self._epoch(position, started, reporter)
                self._end_epoch(val, started)
                position = None
        kept = -1
        if self.keep == "best" and record.best is not None and record.best_epoch is not None:
            self.weights.load(record.best)
            kept = record.best_epoch
        if run.processes.is_first and record.saturated:
            _warn_of_saturation(record.saturated[kept])
        return record.history()

    def _epoch(
        self, position: dict[str, Any] | None, started: float, reporter: ProgressReporter
    ) -> None:
        run, record = self.run, self.record
        for group in self.feed.groups(record.epoch, resumed=position):
            index = len(record.losses)
            self.rates.set(index)
            with update_randomness(run.seed, index, run.processes):
                steps = shares(group, run, index=index, epoch=record.epoch)
                if self.perturb is not None:
                    steps = [_perturbed(self.perturb, step) for step in steps]
                value, penalties = self.updater(steps)
            record.losses.append(value)
            record.penalties.append(penalties)
            record.batches += len(group)
            self._report(reporter)
            if self.saver.due(index + 1):
                self._save(record.batches, started)

    def _end_epoch(self, val: Batches | None, started: float) -> None:
        record = self.record
        self.run.processes.average_in_place(self.run.model.buffers())
        record.epoch_ends.append(len(record.losses))
        record.learning_rates.append(self.rates.now())
        if (saturated := learned_saturation(self.run.model)) is not None:
            record.saturated.append(saturated)
        if val is not None:
            is_best = record.validated(*self.validate(val))
            if is_best and self.keep == "best":
                record.best = self.weights.copy()
        record.epoch, record.batches = record.epoch + 1, 0
        self._save(0, started)

    def _save(self, done: int, started: float) -> None:
        self.record.seconds = time.perf_counter() - started
        if self.saver.checkpoint is None:
            return
        if done:
            self.run.processes.average_in_place(self.run.model.buffers())
        self.saver.save(self.feed.tree(done))

    def _report(self, reporter: ProgressReporter) -> None:
        each = len(self.feed)
        done = self.record.epoch * each + self.record.batches if each else self.record.epoch
        reporter("train", done, self.run.epochs * max(each, 1))


class _Rates:
    """The learning rates of an optimiser's groups: factor × each one's own; put back at the end."""

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule | None) -> None:
        self._groups = optimizer.param_groups
        self._schedule = schedule
        self._own = [group["lr"] for group in self._groups]

    def __enter__(self) -> _Rates:
        return self

    def __exit__(self, *_: object) -> None:
        if self._schedule is not None:
            for group, own in zip(self._groups, self._own, strict=True):
                group["lr"] = own

    def set(self, index: int) -> None:
        """Sets the rates of an update."""
        if self._schedule is not None:
            factor = self._schedule(index)
            if not math.isfinite(factor):
                raise FlexureError(
                    f"expected a finite factor of the schedule, got {factor} at step {index}; "
                    f"mend the schedule"
                )
            for group, own in zip(self._groups, self._own, strict=True):
                group["lr"] = own * factor

    def now(self) -> list[float]:
        """One number a group."""
        return [float(group["lr"]) for group in self._groups]


def _gather(run: Run) -> None:
    """Gives every process the first one's weights, and says what will differ from one process."""
    processes = run.processes
    processes.copy_first([p.detach() for p in run.model.parameters()])
    processes.copy_first(run.model.buffers())
    base = nn.modules.batchnorm._BatchNorm
    norms = [m for m in run.model.modules() if isinstance(m, base) and m.training]
    apart = [m for m in norms if not isinstance(m, nn.SyncBatchNorm)]
    if apart and processes.count > 1 and processes.is_first:
        warnings.warn(
            f"expected layers that treat samples alone, got {len(apart)} BatchNorm layers in train "
            f"mode: each of the {processes.count} processes normalises with its own share of a "
            f"batch; use torch.nn.SyncBatchNorm.convert_sync_batchnorm, or other layers",
            stacklevel=4,
        )


def _warn_of_saturation(saturated: float) -> None:
    if saturated > _MUCH_SATURATED:
        warnings.warn(
            f"expected at most {_MUCH_SATURATED:.0%} of the kept beta and c to be saturated "
            f"(below 0.01 or above 0.99), got {saturated:.1%}: they may follow noise; "
            f"lower their learning rate, or compare with another start",
            stacklevel=4,
        )


def _perturbed(perturb: Perturbation, step: TrainingStep) -> TrainingStep:
    return replace(step, x=perturb(step))


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    # `evaluating` restores every module's own mode when it leaves; train mode is set inside it.
    with evaluating(model):
        model.train()
        yield
