"""Weights files: safetensors, read and fitted to a model exactly. Nothing is ever unpickled."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from flexure.addresses import first_line
from flexure.contracts import AddressError

__all__ = ["load_weights", "read_safetensors"]


def load_weights(model: nn.Module, path: Path) -> None:
    """Fills `model` from a safetensors file whose keys must be the model's, exactly.

    Raises:
        AddressError: the file is missing, damaged, or made for another model; the message lists
            the missing and unexpected keys and differing shapes. The model is then unchanged.
    """
    weights = read_safetensors(path)
    expected = model.state_dict()
    # BatchNorm's step counter may be missing: torch fills it in, and evaluation ignores it.
    needed = {key for key in expected if not key.endswith("num_batches_tracked")}
    differing = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & weights.keys())
        if weights[key].shape != expected[key].shape
    ]
    wrong = {
        "missing keys": sorted(needed - weights.keys()),
        "unexpected keys": sorted(weights.keys() - expected.keys()),
        "shapes": differing,
    }
    if any(wrong.values()):
        got = "; ".join(f"{what}: {_shortened(items)}" for what, items in wrong.items() if items)
        raise AddressError(
            f"expected the weights of {type(model).__name__} in {path}, got {got}; use the file "
            f"made for this model"
        )
    model.load_state_dict(weights)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        AddressError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AddressError(
            f"expected a safetensors file at {path}, got: {first_line(error)}; weights of other "
            f"formats are not read (they may run code): convert them with safetensors.torch"
        ) from error
    return weights


def _shortened(items: list[str], most: int = 5) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
