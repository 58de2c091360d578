"""Validation after an epoch: the loss on other data and, where these have labels, the accuracy.

What is made of the two numbers is `flexure.train.history`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexure.calling import evaluating, logits_of
from flexure.contracts import Batches, DataError
from flexure.train.step import Run, pair, part, samples_in, scalar

__all__ = ["check_labels", "validate"]


def validate(run: Run, batches: Batches, *, labelled: bool) -> tuple[float, float | None]:
    """The mean loss over all samples and processes, in eval mode, and the share of right answers.

    Args:
        run: the model, how it is called, and the loss.
        batches: `(x, y)`.
        labelled: whether every `y` must be `(B,)` integer labels. Otherwise a `y` of another kind
            has a loss only, and there is no accuracy.

    Raises:
        DataError: no samples, or labels that are not those of the model's classes.
    """
    total = count = right = answers = 0.0
    with evaluating(run.model), torch.no_grad():
        for batch in batches:
            x, y = pair(batch)
            samples = samples_in(x, y)
            rows = run.processes.part(samples)
            if rows.start == rows.stop:
                continue
            x, y = part((x, y), rows, samples, run)
            output, share = run.call(x), rows.stop - rows.start
            if labelled or _are_labels(y, share):
                right += _right(output, y, share)
                answers += share
            total += float(scalar("the loss on val", run.loss(output, y))) * share
            count += share
    total, count, right, answers = run.processes.sums([total, count, right, answers])
    if count == 0:
        raise DataError("expected labelled samples in val, got none")
    return total / count, right / answers if answers == count else None


def check_labels(logits: Tensor, y: Tensor, where: str) -> None:
    """Raises `DataError` unless all labels are classes of the (B, classes, ...) logits.

    On accelerators a loss would end the process instead.

    Args:
        logits: of the model.
        y: integer labels, at least one.
        where: what they are the labels of.
    """
    low, high, classes = int(y.min()), int(y.max()), logits.shape[1]
    if low < 0 or high >= classes:
        raise DataError(
            f"expected labels in {where} of the model's {classes} classes, got {low} to {high}; "
            f"number the classes from 0, and give the model a head for them all (adapt has "
            f"classes=); targets of another kind need a loss of their own"
        )


def _are_labels(y: Any, samples: int) -> bool:
    if not isinstance(y, Tensor) or y.shape != (samples,):
        return False
    return not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)


def _right(output: Any, y: Any, samples: int) -> int:
    """How many of the largest logits are at the labels."""
    remedy = (
        "give class numbers from 0; targets of another kind need a loss of their own, and those "
        "that are (B,) must be floats to be validated by it"
    )
    if not _are_labels(y, samples):
        got = f"{tuple(y.shape)} of {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise DataError(f"expected y in val to be ({samples},) integers, got {got}; {remedy}")
    logits = logits_of(output)
    if logits.dim() != 2 or len(logits) != samples:
        raise DataError(
            f"expected (B, classes) logits for the labels in val, got {tuple(logits.shape)} for "
            f"{samples} samples; {remedy}"
        )
    check_labels(logits, y, "val")
    return int((logits.argmax(1) == y).sum())
