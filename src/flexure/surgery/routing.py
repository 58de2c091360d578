"""Routing at run time: a frame hands a caller's k-th activation call to the k-th unit.

What a frame is, is in `frames.py`; where they go, in `install.py`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from flexure.contracts import SiteError
from flexure.surgery.frames import Frame
from flexure.units.catalogue import read_call

__all__ = ["Guard", "RoutedUnits", "Routing"]


class RoutedUnits(nn.ModuleDict):
    """The routed units of a model. As a child of an `nn.Sequential` it passes its input on."""

    def forward(self, *inputs: Any) -> Any:
        """The identity."""
        return inputs[0] if len(inputs) == 1 else inputs


class Routing(Frame):
    """A frame whose changes are units, each in the place of an activation."""

    what = "activation call"
    remedy = (
        "steer again with an example that takes this branch, or leave the sites out with where=; "
        "before to_lcnn, write the model so that it makes the same calls in every mode"
    )

    def read(self, func: Any, args: Any, kwargs: Any) -> tuple[str, Any] | None:
        """The activation, and its call."""
        found = read_call(func, args, kwargs, refused=False)
        return None if found is None else (found[0].name, found[1])

    def changed(self, change: Any, call: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """What the unit makes of the call's input."""
        return change(call.x, inplace=call.inplace, **call.params)


class Guard:
    """Forward pre-hook of a module that the census did not enter."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Raises."""
        raise SiteError(
            f"module {self.path!r} was not reached by the example, so its activations are not "
            f"known; {Routing.remedy}"
        )
