"""The catalogue of adaptation methods: one row a method, by the name in its adapter files."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flexure.contracts import AdaptationMethod
from flexure.methods.baselines import FullFinetune, LinearProbe, SteeredProbe
from flexure.methods.lora import LoRA
from flexure.methods.trainable_ct import TrainableCT

__all__ = ["METHODS"]

METHODS: Mapping[str, Callable[..., AdaptationMethod]] = {
    row.name: row for row in (LinearProbe, SteeredProbe, TrainableCT, LoRA, FullFinetune)
}
"""Name -> class; the settings in a file are its fields."""
