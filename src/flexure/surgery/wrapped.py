"""Networks inside wrappers of other libraries.

PEFT keeps a network in a wrapper, and `merge_and_unload()` hands out the network without it. What
flexure puts into a model goes into the network itself: it then survives the merge, and its paths
are the same before and after.
"""

from __future__ import annotations

import sys

from torch import nn

__all__ = ["unwrapped"]

_WRAPPERS = (
    ("peft", "PeftModel", "base_model"),
    ("peft", "PeftMixedModel", "base_model"),
    ("peft.tuners.tuners_utils", "BaseTuner", "model"),
)
"""Module and class of each wrapper, and its attribute that holds what is inside."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside PEFT's wrappers; a model in no wrapper as it is."""
    for module, classname, attribute in _WRAPPERS:
        # A library that nothing has imported has wrapped nothing.
        kind = getattr(sys.modules.get(module), classname, None)
        if kind is not None and isinstance(model, kind):
            inside: nn.Module = getattr(model, attribute)
            return unwrapped(inside)
    return model
