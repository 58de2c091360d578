"""Routing at run time: a function mode hands a caller's k-th activation call to the k-th unit.

The mode is on while the caller runs, put on and taken off by its forward hooks, so that copying,
pickling, compiling and exporting a model work. Where hooks go is `install.py`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from flexure.contracts import SiteError
from flexure.units.catalogue import read_call

__all__ = ["Enter", "Guard", "Leave", "RoutedUnits", "Step", "run_as_python"]

Step: TypeAlias = "tuple[str, nn.Module | None, str | None]"
"""One activation call of a caller: which activation, its unit and site; None to let it pass."""


class RoutedUnits(nn.ModuleDict):
    """The routed units of a model. As a child of an `nn.Sequential` it passes its input on."""

    def forward(self, *inputs: Any) -> Any:
        """The identity."""
        return inputs[0] if len(inputs) == 1 else inputs


class Frame(TorchFunctionMode):
    """One run of a caller: hands its k-th activation call to the k-th unit."""

    def __init__(
        self,
        caller: str,
        calls: tuple[Step, ...],
        strict: bool,
    ) -> None:
        super().__init__()
        self.caller = caller
        self.calls = calls
        self.strict = strict or any(unit is not None for _, unit, _ in calls)
        self.next = 0
        self.outer: Frame | None = None
        self.active = True
        self.anchor: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        watched = self.active and self.strict
        found = read_call(func, args, kwargs, refused=False) if watched else None
        if found is None or not self._alive():
            return func(*args, **kwargs)
        spec, call = found
        unit = self._take(spec.name)
        if unit is None:
            return func(*args, **kwargs)
        self._refuse_recomputation()
        return unit(call.x, inplace=call.inplace, **call.params)

    def _take(self, activation: str) -> nn.Module | None:
        """The unit of the next call of the route, which must be this activation."""
        if self.next >= len(self.calls):
            raise SiteError(
                f"{self._who()} made more activation calls than the {len(self.calls)} that the "
                f"example showed (an extra {activation}); {_REMEDY}"
            )
        call = self.calls[self.next]
        if call[0] != activation:
            raise SiteError(
                f"{self._who()}: activation call {self.next} was {call[0]} for the example and is "
                f"{activation} now; {_REMEDY}"
            )
        self.next += 1
        return call[1]

    def check_complete(self) -> None:
        """Raises if the caller returned before it made every call of its route."""
        if self.active and self.strict and self.next < len(self.calls):
            missing = [name or activation for activation, _, name in self.calls[self.next :]]
            raise SiteError(
                f"{self._who()} made {self.next} activation calls, the example {len(self.calls)}: "
                f"{', '.join(missing)} was not called; {_REMEDY}"
            )

    def _who(self) -> str:
        names = [name for _, _, name in self.calls if name is not None]
        sites = f" (sites {', '.join(names)})" if names else ""
        return f"module {self.caller or '(model)'!r}{sites}"

    def _alive(self) -> bool:
        """Whether the caller is still running in this thread.

        An interrupt (KeyboardInterrupt) skips forward hooks, which leaves the frame on the mode
        stack: it must then be inert.
        """
        if torch.compiler.is_compiling():
            return True
        frame: Any = sys._getframe(2)
        while frame is not None and frame is not self.anchor:
            frame = frame.f_back
        if frame is None:
            self.active = False
            if self.outer is not None:  # it judges itself by the same walk
                self.outer.active = True
        return frame is not None

    def _refuse_recomputation(self) -> None:
        """Raises where a routed call is checkpointed inside its caller.

        Backward would repeat it outside any frame.
        """
        if torch.compiler.is_compiling():
            return
        frame: Any = sys._getframe(2)
        while frame is not None and frame is not self.anchor:
            if frame.f_code.co_filename == _CHECKPOINT and _will_recompute(frame):
                raise SiteError(
                    f"{self._who()} calls an activation inside torch.utils.checkpoint; its "
                    "recomputation cannot be routed. Checkpoint the whole module call instead"
                )
            frame = frame.f_back


_REMEDY = "steer again with an example that takes this branch, or leave the sites out with where="
_CHECKPOINT = torch.utils.checkpoint.__file__


def _will_recompute(frame: Any) -> bool:
    """Whether this frame of torch.utils.checkpoint runs a function that backward will repeat."""
    if "ctx" in frame.f_locals:  # reentrant: an autograd function that runs without gradients
        return any(frame.f_locals["ctx"].needs_input_grad)
    return torch.is_grad_enabled()


def _top_frame() -> Frame | None:
    """The innermost frame of this thread."""
    for depth in range(torch._C._len_torch_function_stack() - 1, -1, -1):
        mode = torch._C._get_function_stack_at(depth)
        if isinstance(mode, Frame):
            return mode
    return None


def _drop_interrupted_frames() -> None:
    """Takes the frames that an interrupt left behind off the top of this thread's mode stack."""
    running = set()
    current: Any = sys._getframe(2)
    while current is not None:
        running.add(id(current))
        current = current.f_back
    while (depth := torch._C._len_torch_function_stack()) > 0:
        mode = torch._C._get_function_stack_at(depth - 1)
        if not isinstance(mode, Frame) or id(mode.anchor) in running:
            return
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]


class Enter:
    """Forward pre-hook of a caller: its frame becomes the active one."""

    def __init__(
        self,
        caller: str,
        calls: tuple[Step, ...],
        strict: bool,
    ) -> None:
        self.caller = caller
        self.calls = calls
        self.strict = strict

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Begins a run of the caller."""
        frame = Frame(self.caller, self.calls, self.strict)
        if not torch.compiler.is_compiling():
            frame.anchor = sys._getframe(1)
            _drop_interrupted_frames()
        frame.outer = _top_frame()
        if frame.outer is not None:
            frame.outer.active = False
        frame.__enter__()  # type: ignore[no-untyped-call]


class Leave:
    """Forward hook of a caller, run on errors too: the enclosing frame is active again."""

    def __init__(self, caller: str) -> None:
        self.caller = caller

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Ends it, and checks that it made every call that the example showed."""
        frame = _top_frame()
        # A pre-hook of the user's that raised before ours has left no frame of this caller.
        if frame is None or frame.caller != self.caller:
            return
        frame.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        frame.anchor = None
        if frame.outer is not None:
            frame.outer.active = True
        # On an error this hook runs without an output, and must not mask that error.
        if output is not None or torch.compiler.is_compiling() or sys.exc_info()[0] is None:
            frame.check_complete()


class Guard:
    """Forward pre-hook of a module that the census did not enter."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Raises."""
        raise SiteError(
            f"module {self.path!r} was not reached by the example, so its activations are not "
            f"known; {_REMEDY}"
        )


def run_as_python(function: Callable[..., Any]) -> None:
    """Keeps torch.compile from compiling `function` as a frame of its own.

    The hooks of the outermost module run as such frames, and none can end inside a mode. Hooks of
    inner modules are inlined all the same.
    """
    dynamo: Any = torch._C._dynamo.eval_frame
    if hasattr(dynamo, "set_code_exec_strategy"):  # absent from older versions of PyTorch
        skip = dynamo._FrameAction.SKIP
        strategy = dynamo._FrameExecStrategy(skip, skip)
        dynamo.set_code_exec_strategy(function.__code__, strategy)


run_as_python(Enter.__call__)
run_as_python(Leave.__call__)
