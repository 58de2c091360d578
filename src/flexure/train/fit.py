"""The training loop: every network that this library trains itself is trained here.

What is minimised, with which optimiser and schedule, is the caller's; batching and shuffling are
too. Changing activations (`flexure.methods`) and evaluation of attacks do not live here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexure.calling import as_batches, call_model, evaluating, logits_of
from flexure.contracts import Batches, DataError, FlexureError

__all__ = ["History", "Loss", "Schedule", "fit"]

Loss = Callable[[Any, Tensor], Tensor]
"""`(model output, y) -> scalar`."""

Schedule = Callable[[int], float]
"""Step, counted from 0 -> factor on the optimiser's own learning rate."""


@dataclass(frozen=True)
class History:
    """What happened during one `fit`.

    Attributes:
        losses: training loss of every step, before that step's update.
        epoch_losses: mean training loss of every epoch (mean over its steps).
        val_accuracy: share of right answers on `val` after every epoch, in [0, 1]; empty without
            `val`.
    """

    losses: tuple[float, ...]
    epoch_losses: tuple[float, ...]
    val_accuracy: tuple[float, ...]


def fit(
    model: nn.Module,
    batches: Batches,
    *,
    epochs: int,
    seed: int,
    val: Batches | None = None,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: Schedule | None = None,
) -> History:
    """Trains `model` in place on labelled batches.

    Same seed, same batches and same initial weights give the same trained weights: everything in
    the loop that draws from torch's default generators (dropout, a shuffling loader without a
    generator of its own) starts from `seed`, and those generators are put back afterwards.

    Args:
        model: trained in train mode, on the device where it is; its modes are restored.
        batches: `(x, y)` pairs, iterated once an epoch, on the model's device.
        epochs: passes over `batches`, at least 1.
        seed: see above.
        val: labelled batches; accuracy on them is measured after every epoch.
        loss: the objective; default: mean cross-entropy of the logits, `y` a `(B,)` int64 tensor.
        optimizer: default `Adam(lr=1e-3)`, torch's own defaults, on all trainable parameters.
        schedule: factor on the learning rate at each step; default: constant.

    Raises:
        FlexureError: `epochs` below 1, nothing to train, or a loss that is not finite; the
            message names the step.
        DataError: `batches` or `val` is empty.
    """
    if epochs < 1:
        raise FlexureError(f"expected epochs of at least 1, got {epochs}")
    objective = loss or _cross_entropy
    optimizer = optimizer or _default_optimizer(model)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) if schedule else None
    batches, val = as_batches(batches), None if val is None else as_batches(val)
    losses: list[float] = []
    epoch_losses: list[float] = []
    val_accuracy: list[float] = []
    with _seeded(seed), _training(model):
        for _ in range(epochs):
            start = len(losses)
            for x, y in batches:
                losses.append(_step(model, x, y, objective, optimizer, step=len(losses)))
                if rates is not None:
                    rates.step()
            if len(losses) == start:
                raise DataError("expected at least one batch in every epoch, got none")
            epoch_losses.append(sum(losses[start:]) / (len(losses) - start))
            if val is not None:
                val_accuracy.append(_accuracy(model, val))
    return History(tuple(losses), tuple(epoch_losses), tuple(val_accuracy))


def _cross_entropy(output: Any, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits_of(output), y)


def _default_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise FlexureError(
            "expected a model with trainable parameters, got none with requires_grad; "
            "unfreeze what shall be trained"
        )
    return torch.optim.Adam(parameters, lr=1e-3)


def _step(
    model: nn.Module,
    x: Any,
    y: Tensor,
    objective: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
) -> float:
    value = objective(call_model(model, x), y)
    number = float(value.detach())
    # Checked before the update, so that the weights are still those of the last good step.
    if not math.isfinite(number):
        raise FlexureError(
            f"expected a finite loss, got {number} at step {step}; "
            f"lower the learning rate or check the data of that batch"
        )
    optimizer.zero_grad(set_to_none=True)
    value.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return number


def _accuracy(model: nn.Module, batches: Batches) -> float:
    right = total = 0
    with evaluating(model), torch.no_grad():
        for x, y in batches:
            right += int((logits_of(call_model(model, x)).argmax(-1) == y).sum())
            total += y.numel()
    if total == 0:
        raise DataError("expected labelled samples in val, got none")
    return right / total


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # Every device by name: torch warns where it has to guess among several.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    # `evaluating` restores every module's own mode when it leaves; train mode is set inside it.
    with evaluating(model):
        model.train()
        yield
