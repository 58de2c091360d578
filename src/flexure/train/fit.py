"""The training loop: every network that this library trains itself is trained here.

What is minimised, with which optimiser and schedule, is the caller's; batching and shuffling are
too. How one update is made is in `update`, what is saved in `resume`. Changing activations
(`flexure.methods`) and evaluation of attacks do not live here.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flexure.calling import as_batches, evaluating, logits_of
from flexure.contracts import (
    Batches,
    DataError,
    FlexureError,
    Penalty,
    Perturbation,
    UpdateRule,
)
from flexure.progress import Progress, ProgressReporter
from flexure.train.checkpoint import Checkpoint
from flexure.train.feed import Feed
from flexure.train.history import History, Record
from flexure.train.processes import current_processes
from flexure.train.randomness import reproducible, update_randomness
from flexure.train.resume import Saver, Weights, settings_of
from flexure.train.step import Run, TrainingStep, part, samples_in, shares
from flexure.train.update import Loss, Objective, Updater
from flexure.units.trainable import learned_saturation

__all__ = ["History", "Loss", "Schedule", "fit"]

Schedule = Callable[[int], float]
"""Update, counted from 0 -> factor on each of the optimiser's own learning rates."""

_MUCH_SATURATED = 0.05
"""The share that noise alone must not reach (SPEC.md, Trainable CT)."""

_PRECISIONS = {None: None, "bf16": torch.bfloat16}


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
    what a layer draws (dropout) or measures (BatchNorm) within a share.

    Args:
        model: trained in train mode, where it is; its modes are restored. Not wrapped for
            distributed training: the loop averages gradients itself.
        batches: `(x, y)` pairs, iterated once an epoch; moved to the model's device.
        epochs: passes over `batches`, at least 1.
        seed: see above.
        val: labelled batches; accuracy on them is measured after every epoch.
        loss: the mean loss over a batch; default: cross-entropy of the logits, `y` a `(B,)` int64
            tensor.
        penalties: penalty -> its weight.
        perturb: changes the inputs of each batch, once an update, before the loss and the
            penalties see them.
        update: default: one gradient, one step of the optimiser.
        optimizer: default `Adam(lr=1e-3)`, torch's own defaults, on all trainable parameters.
        schedule: factor on the learning rates at each update; default: constant.
        checkpoint: a folder of this run alone: its state is saved there at the end of each epoch
            (and more often with a `Checkpoint`), and a call with the same arguments goes on from
            there, bit by bit as if it had not been interrupted. What plugs in (loss, penalties,
            schedule, ...) must keep no state of its own.
        keep: `"best"`: with `val`, the model ends as it was after the epoch with the highest
            accuracy, the first of several; `"last"`: as it was after the last.
        accumulate: batches that make one update, as if they were one; what is left over at the end
            of an epoch makes an update of its own.
        clip: largest norm of the gradient of all trained parameters together; default: any.
        precision: `"bf16"`: `step.output` and accuracy are computed under bfloat16 autocast, the
            loss in float32; a penalty's or perturbation's own calls of the model are not.
        progress: True: a bar on stderr, of the first process.

    Raises:
        FlexureError: arguments that do not fit; nothing to train; a loss or a gradient that is not
            finite (the message names the step and the largest gradient, the weights stay those of
            the last good step); in several processes, a trained parameter without a gradient; a
            checkpoint of another run.
        DataError: `batches` or `val` is empty; a batch has fewer samples than there are processes.
    """
    weighted = _named(penalties or {})
    autocast = _check(model, epochs, keep, accumulate, clip, precision)
    processes = current_processes()
    optimizer = optimizer or _default_optimizer(model)
    run = Run(model, epochs, seed, processes, _device_of(model), autocast)
    objective = Objective(loss or _cross_entropy, weighted)
    updater = Updater(run, objective, optimizer, rule=update, clip=clip)
    weights, record = Weights(model, updater.trained), Record(tuple(weighted))
    settings = settings_of(
        updater.trained,
        optimizer,
        seed=seed,
        epochs=epochs,
        penalties={name: weight for name, (_, weight) in weighted.items()},
        accumulate=accumulate,
        clip=clip,
        precision=precision,
        keep=keep,
        val=val is not None,
        processes=processes.count,
    )
    place = Checkpoint(checkpoint) if isinstance(checkpoint, str | os.PathLike) else checkpoint
    saver = Saver(place, weights, optimizer, record, settings, processes)
    feed = Feed(
        as_batches(batches),
        at_once=accumulate,
        processes=processes,
        resumable=checkpoint is not None,
    )
    rates = _Rates(optimizer, schedule)
    loop = _Loop(run, feed, updater, perturb, rates, weights, record, saver, keep)
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
    keep: str

    def __call__(self, val: Batches | None, reporter: ProgressReporter) -> History:
        run, record = self.run, self.record
        with reproducible(run.seed), _training(run.model), self.rates:
            started = time.perf_counter()
            position = self.saver.load()
            started -= record.seconds
            _gather(run)
            if position is None:
                self._save(0, started)  # a place that cannot be written shows itself at once
            while record.epoch < run.epochs:
                self._epoch(position, started, reporter)
                self._end_epoch(val, started)
                position = None
        if self.keep == "best" and record.best is not None:
            self.weights.load(record.best)
        if run.processes.is_first:
            _warn_of_saturation(record)
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
            record.val_accuracy.append(_accuracy(self.run, val))
            best = record.best_epoch
            if best is None or record.val_accuracy[-1] > record.val_accuracy[best]:
                record.best_epoch = record.epoch
                record.best = self.weights.copy() if self.keep == "best" else None
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
            for group, own in zip(self._groups, self._own, strict=True):
                group["lr"] = own * factor

    def now(self) -> list[float]:
        """One number a group."""
        return [float(group["lr"]) for group in self._groups]


def _named(penalties: Mapping[Penalty, float]) -> dict[str, tuple[Penalty, float]]:
    """Each penalty by its name: its class's or function's; equal ones are numbered."""
    named: dict[str, tuple[Penalty, float]] = {}
    for penalty, weight in penalties.items():
        name = base = str(getattr(penalty, "__name__", type(penalty).__name__))
        count = 1
        while name in named:
            count += 1
            name = f"{base} {count}"
        named[name] = (penalty, float(weight))
    return named


def _check(
    model: nn.Module,
    epochs: int,
    keep: str,
    accumulate: int,
    clip: float | None,
    precision: str | None,
) -> tuple[str, torch.dtype] | None:
    """Refuses what does not fit; returns what to compute in besides float32."""
    if epochs < 1:
        raise FlexureError(f"expected epochs of at least 1, got {epochs}")
    if keep not in ("best", "last"):
        raise FlexureError(f"expected keep to be 'best' or 'last', got {keep!r}; choose one")
    if type(accumulate) is not int or accumulate < 1:
        raise FlexureError(f"expected accumulate of at least 1 batch, got {accumulate!r}")
    if clip is not None and not clip > 0:
        raise FlexureError(f"expected clip above 0, got {clip}; None does not clip")
    if precision not in _PRECISIONS:
        raise FlexureError(
            f"expected precision None or 'bf16', got {precision!r}; bfloat16 needs no scaling of "
            f"the loss, which float16 does"
        )
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise FlexureError(
            "expected the network itself, got one wrapped in DistributedDataParallel; pass the "
            "network before wrapping: fit averages the gradients of all processes itself"
        )
    dtype = _PRECISIONS[precision]
    device = next((p.device.type for p in model.parameters()), "cpu")
    return None if dtype is None else (device, dtype)


def _device_of(model: nn.Module) -> torch.device | None:
    """The device of all parameters; None where there are several."""
    devices = {parameter.device for parameter in model.parameters()}
    return devices.pop() if len(devices) == 1 else None


def _default_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise FlexureError(
            "expected a model with trainable parameters, got none with requires_grad; "
            "unfreeze what shall be trained"
        )
    return torch.optim.Adam(parameters, lr=1e-3)


def _cross_entropy(output: Any, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits_of(output), y)


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


def _warn_of_saturation(record: Record) -> None:
    if record.saturated and record.saturated[-1] > _MUCH_SATURATED:
        warnings.warn(
            f"expected at most {_MUCH_SATURATED:.0%} of the learned beta and c to be saturated "
            f"(below 0.01 or above 0.99), got {record.saturated[-1]:.1%}: they may follow noise; "
            f"lower their learning rate, or compare with another start",
            stacklevel=4,
        )


def _perturbed(perturb: Perturbation, step: TrainingStep) -> TrainingStep:
    return replace(step, x=perturb(step))


def _accuracy(run: Run, batches: Batches) -> float:
    right = total = 0.0
    with evaluating(run.model), torch.no_grad():
        for x, y in batches:
            samples = samples_in(x, y)
            rows = run.processes.part(samples)
            if rows.start == rows.stop:
                continue
            x, y = part((x, y), rows, samples, run)
            right += int((logits_of(run.call(x)).argmax(-1) == y).sum())
            total += y.numel()
    right, total = run.processes.sums([right, total])
    if total == 0:
        raise DataError("expected labelled samples in val, got none")
    return right / total


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    # `evaluating` restores every module's own mode when it leaves; train mode is set inside it.
    with evaluating(model):
        model.train()
        yield
