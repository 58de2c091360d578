"""Checks of what methods and comparisons are told: settings, counts, seeds, idle arguments."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from numbers import Integral
from typing import Any

from flexure.contracts import FlexureError

__all__ = ["check_counts", "check_positive", "check_unused", "checked_seeds"]


def check_positive(name: str, value: Any) -> None:
    """Raises `FlexureError` unless `value`, called `name`, is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FlexureError(f"expected {name} to be a number, got {value!r}")
    if not (isfinite(value) and value > 0):
        raise FlexureError(f"expected {name} to be finite and above 0, got {value!r}")


def check_unused(name: str, where: Any, axis: Any) -> None:
    """Raises `FlexureError` where one is given to a method that has no use for it."""
    for key, value in (("where", where), ("axis", axis)):
        if value is not None:
            raise FlexureError(
                f"expected no {key}= for {name}, which changes no site, got {value!r}; leave it out"
            )


def check_counts(**counts: object) -> None:
    """Raises `FlexureError` unless each is a whole number, at least 1 and below 2^31."""
    for name, value in counts.items():
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or not 1 <= int(value) < 2**31:  # type: ignore[call-overload]
            raise FlexureError(
                f"expected {name} to be a whole number, at least 1 and below 2^31, got {value!r}; "
                f"choose another"
            )


def checked_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """Different seeds, or one.

    Raises:
        FlexureError: they are not, or torch does not take them.
    """
    found = (seeds,) if isinstance(seeds, Integral) else tuple(seeds)  # type: ignore[arg-type]
    whole = all(isinstance(s, Integral) and not isinstance(s, bool) for s in found)
    if not found or not whole or len(set(found)) < len(found):
        raise FlexureError(f"expected different whole seeds of at least 0, got {seeds!r}")
    numbers = tuple(int(seed) for seed in found)
    if min(numbers) < 0 or max(numbers) >= 2**64:
        raise FlexureError(
            f"expected different whole seeds of at least 0 and below 2^64, got {seeds!r}; choose "
            f"others"
        )
    return numbers
