"""Running a computation in float64 that was written for another precision.

The model's own tensors are lent float64 copies for the time of a call; float32 constants, factories
and casts met on the way become float64. What the computation is, is not known here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["in_float64"]

_NARROW = (torch.float32, torch.float16, torch.bfloat16)

_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
"""Casts whose name is their dtype."""


def in_float64(model: nn.Module | None, run: Callable[[], None]) -> None:
    """Calls `run` while `model` holds detached float64 copies of its parameters and buffers.

    Every function of torch that `run` calls is watched: where float64 meets narrower floating-point
    numbers, those are widened; dtypes that are asked for by name are float64, and so is what is
    made from no tensor. Not reached: casts inside of C++ operators, NumPy, and tensors that are
    written in place and belong to nobody but the caller's code.

    Args:
        model: the module that the computation uses, directly or in a closure; its tensors are
            untouched, whatever `run` does to the copies.
        run: computes; its inputs are its own business.
    """
    with _Wide():
        # Ties are our own business: functional_call restores a module with two names wrongly.
        functional_call(_Holder(model), _copies(model), (run,), tie_weights=False)


def _copies(model: nn.Module | None) -> dict[str, Tensor]:
    """Float64 copies of all that `model` holds, by the names of a `_Holder`'s tensors.

    A tensor that several modules share has one copy under several names, a module with several
    names is listed once.
    """
    copies: dict[int, Tensor] = {}
    named = {}
    for path, module in model.named_modules(prefix="model") if model is not None else ():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            # Integers are copied too: the computation may count in them.
            if id(tensor) not in copies:
                copies[id(tensor)] = _widened(tensor.detach().clone())
            named[f"{path}.{name}"] = copies[id(tensor)]
    return named


class _Holder(nn.Module):
    """Runs anything while `functional_call` lends a model other tensors."""

    def __init__(self, model: nn.Module | None) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], None]) -> None:
        run()


class _Wide(TorchFunctionMode):
    """Float64 wherever torch's functions would mix it with, or fall back to, something narrower."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CASTS:
            return args[0].double()
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given = {tensor.dtype for tensor in tensors}
        if tensors and torch.float64 not in given:
            return func(*args, **kwargs)
        if not _writes(func, kwargs):
            args, kwargs = tree_map(_widened, (args, kwargs))
        out = func(*args, **kwargs)
        return out if tensors else tree_map(_widened, out)


def _writes(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function of torch changes an argument, which then must not become a copy."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__setitem__", "__set__") or kwargs.get("out") is not None


def _widened(leaf: Any) -> Any:
    """A floating-point tensor or dtype, at least as wide as float64; anything else as it is."""
    if isinstance(leaf, Tensor):
        return leaf.double() if leaf.dtype in _NARROW else leaf
    # Others are not even compared: arrays answer with arrays.
    return torch.float64 if isinstance(leaf, torch.dtype) and leaf in _NARROW else leaf
