"""What happened to a model while a part of it was out, happens to the part when it goes back.

Moving and casting, that is. Which parts those are is known to whoever takes them out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["first_floating", "follow", "move", "tensors_of"]


def follow(module: nn.Module, leaders: Mapping[str, Tensor], otherwise: Tensor | None) -> None:
    """Moves and casts every parameter and buffer to where its leader is.

    What needs no move stays the same tensor. Parameters stay the same objects wherever torch lets
    them, as in `nn.Module.to`; gradients go along.

    Args:
        module: the module to be moved.
        leaders: name of a parameter or buffer in `module` -> a tensor on its new device; of its new
            dtype, too, where both are floating-point.
        otherwise: the leader of those that have none; None leaves them where they are.
    """
    goals: dict[int, tuple[torch.device, torch.dtype]] = {}
    for name, tensor in tensors_of(module).items():
        leader = leaders.get(name, otherwise)
        if leader is not None and leader.is_floating_point() != tensor.is_floating_point():
            leader = otherwise
        if leader is None:
            continue
        goal = leader.device, _dtype(tensor, leader)
        if (tensor.device, tensor.dtype) != goal:
            goals[id(tensor)] = goal
            if tensor.is_leaf and tensor.grad is not None:
                goals[id(tensor.grad)] = goal

    def moved(tensor: Tensor) -> Tensor:
        device, dtype = goals.get(id(tensor), (tensor.device, tensor.dtype))
        return tensor.to(device=device, dtype=dtype)

    if goals:
        module._apply(moved)  # type: ignore[no-untyped-call]


def move(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> None:
    """Moves and casts a parameter that is in no module; the same object, for the optimiser."""
    if (parameter.device, parameter.dtype) != (device, dtype):
        gradient, parameter.grad = parameter.grad, None
        parameter.data = parameter.data.to(device=device, dtype=dtype)
        parameter.grad = None if gradient is None else gradient.to(device=device, dtype=dtype)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or buffer, of a module and all inside."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def first_floating(*modules: nn.Module) -> Tensor | None:
    """The first floating-point parameter: where the modules are, and of which dtype."""
    found = (p for module in modules for p in module.parameters() if p.is_floating_point())
    return next(found, None)


def _dtype(tensor: Tensor, leader: Tensor) -> torch.dtype:
    both = tensor.is_floating_point() and leader.is_floating_point()
    return leader.dtype if both else tensor.dtype
