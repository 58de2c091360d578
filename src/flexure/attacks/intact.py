"""A model in other people's hands: put back as it was, and told if it was changed.

Whose hands these are is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flexure.calling import rewritten_weights
from flexure.contracts import FlexureError

__all__ = ["intact"]


@contextmanager
def intact(model: nn.Module, name: str) -> Iterator[None]:
    """Puts a model back, and raises if what computes its outputs was changed inside.

    Put back are the values of parameters, of buffers and of tensors among attributes; every
    module's class, attributes, hooks, parameters and submodules; lists, dicts and sets among its
    attributes; hooks of all modules. What a call of a model may write itself (buffers, attributes,
    modes) is put back without a word; any other change is an error. Compared are values: counting
    changes would miss those through `.data`.

    Args:
        model: which is not to be changed.
        name: of what has it in hand, for the error.

    Raises:
        FlexureError: see above; the model is back then.
    """
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    before = [_Module(module) for module in modules]
    everywhere = [_Container(value) for value in _of_all_modules()]
    rewritten = {id(weight) for weight in rewritten_weights(model).values()}
    parameters = [_Content(p, id(p) not in rewritten) for p in model.parameters()]
    others = [_Content(t, False) for t in (*model.buffers(), *_held(before))]
    groups: tuple[Sequence[_Restorable], ...] = (everywhere, before, parameters, others)
    try:
        yield
    finally:
        changed = [each.put_back() for group in groups for each in group]
    if any(changed):
        raise FlexureError(
            f"expected {name} to leave the model as it is, got one with other parameters, hooks, "
            f"submodules or another forward; let it work on a copy (copy.deepcopy)"
        )


class _Restorable(Protocol):
    """What was one way before."""

    def put_back(self) -> bool:
        """Makes it so again; whether it was changed in a way that is not allowed."""
        ...


class _Container:
    """A list, dict or set, and what was in it."""

    def __init__(self, value: Any) -> None:
        self.value, self.content = value, value.copy()

    def put_back(self) -> bool:
        """Whether it held something else."""
        now = self.value.copy()
        if _same(now, self.content):
            return False
        self.value.clear()
        (self.value.extend if isinstance(self.value, list) else self.value.update)(self.content)
        return True


class _Module:
    """A module: its class, its attributes, and the containers among them."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.forward = self.kind.forward
        self.owner = next(kind for kind in self.kind.__mro__ if "forward" in vars(kind))
        self.attributes = dict(vars(module))
        self.containers = {
            key: _Container(value)
            for key, value in self.attributes.items()
            if isinstance(value, list | dict | set)
        }

    def put_back(self) -> bool:
        """Whether something that decides what it computes was another."""
        now = vars(self.module)
        keys = (*_DECISIVE, "forward")
        changed = type(self.module) is not self.kind or any(
            now.get(key) is not self.attributes.get(key) for key in keys
        )
        self.module.__class__ = self.kind
        if self.kind.forward is not self.forward:
            changed = True
            if self.owner is not self.kind and "forward" in vars(self.kind):
                del self.kind.forward
            self.owner.forward = self.forward  # type: ignore[attr-defined]
        now.clear()
        now.update(self.attributes)
        for key, container in self.containers.items():
            changed |= container.put_back() and key in _DECISIVE
        return changed


class _Content:
    """A tensor's values."""

    def __init__(self, tensor: Tensor, decisive: bool) -> None:
        self.tensor, self.decisive = tensor, decisive
        self.needed = tensor.requires_grad
        self.values = None if tensor.is_meta else tensor.detach().clone()

    def put_back(self) -> bool:
        """Whether they were others, where that is told."""
        if self.tensor.is_leaf:
            self.tensor.requires_grad_(self.needed)
        if self.values is None or _equal(self.tensor.detach(), self.values):
            return False
        with torch.no_grad():
            if self.tensor.shape == self.values.shape and self.tensor.dtype == self.values.dtype:
                self.tensor.copy_(self.values)
            else:
                self.tensor.data = self.values
        return self.decisive


def _equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, up to the sign of zero: NaN is NaN."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def _same(a: Any, b: Any) -> bool:
    """Whether two containers hold the same objects, in the same order."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(a[key] is b[key] for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _held(modules: list[_Module]) -> Iterator[Tensor]:
    """Tensors that modules hold besides parameters and buffers."""
    for module in modules:
        for value in module.attributes.values():
            if isinstance(value, Tensor):
                yield value
        for key, container in module.containers.items():
            if key not in _DECISIVE and key != "_buffers":
                content = container.content
                values = content.values() if isinstance(content, dict) else content
                yield from (value for value in values if isinstance(value, Tensor))


def _of_all_modules() -> Iterator[Any]:
    """PyTorch's tables of hooks that every module has."""
    for key, value in vars(nn.modules.module).items():
        if key.startswith("_global") and isinstance(value, dict):
            yield value


_DECISIVE = frozenset(
    key for key, value in vars(nn.Module()).items() if isinstance(value, dict) and key != "_buffers"
)
"""Attributes of every module that decide what it computes: parameters, submodules, hooks."""
