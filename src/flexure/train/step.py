"""What penalties and perturbations see of a training step (`flexure.contracts.Step`).

Which steps are taken, and what is done with their gradients, is `flexure.train.update`'s.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from flexure.calling import call_model, map_tensors, rows_of, take
from flexure.contracts import DataError
from flexure.processes import Processes

__all__ = ["Run", "TrainingStep", "pair", "part", "samples_in", "shares"]


@dataclass(frozen=True)
class Run:
    """What all steps of one training share.

    Attributes:
        model: the network.
        epochs: of the whole run.
        seed: of the run.
        processes: those that train together.
        device: where inputs are moved; None: they stay.
        autocast: what the forward pass computes in besides float32, on a device type; None: in
            nothing else.
    """

    model: nn.Module
    epochs: int
    seed: int
    processes: Processes
    device: torch.device | None
    autocast: tuple[str, torch.dtype] | None

    def call(self, x: Any) -> Any:
        """`model(x)`, its tensors in float32 where they were computed in less."""
        if self.autocast is None:
            return call_model(self.model, x)
        with torch.autocast(*self.autocast):
            output = call_model(self.model, x)
        return _widened(output)


@dataclass(eq=False)
class TrainingStep:
    """One process's share of one batch; the attributes are those of `flexure.contracts.Step`.

    Attributes:
        model: the network, in train mode.
        x: the inputs.
        y: (B,) int64 labels, or whatever the loss takes.
        positions: (B,) int64, each sample's place among all of this update.
        index: the update that this is, from 0.
        epoch: from 0.
        epochs: of the whole run.
        seed: of the run.
        samples: of the whole batch, all processes together.
        run: what all steps share.
    """

    model: nn.Module
    x: Any
    y: Any
    positions: Tensor
    index: int
    epoch: int
    epochs: int
    seed: int
    samples: int
    run: Run

    @cached_property
    def output(self) -> Any:
        """`model(x)` with its graph, computed once."""
        return self.run.call(self.x)

    def global_mean(self, values: Tensor) -> Tensor:
        """See `flexure.contracts.Step`: the value is global, the gradient that of the share."""
        mean = values.mean(0)
        if self.run.processes.count == 1:
            return mean
        total = self.run.processes.sum(values.sum(0)) / self.samples
        return mean + (total - mean.detach())


def pair(batch: Any) -> tuple[Any, Any]:
    """The `x` and `y` of a batch.

    Raises:
        DataError: it is no pair.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        length = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise DataError(
            f"expected batches to be pairs (x, y), got a {type(batch).__name__}{length}; wrap the "
            f"batches in a generator of pairs, several inputs as a tuple or a dict in x"
        )
    return batch[0], batch[1]


def samples_in(x: Any, y: Any) -> int:
    """The number of samples in a batch: the rows of the first tensor in `y`, else in `x`.

    Raises:
        DataError: neither holds a tensor with a dimension, or there are no rows.
    """
    found: list[int] = []

    def look(leaf: Tensor) -> Tensor:
        rows = rows_of(leaf)
        if rows is not None:
            found.append(rows)
        return leaf

    map_tensors((y, x), look)
    if not found or found[0] == 0:
        raise DataError(
            "expected batches (x, y) of tensors with the samples first, got "
            + ("one without samples" if found else "one without such a tensor")
            + "; leave empty batches out, and stack samples into tensors"
        )
    return found[0]


def shares(batches: list[Any], run: Run, *, index: int, epoch: int) -> list[TrainingStep]:
    """This process's share of each of the batches that make one update.

    Raises:
        DataError: a batch is no pair, or has fewer samples than there are processes.
    """
    steps: list[TrainingStep] = []
    start = 0
    for batch in batches:
        x, y = pair(batch)
        samples = samples_in(x, y)
        rows = run.processes.share(samples)
        x, y = part((x, y), rows, samples, run)
        positions = torch.arange(start + rows.start, start + rows.stop, device=run.device)
        steps.append(
            TrainingStep(
                run.model, x, y, positions, index, epoch, run.epochs, run.seed, samples, run
            )
        )
        start += samples
    return steps


def part(batch: Any, rows: slice, samples: int, run: Run) -> Any:
    """Some rows of a batch of `samples`, on the model's device."""
    if rows != slice(0, samples):
        batch = take(batch, rows, samples)
    if run.device is None:
        return batch
    return map_tensors(batch, lambda leaf: leaf.to(run.device))


def _widened(output: Any) -> Any:
    """Half-precision tensors in a model's output as float32; other outputs are the same object."""
    if isinstance(output, Tensor):
        return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
    if isinstance(output, dict):  # also the outputs of transformers, which are dicts
        for key, value in output.items():
            output[key] = _widened(value)
        return output
    if isinstance(output, tuple | list):
        return map_tensors(output, _widened)
    if hasattr(output, "logits"):
        # Not to the object itself, which may be frozen or the model's own.
        wide = copy(output)
        slots = [entry.name for entry in fields(output)] if is_dataclass(output) else []
        for name in getattr(output, "__dict__", slots):
            object.__setattr__(wide, name, _widened(getattr(output, name)))
        return wide
    return output
