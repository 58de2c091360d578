"""One update of the weights: the objective, its gradient over all processes, and the update rules.

Which batches, how often and at which rate is `flexure.train.fit`'s.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flexure.addresses import first_line
from flexure.contracts import DataError, FlexureError, Penalty, UpdateRule
from flexure.train.step import Run, TrainingStep, scalar

__all__ = ["Objective", "Updater", "plain", "trained_parameters"]


def plain(backward: Callable[[], float], optimizer: Optimizer) -> float:
    """The usual update rule: one gradient, one step."""
    value = backward()
    optimizer.step()
    return value


@dataclass(frozen=True)
class Objective:
    """What is minimised: the loss plus weight·penalty for each penalty.

    Attributes:
        penalties: name -> the penalty and its weight.
    """

    penalties: Mapping[str, tuple[Penalty, float]]

    def parts(self, step: TrainingStep) -> list[Tensor]:
        """The loss and each unweighted penalty, scalars with their graphs.

        Raises:
            FlexureError: one is not a scalar tensor.
        """
        found = [step.loss]
        for name, (penalty, _) in self.penalties.items():
            found.append(scalar(f"the penalty {name}", penalty(step)))
        return found

    def total(self, parts: Sequence[Any]) -> Any:
        """The objective, of tensors or of numbers."""
        value = parts[0]
        for part, (_, weight) in zip(parts[1:], self.penalties.values(), strict=True):
            value = value + weight * part
        return value


def trained_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """What the optimiser changes, by the model's names where they are the model's.

    Raises:
        FlexureError: nothing in the optimiser requires a gradient.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names.get(id(parameter), f"parameter {index} of group {number}"): parameter
        for number, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
        if parameter.requires_grad
    }
    if not found:
        raise FlexureError(
            "expected an optimiser of trainable parameters, got none with requires_grad; "
            "unfreeze what shall be trained"
        )
    return found


class Updater:
    """Performs updates, and stops at the first that is not finite."""

    def __init__(
        self,
        run: Run,
        objective: Objective,
        optimizer: Optimizer,
        *,
        rule: UpdateRule | None,
        clip: float | None,
    ) -> None:
        self.trained = trained_parameters(run.model, optimizer)
        self._differentiated = [
            p for p in {*run.model.parameters(), *self.trained.values()} if p.requires_grad
        ]
        self._run = run
        self._objective = objective
        self._optimizer = optimizer
        self._rule = rule
        self._clip = clip
        self._looked = False
        self._last_norms: Tensor | None = None

    def __call__(self, steps: Sequence[TrainingStep]) -> tuple[float, list[float]]:
        """One update with the batches of `steps` as if they were one.

        Returns:
            The objective before the update, and each penalty, over all samples and processes.

        Raises:
            FlexureError: a loss or gradient that is not finite, or a parameter without gradient
                in one of several processes. Weights and buffers are those before the update.
        """
        measured: list[list[float]] = []
        before = _Buffers(self._run.model)

        def backward() -> float:
            if not measured:
                measured.append(self._backward(steps))
            else:  # the same function again, of which nothing stays
                first = _Buffers(self._run.model)
                before.put_back()
                measured.append(self._backward(steps))
                first.put_back()
            return float(self._objective.total(measured[-1]))

        with self._undone_on_error(before):
            value = (self._rule or plain)(backward, self._optimizer)
            if not measured or not isinstance(value, float):
                raise FlexureError(
                    f"expected the update rule to call backward and to return the objective as a "
                    f"float, got {value!r} after {len(measured)} calls; see contracts.UpdateRule"
                )
        return value, measured[0][1:]

    @contextmanager
    def _undone_on_error(self, buffers: _Buffers) -> Iterator[None]:
        """Weights (where a rule may have moved them) and buffers, put back on an error."""
        moved = [] if self._rule is None else [p.detach() for p in self.trained.values()]
        before = [tensor.clone() for tensor in moved]
        try:
            yield
        except BaseException:  # an interrupted rule may have moved the weights, too
            for tensor, value in zip(moved, before, strict=True):
                tensor.copy_(value)
            buffers.put_back()
            raise

    def _backward(self, steps: Sequence[TrainingStep]) -> list[float]:
        """Sets the gradients; returns the loss and each penalty over all samples."""
        for parameter in self._differentiated:
            parameter.grad = None
        samples = sum(step.samples for step in steps)
        parts = [0.0] * (1 + len(self._objective.penalties))
        for given in steps:
            step = given.fresh()  # the weights may have changed since the last call
            fresh = self._objective.parts(step)
            weight = len(step.positions) / samples
            _differentiate(self._objective.total(fresh) * weight, self._run.input_gradients)
            parts = [
                total + weight * float(part.detach())
                for total, part in zip(parts, fresh, strict=True)
            ]
        parts = self._gathered(parts, samples)
        self._check_and_clip(self._objective.total(parts), steps[0])
        return parts

    def _gathered(self, parts: list[float], samples: int) -> list[float]:
        """The parts and, in place, the gradients summed over the processes, checked first."""
        missing = [float(parameter.grad is None) for parameter in self.trained.values()]
        processes = self._run.processes
        if processes.count == 1:
            if not self._looked:
                self._warn_of(missing)
            self._looked = True
            return parts
        count = len(parts)
        sums = processes.sums([*parts, *missing, float(samples)])
        if sums[-1] != processes.count * samples:
            raise DataError(
                f"expected the same batches on every process, got {samples} samples here and "
                f"{sums[-1]:.0f} on all {processes.count}; give each process the whole batches"
            )
        if any(sums[count:-1]):
            self._refuse(missing, sums[count:-1])
        processes.sum_in_place(p.grad for p in self.trained.values() if p.grad is not None)
        return sums[:count]

    def _warn_of(self, missing: Sequence[float]) -> None:
        names = [name for name, absent in zip(self.trained, missing, strict=True) if absent]
        if names:
            warnings.warn(
                f"expected a gradient for every trained parameter, got none for {_shown(names)}; "
                f"they stay as they are: the objective does not depend on them",
                stacklevel=2,
            )

    def _refuse(self, missing: Sequence[float], sums: Sequence[float]) -> None:
        """Raises on every process, since each knows the sums."""
        index = next(i for i, absent in enumerate(sums) if absent)
        processes = self._run.processes
        own = [missing[index] if i == processes.index else 0.0 for i in range(processes.count)]
        where = [i for i, absent in enumerate(processes.sums(own)) if absent]
        raise FlexureError(
            f"expected a gradient for every trained parameter on every process, got none for "
            f"{list(self.trained)[index]} on process {', '.join(map(str, where))}; freeze it "
            f"(requires_grad_(False)), or make the objective depend on it in every process"
        )

    def _check_and_clip(self, objective: float, step: TrainingStep) -> None:
        names, norms = _gradient_norms(self.trained)
        total = torch.linalg.vector_norm(norms)
        if not (math.isfinite(objective) and math.isfinite(float(total))):
            raise FlexureError(self._not_finite(objective, names, norms, step))
        self._last_norms = norms
        if self._clip is not None:
            nn.utils.clip_grads_with_norm_(self.trained.values(), self._clip, total)

    def _not_finite(
        self, objective: float, names: list[str], norms: Tensor, step: TrainingStep
    ) -> str:
        where = f"at step {step.index} (epoch {step.epoch})"
        remedy = "lower the learning rate, clip gradients, or check the data of that batch"
        if math.isfinite(objective):
            worst = int(norms.nan_to_num(nan=math.inf).argmax())
            return (
                f"expected finite gradients, got {float(norms[worst])} for {names[worst]} "
                f"{where}; {remedy}"
            )
        before = "there was no step before"
        if step.index > 0:  # earlier steps were another process's
            before = "it is the first step since the training was resumed"
        if self._last_norms is not None:
            worst = int(self._last_norms.argmax())
            norm = float(self._last_norms[worst])
            before = f"the largest gradient of the step before was {norm:.3g}, of {names[worst]}"
        return f"expected a finite loss, got {objective} {where}; {before}; {remedy}"


class _Buffers:
    """What the modules in train mode hold besides parameters, as it is when this is made.

    BatchNorm's statistics, the vectors of spectral norms, whatever a forward pass writes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            if module.training
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def put_back(self) -> None:
        """Makes all of it what it was, also where a module has bound another tensor since."""
        with torch.no_grad():
            for module, name, buffer, value in self._held:
                if getattr(module, name) is not buffer:
                    setattr(module, name, buffer)
                buffer.copy_(value)


def _differentiate(value: Tensor, twice: bool) -> None:
    if not value.requires_grad:
        raise FlexureError(
            "expected the loss to depend on a trainable parameter, got one without a graph; "
            "unfreeze a parameter that the output depends on, and do not detach the output"
        )
    try:
        # Of everything, the input too: a layer that cannot be differentiated twice has a branch of
        # its own, which raises when it is reached, and is passed over where leaves are chosen.
        value.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if not twice or isinstance(error, torch.OutOfMemoryError):
            raise
        raise FlexureError(
            f"expected a network that can be differentiated twice, as a penalty of the input "
            f"gradient needs it, got: {first_line(error)}; replace the layer, or leave that "
            f"penalty out"
        ) from error


def _gradient_norms(parameters: Mapping[str, nn.Parameter]) -> tuple[list[str], Tensor]:
    """The names of the parameters with a gradient, and its norm for each."""
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    if not grads:
        raise FlexureError(
            f"expected a gradient for the trained parameters, got none for any of them "
            f"({_shown(list(parameters))}); give the optimiser what the output depends on"
        )
    dense = [g.coalesce().values() if g.is_sparse else g for g in grads.values()]
    norms = torch._foreach_norm(dense)
    return list(grads), torch.stack([norm.to(norms[0].device) for norm in norms])


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
