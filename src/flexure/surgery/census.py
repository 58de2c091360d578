"""The census: every activation site of a network, found by one forward pass.

A site is one call of an activation, not one module. The census leaves the network and the random
generators as they were; it changes nothing. What it finds is the plain data of `sites.py`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from flexure.calling import call_model, copied, evaluating
from flexure.contracts import Example, SiteError
from flexure.surgery.light import LIGHT
from flexure.surgery.preserve import preserved
from flexure.surgery.sites import Event, Refusal, Site, SiteReport
from flexure.surgery.watch import Call, Watch
from flexure.surgery.wrapped import unwrapped
from flexure.units.catalogue import read_module
from flexure.units.unit import CTU

__all__ = ["check_free", "did_not_run", "outermost_scripted", "sites"]


def sites(
    model: nn.Module,
    example: Example,
    *,
    axis: int | dict[str, int] | None = None,
    pooling: bool = False,
) -> SiteReport:
    """Every activation of `model` that one forward pass of `example` reaches.

    What is an activation is known by function and by class: one that is written out in arithmetic
    (`x * (x > 0)`, `torch.where(x > 0, x, 0)`) is arithmetic. The pass runs in eval mode without
    gradients. Parameters, buffers, modes and the random generators of Python, NumPy and PyTorch
    are as before afterwards; lists and dicts that the model changes in place are not.

    Args:
        model: any network; of one that is wrapped (torch.compile, parallel, PEFT) the one inside,
            with the paths that it has there.
        example: an input with a batch axis: a tensor, a tuple of positional arguments, or a dict
            of keyword arguments. One item is enough.
        axis: the channel axis where the producing layer does not tell it: for every such site,
            or `{site name: axis}`.
        pooling: whether max-pooling, a max-affine spline too, counts as a site; left otherwise.

    Returns:
        The report; print it.

    Raises:
        SiteError: the example does not run through the model, or the model is steered already.
    """
    model = unwrapped(model)
    check_free(model)
    watch = Watch(model)
    with preserved(model), evaluating(model), torch.no_grad(), watch.hooks():
        try:
            with watch.dispatch, watch:
                call_model(model, copied(example))
        except Exception as error:
            raise SiteError(did_not_run(model, example, error)) from error
    return _Report(watch, axis, pooling).build()


def check_free(model: nn.Module) -> None:
    """Makes sure that no units are in place in `model`, whoever put them there.

    Raises:
        SiteError: there are units.
    """
    if any(isinstance(module, CTU) for module in model.modules()):
        raise SiteError(
            "the model is steered already: set .beta on its Steering, or remove() it; disable() "
            "an adaptation that is in place (a copy of a steered model stays steered)"
        )


def outermost_scripted(model: nn.Module) -> list[str]:
    """Paths of the TorchScript modules that are in no other."""
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, torch.jit.ScriptModule) and not inside:
            found.append(path)
    return found


class _Report:
    """Turns what was watched into sites and refusals."""

    def __init__(
        self, watch: Watch, axis: int | dict[str, int] | None, pooling: bool = False
    ) -> None:
        self.pooling = pooling
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
            self.refused.append((watch.calls, Refusal(path, kernel, _HIDDEN, True, count)))
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
        invocations: list[list[Call]],
        places: dict[int, set[tuple[int, int]]],
    ) -> None:
        signatures = {tuple((call.spec.name, id(call.module)) for call in c) for c in invocations}
        events: list[Event] = []
        for index, call in enumerate(invocations[0]):
            again = [calls[index] for calls in invocations if index < len(calls)]
            reason = None if len(signatures) == 1 else "its caller makes other calls each time"
            name = self._add(path, index, again, len(places[id(call.module)]), reason)
            events += [Event(spec.name, name) for spec, _ in call.events if spec.refusal is None]
        self.events[path] = tuple(events)

    def _add(
        self, caller: str, index: int, again: list[Call], places: int, reason: str | None
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
        left = spec.optional and not self.pooling
        reason = _PARAMETER if self._makes_a_parameter(caller) else reason
        reason = "; ".join(filter(None, (spec.refusal, call.unseen))) or (_LEFT if left else reason)
        if reason is not None:
            blocking = spec.blocking or (spec.refusal is None and not left)
            blocking = blocking and reason != _PARAMETER
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

    def _makes_a_parameter(self, caller: str) -> bool:
        """Whether a path lies inside a parametrisation: its output is a weight."""
        parts = caller.split(".")
        return any(
            isinstance(self.watch.model.get_submodule(".".join(parts[:i])), ParametrizationList)
            for i in range(1, len(parts) + 1)
        )

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
        scripted = outermost_scripted(watch.model)
        for path, module in watch.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            if id(module) in watch.reached:
                continue
            activation = read_module(module)
            if activation is not None:
                reason = "not called by the example"
                self.refused.append(
                    (watch.calls + 1, Refusal(path, activation[0].name, reason, False, 0))
                )
            elif _may_hide(module) and not any(path.startswith(f"{outer}.") for outer in found):
                found.append(path)
        self.refused += [
            (watch.calls + 1, Refusal(path, "TorchScript", _SCRIPTED, True)) for path in scripted
        ]
        return tuple(found)


_HIDDEN = (
    "called in TorchScript, compiled, quantised or as a raw operator, where Python cannot reach "
    "it; steer the float nn.Module before converting or exporting it"
)
_SCRIPTED = "whatever it calls, Python cannot reach it; use the original nn.Module"
_PARAMETER = "it makes a parameter: the network's inputs do not pass through it"
_LEFT = "pools by maximum, a spline of many pieces: pooling=True steers it"


def _may_hide(module: nn.Module) -> bool:
    """Whether a module that was not entered may call activations of its own."""
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return True
    if type(module) in LIGHT.values():
        return False
    return not type(module).__module__.startswith("torch.nn.")


def _channels(again: list[Call], axis: int | None) -> int | None:
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


def did_not_run(model: nn.Module, example: Example, error: Exception) -> str:
    """What to tell of an example that a model did not take."""
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
