"""Watching one forward pass for additions: which values depend on the input, and who adds two.

`SumWatch` sees the functions that Python calls. What is made of what it saw is `sums.py`'s.
"""

from __future__ import annotations

import operator
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import WeakIdKeyDictionary

from flexure.surgery.frames import MODULE_CALL
from flexure.surgery.joined import STACKS, Joins
from flexure.units.catalogue import read_module

__all__ = ["Addition", "SumWatch", "is_activation", "read_addition"]


@dataclass(frozen=True)
class Addition:
    """One addition of two tensors as it happened.

    Attributes:
        shape: of the result.
        inplace: whether it overwrites its first operand.
        signals: whether both operands depend on the input.
        reason: why it cannot be scaled, or None.
        order: which of all that was seen it is.
    """

    shape: tuple[int, ...]
    inplace: bool
    signals: bool
    reason: str | None
    order: int

    @property
    def scalable(self) -> bool:
        """Whether it is a sum of two signals that can be scaled."""
        return self.signals and self.reason is None


@dataclass(frozen=True)
class Combination:
    """A function that combines values that depend on the input, and is no sum of two."""

    function: str
    caller: str
    reason: str
    order: int


def read_addition(func: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, bool] | None:
    """The second operand of an addition of two floating-point tensors, and whether it is in place.

    None for any other call.
    """
    if func not in _ADDITIONS:
        return None
    x = args[0] if args else kwargs.get("input")
    y = args[1] if len(args) > 1 else kwargs.get("other")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return None
    if not x.is_floating_point() or not y.is_floating_point():
        return None
    return y, _ADDITIONS[func]


def is_activation(module: nn.Module) -> bool:
    """Whether what a module adds is a part of an activation, or of a unit in the place of one."""
    return type(module).__module__.startswith("flexure.units.") or read_module(module) is not None


@dataclass
class _Entered:
    """A module that is running, and the additions that it has made."""

    module: nn.Module
    hidden: bool
    additions: list[Addition] = field(default_factory=list)


class SumWatch(TorchFunctionMode):
    """Sees every function call of the pass, and knows what depends on the input.

    A tensor does if a function made it of one that does, and not of its shape and dtype alone.

    Attributes:
        runs: for each module, by id, the additions of each of its runs.
        combinations: what else combined several values that depend on the input.
        reached: ids of the modules that ran.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.runs: dict[int, list[list[Addition]]] = defaultdict(list)
        self.combinations: list[Combination] = []
        self.reached: set[int] = set()
        self.stack = [_Entered(nn.Module(), hidden=False)]
        self.order = 0
        self._depends: Any = WeakIdKeyDictionary()
        self._joins = Joins()
        self._own = {id(t) for t in (*model.parameters(), *model.buffers(), *_attributes(model))}

    def follow(self, example: Any) -> None:
        """Marks the tensors of an example as the input."""
        for x in _tensors(example):
            self._depends[x] = True

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Hooks on every module, so that the running one is known."""
        handles = []
        for module in self.model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(self._enter))
                leave = module.register_forward_hook(self._leave, with_kwargs=True, prepend=True)
                handles.append(leave)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.order += 1
        inputs = [x for x in _tensors((args, kwargs)) if self._is_signal(x)]
        name = getattr(func, "__name__", "").partition(".")[0]
        out = func(*args, **kwargs)
        top = self.stack[-1]
        addition = read_addition(func, args, kwargs)
        mixed = bool(inputs) and self._joins.mixed(func, name, args, kwargs, inputs, out)
        if addition is not None and not top.hidden:
            self._added(func, self._addition(args, kwargs, *addition, inputs, out))
        elif not top.hidden:
            self._combined(func, name, inputs, out, mixed)
        results = list(_tensors((out, kwargs.get("out"))))
        if name == "__setitem__":
            results.append(args[0])
        for x in results:
            self._depends[x] = bool(inputs) and name not in _FROM_SHAPES
            if x._base is not None and self._depends[x]:
                self._depends[x._base] = True
        return out

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.reached.add(id(module))
        self.stack.append(_Entered(module, self.stack[-1].hidden or is_activation(module)))

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        entered = self.stack.pop()
        if not entered.hidden:
            self.runs[id(module)].append(entered.additions)
        # What no function was seen to make, code out of Python's sight made, of what went in.
        if any(self._is_signal(x) for x in _tensors((args, kwargs))):
            for x in _tensors(output):
                if x not in self._depends and id(x) not in self._own:
                    self._depends[x] = True

    def _is_signal(self, x: Tensor) -> bool:
        return bool(self._depends.get(x)) or (
            x._base is not None and bool(self._depends.get(x._base))
        )

    def _addition(
        self, args: Any, kwargs: Any, second: Tensor, inplace: bool, inputs: Any, out: Tensor
    ) -> Addition:
        first = args[0] if args else kwargs["input"]
        found = {id(x) for x in inputs}
        reason = None
        if kwargs.get("alpha", 1) != 1:
            reason = f"weighs its second operand by alpha={kwargs['alpha']:g}; write a + b"
        elif kwargs.get("out") is not None:
            reason = "writes into out=; write a + b"
        signals = {id(first), id(second)} <= found
        return Addition(tuple(out.shape), inplace, signals, reason, self.order)

    def _added(self, func: Any, addition: Addition) -> None:
        """Notes an addition of the module that runs; one of a hook is nobody's."""
        if not self._in_forward():
            if addition.signals:
                self._note(func, "add", _HOOK)
            return
        self.stack[-1].additions.append(addition)

    def _in_forward(self) -> bool:
        """Whether the running module's own `forward` calls, and no hook."""
        frame: Any = sys._getframe(2)
        while frame is not None and frame.f_code is not MODULE_CALL:
            frame = frame.f_back
        return frame is None or frame.f_locals.get("self") is self.stack[-1].module

    def _combined(self, func: Any, name: str, inputs: list[Tensor], out: Any, mixed: bool) -> None:
        """Notes a function that combines signals, or takes one out of sight."""
        plain = name.strip("_")
        numbers = [x for x in inputs if x.is_floating_point() or x.is_complex()]
        several = len(numbers) > 1 and name not in _HARMLESS and _makes_numbers(out)
        if name in _LEAVING and numbers:
            self._note(func, name, _GONE)
        elif several:
            self._note(func, name, _REASONS.get(plain, _OTHER))
        elif mixed:
            self._note(func, name, _STACK)

    def _note(self, func: Any, name: str, reason: str) -> None:
        title = resolve_name(func) or name
        caller = self.paths.get(id(self.stack[-1].module), "")
        self.combinations.append(Combination(title, caller, reason, self.order))


_ADDITIONS: Mapping[Any, bool] = {
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), False),
    **dict.fromkeys((operator.add, torch.ops.aten.add.Tensor), False),
    **dict.fromkeys((Tensor.add_, Tensor.__iadd__), True),
    **dict.fromkeys((operator.iadd, torch.ops.aten.add_.Tensor), True),
}
"""Functions -> whether they overwrite their first operand."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FROM_SHAPES = _names(
    "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros "
    "new_ones new_empty new_full new_tensor"
)
_HARMLESS = STACKS | _names(
    "where copy_ __setitem__ masked_scatter masked_scatter_ view_as reshape_as expand_as type_as "
    "to index_copy index_copy_ scatter scatter_ index_put index_put_"
)
"""What puts values beside each other, or takes only a shape or dtype from one of them."""

_LEAVING = _names("numpy __array__ tolist item __float__ __complex__")
"""What makes something else of a tensor than a tensor: `x.numpy()`, `float(x)`."""

_STACK = "sums over values that were stacked or joined; write their sum as a + b"
_GONE = "takes a value out of PyTorch, where nobody sees what becomes of it; compute with tensors"
_HOOK = (
    "adds in a hook, or in a module that the model does not have as a submodule; add in the "
    "forward of a submodule"
)
_COMPLEX = "adds what cannot be followed (complex values, say); write a + b of real ones"
_PRODUCT = "a product of two values that depend on the input is no sum of theirs"
_DIFFERENCE = "subtracts a value that depends on the input; write a + (-b)"
_MIXTURE = "mixes values in one function, with weights of its own; write a + b"
_ATTENTION = "attention multiplies values that depend on the input; its weights are no sum"
_OTHER = "combines several values that depend on the input, and is no sum of two"
_REASONS: Mapping[str, str] = {
    **dict.fromkeys(_names("mul multiply matmul mm bmm mv dot inner outer einsum"), _PRODUCT),
    **dict.fromkeys(_names("bilinear rmatmul tensordot linear div divide true_divide"), _PRODUCT),
    **dict.fromkeys(_names("sub subtract rsub"), _DIFFERENCE),
    **dict.fromkeys(_names("add iadd radd"), _COMPLEX),
    **dict.fromkeys(_names("addcmul addcdiv lerp addmm addbmm baddbmm addmv addr"), _MIXTURE),
    **dict.fromkeys(
        _names("scaled_dot_product_attention multi_head_attention_forward"), _ATTENTION
    ),
}
"""Function names -> why what they do cannot be followed as a sum."""


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, dicts and outputs of transformers."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, tuple | list):
        for each in values:
            yield from _tensors(each)


def _makes_numbers(out: Any) -> bool:
    return any(x.is_floating_point() or x.is_complex() for x in _tensors(out))


def _attributes(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules hold besides parameters and buffers."""
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            yield from _tensors(tuple(vars(module).values()))
