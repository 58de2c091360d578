"""Units as an adaptation method holds them: built once, put in, taken out and put back.

What the units compute is theirs; which sites get one is the method's to say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexure.contracts import AdapterError, Example, SiteError
from flexure.surgery.census import check_free, sites
from flexure.surgery.follow import first_floating
from flexure.surgery.install import Installation, Plan, install, plan
from flexure.surgery.plan_file import check_fits, plan_from_json, plan_to_json
from flexure.surgery.sites import Site, SiteReport, Where
from flexure.units.catalogue import read_module
from flexure.units.functional import balanced_c
from flexure.units.trainable import TrainableCTU
from flexure.units.unit import CTU

__all__ = ["Maker", "PlacedUnits", "UnitMethod", "unit_arguments"]

Maker = Callable[[Site, dict[str, Any]], CTU]
"""From a site and the arguments of `unit_arguments` to its unit."""

_RAW = ("raw_beta", "raw_c")


def unit_arguments(site: Site, original: nn.Module | None) -> dict[str, Any]:
    """What a unit needs to know of its site: all arguments of `CTU` but the dial.

    Args:
        site: where it goes.
        original: the module that it replaces; None for a routed call.
    """
    params = dict(site.params)
    if original is not None:
        # Of a loaded adapter too: a learned slope is the model's own, and is not stored.
        found = read_module(original)
        params = params if found is None else found[1]
    return {
        "activation": site.activation,
        "params": params,
        "axis": site.axis,
        "channels": site.channels,
        "inplace": site.inplace,
        "name": site.name,
    }


class UnitMethod(ABC):
    """The part that all methods with units share: finding sites, and putting units there."""

    def install(
        self,
        model: nn.Module,
        *,
        example: Example,
        where: Any = None,
        axis: Any = None,
        head: str | None = None,
    ) -> PlacedUnits:
        """Puts a unit at every chosen site outside the head.

        Raises:
            SiteError: no site, one that cannot be steered, or one that the method cannot use.
        """
        return _place_units(model, self.maker, example=example, where=where, axis=axis, head=head)

    def load(
        self, model: nn.Module, structure: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> PlacedUnits:
        """Puts stored units into `model`, with the values of the file, bit by bit.

        Raises:
            AdapterError: the model has other sites, or the file is damaged.
        """
        return _load_units(model, self.maker, structure, tensors)

    @abstractmethod
    def maker(self, chosen: tuple[Site, ...]) -> Maker:
        """What makes the unit of each of the chosen sites.

        Raises:
            SiteError: a site that the method cannot use.
        """
        ...


class PlacedUnits:
    """Units at the sites of a plan; an `InstalledMethod`. Built outside the model: `insert()`.

    Args:
        model: the network.
        what: which sites.
        report: the census behind the plan.
        units: site name -> unit; sites may share one.
    """

    def __init__(
        self, model: nn.Module, what: Plan, report: SiteReport, units: Mapping[str, CTU]
    ) -> None:
        self._model = model
        self._plan = what
        self._report = report
        self._learned = dict(units)
        self._units = dict(units)
        self._placed: Installation[CTU] | None = None
        self._left: dict[str, torch.dtype] = {}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The raw dials, `SITE.raw_beta` and `SITE.raw_c`; a shared unit's by its first site."""
        return _raw(self._units)

    def insert(self) -> None:
        """Puts the units in place, on the device of the layers around them.

        Raises:
            SiteError: the model has units already.
        """
        if self._placed is None:
            check_free(self._model)
            self._placed = install(self._model, self._plan, self._ready)

    def withdraw(self) -> None:
        """Takes them out again."""
        if self._placed is not None:
            self._placed.remove()
            self._placed = None
            near = {site.name: _near(self._model, site.caller) for site in self._plan.sites}
            self._left = {site: like.dtype for site, like in near.items() if like is not None}

    def freeze(self) -> None:
        """Puts units with constant dials in the place of trainable ones."""
        placed = self._placed is not None
        self.withdraw()
        constant = {
            id(unit): unit.frozen() if isinstance(unit, TrainableCTU) else unit
            for unit in self._units.values()
        }
        self._units = {name: constant[id(unit)] for name, unit in self._units.items()}
        if placed:
            self.insert()

    def tensors(self) -> dict[str, Tensor]:
        """The raw dials, also of frozen units."""
        return {name: parameter.detach() for name, parameter in _raw(self._learned).items()}

    def structure(self) -> dict[str, Any]:
        """The sites by path."""
        return plan_to_json(self._plan, self._report)

    def betas(self) -> dict[str, Tensor]:
        """Site -> `(channels,)`; `(1,)` where the channels are not known."""
        return {site: _spread(unit, unit.beta) for site, unit in self._units.items()}

    def cs(self) -> dict[str, Tensor]:
        """Site -> `(channels,)`, likewise."""
        return {
            site: _spread(unit, balanced_c(unit.beta) if isinstance(unit.c, str) else unit.c)
            for site, unit in self._units.items()
        }

    def _ready(self, site: Site, original: nn.Module | None) -> CTU:
        """The site's unit, with what happened to the model while the unit was out."""
        unit = self._units[site.name]
        if original is not None:
            for key in original._parameters.keys() & unit._parameters.keys():
                unit._parameters[key] = original._parameters[key]
        near = _near(self._model, site.caller)
        if near is None:
            return unit.cpu()
        # Cast only if the model was: stored dials keep their dtype.
        cast = self._left.get(site.name, near.dtype) != near.dtype
        return unit.to(device=near.device, dtype=near.dtype if cast else None)


def _place_units(
    model: nn.Module,
    make: Callable[[tuple[Site, ...]], Maker],
    *,
    example: Example,
    where: Where,
    axis: int | dict[str, int] | None,
    head: str | None,
) -> PlacedUnits:
    """Finds the activation sites outside the head, and puts a unit at each.

    Args:
        model: the network; changed in place.
        make: from all the chosen sites to the maker of their units.
        example: one input, to find the sites with.
        where: the sites; all by default.
        axis: channel axis where the producing layer does not tell it.
        head: path of the module that is left alone.

    Raises:
        SiteError: no site, or one that cannot be steered. The model is unchanged.
    """
    report = sites(model, example, axis=axis)
    outside = [site for site in report.sites if not _inside(site, head)]
    chosen = report.select(where)
    within = [site.name for site in chosen if _inside(site, head)]
    chosen = tuple(site for site in chosen if not _inside(site, head))
    if not chosen or (within and where is not None):
        raise SiteError(
            f"expected activation sites outside the head {head!r}, got "
            f"{', '.join(within) or 'none'}; the head is trained as it is"
        )
    what = plan(report, chosen, complete=len(chosen) == len(outside))
    placed = PlacedUnits(model, what, report, _build(model, what, make(chosen)))
    placed.insert()
    return placed


def _load_units(
    model: nn.Module,
    make: Callable[[tuple[Site, ...]], Maker],
    structure: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> PlacedUnits:
    """Puts stored units into `model`.

    Args:
        model: the network; changed in place.
        make: from all the chosen sites to the maker of their units.
        structure: what `PlacedUnits.structure` gave.
        tensors: what `PlacedUnits.tensors` gave.

    Raises:
        AdapterError: the model has other sites, listed; or the tensors do not fit the structure.
            The model is unchanged.
        SiteError: the model has units already.
    """
    check_free(model)
    what, report = plan_from_json(structure)
    check_fits(model, what, report)
    try:
        units = _build(model, what, make(what.sites))
    except SiteError as error:
        raise AdapterError(f"the adapter's config is damaged: {error}") from error
    placed = PlacedUnits(model, what, report, units)
    _fill(placed.parameters, tensors)
    placed.insert()
    return placed


def _inside(site: Site, head: str | None) -> bool:
    paths = (site.caller, *site.modules)
    return head is not None and any(p == head or p.startswith(f"{head}.") for p in paths)


def _build(model: nn.Module, what: Plan, make: Maker) -> dict[str, CTU]:
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        site.name: make(
            site,
            unit_arguments(site, modules[site.modules[0]] if site.kind == "module" else None),
        )
        for site in what.sites
    }


def _raw(units: Mapping[str, CTU]) -> dict[str, nn.Parameter]:
    first: dict[CTU, str] = {}
    for site, unit in units.items():
        first.setdefault(unit, site)
    return {
        f"{site}.{key}": parameter
        for unit, site in first.items()
        for key in _RAW
        if (parameter := unit._parameters.get(key)) is not None
    }


def _fill(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Gives the parameters the stored values, bit by bit."""
    missing = sorted(parameters.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - parameters.keys())
    if missing or unexpected:
        raise AdapterError(
            f"the adapter's tensors do not fit its sites; missing: {', '.join(missing) or 'none'}; "
            f"unexpected: {', '.join(unexpected) or 'none'}; save the adapter again"
        )
    for name, parameter in parameters.items():
        tensor = tensors[name]
        fits = tensor.shape == parameter.shape and tensor.dtype in (torch.float32, torch.float64)
        if not fits or not bool(tensor.isfinite().all()):
            raise AdapterError(
                f"expected {name} to be {parameter.numel()} finite float32 numbers, got shape "
                f"{tuple(tensor.shape)} of {tensor.dtype}: the file is damaged"
            )
    for name, parameter in parameters.items():
        parameter.data = tensors[name].detach().clone()


def _spread(unit: CTU, value: float | Tensor) -> Tensor:
    if isinstance(value, Tensor) and value.ndim:
        return value.detach().clone()
    return torch.full((unit.channels or 1,), float(value), dtype=torch.float64)


def _near(model: nn.Module, path: str) -> Tensor | None:
    """A parameter around `path`: of the nearest enclosing module that has any."""
    while True:
        found = first_floating(model.get_submodule(path))
        if found is not None or not path:
            return found
        path = path.rpartition(".")[0]
