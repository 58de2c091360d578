"""Keeping some tensors of a module in float32 or wider when the module is cast.

Which tensors those are, and why, is said by the modules that use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["kept_wide"]


@contextmanager
def kept_wide(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Around `nn.Module._apply`: a cast to half precision leaves some tensors' values alone.

    They follow to another device, and to float64. A parameter's gradient stays in its dtype, as an
    optimiser demands.

    Args:
        module: the module that is moved or cast.
        names: of parameters and buffers of its own; those that it lacks are left out.
    """
    held = {name: module._parameters.get(name, module._buffers.get(name)) for name in names}
    before = {
        name: (tensor.detach(), _gradient(tensor))
        for name, tensor in held.items()
        if tensor is not None
    }
    yield
    for name, (value, gradient) in before.items():
        new = module._parameters.get(name, module._buffers.get(name))
        if new is None or new.dtype not in (torch.float16, torch.bfloat16):
            continue
        wide = _widened(value, new.device)
        if isinstance(new, nn.Parameter):
            new.grad = None
            new.data = wide
            new.grad = None if gradient is None else _widened(gradient, new.device)
        else:
            module._buffers[name] = wide


def _gradient(tensor: Tensor) -> Tensor | None:
    return tensor.grad.detach() if tensor.is_leaf and tensor.grad is not None else None


def _widened(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device=device, dtype=torch.promote_types(tensor.dtype, torch.float32))
