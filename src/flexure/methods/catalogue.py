"""The catalogue of adaptation methods: one row a method, by the name in its adapter files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flexure.contracts import AdaptationMethod, FlexureError
from flexure.methods.baselines import FullFinetune, LinearProbe, SteeredProbe
from flexure.methods.lora import LoRA
from flexure.methods.trainable_ct import TrainableCT

__all__ = ["METHODS", "check_method"]

METHODS: Mapping[str, Callable[..., AdaptationMethod]] = {
    row.name: row for row in (LinearProbe, SteeredProbe, TrainableCT, LoRA, FullFinetune)
}
"""Name -> class; the settings in a file are its fields."""


def check_method(method: Any) -> None:
    """Raises `FlexureError` unless `method` is one: not its class, nor its name."""
    if isinstance(method, type):
        raise FlexureError(f"expected a method, got the class {method.__name__}; call it")
    if not callable(getattr(method, "install", None)):
        known = ", ".join(
            f"{name} is {getattr(row, '__name__', row)}" for name, row in METHODS.items()
        )
        raise FlexureError(
            f"expected a method, an object such as flexure.TrainableCT(), got {method!r}; {known}"
        )
