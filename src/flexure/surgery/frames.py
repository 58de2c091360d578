"""Frames: function modes that change some calls of a module while it runs.

A frame is on while its caller runs, put on and taken off by its forward hooks, so that copying,
pickling, compiling and exporting a model work. Which calls a frame changes, and into what, is said
by its subclasses: `routing.py` for activations, `sums.py` for sums. Several kinds may be in
place at once: each kind finds its own among the others'.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from flexure.contracts import SiteError

__all__ = [
    "MODULE_CALL",
    "Enter",
    "Frame",
    "Leave",
    "Step",
    "forget_compiled",
    "framed",
    "run_as_python",
]

Step: TypeAlias = "tuple[str, Any, str | None]"
"""One call of a caller: what it is, what the frame does to it (None: let it pass), its name."""


class Frame(TorchFunctionMode):
    """One run of a caller: changes its k-th call as the k-th step says.

    Attributes:
        what: the calls that it counts, in errors.
        remedy: what to do where they differ from the example's, in errors.
        nested: whether calls of modules inside the caller that have no frame are its own.
    """

    what: ClassVar[str]
    remedy: ClassVar[str]
    nested: ClassVar[bool] = True

    def __init__(
        self,
        caller: str,
        calls: tuple[Step, ...],
        strict: bool,
    ) -> None:
        super().__init__()
        self.caller = caller
        self.calls = calls
        self.strict = strict or any(change is not None for _, change, _ in calls)
        self.next = 0
        self.outer: Frame | None = None
        self.active = True
        self.anchor: Any = None
        self.module: nn.Module | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        watched = self.active and self.strict
        found = self.read(func, args, kwargs) if watched else None
        if found is None or not self._alive():
            return func(*args, **kwargs)
        name, call = found
        change = self._take(name)
        if change is None:
            return func(*args, **kwargs)
        self._refuse_recomputation()
        others = self._others()
        for frame in others:
            frame.active = False
        try:
            return self.changed(change, call, func, args, kwargs)
        finally:
            for frame in others:
                frame.active = True

    def read(self, func: Any, args: Any, kwargs: Any) -> tuple[str, Any] | None:
        """What a call is, as a step says it, and what `changed` needs to know; or None."""
        raise NotImplementedError

    def changed(self, change: Any, call: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of a call whose step has a change."""
        raise NotImplementedError

    def _others(self) -> list[Frame]:
        """Active frames of other kinds, which must not count what a change does in here.

        Outside compilation they walk the stack, and see that it is not their caller's.
        """
        if not torch.compiler.is_compiling():
            return []
        depth = torch._C._len_torch_function_stack()
        modes = [torch._C._get_function_stack_at(i) for i in range(depth)]
        return [mode for mode in modes if isinstance(mode, Frame) and mode.active]

    def _take(self, found: str) -> Any:
        """The change of the next call of the route, which must be this one."""
        if self.next >= len(self.calls):
            raise SiteError(
                f"{self._who()} made more {self.what}s than the {len(self.calls)} that the "
                f"example showed (an extra {found}); {self.remedy}"
            )
        call = self.calls[self.next]
        if call[0] != found:
            raise SiteError(
                f"{self._who()}: {self.what} {self.next} was {call[0]} for the example and is "
                f"{found} now; {self.remedy}"
            )
        self.next += 1
        return call[1]

    def check_complete(self) -> None:
        """Raises if the caller returned before it made every call of its route."""
        if self.active and self.strict and self.next < len(self.calls):
            missing = [name or kind for kind, _, name in self.calls[self.next :]]
            raise SiteError(
                f"{self._who()} made {self.next} {self.what}s, the example {len(self.calls)}: "
                f"{', '.join(missing)} was not called; {self.remedy}"
            )

    def _who(self) -> str:
        names = [name for _, _, name in self.calls if name is not None]
        sites = f" (sites {', '.join(names)})" if names else ""
        return f"module {self.caller or '(model)'!r}{sites}"

    def _alive(self) -> bool:
        """Whether the caller is still running in this thread, and the call is its own.

        An interrupt (KeyboardInterrupt) skips forward hooks, which leaves the frame on the mode
        stack: it must then be inert.
        """
        if torch.compiler.is_compiling():
            return True
        frame: Any = sys._getframe(2)
        own = True
        while frame is not None and frame is not self.anchor:
            own = own and (self.nested or not self._elsewhere(frame))
            frame = frame.f_back
        if frame is None:
            self.active = False
            if self.outer is not None:  # it judges itself by the same walk
                self.outer.active = True
        return frame is not None and own

    def _elsewhere(self, frame: Any) -> bool:
        """Whether a frame of Python runs another module, or what torch.compile made of the caller.

        The latter makes calls that were counted while it was compiled.
        """
        generated = frame.f_code.co_filename.startswith(_GENERATED)
        return frame.f_code is MODULE_CALL or (
            generated and frame.f_locals.get("self") is not self.module
        )

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
                    f"{self._who()} makes {self.what} {self.next - 1} inside "
                    "torch.utils.checkpoint; its recomputation cannot be routed. Checkpoint the "
                    "whole module call instead"
                )
            frame = frame.f_back


MODULE_CALL = nn.Module._call_impl.__code__
"""The code of a call of any module."""

_GENERATED = "<eval_with_key>"
"""File name of the code of graphs (torch.fx)."""

_CHECKPOINT = torch.utils.checkpoint.__file__


def _will_recompute(frame: Any) -> bool:
    """Whether this frame of torch.utils.checkpoint runs a function that backward will repeat."""
    if "ctx" in frame.f_locals:  # reentrant: an autograd function that runs without gradients
        return any(frame.f_locals["ctx"].needs_input_grad)
    return torch.is_grad_enabled()


def _top_frame(kind: type[Frame]) -> Frame | None:
    """The innermost frame of a kind in this thread."""
    for depth in range(torch._C._len_torch_function_stack() - 1, -1, -1):
        mode = torch._C._get_function_stack_at(depth)
        if isinstance(mode, kind):
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
        kind: type[Frame],
        caller: str,
        calls: tuple[Step, ...],
        strict: bool,
    ) -> None:
        self.kind = kind
        self.caller = caller
        self.calls = calls
        self.strict = strict

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Begins a run of the caller."""
        frame = self.kind(self.caller, self.calls, self.strict)
        if not torch.compiler.is_compiling():
            frame.anchor, frame.module = sys._getframe(1), module
            _drop_interrupted_frames()
        frame.outer = _top_frame(self.kind)
        if frame.outer is not None:
            frame.outer.active = False
        frame.__enter__()  # type: ignore[no-untyped-call]


class Leave:
    """Forward hook of a caller, run on errors too: the enclosing frame is active again."""

    def __init__(self, kind: type[Frame], caller: str) -> None:
        self.kind = kind
        self.caller = caller

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Ends it, and checks that it made every call that the example showed."""
        frame = _top_frame(self.kind)
        # A pre-hook of the user's that raised before ours has left no frame of this caller.
        if frame is None or frame.caller != self.caller:
            return
        frame.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        frame.anchor = frame.module = None
        if frame.outer is not None:
            frame.outer.active = True
        # On an error this hook runs without an output, and must not mask that error.
        if output is not None or torch.compiler.is_compiling() or sys.exc_info()[0] is None:
            frame.check_complete()


def framed(
    kind: type[Frame], module: nn.Module, caller: str, calls: Sequence[Step], *, strict: bool
) -> Callable[[], None]:
    """Puts hooks on a module so that each run of it is a frame; returns what takes them off.

    Args:
        kind: of the frames.
        module: the caller.
        caller: its path, in errors.
        calls: the calls that the example showed, in order.
        strict: whether other calls are errors, too, where none of the steps has a change.
    """
    enter = module.register_forward_pre_hook(Enter(kind, caller, tuple(calls), strict))
    # Before the hooks that are there: kinds of frames are taken off in the reverse order.
    leave = module.register_forward_hook(Leave(kind, caller), always_call=True, prepend=True)

    def remove() -> None:
        enter.remove()
        leave.remove()

    return remove


def forget_compiled() -> None:
    """Makes torch.compile begin anew, once hooks of frames came or went.

    It does not guard on the hooks of inner modules: what it compiled before would run on without
    them, and what it compiled with them would go on with them after they are gone.
    """
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


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
