"""A plan of sites as JSON values, and back: sites are stored by path.

So a file loads without an example, and says what does not fit. Files themselves are
`adapter.py`'s; what a unit computes is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from flexure.contracts import AdapterError
from flexure.surgery.install import Plan
from flexure.surgery.sites import Event, Refusal, Site, SiteReport
from flexure.units.catalogue import SPECS, read_module
from flexure.units.spec import UnitSpec

__all__ = ["check_fits", "plan_from_json", "plan_to_json"]


def plan_to_json(what: Plan, report: SiteReport) -> dict[str, Any]:
    """The structure of an adapter file: the plan, and the census behind it, as JSON values."""
    return {
        "sites": [_site_to_json(site) for site in report.sites],
        "refused": [asdict(refusal) for refusal in report.refused],
        "events": {
            caller: [asdict(event) for event in events] for caller, events in report.events.items()
        },
        "chosen": [site.name for site in what.sites],
        "routes": what.routes,
        "complete": what.complete,
        "fast_paths": what.fast_paths,
        "unreached": report.unreached,
        "guarded": what.guarded,
    }


def plan_from_json(structure: Mapping[str, Any]) -> tuple[Plan, SiteReport]:
    """The plan and the census that `plan_to_json` stored, checked against each other.

    Raises:
        AdapterError: the structure is damaged.
    """
    try:
        sites = tuple(_site_from_json(site) for site in structure["sites"])
        by_name = {site.name: site for site in sites}
        report = SiteReport(
            sites,
            tuple(Refusal(**refusal) for refusal in structure["refused"]),
            {
                caller: tuple(Event(**event) for event in events)
                for caller, events in structure["events"].items()
            },
            tuple(structure["fast_paths"]),
            tuple(structure["unreached"]),
        )
        what = Plan(
            tuple(by_name[name] for name in structure["chosen"]),
            {
                caller: tuple((activation, site) for activation, site in route)
                for caller, route in structure["routes"].items()
            },
            bool(structure["complete"]),
            tuple(structure["fast_paths"]),
            tuple(structure["guarded"]),
        )
        _check_consistent(what)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise AdapterError(
            f"the adapter's config is damaged: {type(error).__name__}: {error}; save the adapter "
            f"again"
        ) from error
    return what, report


def check_fits(model: nn.Module, what: Plan, report: SiteReport) -> None:
    """Checks that the model has the sites of a stored plan, and no activation that it lacks.

    Without an example only modules can be compared: the activations of functions are checked,
    call by call, when the model runs.

    Raises:
        AdapterError: lists the missing and the unexpected sites.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = []
    for site in what.sites:
        if site.caller not in modules:
            missing.append(f"{site.name} ({site.activation})")
            continue
        for path in site.modules:
            found = read_module(modules[path]) if path in modules else None
            if found is None or (site.kind == "module" and not _same(site, *found)):
                missing.append(f"{path} ({site.activation})")
    known = {path for site in report.sites for path in site.modules}
    known |= {refusal.name for refusal in report.refused}
    unexpected = [
        f"{path} ({found[0].name})"
        for path, module in modules.items()
        if path not in known
        and (found := read_module(module)) is not None
        and found[0].refusal is None
    ]
    if missing or unexpected:
        raise AdapterError(
            "the adapter was made for another model; "
            f"missing sites: {', '.join(missing) or 'none'}; "
            f"unexpected sites: {', '.join(unexpected) or 'none'}"
        )


def _same(site: Site, spec: UnitSpec, params: Mapping[str, Any]) -> bool:
    """Whether a module is the site's activation, its constants included."""
    plain = {key: value for key, value in params.items() if not isinstance(value, Tensor)}
    return spec.name == site.activation and _jsonable(plain) == _jsonable(dict(site.params))


def _jsonable(params: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(params))


def _site_to_json(site: Site) -> dict[str, Any]:
    # A learned slope is the model's own parameter, and stays there.
    params = {key: value for key, value in site.params.items() if not isinstance(value, Tensor)}
    return {**vars(site), "params": params}


def _site_from_json(stored: dict[str, Any]) -> Site:
    site = Site(**{**stored, "modules": tuple(stored["modules"]), "shape": tuple(stored["shape"])})
    if site.activation not in SPECS or SPECS[site.activation].refusal is not None:
        raise ValueError(f"unknown activation {site.activation!r}")
    if site.kind not in ("module", "call"):
        raise ValueError(f"unknown kind of site {site.kind!r}")
    axis, size = site.axis, len(site.shape)
    if axis is not None and not (isinstance(axis, int) and -size <= axis < 0):
        raise ValueError(f"site {site.name!r} has axis {axis!r} of a shape {site.shape}")
    return site


def _check_consistent(what: Plan) -> None:
    """Checks what a plan says against itself, before any model is touched."""
    if not what.sites:
        raise ValueError("it names no site")
    routed = {name for route in what.routes.values() for _, name in route if name}
    chosen = {site.name for site in what.sites if site.kind == "call"}
    if routed != chosen:
        raise ValueError(f"routes and sites disagree about {sorted(routed ^ chosen)}")
    for site in what.sites:
        if site.kind == "module" and not site.modules:
            raise ValueError(f"site {site.name!r} names no module")
