"""What measuring one or two models found. The measuring itself is in `measurements.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flexure.methods.paired import MEAN, POOLED, SHARE, QuantityDifference, QuantityEstimate
from flexure.record import to_json

if TYPE_CHECKING:
    from flexure.measure.bounds import HessianBound
    from flexure.measure.over import Summary

__all__ = ["Measurements", "ModelMeasurements", "Row"]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        label: the quantity, its statistic where it is not plain, and which setting where there
            are several.
        estimates: of each model; None for one that does not have it.
        difference: of the first to the second; None without one.
    """

    label: str
    estimates: tuple[QuantityEstimate | None, ...]
    difference: QuantityDifference | None


@dataclass(frozen=True)
class ModelMeasurements:
    """All measures of one model.

    Attributes:
        name: what the model is called.
        samples: labelled samples that were given; a costly measure may have used the first of
            them only (`len(summary.result)`).
        summaries: measure -> its values over the samples, for the measures that were asked for
            and that the model allows; each `.result` has one row a sample, in the order of the
            data, so that the rows of two measures belong to the same samples.
        estimates: what the summaries come to: each quantity of each of them with its interval.
        bound: the data-free bound of the Hessian norm; None where it was refused or not asked for.
        looseness: that bound over the largest Hessian norm that was measured; None without both.
        refusals: measure -> why the model does not have it, and what would help; one line.
        seconds: measure -> wall-clock seconds, those of an interrupted run not included.
    """

    name: str
    samples: int
    summaries: Mapping[str, Summary[Any]]
    estimates: tuple[QuantityEstimate, ...] = ()
    bound: HessianBound | None = None
    looseness: float | None = None
    refusals: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON terms, every sample's values included."""
        own: dict[str, Any] = {k: to_json(getattr(self, k)) for k in self.__dataclass_fields__}
        if self.bound is not None:
            own["bound"]["cross_entropy"] = to_json(self.bound.cross_entropy)
        return own

    @property
    def curvature(self) -> Summary[Any] | None:
        """Of `Curvature`: gradient norm, Hessian norm, normalised curvature."""
        return self.summaries.get("curvature")

    @property
    def rate(self) -> Summary[Any] | None:
        """Of `CurvatureRate`; None for a piecewise linear network."""
        return self.summaries.get("rate")

    @property
    def gradient_change(self) -> Summary[Any] | None:
        """Of `GradientChange`: relative gradient change under noise, and its bound."""
        return self.summaries.get("gradient_change")

    @property
    def calibration(self) -> Summary[Any] | None:
        """Of `Calibration`: confidence, right or wrong, negative log-likelihood."""
        return self.summaries.get("calibration")


@dataclass(frozen=True)
class Measurements:
    """The result of `measure_model`: one model, or two on the same samples.

    Attributes:
        models: the model, and the one that it was measured against if there is one.
        differences: how the first compares with the second, each with its interval over samples;
            empty for one model.
        notes: what a reader must know: refusals, measures on fewer samples, samples that did not
            converge or have no value, means that few samples carry.
        settings: what the measures were told (seed, tolerance, radii, orders, limits), by name.
    """

    models: tuple[ModelMeasurements, ...]
    differences: tuple[QuantityDifference, ...]
    notes: tuple[str, ...]
    settings: Mapping[str, Any]

    @property
    def samples(self) -> int:
        """Labelled samples that were given."""
        return self.models[0].samples

    def rows(self) -> list[Row]:
        """The table of all quantities: measure by measure, what has several settings by these."""
        # The model that has most comes first, so that what others lack stays in its place.
        complete = sorted(self.models, key=lambda model: -len(model.estimates))
        every = [one for model in complete for one in model.estimates]
        measures = list(dict.fromkeys(one.measure for one in every))
        every.sort(key=lambda one: (measures.index(one.measure), one.at or 0.0))
        known = {_key(one): one for one in every}
        several = Counter((one.measure, one.quantity, one.at) for one in known.values())
        found = [{_key(one): one for one in model.estimates} for model in self.models]
        differences = {_key(one): one for one in self.differences}
        return [
            Row(
                _label(one, several[one.measure, one.quantity, one.at] > 1),
                tuple(of.get(key) for of in found),
                differences.get(key),
            )
            for key, one in known.items()
        ]

    def differences_of(self, measure: str) -> tuple[QuantityDifference, ...]:
        """Those of one measure."""
        return tuple(one for one in self.differences if one.measure == measure)

    def __str__(self) -> str:
        head = ["", *(model.name for model in self.models)]
        head += ["difference"] if len(self.models) > 1 else []
        cells = [
            [row.label, *(_text(cell) for cell in (*row.estimates, row.difference))][: len(head)]
            for row in self.rows()
        ]
        cells += self._bound_cells()
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (head, *cells)
        ]
        told = (
            f"{self.samples} samples; means over samples unless stated; 95 % intervals over "
            f"samples in brackets"
        )
        if len(self.models) > 1:
            told += "; compared sample by sample, medians by the median of the ratios"
        return "\n".join([told, *lines, *(f"Note: {note}" for note in self.notes)])

    def _bound_cells(self) -> list[list[str]]:
        if all(model.bound is None for model in self.models):
            return []
        bounds = [None if m.bound is None else float(m.bound.cross_entropy) for m in self.models]
        loose = [model.looseness for model in self.models]
        empty = [""] if len(self.models) > 1 else []
        return [
            [label, *("–" if v is None else f"{v:.4g}" for v in values), *empty]
            for label, values in (
                ("bound of the Hessian norm (nats / input unit²)", bounds),
                ("that bound over the largest Hessian norm found", loose),
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON terms, every sample's values included."""
        return {name: to_json(getattr(self, name)) for name in self.__dataclass_fields__}


def _key(one: QuantityEstimate) -> tuple[str, str, str, float | None]:
    return one.measure, one.quantity, one.statistic, one.at


def _label(one: QuantityEstimate, several: bool) -> str:
    return one.label + (f", {one.statistic}" if several or one.statistic not in _PLAIN else "")


_PLAIN = (MEAN.name, POOLED.name, SHARE.name)
"""Statistics that a label need not name, if there is no other of the same quantity."""


def _text(cell: QuantityEstimate | None) -> str:
    return "–" if cell is None else str(cell)
