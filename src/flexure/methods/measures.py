"""The table of measures that `measure_model` runs: how each is called, stored and compared.

A measure joins by one row. What it computes is its own module's, below this floor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from flexure.contracts import Measure
from flexure.measure.calibration import Calibration, calibration
from flexure.measure.curvature import Curvature, curvature
from flexure.measure.rate import CurvatureRate, curvature_rate
from flexure.measure.robustness_of_gradients import GradientChange, gradient_change
from flexure.methods.paired import (
    MEAN,
    MEDIAN,
    POOLED,
    Quantity,
)
from flexure.per_sample import PerSample

__all__ = ["BOUND", "MEASURES", "MeasureRow", "Settings"]

BOUND = "bound"
"""The name of the one measure that needs no samples (`hessian_bound`)."""


@dataclass(frozen=True)
class Settings:
    """What measures are told; the same for both models.

    Attributes:
        tol: relative residual at which the Hessian norm of a sample counts as converged.
        radii: l2 norms of the noise, in units of the input; None: the measure's own.
        directions: of the curvature rate, for each sample.
        orders: of the derivatives that the curvature rate is fitted to.
        normalization: of these, `"raw"` or `"factorial"`.
        memory: bytes that the Hessian norm may hold at once; None: no limit.
        limits: measure -> how many samples it takes, the first ones; absent: all.
        seed: of everything random.
    """

    tol: float
    radii: tuple[float, ...] | None
    directions: int
    orders: tuple[int, ...]
    normalization: str
    memory: int | None
    limits: Mapping[str, int]
    seed: int


@dataclass(frozen=True)
class MeasureRow:
    """One measure.

    Attributes:
        bind: the measure of a model with these settings.
        result: what it returns.
        quantities: what is told of its results, and compared between two models.
        caution: what a reader must know of a result besides, or None.
    """

    bind: Callable[[nn.Module, Settings], Measure]
    result: type[PerSample]
    quantities: tuple[Quantity, ...]
    caution: Callable[[Any], str | None] = lambda result: None


def _curvature(model: nn.Module, settings: Settings) -> Measure:
    return partial(curvature, model, tol=settings.tol, memory=settings.memory)


def _rate(model: nn.Module, settings: Settings) -> Any:
    return partial(
        curvature_rate,
        model,
        orders=settings.orders,
        directions=settings.directions,
        normalization=settings.normalization,
    )


def _gradient_change(model: nn.Module, settings: Settings) -> Measure:
    given: dict[str, Any] = {} if settings.radii is None else {"radii": settings.radii}
    return partial(gradient_change, model, tol=settings.tol, **given)


def _calibration(model: nn.Module, settings: Settings) -> Measure:
    return partial(calibration, model)


def _carried_by_few(found: CurvatureRate) -> str | None:
    """Squares of derivatives span decades, so that a few samples may decide the rate."""
    effective = float(found.effective_samples.min())
    if effective >= _FEW:
        return None
    return (
        f"few samples decide the curvature rate: as few as {effective:.1f} equal ones would carry "
        f"an order, of {len(found)}; its interval is too narrow, more samples help"
    )


_FEW = 10  # equal samples; with fewer, a bootstrap over samples is no guide

_OF_NORMS = (MEDIAN, MEAN)  # norms span decades: a mean of them is that of few samples

MEASURES: dict[str, MeasureRow] = {
    "curvature": MeasureRow(
        _curvature,
        Curvature,
        (
            Quantity("normalized", "normalised curvature", _OF_NORMS),
            Quantity("hessian_norm", "Hessian norm", _OF_NORMS),
            Quantity("gradient_norm", "gradient norm", _OF_NORMS),
        ),
    ),
    "rate": MeasureRow(
        _rate,
        CurvatureRate,
        (Quantity("rate", "curvature rate", (POOLED,)),),
        _carried_by_few,
    ),
    "gradient_change": MeasureRow(
        _gradient_change,
        GradientChange,
        (Quantity("change", "relative gradient change under noise", (MEAN,), "radii"),),
    ),
    "calibration": MeasureRow(
        _calibration,
        Calibration,
        (
            Quantity("correct", "accuracy", (MEAN,)),
            Quantity("nll", "negative log-likelihood (nats)", (MEAN,)),
            Quantity("ece", "expected calibration error", (POOLED,)),
        ),
    ),
}
"""Measure -> its row."""
