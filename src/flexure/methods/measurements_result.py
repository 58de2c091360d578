"""What measuring one or two models found. The measuring itself is in `measurements.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flexure.methods.paired import PairedDifference
from flexure.record import to_json

if TYPE_CHECKING:
    from flexure.measure.bounds import HessianBound
    from flexure.measure.over import Summary

__all__ = ["Measurements", "ModelMeasurements"]


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
        bound: the data-free bound of the Hessian norm; None where it was refused or not asked for.
        looseness: that bound over the largest Hessian norm that was measured; None without both.
        refusals: measure -> why the model does not have it, and what would help; one line.
        seconds: measure -> wall-clock seconds, those of an interrupted run not included.
    """

    name: str
    samples: int
    summaries: Mapping[str, Summary[Any]]
    bound: HessianBound | None = None
    looseness: float | None = None
    refusals: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

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
            converge.
        settings: what the measures were told (seed, tolerance, radii, orders, limits), by name.
    """

    models: tuple[ModelMeasurements, ...]
    differences: tuple[PairedDifference, ...]
    notes: tuple[str, ...]
    settings: Mapping[str, Any]

    @property
    def samples(self) -> int:
        """Labelled samples that were given."""
        return self.models[0].samples

    def differences_of(self, measure: str) -> tuple[PairedDifference, ...]:
        """Those of one measure."""
        return tuple(one for one in self.differences if one.measure == measure)

    def to_dict(self) -> dict[str, Any]:
        """Everything in JSON terms, every sample's values included."""
        return {name: to_json(getattr(self, name)) for name in self.__dataclass_fields__}
