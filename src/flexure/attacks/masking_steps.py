"""Changes of a network's inputs and what they do to its loss, beside what rounding does.

For `masking_checks`; what is suspicious is decided there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexure.attacks.masking_subject import Subject
from flexure.attacks.norms import norm_named, precise
from flexure.batched import norms
from flexure.calling import margin

__all__ = ["LAST_ROUNDING", "Rise", "centred", "direction", "known", "moved", "precision", "rise",
           "rounding"]  # fmt: skip

_ROUNDING = 32
"""Rounding within a network, in units of the precision times its largest centred logit."""

LAST_ROUNDING = 2
"""Rounding of logits themselves, in units of the precision times the largest of them: the margin
before and after a change has four such logits, each wrong by half a unit at most."""

_COARSE = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Rise:
    """(N,) each: what a change does to the loss −m.

    Attributes:
        found: the change of the loss.
        predicted: by the gradient.
        size: root mean square of predictions over the signs of the change's elements.
        rounding: of `found`.
    """

    found: Tensor
    predicted: Tensor
    size: Tensor
    rounding: Tensor


def rise(subject: Subject, gradient: Tensor, change: Tensor) -> Rise:
    """Of a change (N, *shape) in units of the radius."""
    at = moved(subject, subject.eps * change)
    before, after = subject.logits(), subject.logits(at)
    # Logits that all classes share leave fewer digits to the differences.
    found = margin(before.double(), subject.y) - margin(after.double(), subject.y)
    products = gradient.double() * (at.double() - subject.x.double())
    predicted = products.flatten(1).sum(1)
    return Rise(found, predicted, norms(products), rounding(subject, before))


def moved(subject: Subject, change: Tensor) -> Tensor:
    """The samples, changed and within the bounds."""
    low, high = subject.limits
    return (precise(subject.x) + change).clamp(low, high).to(subject.x.dtype)


def centred(logits: Tensor) -> Tensor:
    """(N, K), without their mean over classes."""
    return logits - logits.mean(1, keepdim=True)


def known(gradient: Tensor) -> Tensor:
    """Zero where it is not finite."""
    return gradient.nan_to_num(0.0, 0.0, 0.0)


def direction(subject: Subject, change: Tensor) -> Tensor:
    """(N, *shape) of length 1 in the norm: the way up where the change is a gradient."""
    return norm_named(subject.norm).direction(change)


def rounding(subject: Subject, logits: Tensor) -> Tensor:
    """(N,) what rounding may do to a difference of the margin, from inputs on."""
    unit = precision(subject, logits)
    logits = logits.double()
    inner, last = centred(logits).abs().amax(1), logits.abs().amax(1)
    return unit * (_ROUNDING * inner + LAST_ROUNDING * last)


def precision(subject: Subject, logits: Tensor) -> float:
    """The coarsest on the way: of inputs, floating-point parameters, logits as they are.

    Networks may compute in 16 bits what they give in 32, under autocast, say: their logits are
    numbers of 16 bits then.
    """
    kinds = {p.dtype for p in subject.model.parameters() if p.is_floating_point()}
    kinds |= {logits.dtype, subject.x.dtype}
    kinds |= {kind for kind in _COARSE if torch.equal(logits.to(kind).to(logits.dtype), logits)}
    return max(torch.finfo(kind).eps for kind in kinds)
