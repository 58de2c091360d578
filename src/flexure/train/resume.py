"""Saving a training's whole state, and going on from it as if nothing had happened.

The file is `flexure.train.checkpoint`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flexure.contracts import FlexureError
from flexure.processes import Processes
from flexure.train.checkpoint import (
    Checkpoint,
    check_optimizer_tree,
    load_optimizer_tree,
    load_state,
    optimizer_tree,
    save_state,
)
from flexure.train.history import Record
from flexure.train.identity import describe, digest

__all__ = ["FORMAT", "CheckpointError", "Saver", "Weights", "settings_of"]

FORMAT = 2
"""Of the tree below. 2: with what plugs in, the first batch, and the loss on `val`."""

_TREE = {"format", "settings", "weights", "optimizer", "record", "position"}
_POSITION = {"start", "done", "now", "first"}

_PLAIN = (bool, int, float, str, tuple, list, Tensor, type(None))
"""What an optimiser's setting must be to look the same in every process."""

_FACTORS = 64
"""Factors of a schedule that are compared."""

_SHOWN = 3
"""Differences named in the message; one wrong setting is often behind many."""


class CheckpointError(FlexureError):
    """A checkpoint of another training, or of another version; no fault of the training itself."""


class Weights:
    """What training changes: the trained parameters, and all buffers."""

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        self._model = model
        self._trained = trained

    def tensors(self) -> dict[str, Tensor]:
        """By name, the model's own memory."""
        parameters = {name: parameter.detach() for name, parameter in self._trained.items()}
        return parameters | dict(self._model.named_buffers())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of what is trained, by name."""
        return {name: tuple(parameter.shape) for name, parameter in self._trained.items()}

    def of_model(self) -> list[Tensor]:
        """All parameters and buffers of the model, and what else is trained."""
        return [*self._model.parameters(), *self._model.buffers(), *self._trained.values()]

    def copy(self) -> dict[str, Tensor]:
        """By name, memory of its own."""
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    def check(self, values: Any) -> None:
        """Checks that `values` are of the same names, shapes and dtypes.

        Raises:
            FlexureError: they are not; the message names the first.
        """
        here = {name: (tuple(t.shape), t.dtype) for name, t in self.tensors().items()}
        there = {name: (tuple(t.shape), t.dtype) for name, t in values.items()}
        for name in {**here, **there}:
            if here.get(name) != there.get(name):
                raise CheckpointError(
                    f"expected the checkpoint of this network, got {there.get(name, 'nothing')} "
                    f"there and {here.get(name, 'nothing')} here for {name}; train the same "
                    f"network, or choose another folder"
                )

    def frozen(self) -> dict[str, Tensor]:
        """By name, the parameters that training leaves as they are, so that no file holds them."""
        trained = {id(parameter) for parameter in self._trained.values()}
        parameters = self._model.named_parameters()
        return {name: p.detach() for name, p in parameters if id(p) not in trained}

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
        settings: makes what must be the same for a training to go on; called once, at the start.
        processes: those that train together.
    """

    checkpoint: Checkpoint | None
    weights: Weights
    optimizer: Optimizer
    record: Record
    settings: Callable[[], Mapping[str, Any]]
    processes: Processes

    def load(self, check: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        """Puts back what was saved; returns where the batches were, or None if nothing was saved.

        Args:
            check: checks where the batches were, and raises a FlexureError.

        Raises:
            FlexureError: the folder holds the state of another training; nothing has changed.
        """
        if self.checkpoint is None:
            return None
        settings = self._own_settings  # here, where every process asks for them
        self.processes.wait()  # until the first one has written what it had to
        tree = load_state(self.checkpoint.path)
        if tree is not None:
            self._check_same(tree, settings)
            self._check_whole(tree)
            check(tree["position"])
        updates = -1.0 if tree is None else float(len(tree["record"]["losses"]))
        if self.processes.sums([updates]) != [updates * self.processes.count]:
            raise CheckpointError(
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
                "format": FORMAT,
                "settings": dict(self._own_settings),
                "weights": self.weights.tensors(),
                "optimizer": optimizer_tree(self.optimizer),
                "record": self.record.tree(),
                "position": dict(position),
            }
            save_state(self.checkpoint.path, tree)

    def _check_same(self, tree: Any, here: Mapping[str, Any]) -> None:
        there = tree.get("settings") if isinstance(tree, dict) else None
        if not isinstance(there, dict):
            raise CheckpointError(
                "expected the checkpoint of a training, got another kind of state; "
                "choose another folder"
            )
        if tree.get("format") != FORMAT:
            raise CheckpointError(
                f"expected a checkpoint of format {FORMAT}, got format {tree.get('format', 1)}, of "
                f"another version of flexure; end that training with the version that began it, "
                f"or choose another folder"
            )
        absent = "nothing"
        different = [
            f"{key}: {there.get(key, absent)} there, {here.get(key, absent)} here"
            for key in {**here, **there}
            if there.get(key, absent) != here.get(key, absent)
        ]
        if different:
            more = len(different) - _SHOWN
            raise CheckpointError(
                f"expected the checkpoint of this training, got that of another one "
                f"({'; '.join(different[:_SHOWN])}{f'; {more} more' if more > 0 else ''}); train "
                f"with its settings, or choose another folder"
            )

    def _check_whole(self, tree: dict[str, Any]) -> None:
        """Checks everything that is going to be put back, before anything is."""
        known = {entry.name for entry in fields(Record)}
        if not (set(tree) == _TREE and set(tree["position"]) == _POSITION) or (
            set(tree["record"]) != known or tuple(tree["record"]["names"]) != self.record.names
        ):
            raise CheckpointError(
                "expected a whole checkpoint of a training, got one with other entries; "
                "choose another folder"
            )
        check_optimizer_tree(self.optimizer, tree["optimizer"])
        self.weights.check(tree["weights"])

    @cached_property
    def _own_settings(self) -> Mapping[str, Any]:
        return self.settings()


def settings_of(
    weights: Weights,
    optimizer: Optimizer,
    among: Processes,
    *,
    schedule: Callable[[int], float] | None,
    updates: int,
    plugs: Mapping[str, Any],
    **others: Any,
) -> dict[str, str]:
    """What must be the same for a training to go on.

    Args:
        weights: whose names and shapes must agree, and the values of those that are frozen.
        optimizer: whose class and settings must agree.
        among: the processes; each calls this, and the first one's frozen values count, for all
            get them.
        schedule: described, and compared by its factors at up to 64 updates.
        updates: of the whole run; 0 where nobody knows: the first factor alone is compared.
        plugs: loss, penalties and the like, which are described.
        others: plain settings.
    """
    groups = {
        f"{key} of group {number}": repr(value)
        for number, group in enumerate(optimizer.param_groups)
        for key, value in group.items()
        if key != "params" and isinstance(value, _PLAIN)
    }
    shapes = {f"shape of {name}": repr(shape) for name, shape in weights.shapes().items()}
    own = {id(tensor) for tensor in weights.of_model()}
    plugs = {name: describe(value, own) for name, value in {**plugs, "schedule": schedule}.items()}
    plugs |= _factors(schedule, updates)
    frozen = weights.frozen()
    (values,) = among.sums([float(digest(list(frozen.values()))) if among.is_first else 0.0])
    plugs["frozen parameters"] = f"{len(frozen)} with values {int(values):08x}"
    plain = {name: repr(value) for name, value in others.items()}
    return plain | {"optimizer": type(optimizer).__name__} | groups | shapes | plugs


def _factors(schedule: Callable[[int], float] | None, updates: int) -> dict[str, str]:
    """Of a schedule, all over the run."""
    if schedule is None:
        return {}
    last = max(updates - 1, 0)
    points = sorted({last * i // (_FACTORS - 1) for i in range(_FACTORS)})
    factors = [float(schedule(point)) for point in points]
    values = digest(torch.tensor(factors, dtype=torch.float64))
    shown = f"{factors[0]:.6g} to {factors[-1]:.6g} with values {values:08x}"
    return {"factors of the schedule": shown}
