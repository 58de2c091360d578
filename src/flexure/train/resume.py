"""Saving a training's whole state, and going on from it as if nothing had happened.

The file is `flexure.train.checkpoint`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flexure.contracts import FlexureError
from flexure.train.checkpoint import (
    Checkpoint,
    load_optimizer_tree,
    load_state,
    optimizer_tree,
    save_state,
)
from flexure.train.history import Record
from flexure.train.processes import Processes

__all__ = ["Saver", "Weights", "settings_of"]

_PLAIN = (bool, int, float, str, tuple, list, Tensor, type(None))
"""What an optimiser's setting must be to look the same in every process."""

_SHOWN = 3
"""Differences named in the message; one wrong setting is often behind many."""


class Weights:
    """What training changes: the trained parameters, and all buffers."""

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        self._model = model
        self._trained = trained

    def tensors(self) -> dict[str, Tensor]:
        """By name, the model's own memory."""
        parameters = {name: parameter.detach() for name, parameter in self._trained.items()}
        return parameters | dict(self._model.named_buffers())

    def copy(self) -> dict[str, Tensor]:
        """By name, memory of its own."""
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Puts back values by name."""
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(values[name])


@dataclass(frozen=True)
class Saver:
    """Saves and loads the state of one training; without a checkpoint, does nothing.

    Attributes:
        checkpoint: where and how often.
        weights: what is trained.
        optimizer: that trains it.
        record: of what has happened.
        settings: what must be the same for a training to go on.
        processes: those that train together.
    """

    checkpoint: Checkpoint | None
    weights: Weights
    optimizer: Optimizer
    record: Record
    settings: Mapping[str, Any]
    processes: Processes

    def load(self) -> dict[str, Any] | None:
        """Puts back what was saved; returns where the batches were, or None if nothing was saved.

        Raises:
            FlexureError: the folder holds the state of another training; nothing has changed.
        """
        if self.checkpoint is None:
            return None
        self.processes.wait()  # until the first one has written what it had to
        tree = load_state(self.checkpoint.path)
        if tree is not None:
            self._check_same(tree)
        updates = -1.0 if tree is None else float(len(tree["record"]["losses"]))
        if self.processes.sums([updates]) != [updates * self.processes.count]:
            raise FlexureError(
                f"expected one checkpoint folder for all {self.processes.count} processes, got "
                f"different states; put it where all of them can read it"
            )
        if tree is None:
            return None
        load_optimizer_tree(self.optimizer, tree["optimizer"])
        self.weights.load(tree["weights"])
        self.record.load(tree["record"])
        position: dict[str, Any] = tree["position"]
        return position

    def due(self, update: int) -> bool:
        """Whether a save is due after an update (its number, from 1)."""
        every = None if self.checkpoint is None else self.checkpoint.every
        return every is not None and update % every == 0

    def save(self, position: Mapping[str, Any]) -> None:
        """Saves everything, in the first process; `position`: where the batches are."""
        if self.checkpoint is not None and self.processes.is_first:
            tree = {
                "settings": dict(self.settings),
                "weights": self.weights.tensors(),
                "optimizer": optimizer_tree(self.optimizer),
                "record": self.record.tree(),
                "position": dict(position),
            }
            save_state(self.checkpoint.path, tree)

    def _check_same(self, tree: Any) -> None:
        there = tree.get("settings") if isinstance(tree, dict) else None
        if not isinstance(there, dict):
            raise FlexureError(
                "expected the checkpoint of a training, got another kind of state; "
                "choose another folder"
            )
        here, absent = self.settings, "nothing"
        different = [
            f"{key}: {there.get(key, absent)} there, {here.get(key, absent)} here"
            for key in {**here, **there}
            if there.get(key, absent) != here.get(key, absent)
        ]
        if different:
            more = len(different) - _SHOWN
            raise FlexureError(
                f"expected the checkpoint of this training, got that of another one "
                f"({'; '.join(different[:_SHOWN])}{f'; {more} more' if more > 0 else ''}); train "
                f"with its settings, or choose another folder"
            )


def settings_of(
    trained: Mapping[str, nn.Parameter], optimizer: Optimizer, **others: Any
) -> dict[str, Any]:
    """What must be the same for a training to go on, as plain values."""
    groups = {
        f"{key} of group {number}": repr(value)
        for number, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if key != "params" and isinstance(value, _PLAIN)
    }
    shapes = {
        f"shape of {name}": repr(tuple(parameter.shape)) for name, parameter in trained.items()
    }
    plain = {name: repr(value) for name, value in others.items()}
    return plain | {"optimizer": type(optimizer).__name__} | groups | shapes
