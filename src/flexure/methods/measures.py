"""The table of measures that `measure_model` runs: how each is called, stored and compared.

A measure joins by one row. What it computes is its own module's, below this floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import nn

from flexure.contracts import FlexureError, Measure
from flexure.measure.calibration import Calibration, calibration
from flexure.measure.curvature import Curvature, curvature
from flexure.measure.rate import CurvatureRate, curvature_rate
from flexure.measure.robustness_of_gradients import RADII, GradientChange, gradient_change
from flexure.methods.paired import MEAN, MEDIAN, PLUG_IN, POOLED, SHARE, Quantity
from flexure.per_sample import PerSample

__all__ = ["BOUND", "FEW", "MEASURES", "MeasureRow", "Settings"]

BOUND = "bound"
"""The name of the one measure that needs no samples (`hessian_bound`)."""

FEW = 10
"""Equal samples below which neither a bootstrap nor a t-interval over samples is a guide. Of
log-normal values whose effective number is at least this, t-intervals hold the mean in three of
four draws or more, of others in fewer (simulated in the tests of `measured_notes.py`)."""


@dataclass(frozen=True)
class Settings:
    """What measures are told; the same for both models.

    Attributes:
        tol: relative residual at which the Hessian norm of a sample counts as converged.
        max_products: Hessian-vector products that a sample may take for it.
        radii: l2 norms of the noise, in units of the input; None: the measure's own.
        directions: of the curvature rate, for each sample.
        orders: of the derivatives that the curvature rate is fitted to.
        normalization: of these, `"raw"` or `"factorial"`.
        memory: bytes that the Hessian norm and the noise may hold at once; None: no limit.
        limits: measure -> how many samples it takes, the first ones; absent: all.
        seed: of everything random.
    """

    tol: float
    max_products: int
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
        unconverged: a field, and what its finite values are, and what helps, at samples that have
            not converged; None: nothing can be said.
    """

    bind: Callable[[nn.Module, Settings], Measure]
    result: type[PerSample]
    quantities: tuple[Quantity, ...]
    caution: Callable[[Any], str | None] = lambda result: None
    unconverged: tuple[str, str] | None = None


def _curvature(model: nn.Module, settings: Settings) -> Measure:
    return partial(curvature, model, **_of_hessians(settings))


def _of_hessians(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("tol", "max_products", "memory")}


def _rate(model: nn.Module, settings: Settings) -> Any:
    return partial(
        curvature_rate,
        model,
        orders=settings.orders,
        directions=settings.directions,
        normalization=settings.normalization,
    )


def _gradient_change(model: nn.Module, settings: Settings) -> Measure:
    given: dict[str, Any] = {} if settings.radii is None else {"radii": _radii(settings.radii)}
    return partial(gradient_change, model, **_of_hessians(settings), **given)


def _radii(radii: tuple[float, ...]) -> tuple[float, ...]:
    """Refuses radii in words of few digits; what is no number, the measure itself refuses."""
    numbers = all(isinstance(radius, Real) for radius in radii)
    if numbers and not all(inner < outer for inner, outer in pairwise((0.0, *radii))):
        got, example = (", ".join(f"{radius:.3g}" for radius in some) for some in (radii, RADII))
        raise FlexureError(
            f"expected radii (--radii) that increase from above 0, got {got}; give for example "
            f"{example}"
        )
    return radii


def _calibration(model: nn.Module, settings: Settings) -> Measure:
    return partial(calibration, model)


def _about_rate(found: CurvatureRate) -> str | None:
    """Why there is none; or that a few samples decide it: squares of derivatives span decades."""
    try:
        rate = found.rate
    except FlexureError as error:
        return f"the curvature rate is not defined: {error}"
    if math.isnan(rate):
        return "the curvature rate is not defined: no sample has finite derivatives"
    if math.isinf(rate):
        orders = ", ".join(map(str, found.vanishing))
        return f"the curvature rate is {rate}: derivatives of order {orders} are exactly zero"
    effective = float(found.effective_samples.min())
    if effective >= FEW:
        return None
    return (
        f"few samples decide the curvature rate: as few as {effective:.1f} equal ones would carry "
        f"an order, of {len(found)}; its interval is too narrow, more samples help"
    )


def _about_calibration(found: Calibration) -> str:
    """The level of the ECE: what a perfectly calibrated network would show."""
    generator = torch.Generator().manual_seed(0)
    draws = (
        replace(found, correct=torch.bernoulli(found.confidence, generator=generator) > 0)
        for _ in range(_DRAWS)
    )
    level = sum(draw.ece for draw in draws) / _DRAWS
    return (
        f"the plug-in calibration error is biased upward at few samples: a perfectly calibrated "
        f"network with these confidences would show {level:.4g} on average on {len(found)}"
    )


_DRAWS = 300  # of labels; the mean of so many is known to a few percent of their spread

_OF_NORMS = (MEDIAN, MEAN)  # norms span decades: a mean of them is that of few samples

_RELATIVE = ("zero_gradient", "the gradient is exactly zero, and they are relative to it")

_RAISE = "raise max_products (--max-products) or tol"

_NOISE = ("radii", ", noise of {at} input units", _RELATIVE)

MEASURES: dict[str, MeasureRow] = {
    "curvature": MeasureRow(
        _curvature,
        Curvature,
        (
            Quantity(
                "normalized", "normalised curvature (1 / input unit)", _OF_NORMS, masked=_RELATIVE
            ),
            Quantity("hessian_norm", "Hessian norm (nats / input unit²)", _OF_NORMS),
            Quantity("gradient_norm", "gradient norm (nats / input unit)", _OF_NORMS),
        ),
        unconverged=("hessian_norm", f"their Hessian norms are lower bounds; {_RAISE}"),
    ),
    "rate": MeasureRow(
        _rate,
        CurvatureRate,
        (Quantity("rate", "curvature rate", (POOLED,)),),
        _about_rate,
    ),
    "gradient_change": MeasureRow(
        _gradient_change,
        GradientChange,
        (
            Quantity("change", "relative gradient change", (MEAN,), *_NOISE),
            Quantity("estimated_bound", "its estimated bound", (MEDIAN,), *_NOISE),
            Quantity("violations", "share of samples above that bound", (SHARE,), *_NOISE),
        ),
        unconverged=(
            "estimated_bound",
            f"their estimated bounds rest on lower bounds of Hessian norms; {_RAISE}",
        ),
    ),
    "calibration": MeasureRow(
        _calibration,
        Calibration,
        (
            Quantity("correct", "accuracy", (MEAN,)),
            Quantity("nll", "negative log-likelihood (nats)", (MEAN,)),
            Quantity("ece", "expected calibration error", (PLUG_IN,)),
        ),
        _about_calibration,
    ),
}
"""Measure -> its row."""
