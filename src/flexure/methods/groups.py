"""Parameter groups for any optimiser, with what a method asks of Adam and its kin.

Which parameters there are, and at what rates, is `adapt`'s.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["ParameterGroup"]


class ParameterGroup(dict[str, Any]):
    """An optimiser's group that sets more than the rate, where the optimiser is of Adam's kind.

    One setting can mean different things to different optimisers: an `eps` that is right for Adam
    stalls Adadelta, and Adafactor takes two. An optimiser whose own default equals Adam's means
    what Adam means; every other one gets its own default, as from a plain dictionary.

    Args:
        values: what a plain dictionary would hold: `params`, `lr`, `name`.
        for_adam: setting -> value.
    """

    def __init__(self, values: Mapping[str, Any], for_adam: Mapping[str, float]) -> None:
        super().__init__(values)
        self._for_adam = dict(for_adam)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """Called by an optimiser for each setting that the group leaves open."""
        if key in self._for_adam and default == _ADAM[key].default:
            default = self._for_adam[key]
        return super().setdefault(key, default)


_ADAM = inspect.signature(torch.optim.Adam).parameters
