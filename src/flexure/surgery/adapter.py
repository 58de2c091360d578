"""Adapter files: `adapter_config.json` and `adapter_model.safetensors` in one folder.

Sites are stored by path, so that a file loads without an example and says what does not fit.
Nothing is ever unpickled. What the tensors mean is the method's business.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flexure.contracts import AdapterError
from flexure.record import write_json
from flexure.surgery.install import Plan
from flexure.surgery.sites import Event, Refusal, Site, SiteReport
from flexure.units.catalogue import SPECS, read_module
from flexure.units.spec import UnitSpec

__all__ = ["AdapterFile", "check_fits", "read_adapter", "write_adapter"]

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter folder holds.

    Attributes:
        method: which method wrote it.
        settings: the method's own, JSON values.
        plan: which sites get a unit, and how.
        report: the census behind it.
        tensors: named tensors of the method.
    """

    method: str
    settings: Mapping[str, Any]
    plan: Plan
    report: SiteReport
    tensors: Mapping[str, Tensor]


def write_adapter(folder: str | os.PathLike[str], adapter: AdapterFile) -> None:
    """Writes both files, each atomically: a reader never sees half a file.

    Raises:
        AdapterError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    where = Path(folder)
    config = {
        "format": FORMAT,
        "library": "flexure",
        "method": adapter.method,
        "settings": adapter.settings,
        "sites": [_site_to_json(site) for site in adapter.report.sites],
        "refused": [asdict(refusal) for refusal in adapter.report.refused],
        "events": {
            caller: [asdict(event) for event in events]
            for caller, events in adapter.report.events.items()
        },
        "chosen": [site.name for site in adapter.plan.sites],
        "routes": adapter.plan.routes,
        "complete": adapter.plan.complete,
        "fast_paths": adapter.plan.fast_paths,
        "unreached": adapter.report.unreached,
        "guarded": adapter.plan.guarded,
    }
    try:
        where.mkdir(parents=True, exist_ok=True)
        temporary = where / f".{TENSORS}.{os.getpid()}"
        contiguous = {
            name: tensor.detach().cpu().contiguous() for name, tensor in adapter.tensors.items()
        }
        save_file(contiguous, temporary)
        os.replace(temporary, where / TENSORS)
        write_json(where / CONFIG, config)
    except OSError as error:
        raise AdapterError(f"cannot write the adapter to {where}: {error}") from error


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFile:
    """Reads and checks an adapter folder.

    Raises:
        AdapterError: a file is missing, damaged, or not flexure's.
    """
    where = Path(folder)
    config = _read_config(where / CONFIG)
    tensors = _read_tensors(where / TENSORS)
    try:
        sites = tuple(_site_from_json(site) for site in config["sites"])
        by_name = {site.name: site for site in sites}
        report = SiteReport(
            sites,
            tuple(Refusal(**refusal) for refusal in config["refused"]),
            {
                caller: tuple(Event(**event) for event in events)
                for caller, events in config["events"].items()
            },
            tuple(config["fast_paths"]),
            tuple(config["unreached"]),
        )
        what = Plan(
            tuple(by_name[name] for name in config["chosen"]),
            {
                caller: tuple((activation, site) for activation, site in route)
                for caller, route in config["routes"].items()
            },
            bool(config["complete"]),
            tuple(config["fast_paths"]),
            tuple(config["guarded"]),
        )
        adapter = AdapterFile(
            str(config["method"]), dict(config["settings"]), what, report, tensors
        )
        _check_consistent(adapter)
        return adapter
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise AdapterError(
            f"{where / CONFIG} is damaged: {type(error).__name__}: {error}; save the adapter again"
        ) from error


def check_fits(model: nn.Module, adapter: AdapterFile) -> None:
    """Checks that the model has the sites of the file, and no activation that the file lacks.

    Without an example only modules can be compared: the activations of functions are checked,
    call by call, when the model runs.

    Raises:
        AdapterError: lists the missing and the unexpected sites.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = []
    for site in adapter.plan.sites:
        if site.caller not in modules:
            missing.append(f"{site.name} ({site.activation})")
            continue
        for path in site.modules:
            found = read_module(modules[path]) if path in modules else None
            if found is None or (site.kind == "module" and not _same(site, *found)):
                missing.append(f"{path} ({site.activation})")
    known = {path for site in adapter.report.sites for path in site.modules}
    known |= {refusal.name for refusal in adapter.report.refused}
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


def _check_consistent(adapter: AdapterFile) -> None:
    """Checks what a file says against itself, before any model is touched."""
    if not adapter.plan.sites:
        raise ValueError("it names no site")
    routed = {name for route in adapter.plan.routes.values() for _, name in route if name}
    chosen = {site.name for site in adapter.plan.sites if site.kind == "call"}
    if routed != chosen:
        raise ValueError(f"routes and sites disagree about {sorted(routed ^ chosen)}")
    for site in adapter.plan.sites:
        if site.kind == "module" and not site.modules:
            raise ValueError(f"site {site.name!r} names no module")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"no adapter at {path.parent}: {path.name} is missing") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("library") != "flexure":
        raise AdapterError(f"{path} is not a flexure adapter; it was written by another library")
    if config.get("format") != FORMAT:
        raise AdapterError(
            f"{path} has format {config.get('format')!r}, expected {FORMAT}; update flexure"
        )
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except FileNotFoundError as error:
        raise AdapterError(f"no adapter at {path.parent}: {path.name} is missing") from error
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} is damaged: {error}; save the adapter again") from error


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
