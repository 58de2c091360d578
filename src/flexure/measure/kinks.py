"""Which functions of a network bend sharply, so that a Hessian does not see all of its curvature.

What a Hessian does see is `curvature.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from flexure.calling import call_model, evaluating, unwritten

__all__ = ["kinks"]


def kinks(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    """The functions with a kink or a jump through which the output depends on the input.

    At a kink the gradient jumps: there is no Hessian there, and beside it the Hessian tells
    nothing of the jump. That of a ReLU network is the Hessian of its loss alone.

    Functions are known by their names in torch, as in the site report: a kink that is written out
    in arithmetic (`x * (x > 0)`), or that a scripted module computes, is not found. The model runs
    once in eval mode, and is as before.

    Args:
        model: the network; its output has a graph back to the input.
        x: (B, *shape), an input; one sample is enough.

    Returns:
        The names, each once, in the order of the first calls; empty where none was found.

    Example:
        >>> kinks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Tanh()), torch.zeros(1, 2))
        ('relu',)
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    watch = _Watch()
    with evaluating(model), unwritten(model), torch.enable_grad():
        try:
            for parameter in trained:  # a graph is then one back to the input
                parameter.requires_grad_(False)
            with watch:
                call_model(model, x.detach().clone().requires_grad_())
        finally:
            for parameter in trained:
                parameter.requires_grad_()
    return tuple(dict.fromkeys(watch.found))


class _Watch(TorchFunctionMode):
    """Notes the calls of functions with kinks whose results have a graph.

    Attributes:
        found: their names, in the order of the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_").removesuffix("_with_indices")
        if _bends(name, args, kwargs or {}) and _has_graph(out):
            self.found.append(name)
        return out


def _has_graph(out: Any) -> bool:
    return any(isinstance(each, Tensor) and each.requires_grad for each in tree_leaves(out))


def _bends(name: str, args: Any, kwargs: Mapping[str, Any]) -> bool:
    if name in _UNLESS_ONE:  # C¹ at alpha = 1 alone
        return float((*args[1:2], kwargs.get("alpha", 1.0))[0]) != 1.0
    return name in _KINKED


_UNLESS_ONE = ("elu",)

_NAMES = (
    "relu relu6 threshold leaky_relu prelu rrelu selu hardtanh hardsigmoid hardswish hardshrink "
    "softshrink abs absolute clamp clip clamp_min clamp_max max min maximum minimum fmax fmin amax "
    "amin aminmax max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d cummax cummin sort topk "
    "kthvalue median nanmedian mode quantile nanquantile fmod remainder frac nan_to_num"
)
_KINKED = frozenset(_NAMES.split())
