"""Which adaptations a model has, for whoever did not keep their handles."""

from __future__ import annotations

from torch import nn

from flexure.methods.adapt import Adaptation
from flexure.methods.in_place import adaptations_of
from flexure.surgery.wrapped import unwrapped

__all__ = ["adaptations"]


def adaptations(model: nn.Module) -> dict[str, Adaptation]:
    """The adaptations of `model` by name, in the order they were made, without removed ones.

    A model keeps them alive, in place or disabled; a copy of it has none.

    Args:
        model: the network, or a wrapper of it.

    Raises:
        FlexureError: it is no network.
    """
    return adaptations_of(unwrapped(model))
