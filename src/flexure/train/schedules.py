"""Schedules of the learning rate: update, counted from 0 -> factor on the optimiser's own rate.

The published ones and a cosine. They are objects that can be pickled and compared, not closures;
applying them is the loop's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from flexure.contracts import FlexureError

__all__ = ["cosine", "imagenette_schedule", "lcnn_schedule", "step_schedule"]

_PROBE_DROPS = MappingProxyType({10: 0.1})
_IMAGENETTE_DROPS = MappingProxyType({60: 0.2, 120: 0.2, 160: 0.2})
_LCNN_DROPS = MappingProxyType({3 / 4: 0.1, 7 / 8: 0.1})  # of all updates


def step_schedule(
    steps_per_epoch: int, *, warmup_epochs: int = 1, drops: Mapping[int, float] = _PROBE_DROPS
) -> Callable[[int], float]:
    """Linear warm-up, then steps down. The defaults are those of the Curvature Tuning paper.

    The factor of update u is min(1, (u + 1) / w) times the product of the drops at or before its
    epoch, where w is the number of updates of the warm-up: the first update has 1/w, and the last
    one of the warm-up the full rate.

    Args:
        steps_per_epoch: updates in one epoch, at least 1.
        warmup_epochs: length of the warm-up in epochs, 0 for none.
        drops: finished epochs -> factor from then on; factors multiply. Default: a tenth after
            ten epochs, as the paper's probe and Trainable CT.

    Raises:
        FlexureError: a count below its least value, or a factor that is not positive and finite.
    """
    steps = _count("steps_per_epoch", steps_per_epoch, 1)
    warmup = _count("warmup_epochs", warmup_epochs, 0) * steps
    for epoch, factor in drops.items():
        _count("the epochs in drops", epoch, 1)
        if not (math.isfinite(factor) and factor > 0):
            raise FlexureError(f"expected positive factors in drops, got {factor} at {epoch}")
    return _Steps(warmup, tuple((epoch * steps, drops[epoch]) for epoch in sorted(drops)))


def imagenette_schedule(steps_per_epoch: int) -> Callable[[int], float]:
    """The Curvature Tuning paper's for Imagenette: warm-up in epoch 1, x0.2 at 60, 120 and 160.

    Args:
        steps_per_epoch: updates in one epoch, at least 1.

    Raises:
        FlexureError: `steps_per_epoch` below 1.
    """
    return step_schedule(steps_per_epoch, drops=_IMAGENETTE_DROPS)


def lcnn_schedule(steps_per_epoch: int, *, epochs: int = 200) -> Callable[[int], float]:
    """The low-curvature networks paper's: no warm-up, x0.1 at 3/4 and at 7/8 of the updates.

    Of the published 200 epochs that is at epochs 150 and 175.

    Args:
        steps_per_epoch: updates in one epoch, at least 1.
        epochs: of the whole run, at least 1.

    Raises:
        FlexureError: a count below 1.
    """
    total = _count("steps_per_epoch", steps_per_epoch, 1) * _count("epochs", epochs, 1)
    return _Steps(0, tuple((math.ceil(share * total), drop) for share, drop in _LCNN_DROPS.items()))


def cosine(total_steps: int, *, warmup: int = 0, floor: float = 0.0) -> Callable[[int], float]:
    """Linear warm-up, then half a cosine from 1 down to `floor`.

    The factor of update u is (u + 1) / warmup before `warmup`, then floor + (1 - floor) ·
    (1 + cos(π t)) / 2 with t = (u - warmup) / (total_steps - warmup), and `floor` from
    `total_steps` on (Loshchilov and Hutter, 2017, without restarts).

    Args:
        total_steps: updates in the whole run, at least 1.
        warmup: updates of the warm-up, fewer than `total_steps`.
        floor: the last factor, in [0, 1].

    Raises:
        FlexureError: an argument outside its range.
    """
    total = _count("total_steps", total_steps, 1)
    if _count("warmup", warmup, 0) >= total:
        raise FlexureError(
            f"expected warmup below total_steps, got {warmup} of {total}; shorten the warm-up"
        )
    if not 0 <= floor <= 1:
        raise FlexureError(f"expected floor in [0, 1], got {floor}")
    return _Cosine(total, warmup, float(floor))


@dataclass(frozen=True)
class _Steps:
    warmup: int
    drops: tuple[tuple[int, float], ...]

    def __call__(self, update: int) -> float:
        factor = _warmed(update, self.warmup)
        for start, drop in self.drops:
            if update >= start:
                factor *= drop
        return factor


@dataclass(frozen=True)
class _Cosine:
    total: int
    warmup: int
    floor: float

    def __call__(self, update: int) -> float:
        if update < self.warmup:
            return _warmed(update, self.warmup)
        done = min(1.0, (update - self.warmup) / (self.total - self.warmup))
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2


def _warmed(update: int, warmup: int) -> float:
    return (update + 1) / warmup if update < warmup else 1.0


def _count(name: str, value: int, least: int) -> int:
    if type(value) is not int or value < least:
        raise FlexureError(f"expected {name} to be an integer of at least {least}, got {value!r}")
    return value
