"""Putting units in the place of activations, and taking them out again.

A leaf activation module with one call site is swapped; every other call is routed (`routing.py`).
What to put where is a `Plan`, plain data that can be stored; what a unit computes is not known
here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import nn

from flexure.contracts import SiteError
from flexure.surgery.frames import forget_compiled, framed
from flexure.surgery.replace import HOOKS
from flexure.surgery.routing import Guard, RoutedUnits, Routing
from flexure.surgery.sites import Site, SiteReport

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
        complete: whether every site was chosen: then any other activation call is an error.
        fast_paths: modules whose fused path would bypass the units.
        guarded: modules that the census did not enter; entering one raises.
    """

    sites: tuple[Site, ...]
    routes: Mapping[str, tuple[tuple[str, str | None], ...]]
    complete: bool = True
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
            for event in events
            if event.owner not in swapped
        )
        for caller, events in report.events.items()
    }
    watched = {caller: route for caller, route in routes.items() if (routed or complete) and route}
    if complete:
        # The model itself is watched in any case: an activation that the example did not show,
        # wherever it is called, reaches this frame.
        watched.setdefault("", ())
    return Plan(chosen, watched, complete, report.fast_paths, report.unreached if complete else ())


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
    _check(model, modules, what)
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
            undo.callback(modules[path].register_forward_pre_hook(Guard(path)).remove)
        kept = undo.pop_all()
    return Installation(units, kept)


def _check(model: nn.Module, modules: Mapping[str, nn.Module], what: Plan) -> None:
    named = {path for site in what.sites for path in (*site.modules, site.caller)}
    missing = sorted((named | {*what.routes, *what.fast_paths, *what.guarded}) - modules.keys())
    if missing:
        raise SiteError(f"the model has no module {', '.join(map(repr, missing))}")
    if hasattr(model, ROUTED):
        raise SiteError(
            f"the model has an attribute named {ROUTED!r} already, where routed units would go; "
            "rename it, or remove() the units installed before"
        )


def _swap(model: nn.Module, site: Site, unit: nn.Module, undo: ExitStack) -> None:
    """Puts `unit` under every name of the site's module, with that module's hooks and mode."""
    original = model.get_submodule(site.modules[0])
    # The same dictionaries, so that a handle made before or after removes its hook from both.
    for key in HOOKS:
        unit.__dict__[key] = original.__dict__[key]
    unit.train(original.training)
    for path in site.modules:
        parent, _, name = path.rpartition(".")
        children = model.get_submodule(parent)._modules
        children[name] = unit
        undo.callback(children.__setitem__, name, original)
    undo.callback(_hand_back, original, unit)


def _hand_back(original: nn.Module, unit: nn.Module) -> None:
    """What happened to the unit meanwhile, happened to the module: its mode, its parameters."""
    original.train(unit.training)
    for key in original._parameters.keys() & unit._parameters.keys():
        original._parameters[key] = unit._parameters[key]


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
    if routed:
        named = {name.replace(".", "/"): unit for name, unit in routed.items()}
        model.add_module(ROUTED, RoutedUnits(named))
        undo.callback(model._modules.pop, ROUTED)
    for caller, route in what.routes.items():
        calls = tuple(
            (activation, None if name is None else units[name], name) for activation, name in route
        )
        module = modules[caller]
        undo.callback(framed(Routing, module, caller, calls, strict=what.complete))
    forget_compiled()
    undo.callback(forget_compiled)


def _close_fast_path(module: nn.Module, undo: ExitStack) -> None:
    """Makes a transformer layer call its activation instead of a fused kernel."""
    for flag in ("activation_relu_or_gelu", "use_nested_tensor"):
        if hasattr(module, flag):
            undo.callback(setattr, module, flag, getattr(module, flag))
            setattr(module, flag, 0)
