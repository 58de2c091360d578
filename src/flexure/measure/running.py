"""What runs just now, as a user would name it: the module, the function of torch."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.overrides import resolve_name

__all__ = ["module_name", "name_of", "running_module"]


def running_module() -> tuple[str, nn.Module] | None:
    """The innermost module that runs, after its path in the outermost one; None outside modules."""
    running: list[nn.Module] = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_argcount else None
        if isinstance(owner, nn.Module) and (not running or running[-1] is not owner):
            running.append(owner)
        frame = frame.f_back
    if not running:
        return None
    inner = running[0]
    paths = (path for root in reversed(running) for path, m in root.named_modules() if m is inner)
    return next((path for path in paths if path), ""), inner


def name_of(func: Any) -> str:
    """What a user calls it."""
    owner = getattr(func, "__self__", None)
    if getattr(func, "__name__", "") == "__get__":
        return f"torch.Tensor.{getattr(owner, '__name__', 'property')}"
    return resolve_name(func) or str(getattr(func, "__name__", func))


def module_name() -> str:
    """What a user calls the innermost module that runs."""
    found = running_module()
    if found is None:
        return ""
    path, module = found
    return f"module {path!r} ({type(module).__name__})" if path else type(module).__name__
