"""Checks of what adaptation methods are told: settings, and arguments they have no use for."""

from __future__ import annotations

from math import isfinite
from typing import Any

from flexure.contracts import FlexureError

__all__ = ["check_positive", "check_unused"]


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
