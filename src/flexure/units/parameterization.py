"""How a free real number becomes a dial in [0, 1]: the rows that Trainable CT chooses from.

Knows neither units nor networks; `trainable.py` holds the module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexure.contracts import FlexureError

__all__ = [
    "DEFAULT",
    "PARAMETERIZATIONS",
    "SATURATION_MARGIN",
    "Parameterization",
    "find_parameterization",
    "saturated_share",
]

SATURATION_MARGIN = 0.01
"""A dial this near to 0 or to 1 counts as saturated: gradients nearly vanish."""


@dataclass(frozen=True)
class Parameterization:
    """One row of the catalogue: how a raw parameter is read as a dial.

    Attributes:
        name: its name.
        to_value: raw values, any shape, to dials in [0, 1]; elementwise and differentiable.
        to_raw: dials in [0, 1] to raw values; `to_value(to_raw(v))` is v, up to rounding.
        learning_rate: for Adam on the raw values.
        epsilon: Adam's `eps` for them. The gradient in beta vanishes with 1 - beta; a start near
            beta = 1 comes back only if `eps` is smaller still.
        source: where map and settings come from.
    """

    name: str
    to_value: Callable[[Tensor], Tensor]
    to_raw: Callable[[Tensor], Tensor]
    learning_rate: float
    epsilon: float
    source: str


def find_parameterization(name: str) -> Parameterization:
    """The row of that name.

    Raises:
        FlexureError: there is none.
    """
    if name not in PARAMETERIZATIONS:
        known = ", ".join(map(repr, PARAMETERIZATIONS))
        raise FlexureError(f"expected a parameterization of {known}, got {name!r}; name one")
    return PARAMETERIZATIONS[name]


def saturated_share(*values: Tensor) -> float:
    """The share of dials that are nearer than 0.01 to 0 or to 1; 0.0 of none.

    Saturated dials are the mark of a walk that no longer learns: the published parameterization
    ends there under noise alone.

    Args:
        values: dials in [0, 1], tensors of any shape and device, counted together.

    Example:
        >>> saturated_share(torch.tensor([0.0, 0.5]), torch.tensor([0.7, 0.995]))
        0.5
    """
    count = sum(value.numel() for value in values)
    ends = (
        (value < SATURATION_MARGIN) | (value > 1.0 - SATURATION_MARGIN)
        for value in (value.detach() for value in values)
    )
    return sum(int(end.sum()) for end in ends) / count if count else 0.0


def _folded(raw: Tensor) -> Tensor:
    """The triangle wave with period 2 that is the identity on [0, 1]."""
    phase = torch.remainder(raw, 2.0)
    # Not 1 - |1 - phase|, whose derivative is 0 where a fold is met exactly.
    return torch.where(phase <= 1.0, phase, 2.0 - phase)


def _as_it_is(value: Tensor) -> Tensor:
    return value.clone()


PARAMETERIZATIONS: Mapping[str, Parameterization] = {
    row.name: row
    for row in (
        Parameterization(
            "reflected",
            _folded,
            _as_it_is,
            2e-2,
            1e-18,
            "the real line folded onto [0, 1]: the slope is 1 or -1 everywhere, so that no value "
            "absorbs, and a free random walk spreads evenly, 2 % of it saturated",
        ),
        Parameterization(
            "sigmoid",
            torch.sigmoid,
            torch.logit,
            1e-1,
            1e-8,
            "[CT], as published: map and settings",
        ),
    )
}

DEFAULT = "reflected"
"""The row that Trainable CT uses unless told otherwise."""
