"""Steering: a pretrained network with every activation turned into a CTU, weights untouched.

Training-free. One dial for the whole network, or one per site pattern; plain or calibrated.
Searching for a dial is `search.py`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from flexure.contracts import AdapterError, Example, SiteError
from flexure.methods.head import stored_head
from flexure.methods.placing import unit_arguments
from flexure.surgery.adapter import AdapterFile, write_adapter
from flexure.surgery.calibrate import Calibration, Match
from flexure.surgery.census import sites
from flexure.surgery.install import Installation, Plan, install, plan
from flexure.surgery.plan_file import check_fits, plan_from_json, plan_to_json
from flexure.surgery.replace import replace_module
from flexure.surgery.sites import Site, SiteReport, Where
from flexure.surgery.wrapped import unwrapped
from flexure.units.functional import balanced_c, check_dial
from flexure.units.unit import CTU

__all__ = ["Steering", "load_steering", "steer"]

Dial: TypeAlias = "float | Mapping[str, float]"
Mixture: TypeAlias = "float | str | Mapping[str, float | str]"


def steer(
    model: nn.Module,
    *,
    beta: Dial,
    c: Mixture = 0.5,
    example: Example,
    where: Where = None,
    axis: int | dict[str, int] | None = None,
    pooling: bool = False,
    calibration: Iterable[Any] | None = None,
    match: Match = "mean",
) -> Steering:
    """Turns every activation of `model` into a CTU at the given dial ([CT] eq. 8, section 3).

    The model is changed in place and reversibly: `remove()`, or leaving a `with` block, restores
    it exactly. Weights are not touched. At beta = 1 a ReLU network computes what it did before.

    Args:
        model: a pretrained network; of one that is wrapped (torch.compile, parallel, PEFT) the one
            inside is steered.
        beta: the dial in [0, 1], or `{site pattern: beta}`: the first pattern that matches a
            site counts, and a site that none matches keeps its activation.
        c: the mixture in [0, 1] (0.5 in the paper), `"balanced"` for beta²/(1+beta²), which
            leaves no mean shift, or a dict as for beta.
        example: one input, to find the sites with: a tensor, a tuple or a dict.
        where: the sites to steer: name patterns or a predicate; all by default.
        axis: channel axis where the producing layer does not tell it (calibration needs one).
        pooling: whether to steer max-pooling too ([CT] eqs. 5–7 with a window's many pieces).
        calibration: a few hundred unlabelled inputs in batches: every channel then keeps the
            mean (or mean and spread) it had.
        match: what calibration keeps: `"mean"` or `"mean+std"`.

    Returns:
        The handle: set `.beta` and `.c`, read `.report`, `.save(path)`, `.remove()`.

    Raises:
        FlexureError: beta or c outside [0, 1] or nan.
        SiteError: no site, a site that cannot be steered, a pattern that matches nothing, or an
            example that does not run. The model is unchanged.
    """
    _check_dials(beta, c)
    model = unwrapped(model)
    report = sites(model, example, axis=axis, pooling=pooling)
    chosen = report.select(where)
    betas = _per_site(chosen, beta, "beta")
    chosen = tuple(site for site in chosen if site.name in betas)
    cs = _per_site(chosen, c, "c")
    missing = [site.name for site in chosen if site.name not in cs]
    if missing:
        raise SiteError(f"no pattern of c matches {', '.join(missing)}, which beta steers")
    if not chosen:
        raise SiteError("expected beta to name at least one site, got an empty dict")
    complete = len(chosen) == len(report.sites)
    what = plan(report, chosen, complete=complete)
    placed = _place(model, what, betas, cs)
    steering = Steering(model, report, what, placed, beta, c)
    if calibration is not None:
        try:
            steering._calibrate(calibration, match)
        except BaseException:
            steering.remove()
            raise
    return steering


class Steering:
    """A steered model: its dial, its report, and the way back. Made by `steer`.

    Also a context manager that restores the model on exit.

    Attributes:
        model: the steered network.
        report: the sites, as they were found.
        head: path of the head that was loaded with the adapter, if it held one.
    """

    def __init__(
        self,
        model: nn.Module,
        report: SiteReport,
        what: Plan,
        placed: Installation[CTU],
        beta: Dial,
        c: Mixture,
    ) -> None:
        self.model = model
        self.report = report
        self._plan = what
        self._placed = placed
        self._beta = beta
        self._c = c
        self._calibration: Calibration | None = None
        self._match: Match | None = None
        self._removed = False
        self.head: str | None = None
        self._put_back_head: Callable[[], None] = lambda: None

    @property
    def beta(self) -> Dial:
        """The dial as it was set. Setting it re-dials every unit, and calibrates anew."""
        return self._beta

    @beta.setter
    def beta(self, beta: Dial) -> None:
        self.dial(beta, self._c)

    @property
    def c(self) -> Mixture:
        """The mixture as it was set. Setting it re-dials every unit, and calibrates anew."""
        return self._c

    @c.setter
    def c(self, c: Mixture) -> None:
        self.dial(self._beta, c)

    def dial(self, beta: Dial, c: Mixture) -> None:
        """Sets both at once; on an error nothing changes.

        Raises:
            FlexureError: beta or c outside [0, 1] or nan.
            SiteError: a pattern matches nothing, or leaves out a site that is steered.
            AdapterError: the steering was loaded from a file and is calibrated: calibrating anew
                needs the inputs, which the file does not hold.
        """
        _check_dials(beta, c)
        if self._removed:
            raise SiteError("this steering was removed; steer the model again")
        if self.calibrated and self._calibration is None:
            raise AdapterError(
                "this calibrated steering was loaded from a file, and another dial needs another "
                "calibration; steer anew with calibration="
            )
        chosen = self._plan.sites
        betas, cs = _per_site(chosen, beta, "beta"), _per_site(chosen, c, "c")
        for name, values in (("beta", betas), ("c", cs)):
            missing = [site.name for site in chosen if site.name not in values]
            if missing:
                raise SiteError(f"no pattern of {name} matches {', '.join(missing)}")
        before = {name: _held(unit) for name, unit in self.units.items()}
        try:
            for name, unit in self.units.items():
                unit.dial(betas[name], cs[name])
            if self._calibration is not None:
                self._calibration.apply()
        except BaseException:
            for name, unit in self.units.items():
                _restore(unit, before[name])
            raise
        self._beta, self._c = beta, c

    @property
    def units(self) -> Mapping[str, CTU]:
        """Site name -> unit."""
        return self._placed.units

    @property
    def calibrated(self) -> bool:
        """Whether the units keep the original channel moments."""
        return any(unit.shift is not None for unit in self.units.values())

    def save(self, path: str | os.PathLike[str], *, head: str | None = None) -> None:
        """Writes `adapter_config.json` and `adapter_model.safetensors` into the folder `path`.

        The files hold the sites by path, each site's beta and c, and the calibration if there is
        one; `flexure.load_adapter(model, path)` steers another copy of the model by them.

        Args:
            path: a folder, made if it does not exist.
            head: path of a Linear layer to save too, such as one trained for the steered network;
                a head that was loaded is saved again without being named.

        Raises:
            AdapterError: the folder cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        for name, unit in self.units.items():
            c = balanced_c(unit.beta) if isinstance(unit.c, str) else unit.c
            tensors[f"{name}.beta"] = torch.as_tensor(unit.beta, dtype=torch.float64)
            tensors[f"{name}.c"] = torch.as_tensor(c, dtype=torch.float64)
            if unit.scale is not None and unit.shift is not None:
                tensors[f"{name}.scale"] = unit.scale
                tensors[f"{name}.shift"] = unit.shift
        head = head or self.head
        if head is not None:
            linear = dict(self.model.named_modules()).get(head)
            if not isinstance(linear, nn.Linear):
                raise AdapterError(
                    f"expected an nn.Linear at {head!r}, got {type(linear).__name__}"
                )
            tensors.update({f"head.{key}": value for key, value in linear.state_dict().items()})
        settings = {"beta": self._beta, "c": self._c, "match": self._match, "head": head}
        structure = plan_to_json(self._plan, self.report)
        write_adapter(path, AdapterFile("steer", settings, structure, tensors))

    def remove(self) -> None:
        """Restores the model exactly; a second call does nothing."""
        self._put_back_head()
        self._placed.remove()
        self._calibration = None
        self._removed = True

    def __enter__(self) -> Steering:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        calibrated = f", calibrated on {self._match}" if self.calibrated else ""
        return f"Steering(beta={self._beta}, c={self._c}, sites={len(self.units)}{calibrated})"

    def _load_head(self, path: str, tensors: Mapping[str, Tensor]) -> None:
        found = {
            name.removeprefix("head."): tensor
            for name, tensor in tensors.items()
            if name in ("head.weight", "head.bias")
        }
        self._put_back_head = replace_module(self.model, path, stored_head(self.model, path, found))
        self.head = path

    def _calibrate(self, inputs: Iterable[Any], match: Match) -> None:
        self._calibration = Calibration(self.model, self.units, inputs, match)
        self._match = match
        self._calibration.apply()


def load_steering(model: nn.Module, stored: AdapterFile) -> Steering:
    """Steers `model` as the file says; the model needs no example.

    Raises:
        AdapterError: the model has other sites than the file, listed; or a value is missing.
    """
    what, report = plan_from_json(stored.structure)
    check_fits(model, what, report)
    values = {site.name: _stored_values(stored, site) for site in what.sites}
    settings = stored.settings
    if "beta" not in settings or "c" not in settings:
        raise AdapterError("the adapter's settings lack beta or c: the file is damaged")
    _check_dials(settings["beta"], settings["c"])
    betas = {name: found["beta"] for name, found in values.items()}
    cs = {name: found["c"] for name, found in values.items()}
    _check_dials(betas, cs)
    placed = _place(model, what, betas, cs)
    try:
        for name, unit in placed.units.items():
            if "shift" in values[name]:
                unit.correct(values[name]["scale"], values[name]["shift"])
                unit.to(device=next((p.device for p in model.parameters()), torch.device("cpu")))
        steering = Steering(model, report, what, placed, settings["beta"], settings["c"])
        steering._match = settings.get("match")
        if settings.get("head") is not None:
            steering._load_head(settings["head"], stored.tensors)
    except BaseException:
        placed.remove()
        raise
    return steering


def _stored_values(stored: AdapterFile, site: Site) -> dict[str, Any]:
    """A site's numbers in the file, checked: beta and c, and scale and shift if calibrated."""
    found: dict[str, Any] = {}
    for key in ("beta", "c"):
        tensor = stored.tensors.get(f"{site.name}.{key}")
        if tensor is None or tensor.numel() != 1:
            raise AdapterError(f"the adapter's tensors lack {site.name}.{key}: the file is damaged")
        found[key] = float(tensor)
    calibrated = stored.settings.get("match") is not None
    for key in ("scale", "shift"):
        tensor = stored.tensors.get(f"{site.name}.{key}")
        if (tensor is not None) != calibrated:
            raise AdapterError(f"{site.name}.{key} does not fit the adapter's settings")
        if tensor is None:
            continue
        if tensor.shape != (site.channels,) or not bool(torch.isfinite(tensor).all()):
            raise AdapterError(
                f"expected {site.name}.{key} to be {site.channels} finite numbers, got shape "
                f"{tuple(tensor.shape)}: the file is damaged"
            )
        found[key] = tensor
    return found


def _place(
    model: nn.Module,
    what: Plan,
    betas: Mapping[str, float],
    cs: Mapping[str, float | str],
) -> Installation[CTU]:
    def make(site: Site, original: nn.Module | None) -> CTU:
        arguments = unit_arguments(site, original)
        return CTU(**arguments, beta=betas[site.name], c=cs[site.name])

    return install(model, what, make)


def _held(unit: CTU) -> tuple[Any, ...]:
    return unit.beta, unit.c, unit.scale, unit.shift


def _restore(unit: CTU, held: tuple[Any, ...]) -> None:
    beta, c, scale, shift = held
    unit.dial(beta, c)
    if scale is not None:
        unit.correct(scale, shift)


def _check_dials(beta: Dial, c: Mixture) -> None:
    for value in beta.values() if isinstance(beta, Mapping) else (beta,):
        check_dial(value, 0.5)
    for mixture in c.values() if isinstance(c, Mapping) else (c,):
        check_dial(0.5, mixture)


def _per_site(chosen: tuple[Site, ...], value: Any, what: str) -> dict[str, Any]:
    """Site name -> its value; the first pattern that matches counts."""
    if not isinstance(value, Mapping):
        return {site.name: value for site in chosen}
    for pattern in value:
        if not any(fnmatchcase(site.name, pattern) for site in chosen):
            raise SiteError(f"the pattern {pattern!r} of {what} matches none of the steered sites")
    return {
        site.name: next(value[pattern] for pattern in value if fnmatchcase(site.name, pattern))
        for site in chosen
        if any(fnmatchcase(site.name, pattern) for pattern in value)
    }
