"""Factors and kinks that are written out in a network's forward, found by one forward pass.

Products of a value that depends on the input with one that does not, outside layers, and kinks in
arithmetic. Changes nothing. What depends on the input is seen by `sum_watch.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flexure.calling import call_model, copied, evaluating
from flexure.contracts import Example, SiteError
from flexure.surgery.census import did_not_run
from flexure.surgery.preserve import preserved
from flexure.surgery.sum_watch import SumWatch

__all__ = ["Factor", "find_factors"]


@dataclass(frozen=True)
class Factor:
    """A function that bends or multiplies a signal, outside any layer.

    Attributes:
        function: its name.
        caller: path of the module that calls it ("" is the model).
        by: what the signal is multiplied by; empty for a kink.
        reason: what follows.
    """

    function: str
    caller: str
    by: str
    reason: str


def find_factors(model: nn.Module, example: Example) -> tuple[Factor, ...]:
    """Multiplications of a signal by anything else, and kinks in arithmetic, each once.

    One forward pass in eval mode without gradients that leaves no trace. Layers of PyTorch and
    activations are left out, and so is what Python cannot see.

    Args:
        model: any network, in no wrapper.
        example: one input.

    Raises:
        SiteError: the example does not run through the model.
    """
    watch = _FactorWatch(model)
    x = copied(example)
    with preserved(model), evaluating(model), torch.no_grad(), watch.hooks():
        try:
            watch.follow(x)
            with watch:
                call_model(model, x)
        except Exception as error:
            raise SiteError(did_not_run(model, example, error)) from error
    return tuple(watch.factors)


class _FactorWatch(SumWatch):
    """Notes products and kinks besides."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.factors: dict[Factor, None] = {}
        self.names = {
            id(tensor): f"{kind} {path}"
            for kind, named in (
                ("the buffer", model.named_buffers()),
                ("the parameter", model.named_parameters()),
            )
            for path, tensor in named
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        top = self.stack[-1]
        if name in _WATCHED and not top.hidden and not _is_layer(top.module):
            for by, reason in self._noted(name, _looked_at(name, args, kwargs)):
                caller = self.paths.get(id(top.module), "")
                self.factors[Factor(name, caller, by, reason)] = None
        return super().__torch_function__(func, types, args, kwargs)

    def _noted(self, name: str, given: list[Any]) -> Iterator[tuple[str, str]]:
        signals = [x for x in given if isinstance(x, Tensor) and self._is_signal(x)]
        floating = [x for x in signals if x.is_floating_point()]
        if name in _CHOICES:
            if signals:
                yield "", _CHOICE
        elif name in _BENDS:
            if floating:
                yield "", _BENDS[name]
        elif len(floating) == 1 and len(signals) > 1:
            yield "", _MASK
        elif len(floating) == 1:
            others = [x for x in given if x is not floating[0] and _multiplies(x)]
            if others:
                yield self._named(others[0]), _PRODUCT

    def _named(self, other: Any) -> str:
        if not isinstance(other, Tensor):
            return f"the number {other:.4g}"
        return self.names.get(id(other), f"a tensor of shape {tuple(other.shape)}")


def _looked_at(name: str, args: Any, kwargs: Any) -> list[Any]:
    """What decides on the signal: of an assignment to an index, the index alone."""
    if name in _ASSIGNMENTS:
        return tree_leaves(args[1] if len(args) > 1 else kwargs.get("indices"))
    return tree_leaves((args, kwargs))


def _multiplies(x: Any) -> bool:
    number = isinstance(x, int | float) and not isinstance(x, bool)
    return (isinstance(x, Tensor) and x.dtype != torch.bool) or number


def _is_layer(module: nn.Module) -> bool:
    """Whether what a module multiplies by is its own business, and told of as a layer."""
    return type(module).__module__.startswith(("torch.nn.", "flexure.layers.", "flexure.units."))


_PRODUCT = "nothing bounds this factor"
_MASK = "a signal times a condition on one: a rectifier written out stays as it is; use nn.ReLU"
_CHOICE = "a choice by a condition on a signal stays as it is; of a rectifier, use nn.ReLU"
_KINK = "has a kink that stays: no bound on curvature"
_JUMP = "has jumps that stay: no bound on slope or curvature"
_ASSIGNMENTS = frozenset(("setitem", "index_put"))
_CHOICES = _ASSIGNMENTS | {"where", "masked_fill", "masked_scatter"}
_BENDS: Mapping[str, str] = {
    **dict.fromkeys(("abs", "absolute", "max", "min", "amax", "amin"), _KINK),
    **dict.fromkeys(("round", "floor", "ceil", "sign"), _JUMP),
}
_PRODUCTS = frozenset(
    (
        *("mul", "rmul", "imul", "multiply", "div", "truediv", "itruediv", "divide"),
        *("true_divide", "matmul", "rmatmul", "mm", "bmm", "mv", "linear", "einsum", "tensordot"),
        *("conv1d", "conv2d", "conv3d"),
        *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    )
)
_WATCHED = _PRODUCTS | _CHOICES | _BENDS.keys()
"""Functions, by their names without underscores."""
