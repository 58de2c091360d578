"""The census: every activation site of a network, found by one forward pass.

A site is one call of an activation, not one module. The census leaves the network and the random
generators as they were; it changes nothing. What it finds is the plain data of `sites.py`.
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

from flexure.calling import call_model, evaluating
from flexure.contracts import Example, SiteError
from flexure.surgery.axes import ChannelAxes
from flexure.surgery.preserve import preserved
from flexure.surgery.sites import Event, Refusal, Site, SiteReport
from flexure.units.catalogue import read_call, read_module
from flexure.units.spec import UnitSpec
from flexure.units.unit import CTU

__all__ = ["sites"]


def sites(
    model: nn.Module, example: Example, *, axis: int | dict[str, int] | None = None
) -> SiteReport:
    """Every activation of `model` that one forward pass of `example` reaches.

    The pass runs in eval mode without gradients. Parameters, buffers, modes and the random
    generators of Python, NumPy and PyTorch are as before afterwards.

    Args:
        model: any network.
        example: an input with a batch axis: a tensor, a tuple of positional arguments, or a dict
            of keyword arguments. One item is enough.
        axis: the channel axis where the producing layer does not tell it: for every such site,
            or `{site name: axis}`.

    Returns:
        The report; print it.

    Raises:
        SiteError: the example does not run through the model, or the model is steered already.
    """
    if any(isinstance(module, CTU) for module in model.modules()):
        raise SiteError("the model is steered already; set .beta on its Steering, or remove() it")
    watch = _Watch(model)
    with preserved(model), evaluating(model), torch.no_grad(), watch.hooks():
        try:
            with watch.dispatch, watch:
                call_model(model, example)
        except Exception as error:
            raise SiteError(_did_not_run(model, example, error)) from error
    return _Report(watch, axis).build()


@dataclass
class _Call:
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
    calls: list[_Call] = field(default_factory=list)
    activation: _Call | None = None


class _Watch(TorchFunctionMode):  # type: ignore[no-untyped-call]
    """Sees every function call of the pass, and knows which module makes it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.paths: dict[int, list[str]] = defaultdict(list)
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths[id(module)].append(path)
        self.axes = ChannelAxes()
        self.stack = [_Entered(nn.Module())]
        self.invocations: dict[int, list[list[_Call]]] = defaultdict(list)
        self.reached: set[int] = set()
        self.hidden: dict[tuple[str, str], int] = defaultdict(int)
        self.calls = 0
        self.busy = False
        self.dispatch = _Completeness(self)

    def path(self, module: nn.Module) -> str:
        return self.paths[id(module)][0] if id(module) in self.paths else ""

    @contextmanager
    def hooks(self) -> Iterator[None]:
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
            out = func(*args, **kwargs)
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
    ) -> _Call:
        self.calls += 1
        return _Call(spec, params, module, x.shape, self.axes.of(x), inplace, self.calls)


class _Completeness(TorchDispatchMode):
    """Notices activation kernels that no seen function call explains."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        watch = self.watch
        kernel = func.overloadpacket.__name__.rstrip("_")
        hidden = kernel in _KERNELS or func.namespace == "quantized"
        if hidden and not watch.busy and watch.stack[-1].activation is None:
            watch.hidden[watch.path(watch.stack[-1].module), kernel] += 1
        return func(*args, **(kwargs or {}))


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


class _Report:
    """Turns what was watched into sites and refusals."""

    def __init__(self, watch: _Watch, axis: int | dict[str, int] | None) -> None:
        self.watch = watch
        self.axis = axis
        self.sites: list[tuple[int, Site]] = []
        self.refused: list[tuple[int, Refusal]] = []
        self.events: dict[str, tuple[Event, ...]] = {}

    def build(self) -> SiteReport:
        watch = self.watch
        places: dict[int, set[tuple[int, int]]] = defaultdict(set)
        for caller, invocations in watch.invocations.items():
            for calls in invocations:
                for index, call in enumerate(calls):
                    places[id(call.module)].add((caller, index))
        for call in watch.stack[0].calls:
            raise SiteError(
                f"the model itself is an activation ({call.spec.name}); wrap it in nn.Sequential"
            )
        for caller, invocations in watch.invocations.items():
            if any(invocations):
                self._caller(watch.paths[caller][0], invocations, places)
        for (path, kernel), count in watch.hidden.items():
            self.refused.append((watch.calls, _hidden(watch.model, path, kernel, count)))
        unreached = self._unreached()
        named = self._name_axes()
        return SiteReport(
            tuple(site for _, site in sorted(named, key=lambda pair: pair[0])),
            tuple(refusal for _, refusal in sorted(self.refused, key=lambda pair: pair[0])),
            self.events,
            tuple(
                path
                for path, module in watch.model.named_modules()
                if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder)
            ),
            unreached,
        )

    def _caller(
        self,
        path: str,
        invocations: list[list[_Call]],
        places: dict[int, set[tuple[int, int]]],
    ) -> None:
        signatures = {tuple((call.spec.name, id(call.module)) for call in c) for c in invocations}
        events: list[Event] = []
        for index, call in enumerate(invocations[0]):
            again = [calls[index] for calls in invocations if index < len(calls)]
            reason = None if len(signatures) == 1 else "its caller makes other calls each time"
            name = self._add(path, index, again, len(places[id(call.module)]), reason)
            events += [Event(spec.name, name) for spec, _ in call.events]
        self.events[path] = tuple(events)

    def _add(
        self, caller: str, index: int, again: list[_Call], places: int, reason: str | None
    ) -> str:
        call = again[0]
        modules = () if call.module is None else tuple(self.watch.paths.get(id(call.module), ()))
        swapped = bool(modules) and places == 1
        name = modules[0] if swapped else f"{caller}:{index}"
        spec, params = call.spec, call.params
        if not swapped and spec.refusal is None and call.module is not None:
            if len(call.events) != 1 or call.events[0][0].refusal is not None:
                reason = "a composite activation called in several places; give each its own module"
            else:
                spec, params = call.events[0]
        reason = spec.refusal or reason or call.unseen
        if reason is not None:
            blocking = spec.blocking or spec.refusal is None
            refusal = Refusal(name, spec.name, reason, blocking, len(again))
            self.refused.append((call.order, refusal))
            return name
        axes = {c.axis for c in again}
        axis = axes.pop() if len(axes) == 1 else None
        site = Site(
            name=name,
            kind="module" if swapped else "call",
            activation=spec.name,
            params=params,
            caller=caller,
            index=index,
            modules=modules,
            calls=len(again),
            inplace=call.inplace,
            shape=tuple(call.x),
            axis=axis,
            channels=_channels(again, axis),
        )
        self.sites.append((call.order, site))
        return name

    def _name_axes(self) -> list[tuple[int, Site]]:
        given = self.axis
        if given is None:
            return self.sites
        if isinstance(given, dict):
            unknown = set(given) - {site.name for _, site in self.sites}
            if unknown:
                raise SiteError(f"axis= names no site: {', '.join(sorted(unknown))}")
        return [(order, _with_axis(site, given)) for order, site in self.sites]

    def _unreached(self) -> tuple[str, ...]:
        watch = self.watch
        found: list[str] = []
        for path, module in watch.model.named_modules():
            if id(module) in watch.reached or isinstance(module, torch.jit.ScriptModule):
                continue
            activation = read_module(module)
            if activation is not None:
                reason = "not called by the example"
                self.refused.append(
                    (watch.calls + 1, Refusal(path, activation[0].name, reason, False, 0))
                )
            elif _may_hide(module) and not any(path.startswith(f"{outer}.") for outer in found):
                found.append(path)
        return tuple(found)


def _may_hide(module: nn.Module) -> bool:
    """Whether a module that was not entered may call activations of its own."""
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return True
    return not type(module).__module__.startswith("torch.nn.")


def _hidden(model: nn.Module, path: str, kernel: str, count: int) -> Refusal:
    scripted = [
        name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)
    ]
    if scripted:
        reason = "inside TorchScript, which Python cannot reach; use the original nn.Module"
        path = scripted[0] if path == "" or len(scripted) == 1 else path
    else:
        reason = (
            "called as a compiled, quantised or raw operator, where Python cannot reach it; "
            "steer the float nn.Module before converting or exporting it"
        )
    return Refusal(path, kernel, reason, True, count)


def _channels(again: list[_Call], axis: int | None) -> int | None:
    if axis is None:
        return None
    sizes = {call.x[axis] for call in again if len(call.x) >= -axis}
    return sizes.pop() if len(sizes) == 1 else None


def _with_axis(site: Site, given: int | dict[str, int]) -> Site:
    axis = (
        given.get(site.name) if isinstance(given, dict) else (given if site.axis is None else None)
    )
    if axis is None:
        return site
    size = len(site.shape)
    if not -size <= axis < size:
        raise SiteError(
            f"site {site.name!r}: axis={axis} is outside its input of shape {site.shape}"
        )
    axis = axis - size if axis >= 0 else axis
    return Site(**{**vars(site), "axis": axis, "channels": site.shape[axis]})


def _did_not_run(model: nn.Module, example: Example, error: Exception) -> str:
    weight = next(iter(model.parameters()), None)
    expected = "" if weight is None else f" (weights are {weight.dtype} on {weight.device})"
    got = ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in _tensors(example))
    return (
        f"the example does not run through the model{expected}; got {got or 'no tensor'}: "
        f"{type(error).__name__}: {error}"
    )


def _tensors(example: Any) -> list[Tensor]:
    values: Any = example
    if isinstance(example, dict):
        values = example.values()
    elif isinstance(example, Tensor):
        values = (example,)
    return [value for value in values if isinstance(value, Tensor)]
