"""Loading an adapter: whatever method wrote it, one verb reads it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from flexure.contracts import AdaptationMethod, AdapterError, FlexureError, InstalledMethod
from flexure.methods.adapt import Adaptation, put_in_place
from flexure.methods.catalogue import METHODS
from flexure.methods.head import Head, stored_head
from flexure.methods.hub import adapter_folder
from flexure.methods.steer import Steering, load_steering
from flexure.surgery.adapter import AdapterFile, read_adapter
from flexure.surgery.wrapped import unwrapped, unwrapped_to_train

__all__ = ["load_adapter"]

_STEER = "steer"


def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], *, name: str = "default"
) -> Steering | Adaptation:
    """Applies a saved adapter to `model`, in place and reversibly.

    Args:
        model: a model with the sites that the adapter was saved from; no example is needed.
        path: the folder that `.save(path)` wrote, or `hf:user/repo`.
        name: of the adaptation, among those of the model; a steering needs none.

    Returns:
        The handle that the saving method gave.

    Raises:
        AdapterError: a file is missing, damaged or foreign, or the model has other sites; the
            missing and the unexpected ones are listed, and the model is unchanged.
        MissingExtraError: `hf:` needs huggingface_hub, which is not installed.
    """
    stored = read_adapter(adapter_folder(path))
    if stored.method == _STEER:
        return load_steering(unwrapped(model), stored)
    model = unwrapped_to_train(model)
    method = _method(stored)
    tensors, head = (_under(prefix, stored.tensors) for prefix in ("method.", "head."))

    def parts() -> tuple[Head, Callable[[], InstalledMethod]]:
        path = stored.structure.get("head")
        new = Head(model, str(path), stored_head(model, path, head))
        return new, lambda: _load(model, method, stored.structure, tensors)

    return put_in_place(model, method, parts, name=name)


def _method(stored: AdapterFile) -> AdaptationMethod:
    if stored.method not in METHODS:
        raise AdapterError(
            f"the adapter was made by method {stored.method!r}; this version knows "
            f"{', '.join((_STEER, *METHODS))}; update flexure"
        )
    try:
        return METHODS[stored.method](**stored.settings)
    except (TypeError, FlexureError) as error:
        raise AdapterError(
            f"the adapter's settings are damaged, or of another version: {error}"
        ) from error


def _load(
    model: nn.Module,
    method: AdaptationMethod,
    structure: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> InstalledMethod:
    installed = method.load(model, structure, tensors)
    unknown = sorted(tensors.keys() - installed.tensors().keys())
    if unknown:
        installed.withdraw()
        raise AdapterError(
            f"expected the tensors of {method.name}, got others too: {', '.join(unknown)}: the "
            f"file is damaged"
        )
    return installed


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }
