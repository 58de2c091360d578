"""What a search for a robust dial is given: settings, data and a model, checked before any work.

How it searches is not known here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from flexure.attacks.bounded import Bounded, check_within, limits_of
from flexure.attacks.catalogue import ATTACKS
from flexure.attacks.checks import check_attack, check_seed
from flexure.attacks.norms import check_eps, norm_named
from flexure.contracts import Attack, Batches, DataError, FlexureError
from flexure.fingerprints import described, fingerprint, tensor_digest
from flexure.methods.features import device_of
from flexure.methods.robust_dial_bench import DialBench, DialledModel
from flexure.methods.robust_dial_groups import ALL_SITES, Groups, site_groups
from flexure.methods.robust_dial_moves import SEARCHES
from flexure.methods.robust_dial_result import RobustDial
from flexure.methods.samples import Samples, check_disjoint, read_samples
from flexure.record import versions
from flexure.store import Store
from flexure.surgery.census import sites
from flexure.surgery.sites import Where
from flexure.surgery.wrapped import unwrapped
from flexure.units.functional import check_dial

__all__ = ["Data", "DialSettings", "Space", "Subject", "read_splits"]

Data: TypeAlias = "Batches | tuple[Tensor, Tensor]"

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
        for radius in (self.eps, *self.radii, *(self.report_radii or ())):
            if check_eps(radius) == 0:
                raise FlexureError("expected radii above 0, got 0; clean accuracy is told anyhow")
        for name in ("betas", "cs", "matches"):
            if not len(getattr(self, name)):
                raise FlexureError(f"expected at least one of {name}, got none; leave it out")
        for beta in self.betas:
            check_dial(beta, 0.5)
        for c in self.cs:
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

    def grid(self) -> tuple[RobustDial, ...]:
        """Every shared dial; beta = 1 last, once."""
        below = sorted({float(beta) for beta in self.betas} - {1.0})
        found = [
            _shared(beta, c, match)
            for match in dict.fromkeys(self.matches)
            for c in dict.fromkeys(self.cs)
            for beta in below
        ]
        return (*found, _shared(1.0, self.cs[0], None))


@dataclass(frozen=True)
class Space:
    """How inputs become what the network takes; see `Bounded`."""

    mean: Sequence[float] | Tensor | None
    std: Sequence[float] | Tensor | None
    bounds: tuple[float, float] | None

    def bounded(self, model: nn.Module) -> Bounded:
        """The model with its bounds; of one that has them, its own."""
        if isinstance(model, Bounded):
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
        settings: of the search.
        folder: of finished parts; None: none are kept.

    Attributes:
        model: to be steered.
        groups: name -> sites.

    Raises:
        FlexureError: inputs out of bounds, groups that do not fit.
        DataError: inputs that do not make one tensor.
        SiteError: no site to steer, or one that cannot be.
    """

    def __init__(
        self,
        bounded: Bounded,
        splits: Mapping[str, Samples],
        *,
        calibration: Iterable[Any] | Tensor | None,
        groups: Groups,
        where: Where,
        settings: DialSettings,
        folder: str | os.PathLike[str] | None,
    ) -> None:
        self._settings, self._splits = settings, splits
        self._folder = None if folder is None else Path(folder)
        self._device = device_of(bounded.model)
        x, _ = self._tensors("val", bounded)
        inputs = x if calibration is None else _inputs(calibration, self._device)
        check_within(inputs, limits_of(bounded, inputs.dtype))
        example = _normalised(bounded, x[:2])
        names = [site.name for site in sites(bounded.model, example).select(where)]
        self.groups = site_groups(names, groups)
        kept = [_normalised(bounded, inputs)]
        self.model = DialledModel(
            bounded, self.groups, example=example, where=where, calibration=kept
        )
        self._parts = {
            "model": fingerprint(bounded),
            "calibration inputs": tensor_digest(inputs),
            "attack": described(settings.attack),
            "eps": repr(float(settings.eps)),
            "seed": str(settings.seed),
            "sites": ", ".join(names),
            "library": f"flexure {versions()['flexure']}, torch {versions()['torch']}",
        }

    def bench(self, split: str) -> DialBench:
        """To evaluate dials on the samples of a split."""
        x, y = self._tensors(split, self.model.bounded)
        settings, store = self._settings, None
        if self._folder is not None:
            parts = self._parts | {"inputs": tensor_digest(x), "labels": tensor_digest(y)}
            store = Store(self._folder / split, parts, holds="evaluated dials")
        return DialBench(
            self.model, x, y, attack=settings.attack, eps=float(settings.eps),
            seed=settings.seed, batch_size=settings.batch_size, store=store,
        )  # fmt: skip

    def _tensors(self, split: str, bounded: Bounded) -> tuple[Tensor, Tensor]:
        """All inputs and labels of a split, where the model is."""
        samples = self._splits[split]
        parts = [x for x, _ in samples.inputs()]
        if not all(isinstance(x, Tensor) and x.shape[1:] == parts[0].shape[1:] for x in parts):
            raise DataError(
                f"expected {split} inputs that are tensors of one shape, got others; attacks "
                f"change one tensor"
            )
        x = torch.cat([x.to(self._device) for x in parts])
        check_within(x, limits_of(bounded, x.dtype))
        return x, samples.labels.to(self._device)


def read_splits(val: Data, test: Data | None) -> tuple[dict[str, Samples], int]:
    """The splits that are given, and how many samples they share.

    Raises:
        DataError: no samples, or more than a few that are in both.
    """
    if test is val:
        raise DataError(
            "expected different data as val and test, got the same object; what is chosen by and "
            "what is reported must be disjoint"
        )
    given = {"val": val} if test is None else {"val": val, "test": test}
    read = {name: read_samples(_batches(data), name, cache_bytes=sys.maxsize)
            for name, data in given.items()}  # fmt: skip
    return read, check_disjoint(read["test"], read["val"]) if "test" in read else 0


def _batches(data: Data) -> Any:
    pair = isinstance(data, tuple) and len(data) == 2 and all(isinstance(d, Tensor) for d in data)
    return [data] if pair else data


def _inputs(calibration: Iterable[Any] | Tensor, device: torch.device) -> Tensor:
    """Unlabelled inputs, a tensor or batches; labels are ignored."""
    if isinstance(calibration, Tensor):
        return calibration.to(device)
    parts = [one[0] if isinstance(one, tuple | list) else one for one in calibration]
    if not parts or not all(isinstance(one, Tensor) for one in parts):
        raise DataError(
            "expected calibration inputs, a tensor or batches, got others; "
            "leave it out for the validation inputs"
        )
    return torch.cat([one.to(device) for one in parts])


def _normalised(bounded: Bounded, x: Tensor) -> Tensor:
    """What the model inside is given."""
    inner = Bounded(nn.Identity(), mean=bounded.mean, std=bounded.std, bounds=None)
    found: Tensor = inner.to(x.device)(x)
    return found


def _shared(beta: float, c: float, match: str | None) -> RobustDial:
    return RobustDial({ALL_SITES: float(beta)}, {ALL_SITES: float(c)}, match)


def _check_among(name: str, values: Sequence[Any], choices: Sequence[Any]) -> None:
    for value in values:
        if value not in choices:
            raise FlexureError(
                f"expected {name} to be among {', '.join(map(repr, choices))}, got {value!r}; "
                f"choose one of these"
            )


def _check_count(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise FlexureError(f"expected {name} to be a whole number, at least 1, got {value!r}")
