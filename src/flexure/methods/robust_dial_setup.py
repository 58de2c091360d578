"""What a search for a robust dial is given: settings, data and a model, checked before any work.

How it searches is not known here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexure.attacks.bounded import Bounded
from flexure.attacks.catalogue import ATTACKS
from flexure.attacks.checks import check_attack, check_seed
from flexure.attacks.norms import check_eps, norm_named
from flexure.contracts import Attack, DataError, FlexureError
from flexure.fingerprints import described, fingerprint, tensor_digest
from flexure.methods.attack_model_bench import check_unused
from flexure.methods.features import device_of
from flexure.methods.robust_dial_bench import Axis, DialBench, DialledModel
from flexure.methods.robust_dial_data import (
    calibrated_on,
    calibration_inputs,
    check_inputs,
    normalised,
)
from flexure.methods.robust_dial_groups import ALL_SITES, Groups, site_groups
from flexure.methods.robust_dial_moves import SEARCHES
from flexure.methods.robust_dial_result import RobustDial
from flexure.methods.samples import Samples
from flexure.record import versions
from flexure.store import Store
from flexure.surgery.census import sites
from flexure.surgery.sites import Site, Where
from flexure.surgery.wrapped import unwrapped
from flexure.units.functional import check_dial

__all__ = ["DialSettings", "Space", "Subject"]

_MATCHES = (None, "mean", "mean+std")


@dataclass(frozen=True)
class DialSettings:
    """The settings of `search_robust_dial` that are no data; see there.

    Raises:
        FlexureError: one of them does not fit.
    """

    norm: str
    eps: float
    radii: Sequence[float]
    report_radii: Sequence[float] | None
    betas: Sequence[float]
    cs: Sequence[float]
    matches: Sequence[str | None]
    search: str | None
    budget: int
    starts: int
    clean_loss: float
    attack: Attack
    report_attack: str | Attack
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        norm_named(self.norm)
        for name in ("radii", "report_radii", "betas", "cs", "matches"):
            _check_several(name, getattr(self, name))
        for radius in (self.eps, *self.radii, *(self.report_radii or ())):
            if check_eps(radius) == 0:
                raise FlexureError("expected radii above 0, got 0; clean accuracy is told anyhow")
        for name in ("betas", "cs", "matches"):
            if not len(getattr(self, name)):
                raise FlexureError(f"expected at least one of {name}, got none; leave it out")
        for beta in self.betas:
            check_dial(beta, 0.5)
        for c in self.cs:
            if isinstance(c, str):
                raise FlexureError(
                    f"expected cs to be numbers in [0, 1], got {c!r}; a search moves c apart from "
                    f"beta: give 0.5, for example"
                )
            check_dial(0.5, c)
        _check_among("matches", self.matches, _MATCHES)
        _check_among("search", [self.search], (*SEARCHES, None))
        for name in ("budget", "starts", "batch_size"):
            _check_count(name, getattr(self, name))
        if not isinstance(self.clean_loss, Real) or not 0 <= self.clean_loss < 1:
            raise FlexureError(
                f"expected clean_loss as a share of samples, from 0 to 1, got {self.clean_loss!r}; "
                f"give 0.01 for one point"
            )
        check_seed(self.seed)
        self._check_attacks()

    def _check_attacks(self) -> None:
        if isinstance(self.report_attack, str):
            _check_among("report_attack", [self.report_attack], tuple(ATTACKS))
        objects = [each for each in (self.attack, self.report_attack) if not isinstance(each, str)]
        for each in objects:
            if check_attack(each).norm != self.norm:
                raise FlexureError(
                    f"expected attacks in {self.norm}, got one in {each.norm}; give norm= that of "
                    f"the attacks"
                )

    @property
    def all_radii(self) -> tuple[float, ...]:
        """Increasing, with that of the choice among them."""
        return tuple(sorted({*self.radii, self.eps}))

    @property
    def reported(self) -> tuple[float, ...]:
        """The radii of the report, likewise."""
        return (
            self.all_radii
            if self.report_radii is None
            else tuple(sorted({*self.report_radii, self.eps}))
        )

    @property
    def attack_names(self) -> tuple[str, str]:
        """Of the search and of the report, in words."""
        search, report = (
            each if isinstance(each, str) else repr(each)
            for each in (self.attack, self.report_attack)
        )
        return search, report

    def grid(self, plain_at_one: bool) -> tuple[RobustDial, ...]:
        """Every shared dial; beta = 1 last, where c has no effect.

        Args:
            plain_at_one: whether beta = 1 is the network as it was: then it needs no calibration.
        """
        below = sorted({float(beta) for beta in self.betas} - {1.0})
        found = [
            _shared(beta, c, match)
            for match in dict.fromkeys(self.matches)
            for c in dict.fromkeys(self.cs)
            for beta in below
        ]
        kept = (None,) if plain_at_one else dict.fromkeys(self.matches)
        return (*found, *(_shared(1.0, self.cs[0], match) for match in kept))


@dataclass(frozen=True)
class Space:
    """How inputs become what the network takes; see `Bounded`."""

    mean: Sequence[float] | Tensor | None
    std: Sequence[float] | Tensor | None
    bounds: tuple[float, float] | None

    def bounded(self, model: nn.Module) -> Bounded:
        """The model with its bounds; of one that has them, its own."""
        if isinstance(model, Bounded):
            check_unused(self.mean, self.std)
            own = Space(model.mean, model.std, model.bounds)
            return own.bounded(model.model)
        return Bounded(unwrapped(model), mean=self.mean, std=self.std, bounds=self.bounds)


class Subject:
    """The model and the data of a search.

    Args:
        bounded: the model with its bounds.
        splits: "val" and perhaps "test".
        calibration: inputs before normalisation; None: those of "val".
        groups: see `site_groups`.
        where: the sites to steer.
        axis: of channels.
        settings: of the search.
        folder: of finished parts; None: none are kept.

    Attributes:
        model: to be steered.
        groups: name -> sites.
        digest: of the model with its bounds.
        notes: what a reader must know of it.

    Raises:
        FlexureError: inputs out of bounds, groups that do not fit.
        DataError: inputs that do not make one tensor, or that are calibrated and reported on.
        SiteError: no site to steer, or one that cannot be.
    """

    notes: tuple[str, ...]

    def __init__(
        self,
        bounded: Bounded,
        splits: Mapping[str, Samples],
        *,
        calibration: Iterable[Any] | Tensor | None,
        groups: Groups,
        where: Where,
        axis: Axis,
        settings: DialSettings,
        folder: str | os.PathLike[str] | None,
    ) -> None:
        self._settings, self._splits = settings, splits
        self._folder = None if folder is None else Path(folder)
        self._device = device_of(bounded.model)
        self._tensors = {name: self._read(name, bounded) for name in splits}
        x, _ = self._tensors["val"]
        inputs = x if calibration is None else calibration_inputs(calibration, self._device)
        check_inputs("calibration", inputs, bounded)
        # A copy: it outlives the search, and is not to keep all inputs.
        example = normalised(bounded, x[:2].clone())
        chosen = sites(bounded.model, example, axis=axis).select(where)
        self.groups = site_groups([site.name for site in chosen], groups)
        self.notes = (
            *(() if calibration is None else calibrated_on(inputs, splits)),
            *_smooth(chosen),
        )
        self.model = DialledModel(
            bounded, self.groups, example=example, where=where, axis=axis,
            calibration=[normalised(bounded, inputs)], plain_at_one=not _smooth(chosen),
        )  # fmt: skip
        self.digest = fingerprint(bounded)
        self._parts = self._depends_on(chosen, axis, inputs)

    def benches(self) -> dict[str, DialBench]:
        """To evaluate dials on each split.

        Before anything is searched, the model is run on a few samples of each, and calibrated once:
        what does not fit is found in seconds, and not after hours.

        Raises:
            DataError: the model does not take a split.
            SiteError: the network cannot be calibrated.
        """
        found = {name: self._bench(name) for name in self._splits}
        for name, bench in found.items():
            try:
                bench.check()
            except FlexureError as error:
                raise DataError(f"{name} data: {error}") from error
        grid = self._settings.grid(self.model.plain_at_one)
        calibrated = next((dial for dial in grid if dial.match is not None), None)
        if calibrated is not None:
            self.model.turn(calibrated)
            self.model.close()
        return found

    def _depends_on(self, chosen: Sequence[Site], axis: Axis, inputs: Tensor) -> dict[str, str]:
        """What stored parts depend on, besides their samples."""
        settings = self._settings
        told = "" if axis is None else f"; axis {axis}"
        return {
            "model": self.digest,
            "calibration inputs": tensor_digest(inputs),
            "attack": described(settings.attack),
            "eps": repr(float(settings.eps)),
            "seed": str(settings.seed),
            "sites": ", ".join(site.name for site in chosen) + told,
            "library": f"flexure {versions()['flexure']}, torch {versions()['torch']}",
        }

    def _bench(self, split: str) -> DialBench:
        x, y = self._tensors[split]
        settings, store = self._settings, None
        if self._folder is not None:
            parts = self._parts | {"inputs": tensor_digest(x), "labels": tensor_digest(y)}
            store = Store(self._folder / split, parts, holds="evaluated dials")
        return DialBench(
            self.model, x, y, attack=settings.attack, eps=float(settings.eps),
            seed=settings.seed, batch_size=settings.batch_size, store=store,
        )  # fmt: skip

    def _read(self, split: str, bounded: Bounded) -> tuple[Tensor, Tensor]:
        """All inputs and labels of a split, where the model is."""
        samples = self._splits[split]
        parts = [x for x, _ in samples.inputs()]
        if not all(isinstance(x, Tensor) and x.shape[1:] == parts[0].shape[1:] for x in parts):
            raise DataError(
                f"expected {split} inputs that are tensors of one shape, got others; attacks "
                f"change one tensor"
            )
        x = torch.cat([x.to(self._device) for x in parts])
        check_inputs(split, x, bounded)
        return x, samples.labels.to(self._device)


def _smooth(chosen: Sequence[Site]) -> tuple[str, ...]:
    """What must be told of sites that beta = 1 does not leave as they were."""
    others = dict.fromkeys(site.activation for site in chosen if not site.exact_at_relu)
    if not others:
        return ()
    return (
        f"beta = 1 is not the plain network, which has {', '.join(others)}: it is a candidate of "
        f"its own",
    )


def _shared(beta: float, c: float, match: str | None) -> RobustDial:
    return RobustDial({ALL_SITES: float(beta)}, {ALL_SITES: float(c)}, match)


def _check_several(name: str, values: Any) -> None:
    if values is None and name == "report_radii":
        return
    try:
        several = not isinstance(values, str) and len(values) >= 0
    except TypeError:
        several = False
    if not several:
        raise FlexureError(
            f"expected {name} to be a sequence, got {values!r}; give ({values!r},) for one"
        )


def _check_among(name: str, values: Sequence[Any], choices: Sequence[Any]) -> None:
    for value in values:
        if value not in choices:
            raise FlexureError(
                f"expected {name} to be among {', '.join(map(repr, choices))}, got {value!r}; "
                f"choose one of these"
            )


def _check_count(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise FlexureError(
            f"expected {name} to be a whole number, at least 1, got {value!r}; leave it out for "
            f"the usual one"
        )
