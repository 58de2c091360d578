"""What is checked of attacks, by all that run one: what they are, and what they return.

How they are scored is `evaluate`'s business.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

from torch import Tensor

from flexure.attacks.norms import norm_named, project
from flexure.contracts import Attack, FlexureError

__all__ = ["allowed", "check_attack", "check_seed", "checked", "finite_inputs"]

_TOLERANCE = 1e-4
"""Relative excess over the radius that is forgiven: float32 cannot hold the sum x + change."""


def check_attack(attack: Any) -> Attack:
    """An attack, once it is an object with a norm that is known and `run`.

    Raises:
        FlexureError: it is not.
    """
    run = None if isinstance(attack, type) else getattr(attack, "run", None)
    if not callable(run) or not hasattr(attack, "norm"):
        raise FlexureError(
            f"expected an attack: an object with norm and run, such as PGD(), got {attack!r}"
        )
    norm_named(attack.norm)
    found: Attack = attack
    return found


def check_seed(seed: Any) -> int:
    """A seed, once it is one that PyTorch takes.

    Raises:
        FlexureError: it is no integer of 64 bits.
    """
    integer = isinstance(seed, Integral) and not isinstance(seed, bool)
    if not integer or not -(2**63) <= seed < 2**64:
        raise FlexureError(f"expected seed to be an integer of 64 bits, got {seed!r}; choose one")
    return int(seed)


def checked(
    found: Any, name: str, x: Tensor, *, norm: str, eps: float, limits: tuple[float, float]
) -> Tensor:
    """What an attack returned, within the ball and the bounds.

    Args:
        found: anything.
        name: of the attack, for errors.
        x: (B, *shape), what was attacked.
        norm: of the ball.
        eps: its radius.
        limits: the lowest and the highest value, which the dtype of x can hold.

    Returns:
        (B, *shape) as x, without a graph.

    Raises:
        FlexureError: it is no finite tensor of this shape, or the precision of x is too low for
            this radius.
    """
    inputs = project(finite_inputs(found, name, x), x, norm=norm, eps=eps, limits=limits)
    if not allowed(inputs, x, norm=norm, eps=eps, limits=limits):
        raise FlexureError(
            f"expected projected inputs within {eps} and within {limits}, got a distance of "
            f"{_farthest(inputs, x, norm)}; use float64 or a larger eps"
        )
    return inputs


def finite_inputs(found: Any, name: str, x: Tensor) -> Tensor:
    """What an attack returned, once it is inputs as those that were attacked.

    Args:
        found: anything.
        name: of the attack, for errors.
        x: (B, *shape), what was attacked.

    Returns:
        (B, *shape) of the dtype and device of x, without a graph.

    Raises:
        FlexureError: it is no finite tensor of this shape.
    """
    if not isinstance(found, Tensor) or found.shape != x.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise FlexureError(f"expected {name} to return inputs {tuple(x.shape)}, got {got}; mend it")
    inputs: Tensor = found.detach().to(x)
    if not bool(inputs.isfinite().all()):
        raise FlexureError(f"expected {name} to return finite inputs, got nan or infinity; mend it")
    return inputs


def allowed(
    inputs: Tensor, x: Tensor, *, norm: str, eps: float, limits: tuple[float, float]
) -> bool:
    """Whether inputs are within the ball around x, up to rounding, and within the bounds."""
    within = bool(((inputs >= limits[0]) & (inputs <= limits[1])).all())
    return within and _farthest(inputs, x, norm) <= eps * (1 + _TOLERANCE)


def _farthest(inputs: Tensor, x: Tensor, norm: str) -> float:
    return float(norm_named(norm).size(inputs.double() - x.double()).max())
