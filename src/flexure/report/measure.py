"""What measuring one or two models says in a report: its sentences, sections and page.

Reads finished measurements; measures and chooses nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flexure.measure.over import Summary
from flexure.methods.measurements_result import Measurements, ModelMeasurements, Row
from flexure.methods.paired import QuantityDifference
from flexure.report.canvas import Curve, Picture
from flexure.report.geometry_plots import (
    Bin,
    Fit,
    Samples,
    against_confidence,
    contributions,
    distributions,
    fits,
    log_curves,
    reliability,
)
from flexure.report.page import Section, write_page
from flexure.report.tables import Table, percent, table_of

__all__ = ["measure_page", "measure_sections", "measure_summary"]

SHOWS = (
    "The geometry of these networks in input space at these samples: gradient and Hessian norms of "
    "the loss, their ratio, and how fast derivatives grow with their order.",
    "How sure means, medians and differences are, as far as the draw of samples goes.",
)
DOES_NOT_SHOW = (
    "Robustness: gradients and curvature at samples say nothing of what an attack finds away from "
    "them.",
    "What another network of the same kind, trained once more, would give: intervals are over "
    "samples, not over trainings.",
    "The limit of the curvature rate: it is a slope over the orders that are named.",
)
_NORMS = (
    ("normalized", "Normalised curvature", "C = ‖H‖ / g (1 / input unit)"),
    ("gradient_norm", "Gradient norm", "g (nats / input unit)"),
    ("hessian_norm", "Hessian norm", "‖H‖ (nats / input unit²)"),
)
_LAYERS = 40  # rows of the table of layers; the picture has all


def measure_page(
    path: str | os.PathLike[str], found: Measurements, *, title: str, run: Table | None = None
) -> Path:
    """Writes the page of one measurement to `path`; see `write_page`."""
    return write_page(
        path,
        title=title,
        summary=measure_summary(found),
        sections=measure_sections(found),
        shows=SHOWS,
        does_not_show=DOES_NOT_SHOW,
        run=run,
    )


def measure_summary(found: Measurements) -> tuple[str, ...]:
    """What was found, in sentences."""
    names = " and ".join(model.name for model in found.models)
    what = f"{names}, measured on {found.samples} samples; intervals are 95 %, over samples."
    rows = [row for row in found.rows() if _is_headline(row)]
    return (what, *(_sentence(found, row) for row in rows), *(f"Note: {n}." for n in found.notes))


def measure_sections(found: Measurements) -> list[Section]:
    """Table, then a section for each measure that some model has."""
    makers: tuple[Callable[[Measurements], list[Section]], ...] = (
        _table_section,
        _distribution_sections,
        _confidence_sections,
        _noise_sections,
        _rate_sections,
        _bound_sections,
        _calibration_sections,
    )
    return [section for make in makers for section in make(found)]


def _is_headline(row: Row) -> bool:
    """Means of norms are those of a few samples, and the noise curve has a picture."""
    first = next(one for one in row.estimates if one is not None)
    return first.statistic != "mean" or first.measure == "calibration"


def _sentence(found: Measurements, row: Row) -> str:
    told = [
        f"{model.name}: {estimate}"
        for model, estimate in zip(found.models, row.estimates, strict=True)
        if estimate is not None
    ]
    against = "" if row.difference is None else f" {_verdict(row.difference)}"
    return f"{row.label[:1].upper()}{row.label[1:]}: {'; '.join(told)}.{against}"


def _verdict(told: QuantityDifference) -> str:
    compared = "Ratio" if told.is_ratio else "Difference"
    sure = "" if told.certain else ": the interval holds that of equal networks"
    return f"{compared} on the same samples {str(told).removeprefix('times ')}{sure}."


def _table_section(found: Measurements) -> list[Section]:
    several = len(found.models) > 1
    columns = ["quantity", *(model.name for model in found.models)]
    columns += ["difference, or ratio of medians"] if several else []
    rows = [
        [row.label, *row.estimates, *([row.difference] if several else [])] for row in found.rows()
    ]
    paired = (
        " Differences are the first's minus the second's on the same samples; for a median, it is "
        "the median of the samples' ratios (the first over the second)."
        if several
        else ""
    )
    return [
        Section(
            "Numbers",
            table=table_of(columns, rows, *columns[1:]),
            caption="In brackets: 95 % intervals over the draw of samples. The loss is the "
            f"cross-entropy at the true label, in nats.{paired}",
        )
    ]


def _distribution_sections(found: Measurements) -> list[Section]:
    models = [model for model in found.models if model.curvature is not None]
    if not models:
        return []
    pictures = []
    for name, title, axis in _NORMS:
        samples = [Samples(model.name, _values(model, "curvature", name)) for model in models]
        drawn = _drawable(samples)
        pictures += [distributions(drawn, title=title, axis=axis)] if drawn else []
    shares = "; ".join(
        f"{model.name}: {percent(model.curvature.converged)}"
        for model in models
        if model.curvature is not None
    )
    return [
        Section(
            "Curvature and gradients over samples",
            pictures=tuple(pictures),
            caption="The share of samples below each value; axes are logarithmic, and zeros are "
            f"not drawn. Samples whose Hessian norm has converged: {shares}.",
        )
    ]


def _confidence_sections(found: Measurements) -> list[Section]:
    pictures: list[Picture] = []
    for model in found.models:
        if model.curvature is None or model.calibration is None:
            continue
        values = _values(model, "curvature", "normalized")
        sure = _values(model, "calibration", "confidence")[: len(values)]
        drawn = _drawable([Samples(model.name, values)])
        pictures += [
            against_confidence(one, sure, title=model.name, axis="C = ‖H‖ / g (1 / input unit)")
            for one in drawn
        ]
    if not pictures:
        return []
    return [
        Section(
            "Curvature against confidence",
            pictures=tuple(pictures),
            caption="Each dot is a sample's normalised curvature; samples of which the network is "
            "sure are on the left. The line joins medians of groups of equally many samples.",
        )
    ]


def _noise_sections(found: Measurements) -> list[Section]:
    lines: list[Curve] = []
    for model in found.models:
        if model.gradient_change is not None:
            lines += _noise_lines(model.name, model.gradient_change)
    if not lines:
        return []
    return [
        Section(
            "Gradients under noise",
            pictures=(
                log_curves(
                    lines,
                    title="Relative gradient change",
                    x_label="noise (l2 norm, input units)",
                    y_label="‖∇f(x+ε) − ∇f(x)‖ / ‖∇f(x)‖",
                ),
            ),
            caption="Mean over samples of the change under random noise of each norm, with one "
            "standard error, and the median over samples of Proposition 1's bound, e to the power "
            "of noise times curvature, minus 1. The curvature in it is the largest that was found "
            "on points of the segment: an estimate. At kinks of ReLU the gradient jumps, which no "
            "curvature sees: there the bound does not hold.",
        )
    ]


def _noise_lines(name: str, summary: Summary[Any]) -> list[Curve]:
    """A network's change and its bound; none where a logarithmic axis can show neither."""
    radii, mean = list(summary.result.radii), summary.mean["change"]
    bound = summary.result.estimated_bound.double().nanquantile(0.5, dim=0)
    if not all(bool((line.isfinite() & (line > 0)).all()) for line in (mean, bound)):
        return []
    errors = summary.standard_error["change"].nan_to_num(0.0)
    return [
        Curve(f"{name}: mean", radii, mean.tolist(), errors.tolist()),
        Curve(f"{name}: bound", radii, bound.tolist()),
    ]


def _rate_sections(found: Measurements) -> list[Section]:
    lines = []
    for model in found.models:
        if model.rate is None:
            continue
        result = model.rate.result
        orders, logs = [float(n) for n in result.orders], result.log_norms.tolist()
        middle = sum(logs) / len(logs) - result.rate * sum(orders) / len(orders)
        lines.append(Fit(model.name, orders, logs, result.rate, middle))
    if not lines:
        return []
    picture = fits(
        lines, title="Curvature rate", x_label="order n", y_label="log ‖Dⁿf‖ (n-th derivative)"
    )
    return [
        Section(
            "Growth of derivatives",
            pictures=(picture,),
            caption="Logarithm of the root mean square n-th derivative of the probability of the "
            "predicted class along random directions; the slope is the curvature rate over these "
            f"orders ({_normalization(found)}).",
        )
    ]


def _normalization(found: Measurements) -> str:
    result = next(model.rate.result for model in found.models if model.rate is not None)
    scaled = "calibrated for the dimension" if result.calibrate else "not calibrated"
    return f"{result.normalization} normalisation, {scaled}"


def _bound_sections(found: Measurements) -> list[Section]:
    return [
        _bound_section(model)
        for model in found.models
        if model.bound is not None and model.bound.contributions
    ]


def _bound_section(model: ModelMeasurements) -> Section:
    bound: Any = model.bound
    rows = bound.contributions
    top = max(rows, key=lambda row: row.share)
    loose = (
        ""
        if model.looseness is None
        else f" It is {model.looseness:.3g} times the largest Hessian norm that was measured."
    )
    shares = [row.share for row in rows]
    return Section(
        f"A bound for every input: {model.name}",
        (
            f"Without data: the Hessian norm of the cross-entropy is at most "
            f"{bound.cross_entropy:.4g} nats / input unit² at any input.{loose}",
        ),
        (contributions(shares, title="Where the bound comes from", highest=top.name),),
        table=table_of(
            ("activation", "largest curvature", "sensitivity", "Lipschitz constant to it", "share"),
            [
                (row.name, f"{row.curvature:.3g}", f"{row.sensitivity:.3g}",
                 f"{row.lipschitz:.3g}", percent(row.share))
                for row in sorted(rows, key=lambda row: -row.share)[:_LAYERS]
            ],
            "largest curvature", "sensitivity", "Lipschitz constant to it", "share",
        ),
        caption="Each activation adds its largest second derivative, times how much the logits can "
        "depend on it, times the square of how much it can depend on the input; the largest first.",
    )  # fmt: skip


def _calibration_sections(found: Measurements) -> list[Section]:
    pictures, told = [], []
    for model in found.models:
        if model.calibration is None:
            continue
        result = model.calibration.result
        bins = [Bin(b.confidence, b.accuracy, b.low, b.high, b.count) for b in result.reliability()]
        pictures.append(reliability(bins, title=model.name))
        told.append(f"{model.name} {percent(result.ece)}")
    if not pictures:
        return []
    return [
        Section(
            "Calibration",
            pictures=tuple(pictures),
            caption="The share of right predictions among samples of similar confidence, with 95 % "
            f"intervals. Expected calibration error, 15 bins: {'; '.join(told)}.",
        )
    ]


def _values(model: ModelMeasurements, measure: str, name: str) -> list[float]:
    values: list[float] = model.summaries[measure].result.samples()[name].double().tolist()
    return values


def _drawable(samples: Sequence[Samples]) -> list[Samples]:
    """Those with a value that a logarithmic axis can show."""
    return [one for one in samples if any(0 < value < math.inf for value in one.values)]
