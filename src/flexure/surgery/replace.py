"""Replacing one module of a network, and putting the old one back."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from flexure.contracts import AdapterError

__all__ = ["linear_of", "replace_module"]


def replace_module(model: nn.Module, path: str, new: nn.Module) -> Callable[[], None]:
    """Puts `new` at `path`, in the mode, on the device and in the dtype of what was there.

    Returns:
        A function that puts the old module back; a second call does nothing.

    Raises:
        AttributeError: the model has no module at `path`.
    """
    parent, _, name = path.rpartition(".")
    owner, old = model.get_submodule(parent), model.get_submodule(path)
    like = next(iter((*old.parameters(), *model.parameters())), None)
    if like is not None:
        new.to(device=like.device, dtype=like.dtype)
    owner._modules[name] = new.train(old.training)

    def put_back() -> None:
        if owner._modules.get(name) is new:
            owner._modules[name] = old.train(new.training)

    return put_back


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An `nn.Linear` of the given weight `(out, in)` and bias `(out,)`.

    Raises:
        AdapterError: the shapes do not belong together.
    """
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shape = None if bias is None else tuple(bias.shape)
        raise AdapterError(
            f"the adapter's head has weight {tuple(weight.shape)} and bias {shape}, expected "
            "(out, in) and (out,); save the adapter again"
        )
    outside, inside = weight.shape
    linear = nn.Linear(inside, outside, bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone())
    return linear
