"""Loading an adapter: whatever method wrote it, one verb reads it."""

from __future__ import annotations

import os

from torch import nn

from flexure.contracts import AdapterError
from flexure.methods.steer import Steering, load_steering
from flexure.surgery.adapter import read_adapter

__all__ = ["load_adapter"]

_LOADERS = {"steer": load_steering}


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> Steering:
    """Applies a saved adapter to `model`, in place and reversibly.

    Args:
        model: a model with the sites that the adapter was saved from; no example is needed.
        path: the folder that `.save(path)` wrote.

    Returns:
        The handle that the saving method gave.

    Raises:
        AdapterError: a file is missing, damaged or foreign, or the model has other sites; the
            missing and the unexpected ones are listed, and the model is unchanged.
    """
    stored = read_adapter(path)
    loader = _LOADERS.get(stored.method)
    if loader is None:
        raise AdapterError(
            f"the adapter was made by method {stored.method!r}; this version knows "
            f"{', '.join(_LOADERS)}; update flexure"
        )
    return loader(model, stored)
