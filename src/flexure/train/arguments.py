"""Checks of what `flexure.train.fit` is given, and its defaults.

Checks of batches are where batches are taken apart.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexure.calling import logits_of
from flexure.contracts import DataError, FlexureError, Penalty
from flexure.train.checkpoint import Checkpoint
from flexure.train.step import IGNORED
from flexure.train.validation import check_labels

__all__ = [
    "asking_input_gradient",
    "check_optimizer",
    "check_settings",
    "compute_in",
    "cross_entropy",
    "default_optimizer",
    "device_of",
    "named",
    "needs_closure",
    "place_of",
]

_PRECISIONS = {None: None, "bf16": torch.bfloat16}


def check_settings(
    *,
    epochs: Any,
    seed: Any,
    keep: Any,
    accumulate: Any,
    clip: Any,
    schedule: Any,
) -> None:
    """Refuses settings that do not fit, whatever the model.

    Raises:
        FlexureError: one does not; the message names it.
    """
    if not _is_integer(epochs) or epochs < 1:
        raise FlexureError(f"expected epochs of at least 1, an integer, got {epochs!r}")
    if not _is_integer(seed) or not -(2**63) <= seed < 2**63:
        raise FlexureError(f"expected seed to be an integer of 64 bits, got {seed!r}; choose one")
    if keep not in ("best", "last"):
        raise FlexureError(f"expected keep to be 'best' or 'last', got {keep!r}; choose one")
    if type(accumulate) is not int or accumulate < 1:
        raise FlexureError(f"expected accumulate of at least 1 batch, got {accumulate!r}")
    if clip is not None and not clip > 0:
        raise FlexureError(f"expected clip above 0, got {clip}; None does not clip")
    if schedule is not None and not callable(schedule):
        raise FlexureError(
            f"expected schedule to be a function of the update's number, got {schedule!r}; pass "
            f"one such as flexure.train.cosine(total_steps), and no scheduler of torch"
        )


def check_optimizer(optimizer: Any, update: Any) -> None:
    """Refuses what is no optimiser, and one whose step asks for more than gradients.

    Raises:
        FlexureError: see above.
    """
    if not (hasattr(optimizer, "param_groups") and callable(getattr(optimizer, "step", None))):
        raise FlexureError(
            f"expected an optimiser of torch.optim, got {optimizer!r}; make one of the parameters"
        )
    if update is None and needs_closure(optimizer):
        raise FlexureError(
            f"expected an optimiser that steps once a gradient, got {type(optimizer).__name__}, "
            f"whose step needs a closure; pass update=lambda backward, optimizer: "
            f"optimizer.step(backward)"
        )


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step asks for gradients at several weights, as that of LBFGS does."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def compute_in(model: nn.Module, precision: Any) -> tuple[str, torch.dtype] | None:
    """The device type and the dtype to compute in besides float32; None: in nothing else.

    Raises:
        FlexureError: another precision, or a model that is wrapped already.
    """
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


def place_of(checkpoint: Any) -> Checkpoint | None:
    """Where to save; a path is a place for saves at the end of each epoch.

    Raises:
        FlexureError: neither a path nor a `Checkpoint`.
    """
    if isinstance(checkpoint, str | os.PathLike):
        return Checkpoint(checkpoint)
    if checkpoint is None or isinstance(checkpoint, Checkpoint):
        return checkpoint
    raise FlexureError(
        f"expected checkpoint to be a folder or a Checkpoint, got {checkpoint!r}; name a folder"
    )


def named(penalties: Mapping[Penalty, float]) -> dict[str, tuple[Penalty, float]]:
    """Each penalty by its name: its class's or function's; equal ones are numbered.

    Raises:
        FlexureError: a weight is not finite.
    """
    found: dict[str, tuple[Penalty, float]] = {}
    for penalty, weight in penalties.items():
        name = base = str(getattr(penalty, "__name__", type(penalty).__name__))
        count = 1
        while name in found:
            count += 1
            name = f"{base} {count}"
        if not math.isfinite(weight):
            raise FlexureError(f"expected a finite weight of the penalty {name}, got {weight}")
        found[name] = (penalty, float(weight))
    return found


def asking_input_gradient(
    model: nn.Module, penalties: Mapping[str, tuple[Penalty, float]]
) -> list[str]:
    """The names of the penalties that differentiate the loss in the inputs.

    Raises:
        FlexureError: there are some, and a part of the model is compiled or scripted: what is
            compiled cannot be differentiated twice.
    """
    names = [
        name
        for name, (penalty, _) in penalties.items()
        if getattr(penalty, "needs_input_gradient", False)
    ]
    for path, module in model.named_modules():
        if names and (how := _compiled(module)):
            raise FlexureError(
                f"expected a network that can be differentiated twice, as {', '.join(names)} needs "
                f"it, got {f'{path} in it' if path else 'one'} {how}; train the network before "
                f"compiling it, or pass the one that is not compiled"
            )
    return names


def _compiled(module: nn.Module) -> str | None:
    """By what a module is compiled; None: it runs as Python."""
    if isinstance(module, torch.jit.ScriptModule):
        return "made by torch.jit"
    forward = module.forward
    by_dynamo = (
        "_orig_mod" in module._modules  # what torch.compile returns
        or getattr(module, "_compiled_call_impl", None) is not None  # Module.compile
        or (
            hasattr(forward, "_torchdynamo_orig_callable")
            and not getattr(forward, "_torchdynamo_disable", False)
        )  # left out of compilation
    )
    return "compiled by torch.compile" if by_dynamo else None


def device_of(model: nn.Module) -> torch.device | None:
    """The device of all parameters; None where there are several."""
    devices = {parameter.device for parameter in model.parameters()}
    return devices.pop() if len(devices) == 1 else None


def default_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Adam with torch's own defaults, on all trainable parameters.

    Raises:
        FlexureError: there are none.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise FlexureError(
            "expected a model with trainable parameters, got none with requires_grad; "
            "unfreeze what shall be trained"
        )
    return torch.optim.Adam(parameters, lr=1e-3)


def cross_entropy(output: Any, y: Tensor) -> Tensor:
    """The default loss; labels of -100 do not count, as in torch.

    Raises:
        DataError: labels that are not classes of the logits, or none that counts.
    """
    logits = logits_of(output)
    if logits.ndim > 1 and not y.is_floating_point():
        counted = y[y != IGNORED]
        if not len(counted):
            raise DataError(
                f"expected a label that counts in each training batch (and in each process's share "
                f"of it), got {y.numel()} labels of {IGNORED}, which are left out; leave that "
                f"batch out, or shuffle the samples"
            )
        check_labels(logits, counted, "a training batch")
    return nn.functional.cross_entropy(logits, y)


def _is_integer(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool | Tensor)
