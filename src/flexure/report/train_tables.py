"""The tables of a report on networks trained by several methods, and how their numbers are written.

Reads a finished `FlatTraining`; its page is `train.py`'s, pictures are in `train_sections.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from flexure.methods.flat_notes import BLIND
from flexure.methods.flat_quantities import FlatEstimate, FlatQuantity
from flexure.methods.flat_result import FlatRow, FlatTraining
from flexure.report.geometry_sections import NOISE, violated
from flexure.report.tables import Table, table_of

__all__ = [
    "NOISE_COLUMNS",
    "attack_names",
    "covers",
    "discrepancy_table",
    "estimate_table",
    "estimate_text",
    "geometry_table",
    "head_of",
    "kinks_text",
    "median_table",
    "methods_table",
    "more_table",
    "noise_table",
    "number_text",
    "site_values",
    "site_values_table",
]

GEOMETRY = ("gradient_norm", "hessian_norm", "normalized", "accuracy")
_MORE = ("nll", "ece", "rate", "lipschitz")
_PLAIN = (1e-4, 1e5)  # numbers from the one to the other are written without a power of ten
_DIGITS = 3
NOISE_COLUMNS = 3
"""Radii in the table of gradient changes; the picture has all."""

_SITES = 40  # rows of the table of learned values; the picture has all


def attack_names(found: FlatTraining) -> tuple[str, ...]:
    """Names of the quantities that are accuracies under attack, by increasing radius."""
    return tuple(f"pgd_{radius:g}" for radius in sorted(found.radii))


def head_of(quantity: FlatQuantity) -> str:
    """The head of its column, with the unit."""
    if quantity.kind == "share":
        return f"{quantity.head} (%)"
    return "mean " * (quantity.kind == "mean") + quantity.label.split(", ")[0]


def number_text(value: float, sign: str = "") -> str:
    """A number of three digits; with a power of ten where it is very small or large."""
    size = abs(value)
    if size == 0 or not math.isfinite(value) or _PLAIN[0] <= size < _PLAIN[1]:
        form = f"{sign}.0f" if 10**_DIGITS <= size < _PLAIN[1] else f"{sign}.{_DIGITS}g"
        return f"{value:{form}}"
    return f"{value:{sign}.2e}"


def estimate_text(quantity: FlatQuantity, told: FlatEstimate | None, sign: str = "") -> str | None:
    """A value and its interval, shares in per cent; None where there is none."""
    if told is None or math.isnan(told.value):
        return None
    if quantity.kind == "share":
        value = f"{100 * told.value:{sign}.2f}"
        ends = [f"{100 * v:{sign}.1f}" for v in (told.low, told.high)]
    else:
        value, *ends = (number_text(v, sign) for v in (told.value, told.low, told.high))
    return f"{value} [{ends[0]}, {ends[1]}]" if told.has_interval else value


def covers(found: FlatTraining) -> str:
    """What the intervals cover the draw of, in words."""
    return "; ".join(found.covers)


def kinks_text(found: FlatTraining) -> str:
    """Which networks have kinks, as a last sentence of a caption; empty where none has."""
    rows = [f"“{row.method}”" for row in found.rows if row.kinks]
    return f" Networks with kinks: {', '.join(rows)}; {BLIND}." if rows else ""


def methods_table(found: FlatTraining) -> Table:
    """What each method is, and how its trainings went."""
    columns = ["method", "trained numbers", "seconds per epoch", f"times {found.baseline}",
               "finished", "what it is"]  # fmt: skip
    rows = [
        (
            row.method,
            f"{row.parameters:,}",
            # Without an interval: the clock's chance is not that of seeds.
            _number(row.estimates.get("seconds_per_epoch"), "value"),
            None if math.isnan(row.relative_time) else f"{row.relative_time:.2f}",
            f"{len(row.finished)} of {len(row.runs)}",
            row.says,
        )
        for row in found.rows
    ]
    return table_of(columns, rows, *columns[1:-1])


def geometry_table(found: FlatTraining) -> Table:
    """The columns of the paper's Table 1."""
    return estimate_table(found, GEOMETRY, found.rows, lambda row: row.estimates)


def estimate_table(
    found: FlatTraining,
    names: Sequence[str],
    rows: Sequence[FlatRow],
    numbers: Callable[[FlatRow], Mapping[str, FlatEstimate]],
    sign: str = "",
) -> Table:
    """Quantities of methods with their intervals.

    Args:
        found: of which they are.
        names: of the quantities.
        rows: the methods.
        numbers: what is shown of a method, by quantity.
        sign: `"+"` for differences.
    """
    known = [found.quantities[name] for name in names]
    heads = [head_of(one) for one in known]
    cells = [
        [row.method, *(estimate_text(one, numbers(row).get(one.name), sign) for one in known)]
        for row in rows
    ]
    return table_of(["method", *heads], cells, *heads)


def median_table(found: FlatTraining) -> Table:
    """Medians over samples of what the geometry table has the means of."""
    columns = {
        f"median {found.quantities[name].label}": [
            _number(row.estimates.get(name), "median") for row in found.rows
        ]
        for name in GEOMETRY[:3]
    }
    return _by_method(found, columns)


def more_table(found: FlatTraining) -> Table:
    """Calibration, rates and bounds."""
    known = [found.quantities[name] for name in _MORE]
    columns = {
        head_of(one): [estimate_text(one, row.estimates.get(one.name)) for row in found.rows]
        for one in known
    }
    return _by_method(found, columns)


def discrepancy_table(found: FlatTraining) -> Table:
    """The paper's Table 3, signed: (test − train) / train."""
    known = [found.quantities[name] for name in GEOMETRY[:3]]
    heads = [one.label.split(" (")[0] for one in known]
    rows = [
        [row.method, *(_relative(row.discrepancies.get(name)) for name in GEOMETRY[:3])]
        for row in found.rows
        if row.discrepancies
    ]
    return table_of(["method", *heads], rows, *heads)


def noise_table(found: FlatTraining) -> Table:
    """Mean gradient changes with their intervals, one row a method, one column a radius.

    Of many radii, the first, the last and some between, evenly: a page shows no more.
    """
    rows = [row for row in found.rows if row.noise]
    every = sorted({point.radius for row in rows for point in row.noise})
    last, most = len(every) - 1, min(len(every), NOISE_COLUMNS)
    radii = [every[round(k * last / max(most - 1, 1))] for k in range(most)]
    heads = [f"noise {radius:.3g}" for radius in radii]
    cells = []
    for row in rows:
        there = {point.radius: point.change for point in row.noise}
        results = [run.test[NOISE].result for run in row.finished if NOISE in run.test]
        beyond = violated(type(results[0]).joined(results))
        cells.append([row.method, *(_change(there.get(radius)) for radius in radii), beyond])
    heads.append("beyond the bound")
    return table_of(["method", *heads], cells, *heads)


def site_values(found: FlatTraining, name: str) -> dict[str, dict[str, float]]:
    """Method -> site -> its learned value, the mean over runs; of methods that have some.

    Args:
        found: the result.
        name: `"betas"` or `"gammas"`.
    """
    learned = {}
    for row in found.rows:
        runs = [getattr(run, name) for run in row.finished if getattr(run, name)]
        if runs:
            learned[row.method] = {
                site: math.fsum(run[site] for run in runs) / len(runs) for site in runs[0]
            }
    return learned


def site_values_table(learned: Mapping[str, Mapping[str, float]]) -> Table:
    """Learned values, one row a site, at most the first forty, one column a method."""
    places = list(dict.fromkeys(site for values in learned.values() for site in values))[:_SITES]
    rows: list[list[Any]] = [
        [k, site, *(_known(values.get(site)) for values in learned.values())]
        for k, site in enumerate(places, 1)
    ]
    return table_of(["number", "site", *learned], rows, "number", *learned)


def _by_method(found: FlatTraining, columns: Mapping[str, Sequence[str | None]]) -> Table:
    """Without the columns that no method has."""
    kept = {head: cells for head, cells in columns.items() if any(cells)}
    methods = [row.method for row in found.rows]
    return table_of(["method", *kept], zip(methods, *kept.values(), strict=True), *kept)


def _number(told: FlatEstimate | None, which: Literal["value", "median"]) -> str | None:
    number = math.nan if told is None else getattr(told, which)
    return None if math.isnan(number) else number_text(number)


def _change(told: FlatEstimate | None) -> str | None:
    if told is None or math.isnan(told.value):
        return None
    ends = f" [{told.low:.2g}, {told.high:.2g}]" if told.has_interval else ""
    return f"{told.value:.3g}{ends}"


def _relative(told: FlatEstimate | None) -> str | None:
    """Decimals, not digits: a difference of nearly nothing shall look like it."""
    if told is None or math.isnan(told.value):
        return None
    ends = f" [{told.low:+.3f}, {told.high:+.3f}]" if told.has_interval else ""
    return f"{told.value:+.3f}{ends}"


def _known(value: float | None) -> str | None:
    return None if value is None else number_text(value)
