"""Replacing one module of a network, and putting the old one back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flexure.contracts import AdapterError
from flexure.surgery.follow import first_floating, follow, tensors_of
from flexure.surgery.wrapped import module_at

__all__ = ["HOOKS", "linear_of", "replace_module"]


def replace_module(model: nn.Module, path: str, new: nn.Module) -> Callable[[], None]:
    """Puts `new` at `path`, in the mode, on the device and in the dtypes of what was there.

    A layer that PEFT trains whole is replaced inside its wrapper. It takes every place of a module
    that has several, and the hooks of what was there.

    Returns:
        A function that puts the old module back, in the mode of the new one, moved and cast as the
        new one was meanwhile; a second call does nothing.

    Raises:
        AttributeError: the model has no module at `path`.
    """
    old = module_at(model, path)
    follow(new, tensors_of(old), first_floating(old, model))
    before = _place(new)
    # The same dictionaries, so that a handle made before or after removes its hook from both.
    for key in HOOKS:
        new.__dict__[key] = old.__dict__[key]
    new.train(old.training)
    for children, name in _places(model, old):
        children[name] = new

    def put_back() -> None:
        follow(old, tensors_of(new), first_floating(new) if _place(new) != before else None)
        # Where it is now: merging a PEFT model has moved it.
        for children, name in _places(model, new):
            children[name] = old.train(new.training)

    return put_back


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    first = first_floating(module)
    return None if first is None else (first.device, first.dtype)


def _places(model: nn.Module, held: nn.Module) -> list[tuple[dict[str, nn.Module | None], str]]:
    """Every place of a module: the children among which it is, and its name there."""
    return [
        (module._modules, name)
        for module in model.modules()
        for name, child in module._modules.items()
        if child is held
    ]


HOOKS = tuple(key for key in nn.Module().__dict__ if "_hook" in key)
"""Attributes of a module that hold hooks."""


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
