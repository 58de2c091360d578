"""Watching one forward pass: every activation call, and the module that makes it.

`Watch` sees the functions that Python calls; a second mode sees the kernels that run, so that an
activation which no function explains is noticed. Making sense of it is `census.py`'s.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flexure.surgery.axes import ChannelAxes
from flexure.units.catalogue import read_call, read_module
from flexure.units.spec import UnitSpec

__all__ = ["Call", "Watch"]


@dataclass
class Call:
    """One activation call as it happened."""

    spec: UnitSpec
    params: dict[str, Any]
    module: nn.Module | None
    x: torch.Size
    axis: int | None
    inplace: bool
    order: int
    unseen: str | None = None
    events: list[tuple[UnitSpec, dict[str, Any]]] = field(default_factory=list)


@dataclass
class _Entered:
    """A module that is running: its path, and the activation calls it has made."""

    module: nn.Module
    calls: list[Call] = field(default_factory=list)
    activation: Call | None = None


class Watch(TorchFunctionMode):
    """Sees every function call of the pass, and knows which module makes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.paths: dict[int, list[str]] = defaultdict(list)
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths[id(module)].append(path)
        self.axes = ChannelAxes()
        self.stack = [_Entered(nn.Module())]
        self.invocations: dict[int, list[list[Call]]] = defaultdict(list)
        self.reached: set[int] = set()
        self.hidden: dict[tuple[str, str], int] = defaultdict(int)
        self.calls = 0
        self.busy = False
        self.function: Any = None
        self.dispatch = _Completeness(self)

    def path(self, module: nn.Module) -> str:
        """The first path of `module`, "" for the model and for what is outside it."""
        return self.paths[id(module)][0] if id(module) in self.paths else ""

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Hooks on every module, so that the running one is known."""
        handles = []
        for module in self.model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = read_call(func, args, kwargs)
        if found is None:
            before, self.function = self.function, func
            out = func(*args, **kwargs)
            self.function = before
        else:
            spec, call = found
            self._record(spec, dict(call.params), call.x, call.inplace)
            before, self.busy = self.busy, True
            out = func(*args, **kwargs)
            self.busy = before
        self.axes.follow(func, args, kwargs, out)
        return out

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.reached.add(id(module))
        found = read_module(module)
        entered = _Entered(module)
        if found is not None and self.stack[-1].activation is None:
            spec, params = found
            x = args[0] if args else next(iter(kwargs.values()))
            entered.activation = self._call(
                spec, params, x, bool(getattr(module, "inplace", False)), module
            )
            self.stack[-1].calls.append(entered.activation)
        else:
            entered.activation = self.stack[-1].activation
        self.stack.append(entered)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        entered = self.stack.pop()
        if entered.activation is None:
            self.invocations[id(module)].append(entered.calls)

    def _record(self, spec: UnitSpec, params: dict[str, Any], x: Tensor, inplace: bool) -> None:
        top = self.stack[-1]
        owner = top.activation
        if owner is None:
            owner = self._call(spec, params, x, inplace, None)
            owner.unseen = _inside_autograd_function()
            top.calls.append(owner)
        owner.events.append((spec, params))

    def _call(
        self,
        spec: UnitSpec,
        params: dict[str, Any],
        x: Tensor,
        inplace: bool,
        module: nn.Module | None,
    ) -> Call:
        self.calls += 1
        return Call(spec, params, module, x.shape, self.axes.of(x), inplace, self.calls)


class _Completeness(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices activation kernels that no seen function call explains."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        watch = self.watch
        kernel = func.overloadpacket.__name__.rstrip("_")
        hidden = kernel in _KERNELS or func.namespace == "quantized" or _from_zero(kernel, args)
        # A function that Python sees and the catalogue does not name is no activation, whatever
        # it is made of. Raw operators and TorchScript are not such functions.
        function = watch.function
        bare = getattr(function, "__name__", "").rstrip("_") in _KERNELS
        named = function is not None and not isinstance(function, OPERATORS) and not bare
        if hidden and not named and not watch.busy and watch.stack[-1].activation is None:
            watch.hidden[watch.path(watch.stack[-1].module), kernel] += 1
        return func(*args, **(kwargs or {}))


OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


def _from_zero(kernel: str, args: Any) -> bool:
    """Whether a kernel clamps floating-point numbers from the constant 0."""
    return (
        kernel in ("clamp", "clamp_min")
        and args[0].is_floating_point()
        and len(args) > 1
        and not isinstance(args[1], Tensor)
        and args[1] == 0
    )


_KERNELS = frozenset(
    {
        *("relu", "relu6", "gelu", "silu", "leaky_relu", "softplus", "hardswish", "mish"),
        *("_prelu_kernel", "hardtanh", "threshold", "elu", "rrelu_with_noise"),
        "_transformer_encoder_layer_fwd",
    }
)


def _inside_autograd_function() -> str | None:
    """Why a call cannot be steered: it runs inside a hand-written autograd function."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != nn.modules.module.__file__:
        if frame.f_code.co_filename == torch.autograd.function.__file__:
            outer = frame.f_back
            if outer is None or outer.f_code.co_filename != torch.utils.checkpoint.__file__:
                return "inside a custom autograd function, whose backward would not follow"
        frame = frame.f_back  # type: ignore[assignment]
    return None
