"""The catalogue of jets, fourth part: losses. Layers are in `jet_layers.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from flexure.measure.jet_rules import by_expression, linear
from flexure.measure.propagate import Carrying, Rule, Unsupported, refused

__all__ = ["LOSSES"]


def _cross_entropy(
    x: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    _current(size_average, reduce)
    if label_smoothing:
        raise Unsupported("it smooths labels; give the smoothed probabilities as the target")
    if isinstance(target, Carrying):
        raise Unsupported("its target depends on the input; keep it constant")
    axis = 0 if x.dim() == 1 else 1
    logarithm = torch.log_softmax(x, axis)
    if not target.is_floating_point():
        return F.nll_loss(logarithm, target, weight, ignore_index=ignore_index, reduction=reduction)
    if weight is not None:
        target = target * weight.reshape(-1, *(1,) * (x.dim() - 1 - axis))
    each = -(logarithm * target).sum(axis)
    count = math.prod(each.shape)
    return _reduced(each, reduction, count)


def _mse(
    x: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    weight: Any = None,
) -> Any:
    _current(size_average, reduce)
    apart = x - target
    square = apart * apart if weight is None else apart * apart * weight
    return _reduced(square, reduction, square.numel() if weight is None else weight.sum())


def _bce_with_logits(
    x: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    pos_weight: Any = None,
) -> Any:
    _current(size_average, reduce)
    positive = target if pos_weight is None else target * pos_weight
    each = -(positive * F.logsigmoid(x) + (1 - target) * F.logsigmoid(-x))
    each = each if weight is None else each * weight
    return _reduced(each, reduction, each.numel())


def _current(*outdated: Any) -> None:
    if any(value is not None for value in outdated):
        raise Unsupported("size_average and reduce are not followed; use reduction=")


def _reduced(each: Any, reduction: str, count: Any) -> Any:
    if reduction not in ("none", "sum", "mean"):
        raise Unsupported(f'expected reduction "none", "sum" or "mean", got {reduction!r}')
    if reduction == "none":
        return each
    return each.sum() if reduction == "sum" else each.sum() / count


LOSSES: Mapping[Any, Rule] = {
    "nll_loss": linear,
    "cross_entropy": by_expression(_cross_entropy),
    "mse_loss": by_expression(_mse),
    F.binary_cross_entropy_with_logits: by_expression(_bce_with_logits),
    torch.binary_cross_entropy_with_logits: refused(
        "it takes its arguments in another order; use "
        "torch.nn.functional.binary_cross_entropy_with_logits"
    ),
}
"""Names, or functions where a name has two meanings -> rule, as `rule_table` takes them."""
