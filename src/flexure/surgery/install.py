"""Putting units in the place of activations, and taking them out again.

A leaf activation module with one call site is swapped. Every other call is routed: while its
caller runs, a function mode hands the caller's k-th activation call to the k-th unit. What to
put where is a `Plan`, plain data that can be stored; what a unit computes is not known here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from flexure.contracts import SiteError
from flexure.surgery.sites import Event, Site, SiteReport
from flexure.units.catalogue import read_call

__all__ = ["Installation", "Plan", "install", "plan"]

ROUTED = "flexure"
"""Name of the root child that holds the routed units."""


@dataclass(frozen=True)
class Plan:
    """What to install where.

    Attributes:
        sites: the chosen sites, in order.
        routes: for each caller its visible activation calls that remain once the chosen modules
            are swapped: each names its activation and the site to hand it to, None to let pass.
        fast_paths: modules whose fused path would bypass the units.
        guarded: modules that the census did not enter; entering one raises.
    """

    sites: tuple[Site, ...]
    routes: Mapping[str, tuple[tuple[str, str | None], ...]]
    fast_paths: tuple[str, ...] = ()
    guarded: tuple[str, ...] = ()


Unit = TypeVar("Unit", bound=nn.Module)


@dataclass
class Installation(Generic[Unit]):
    """Units in place. `remove()` takes them out.

    Attributes:
        units: site name -> unit.
    """

    units: dict[str, Unit]
    _undo: ExitStack

    def remove(self) -> None:
        """Restores the model exactly; a second call does nothing."""
        self._undo.close()


def plan(report: SiteReport, chosen: tuple[Site, ...], *, complete: bool) -> Plan:
    """The plan for the chosen sites of a report.

    Args:
        report: the census.
        chosen: some of its sites.
        complete: whether all was meant: then a module that the census did not enter is guarded.
    """
    swapped = {site.name for site in chosen if site.kind == "module"}
    routed = {site.name for site in chosen if site.kind == "call"}
    routes = {
        caller: tuple(
            (event.activation, event.owner if event.owner in routed else None)
            for event in _visible(events, swapped)
        )
        for caller, events in report.events.items()
    }
    return Plan(
        chosen,
        {caller: route for caller, route in routes.items() if routed and route},
        report.fast_paths,
        report.unreached if complete else (),
    )


def install(
    model: nn.Module, what: Plan, make_unit: Callable[[Site, nn.Module | None], Unit]
) -> Installation[Unit]:
    """Builds a unit for every site of the plan and puts it in place.

    Args:
        model: the network; changed in place.
        what: the plan.
        make_unit: from a site, and the module that it replaces (None for a routed call), to its
            unit.

    Raises:
        SiteError: the model lacks a module that the plan names, or has units already.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    _check(modules, what)
    units = {
        site.name: make_unit(site, modules[site.modules[0]] if site.kind == "module" else None)
        for site in what.sites
    }
    with ExitStack() as undo:
        for site in what.sites:
            if site.kind == "module":
                _swap(model, site, units[site.name], undo)
        _route(model, modules, what, units, undo)
        for path in what.fast_paths:
            _close_fast_path(modules[path], undo)
        for path in what.guarded:
            undo.callback(modules[path].register_forward_pre_hook(_Guard(path)).remove)
        return Installation(units, undo.pop_all())
    raise AssertionError("unreachable: the with block returns or raises")


def _visible(events: tuple[Event, ...], swapped: set[str]) -> Iterator[Event]:
    return (event for event in events if event.owner not in swapped)


def _check(modules: Mapping[str, nn.Module], what: Plan) -> None:
    named = {path for site in what.sites for path in (*site.modules, site.caller)}
    missing = sorted((named | {*what.routes, *what.fast_paths, *what.guarded}) - modules.keys())
    if missing:
        raise SiteError(f"the model has no module {', '.join(map(repr, missing))}")
    if ROUTED in modules:
        raise SiteError(
            f"the model has a child named {ROUTED!r} already; remove() the units installed before"
        )


def _swap(model: nn.Module, site: Site, unit: nn.Module, undo: ExitStack) -> None:
    """Puts `unit` under every name of the site's module, with that module's hooks and mode."""
    original = model.get_submodule(site.modules[0])
    # The same dictionaries, so that a handle made before or after removes its hook from both.
    for key in _HOOKS:
        unit.__dict__[key] = original.__dict__[key]
    unit.train(original.training)
    for path in site.modules:
        parent, _, name = path.rpartition(".")
        children = model.get_submodule(parent)._modules
        children[name] = unit
        undo.callback(children.__setitem__, name, original)
    undo.callback(lambda: original.train(unit.training))


_HOOKS = tuple(key for key in nn.Module().__dict__ if "_hook" in key)


def _route(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    what: Plan,
    units: Mapping[str, nn.Module],
    undo: ExitStack,
) -> None:
    if not what.routes:
        return
    routed = {site.name: units[site.name] for site in what.sites if site.kind == "call"}
    model.add_module(ROUTED, RoutedUnits({name.replace(".", "/"): u for name, u in routed.items()}))
    undo.callback(model._modules.pop, ROUTED)
    for caller, route in what.routes.items():
        calls = tuple(
            (activation, None if name is None else units[name], name) for activation, name in route
        )
        module = modules[caller]
        undo.callback(module.register_forward_pre_hook(_Enter(caller, calls)).remove)
        undo.callback(module.register_forward_hook(_Leave(), always_call=True).remove)


class RoutedUnits(nn.ModuleDict):
    """The routed units of a model. As a child of an `nn.Sequential` it passes its input on."""

    def forward(self, x: Any) -> Any:
        """The identity."""
        return x


class _Frame(TorchFunctionMode):
    """One run of a caller: hands its k-th activation call to the k-th unit."""

    def __init__(
        self, caller: str, calls: tuple[tuple[str, nn.Module | None, str | None], ...]
    ) -> None:
        super().__init__()
        self.caller = caller
        self.calls = calls
        self.routes = any(unit is not None for _, unit, _ in calls)
        self.next = 0
        self.outer: _Frame | None = None
        self.active = True
        self.anchor: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = read_call(func, args, kwargs) if self.active and self.routes else None
        if found is None or not self._alive():
            return func(*args, **kwargs)
        spec, call = found
        unit = self._take(spec.name)
        if unit is None:
            return func(*args, **kwargs)
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
        if self.active and self.routes and self.next < len(self.calls):
            missing = [name or activation for activation, _, name in self.calls[self.next :]]
            raise SiteError(
                f"{self._who()} made {self.next} activation calls, the example {len(self.calls)}: "
                f"{', '.join(missing)} was not called; {_REMEDY}"
            )

    def _who(self) -> str:
        names = [name for _, _, name in self.calls if name is not None]
        return f"module {self.caller or '(model)'!r} (sites {', '.join(names)})"

    def _alive(self) -> bool:
        """Whether the caller is still running in this thread.

        An interrupt (KeyboardInterrupt) skips forward hooks, which leaves the frame on the mode
        stack: it must then be inert. The same walk finds a checkpointed function inside the
        caller, whose recomputation would run outside any frame.
        """
        if torch.compiler.is_compiling():
            return True
        frame: Any = sys._getframe(2)
        while frame is not None and frame is not self.anchor:
            if frame.f_code.co_filename == _CHECKPOINT and _will_recompute(frame):
                raise SiteError(
                    f"{self._who()} calls an activation inside torch.utils.checkpoint; its "
                    "recomputation cannot be routed. Checkpoint the whole module call instead"
                )
            frame = frame.f_back
        if frame is None:
            self.active = False
            if self.outer is not None:  # it judges itself by the same walk
                self.outer.active = True
        return frame is not None


_REMEDY = "steer again with an example that takes this branch, or leave the sites out with where="
_CHECKPOINT = torch.utils.checkpoint.__file__


def _will_recompute(frame: Any) -> bool:
    """Whether this frame of torch.utils.checkpoint runs a function that backward will repeat."""
    if "ctx" in frame.f_locals:  # reentrant: an autograd function that runs without gradients
        return any(frame.f_locals["ctx"].needs_input_grad)
    return torch.is_grad_enabled()


def _top_frame() -> _Frame | None:
    """The innermost frame of this thread."""
    for depth in range(torch._C._len_torch_function_stack() - 1, -1, -1):
        mode = torch._C._get_function_stack_at(depth)
        if isinstance(mode, _Frame):
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
        if not isinstance(mode, _Frame) or id(mode.anchor) in running:
            return
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _Enter:
    """Forward pre-hook of a caller: its frame becomes the active one."""

    def __init__(
        self, caller: str, calls: tuple[tuple[str, nn.Module | None, str | None], ...]
    ) -> None:
        self.caller = caller
        self.calls = calls

    def __call__(self, module: nn.Module, args: Any) -> None:
        frame = _Frame(self.caller, self.calls)
        if not torch.compiler.is_compiling():
            frame.anchor = sys._getframe(1)
            _drop_interrupted_frames()
        frame.outer = _top_frame()
        if frame.outer is not None:
            frame.outer.active = False
        frame.__enter__()  # type: ignore[no-untyped-call]


class _Leave:
    """Forward hook of a caller, run on errors too: the enclosing frame is active again."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        frame = _top_frame()
        if frame is None:
            return
        frame.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        frame.anchor = None
        if frame.outer is not None:
            frame.outer.active = True
        # On an error this hook runs without an output, and must not mask that error.
        if output is not None or torch.compiler.is_compiling() or sys.exc_info()[0] is None:
            frame.check_complete()


class _Guard:
    """Forward pre-hook of a module that the census did not enter."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, module: nn.Module, args: Any) -> None:
        raise SiteError(
            f"module {self.path!r} was not reached by the example, so its activations are not "
            f"known; {_REMEDY}"
        )


def _close_fast_path(module: nn.Module, undo: ExitStack) -> None:
    """Makes a transformer layer call its activation instead of a fused kernel."""
    for flag in ("activation_relu_or_gelu", "use_nested_tensor"):
        if hasattr(module, flag):
            undo.callback(setattr, module, flag, getattr(module, flag))
            setattr(module, flag, 0)


def _run_as_python(function: Callable[..., Any]) -> None:
    """Keeps torch.compile from compiling `function` as a frame of its own.

    The hooks of the outermost module run as such frames, and none can end inside a mode. Hooks of
    inner modules are inlined all the same.
    """
    dynamo: Any = torch._C._dynamo.eval_frame
    if hasattr(dynamo, "set_code_exec_strategy"):  # absent from older versions of PyTorch
        skip = dynamo._FrameAction.SKIP
        strategy = dynamo._FrameExecStrategy(skip, skip)
        dynamo.set_code_exec_strategy(function.__code__, strategy)


_run_as_python(_Enter.__call__)
_run_as_python(_Leave.__call__)
