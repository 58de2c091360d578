"""What a training reports, and the record from which it does so.

Nothing here trains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

__all__ = ["History", "Record"]


@dataclass(frozen=True)
class History:
    """What happened during one `fit`.

    Attributes:
        losses: the objective (loss plus weighted penalties) at every update, before it.
        epoch_losses: its mean over the updates of every epoch.
        val_accuracy: share of right answers on `val` after every epoch, in [0, 1]; empty without
            `val`, and where its `y` are no labels.
        val_loss: mean of the loss, without penalties, over the samples of `val` after every epoch;
            empty without `val`.
        penalties: name -> the unweighted penalty, its mean over the updates of every epoch.
        learning_rates: the rate of each of the optimiser's groups, at the last update of every
            epoch.
        saturated: share of the learned beta and c of Trainable CT below 0.01 or above 0.99, after
            every epoch; empty where none is learned. `fit` warns of more than 5 %.
        best_epoch: the first one, from 0, with the highest accuracy on `val`, or with the lowest
            loss where there is no accuracy; None without `val`.
        seconds: spent, also before an interruption.
    """

    losses: tuple[float, ...]
    epoch_losses: tuple[float, ...]
    val_accuracy: tuple[float, ...]
    penalties: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    learning_rates: tuple[tuple[float, ...], ...] = ()
    saturated: tuple[float, ...] = ()
    best_epoch: int | None = None
    val_loss: tuple[float, ...] = ()
    seconds: float = field(default=0.0, compare=False)


@dataclass
class Record:
    """How far a training has come; its fields make `History`.

    Attributes:
        names: of the penalties.
        epoch: that is running.
        batches: of it that are done.
        losses: see `History`.
        penalties: one row of values per update.
        epoch_ends: the number of updates at the end of every epoch.
        val_accuracy: see `History`.
        val_loss: see `History`.
        learning_rates: see `History`.
        saturated: see `History`.
        best_epoch: see `History`.
        best: the values of what is trained, after the best epoch.
        seconds: spent.
    """

    names: tuple[str, ...]
    epoch: int = 0
    batches: int = 0
    losses: list[float] = field(default_factory=list)
    penalties: list[list[float]] = field(default_factory=list)
    epoch_ends: list[int] = field(default_factory=list)
    val_accuracy: list[float] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    learning_rates: list[list[float]] = field(default_factory=list)
    saturated: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    best: dict[str, Tensor] | None = None
    seconds: float = 0.0

    def tree(self) -> dict[str, Any]:
        """Everything in it, for a file."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}

    def validated(self, loss: float, accuracy: float | None) -> bool:
        """Notes what validation found after an epoch; returns whether this one is the best."""
        self.val_loss.append(loss)
        if accuracy is not None:
            self.val_accuracy.append(accuracy)
        scores = self.val_accuracy
        if len(scores) < len(self.val_loss):
            scores = [-math.inf if math.isnan(value) else -value for value in self.val_loss]
        self.best_epoch = scores.index(max(scores))
        return self.best_epoch == len(scores) - 1

    def load(self, tree: Mapping[str, Any]) -> None:
        """Puts back what `tree` returned."""
        for entry in fields(self):
            setattr(self, entry.name, tree[entry.name])

    def history(self) -> History:
        """What is reported of it."""
        spans = list(zip([0, *self.epoch_ends], self.epoch_ends, strict=False))
        return History(
            losses=tuple(self.losses),
            epoch_losses=tuple(_mean(self.losses[a:b]) for a, b in spans),
            val_accuracy=tuple(self.val_accuracy),
            penalties={
                name: tuple(_mean([row[i] for row in self.penalties[a:b]]) for a, b in spans)
                for i, name in enumerate(self.names)
            },
            learning_rates=tuple(map(tuple, self.learning_rates)),
            saturated=tuple(self.saturated),
            val_loss=tuple(self.val_loss),
            best_epoch=self.best_epoch,
            seconds=self.seconds,
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
