"""What penalties and perturbations see of a training step (`flexure.contracts.Step`).

Which steps are taken, and what is done with their gradients, is `flexure.train.update`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from flexure.addresses import first_line
from flexure.calling import call_model, map_tensors, rows_of, take, unwritten
from flexure.contracts import DataError, FlexureError
from flexure.measure.fields import point_of
from flexure.measuring import twice_differentiable
from flexure.processes import Processes
from flexure.train.checkpoint import rng_state, set_rng_state

__all__ = [
    "IGNORED",
    "Loss",
    "Run",
    "TrainingStep",
    "pair",
    "part",
    "samples_in",
    "scalar",
    "shares",
]

Loss = Callable[[Any, Any], Tensor]
"""`(model output, y) -> scalar`, the mean over the samples."""

IGNORED = -100
"""The label that torch's cross-entropy leaves out by default."""


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
        loss: what is minimised besides penalties.
        input_gradients: whether a penalty differentiates the loss in the inputs.
    """

    model: nn.Module
    epochs: int
    seed: int
    processes: Processes
    device: torch.device | None
    autocast: tuple[str, torch.dtype] | None
    loss: Loss
    input_gradients: bool

    def call(self, x: Any) -> Any:
        """`model(x)`, its tensors in float32 where they were computed in less."""
        with twice_differentiable() if self.input_gradients else nullcontext():
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
    _point: Tensor | None = field(default=None, repr=False)

    @cached_property
    def output(self) -> Any:
        """`model(x)` with its graph, computed once."""
        if self._point is None:
            return self.run.call(self.x)
        self.__dict__["_randomness"] = rng_state()
        return self.run.call(self._with(self._point))

    @cached_property
    def loss(self) -> Tensor:
        """What is minimised besides penalties, of `output`: a scalar with its graph."""
        return scalar("the loss", self.run.loss(self.output, self.y))

    def fresh(self) -> TrainingStep:
        """The same step without what has been computed, ready for what penalties ask for."""
        if not self.run.input_gradients:
            return replace(self)
        point = point_of(self.x)
        if len(point) != len(self.positions):
            raise FlexureError(
                f"expected one input for each of {len(self.positions)} samples, got "
                f"{tuple(point.shape)}; put the samples first, or leave penalties of the input "
                f"gradient out"
            )
        leaf = point.detach().requires_grad_()
        return replace(self, x=_exchanged(self.x, point, leaf), _point=leaf)

    def input_gradient(self, x: Tensor | None = None) -> Tensor:
        """See `flexure.contracts.Step`."""
        if x is None:
            return self._own_gradient
        point = self._asked_point()
        if x.shape != point.shape or x.dtype != point.dtype:
            raise FlexureError(
                f"expected inputs like those of the step, {point.dtype} {tuple(point.shape)}, got "
                f"{x.dtype} {tuple(x.shape)}; change step.x without changing its shape"
            )
        at = x if x.requires_grad else x.detach().requires_grad_()
        with self._again():
            output = self.run.call(self._with(at))
        return self._rows(scalar("the loss", self.run.loss(output, self.y)), at)

    @cached_property
    def _own_gradient(self) -> Tensor:
        return self._rows(self.loss, self._asked_point())

    def _asked_point(self) -> Tensor:
        if self._point is None:
            raise FlexureError(
                "expected a penalty that says that it needs the input gradient, got none in this "
                "training; give its class the attribute needs_input_gradient = True"
            )
        return self._point

    def _with(self, point: Tensor) -> Any:
        """`x` with another tensor in the place of its point; models may overwrite it."""
        return _exchanged(self.x, self._asked_point(), point.clone())

    @contextmanager
    def _again(self) -> Iterator[None]:
        """Inside, the model is the function that gave `output`, and keeps nothing of a call."""
        _ = self.output
        with ExitStack() as stack:
            stack.enter_context(unwritten(self.model, differentiated=True))
            stack.callback(set_rng_state, rng_state())
            set_rng_state(self.__dict__["_randomness"])
            yield

    def _rows(self, loss: Tensor, point: Tensor) -> Tensor:
        """The gradients of the samples' losses at a point, of their mean."""
        gradient = _gradient(loss, point) if loss.requires_grad else None
        if gradient is None:
            raise FlexureError(
                "expected a loss that depends on the input, got one that does not (an input that "
                "the model does not use, or detaches); leave penalties of the input gradient out"
            )
        if not gradient.requires_grad:
            raise FlexureError(
                "expected an input gradient that depends on trainable parameters, got one without "
                "a graph (all are frozen, or a layer's backward cannot be differentiated); "
                "unfreeze them, replace that layer, or leave penalties of the input gradient out"
            )
        return gradient * self._counted

    @property
    def _counted(self) -> Tensor | int:
        """How many samples the loss is the mean of."""
        y = self.y
        is_labels = isinstance(y, Tensor) and y.dtype in _INTEGERS and y.dim() == 1
        return (y != IGNORED).sum() if is_labels else len(self.positions)

    def global_mean(self, values: Tensor) -> Tensor:
        """See `flexure.contracts.Step`: the value is global, the gradient that of the share."""
        mean = values.mean(0)
        if self.run.processes.count == 1:
            return mean
        total = self.run.processes.sum(values.sum(0)) / self.samples
        return mean + (total - mean.detach())

    def global_max(self, values: Tensor) -> Tensor:
        """See `flexure.contracts.Step`."""
        largest = values.detach().max()
        processes = self.run.processes
        if processes.count == 1:
            return largest
        own = [float(largest) if i == processes.index else 0.0 for i in range(processes.count)]
        return torch.tensor(processes.sums(own), dtype=torch.float64).max().to(largest)


def _gradient(loss: Tensor, point: Tensor) -> Tensor | None:
    try:
        return torch.autograd.grad(loss, point, create_graph=True, allow_unused=True)[0]
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise FlexureError(
            f"expected a network that can be differentiated in its input, got: "
            f"{first_line(error)}; where it saves memory by torch.utils.checkpoint, call that with "
            f"use_reentrant=False, else leave penalties of the input gradient out"
        ) from error


def scalar(name: str, value: Any) -> Tensor:
    """`value`, called `name`, as a tensor without dimensions.

    Raises:
        FlexureError: it is no tensor of one element.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.reshape(())
    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise FlexureError(f"expected {name} to be a scalar tensor, got {got}; return its mean")


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


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _exchanged(x: Any, old: Tensor, new: Tensor) -> Any:
    """An `Example` with another tensor in the place of one of its own."""
    return map_tensors(x, lambda leaf: new if leaf is old else leaf)


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
