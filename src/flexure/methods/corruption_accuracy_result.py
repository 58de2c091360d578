"""How accurate one model or two are on corrupted images; counted by `corruption_accuracy.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexure.columns import aligned
from flexure.contracts import FlexureError
from flexure.methods.attack_model_shares import PairedShare, Share, over, paired_share, share
from flexure.methods.crossed import CrossedMean, crossed_difference, crossed_share
from flexure.record import to_json

__all__ = ["ALL", "COLUMNS", "CorruptedCell", "CorruptionAccuracy", "CorruptionMean"]

ALL = "all corruptions"
"""The name of the mean over everything that was corrupted."""

COLUMNS = ("images", "group", "difference", "errors/errors")
"""Of the printed table, beside those that are called after models and severities."""


@dataclass(frozen=True)
class CorruptedCell:
    """The images with one corruption at one severity.

    Attributes:
        name: of the corruption, of the shift, or `"clean"`.
        group: `"noise"`, `"blur"`, `"weather"`, `"digital"`, `"extra"`, `"shift"` or `"clean"`.
        severity: 1 ... 5; None for shifts and clean images.
        right: (N,) bool, the model is right.
        reference: (N,) bool, the reference is; None without one.
        substitute: in what the corruption differs in kind from the official one; None: in nothing.
    """

    name: str
    group: str
    severity: int | None
    right: Tensor
    reference: Tensor | None = None
    substitute: str | None = None

    @property
    def accuracy(self) -> Share:
        """The model's, with Wilson's interval."""
        return share(self.right)

    @property
    def reference_accuracy(self) -> Share | None:
        """The reference's, likewise."""
        return None if self.reference is None else share(self.reference)

    @property
    def difference(self) -> PairedShare | None:
        """The model's accuracy minus the reference's, image by image."""
        return None if self.reference is None else paired_share(self.right, self.reference)

    @property
    def errors_ratio(self) -> float | None:
        """The model's errors over the reference's; see `CorruptionMean`."""
        return None if self.reference is None else _errors_ratio([self])

    def to_dict(self) -> dict[str, Any]:
        """In JSON terms, with the estimates."""
        own = {name: to_json(getattr(self, name)) for name in self.__dataclass_fields__}
        told = ("accuracy", "reference_accuracy", "difference", "errors_ratio")
        return own | {name: to_json(getattr(self, name)) for name in told}


@dataclass(frozen=True)
class CorruptionMean:
    """A mean over corruptions or severities, with intervals over the draw of images.

    Corrupted versions of one image are not independent: the unit is an image's mean over them, and
    the intervals are those of the mean of N such numbers (`crossed_share`, `crossed_difference`).

    Attributes:
        name: of what it is the mean.
        cells: how many corruptions at a severity it covers.
        accuracy: the model's.
        reference_accuracy: the reference's; None without one.
        difference: the model's minus the reference's; None without one.
        errors_ratio: the model's errors over the reference's, of one corruption: its corruption
            error with this reference (Hendrycks and Dietterich 2019, section 4.2). For several
            corruptions the mean of theirs, which is called mCE. None without a reference, nan where
            that makes no error.
    """

    name: str
    cells: int
    accuracy: CrossedMean
    reference_accuracy: CrossedMean | None
    difference: CrossedMean | None
    errors_ratio: float | None


@dataclass(frozen=True)
class CorruptionAccuracy:
    """The result of `corruption_accuracy`: one model, or two on the same images.

    Attributes:
        clean: the images as they are.
        cells: one a corruption and severity.
        shifts: one a given version of the images.
        names: of the model and of the reference.
        official: the address that the corrupted images were read from; None: generated.
        settings: what was asked for, by name.
    """

    clean: CorruptedCell
    cells: tuple[CorruptedCell, ...]
    shifts: tuple[CorruptedCell, ...] = ()
    names: tuple[str, str] = ("model", "reference")
    official: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Images."""
        return len(self.clean.right)

    @property
    def corruptions(self) -> tuple[str, ...]:
        """Their names, in order."""
        return tuple(dict.fromkeys(cell.name for cell in self.cells))

    @property
    def groups(self) -> tuple[str, ...]:
        """Likewise."""
        return tuple(dict.fromkeys(cell.group for cell in self.cells))

    @property
    def mean(self) -> CorruptionMean | None:
        """Over all corruptions and severities; None where nothing was corrupted."""
        return self._mean(ALL, self.cells) if self.cells else None

    @property
    def substitutes(self) -> dict[str, str]:
        """Corruption -> in what it differs in kind from the official one."""
        return {cell.name: cell.substitute for cell in self.cells if cell.substitute}

    def cell(self, name: str, severity: int) -> CorruptedCell:
        """One corruption at one severity.

        Raises:
            KeyError: there is none.
        """
        for cell in self.cells:
            if (cell.name, cell.severity) == (name, severity):
                return cell
        raise KeyError((name, severity))

    def over(self, name: str) -> CorruptionMean:
        """The mean over the severities of a corruption, or over all corruptions of a group.

        Raises:
            KeyError: there is no such corruption or group.
        """
        cells = [cell for cell in self.cells if name in (cell.name, cell.group)]
        if not cells:
            raise KeyError(name)
        return self._mean(name, cells)

    def at(self, severity: int) -> CorruptionMean:
        """The mean over all corruptions at a severity.

        Raises:
            KeyError: there is no such severity.
        """
        cells = [cell for cell in self.cells if cell.severity == severity]
        if not cells:
            raise KeyError(severity)
        return self._mean(f"severity {severity}", cells)

    def rows(self) -> list[dict[str, str]]:
        """The printed table: clean images, shifts, corruptions, groups, and all of them."""
        rows = [self._row(cell.name, cell.group, cell) for cell in (self.clean, *self.shifts)]
        groups = {cell.name: cell.group for cell in self.cells}
        for name in self.corruptions:
            told = name + ("*" if name in self.substitutes else "")
            rows.append(self._row(told, groups[name], self.over(name)))
        if self.mean is not None:
            means = [*(self.over(name) for name in self.groups), self.mean]
            rows += [self._row(mean.name, "mean", mean) for mean in means]
        return rows

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know."""
        notes = [f"* {name}: {text}" for name, text in self.substitutes.items()]
        if self.cells and self.official is None:
            notes.append(
                "generated from these images, not the official files: to be compared among "
                "themselves, not with published numbers"
            )
        if self.cells and self.clean.reference is not None:
            notes.append(
                f"errors/errors: {self.names[0]}'s errors over those of {self.names[1]}; of groups "
                f"and of all the mean over corruptions (of all: mCE, with this reference); no "
                f"interval, and not to be read without the points"
            )
        return tuple(notes)

    def __str__(self) -> str:
        told = f"{self.samples} images; accuracy in %, 95 % intervals over images in brackets"
        if self.cells:
            told += (
                "; of a corruption the mean over severities, which have columns of their own "
                f"({self.names[0]})"
            )
        lines = [told, *aligned(self.rows(), ruled=True)]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON terms, every image's outcome included."""
        own = {name: to_json(getattr(self, name)) for name in ("names", "official", "settings")}
        names = (*self.corruptions, *self.groups)
        severities = dict.fromkeys(cell.severity for cell in self.cells if cell.severity)
        return own | {
            "clean": self.clean.to_dict(),
            "cells": [cell.to_dict() for cell in self.cells],
            "shifts": [cell.to_dict() for cell in self.shifts],
            "means": to_json(
                [*map(self.over, names), *map(self.at, severities)]
                + ([] if self.mean is None else [self.mean])
            ),
            "notes": list(self.notes),
        }

    def _mean(self, name: str, cells: Sequence[CorruptedCell]) -> CorruptionMean:
        right = _by_image(cell.right for cell in cells)
        accuracy = crossed_share(right)
        if self.clean.reference is None:
            return CorruptionMean(name, len(cells), accuracy, None, None, None)
        others = _by_image(_given(cell) for cell in cells)
        return CorruptionMean(
            name,
            len(cells),
            accuracy,
            crossed_share(others),
            crossed_difference(right - others),
            _errors_ratio(cells),
        )

    def _row(self, name: str, group: str, of: CorruptedCell | CorruptionMean) -> dict[str, str]:
        """Cells that do not apply are empty."""
        row = {"images": name, "group": group, self.names[0]: _points(of.accuracy)}
        if self.clean.reference is not None:
            row[self.names[1]] = _points(of.reference_accuracy)
            row["difference"] = _points(of.difference, sign="+")
            row["errors/errors"] = f"{of.errors_ratio:.3f}"
        severities = sorted({cell.severity for cell in self.cells if cell.severity})
        for severity in severities:
            found = [c for c in self.cells if (c.name, c.severity) == (name.rstrip("*"), severity)]
            row[str(severity)] = f"{100 * found[0].accuracy.value:.1f}" if found else ""
        return row


def _by_image(hits: Any) -> Tensor:
    """(1, N): each image's mean over what was done to it."""
    return torch.stack(list(hits)).double().mean(0, keepdim=True)


def _given(cell: CorruptedCell) -> Tensor:
    if cell.reference is None:
        raise FlexureError(f"expected the reference's outcomes for {cell.name}, got none; measure")
    return cell.reference


def _errors_ratio(cells: Sequence[CorruptedCell]) -> float:
    """Errors over errors for each corruption; the mean over them."""
    ratios = []
    for name in dict.fromkeys(cell.name for cell in cells):
        own = [cell for cell in cells if cell.name == name]
        errors = sum(int((~cell.right).sum()) for cell in own)
        ratios.append(over(errors, sum(int((~_given(cell)).sum()) for cell in own)))
    return math.fsum(ratios) / len(ratios)


def _points(estimate: Any, *, sign: str = "") -> str:
    """In percent, with its interval."""
    if isinstance(estimate, CrossedMean):
        value, low, high = (100 * x for x in (estimate.mean, estimate.low, estimate.high))
        return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"
    return "" if estimate is None else str(estimate)
