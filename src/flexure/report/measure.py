"""What measuring one or two models says in a report: its sentences, sections and page.

Reads finished measurements; measures and chooses nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from flexure.methods.measurements_result import Measurements, Row
from flexure.methods.paired import QuantityDifference
from flexure.report.geometry_sections import (
    NOISE,
    bound_sections,
    calibration_sections,
    confidence_sections,
    distribution_sections,
    noise_sections,
    numbers_table,
    rate_sections,
    row_measure,
)
from flexure.report.page import Section, write_page
from flexure.report.tables import Table

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
        distribution_sections,
        confidence_sections,
        noise_sections,
        rate_sections,
        bound_sections,
        calibration_sections,
    )
    return [section for make in makers for section in make(found)]


def _is_headline(row: Row) -> bool:
    """Means of norms are those of a few samples, and noise has a section for its many rows."""
    if row_measure(row) == NOISE:
        return False
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
    unsure = told.has_interval and not told.certain
    sure = (
        f": the interval includes {told.neutral:g}, the data do not tell which is lower"
        if unsure
        else ""
    )
    return f"{compared} on the same samples {str(told).removeprefix('times ')}{sure}."


def _table_section(found: Measurements) -> list[Section]:
    rows = [row for row in found.rows() if row_measure(row) != NOISE]
    paired = (
        " Differences are the first's minus the second's on the same samples; for a median, it is "
        "the median of the samples' ratios (the first over the second)."
        if len(found.models) > 1
        else ""
    )
    return [
        Section(
            "Numbers",
            table=numbers_table(found, rows, _bound_rows(found)),
            caption="Means over samples unless stated; in brackets 95 % intervals over the draw of "
            f"samples. The loss is the cross-entropy at the true label, in nats.{paired}",
        )
    ]


def _bound_rows(found: Measurements) -> list[list[str | None]]:
    """The data-free bound, which has no interval: it is of all inputs."""
    bounds = [None if m.bound is None else m.bound.cross_entropy for m in found.models]
    if all(bound is None for bound in bounds):
        return []
    told = {
        "bound of the Hessian norm at any input (nats / input unit²)": bounds,
        "that bound over the largest Hessian norm found": [m.looseness for m in found.models],
    }
    return [
        [label, *(None if value is None else f"{value:.4g}" for value in values)]
        for label, values in told.items()
    ]
