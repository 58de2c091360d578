"""What a search for a robust dial says in a report: its sentences, sections and page.

Reads a finished `RobustDialSearch`; searches and attacks nothing. What the choice rests on is in
`attack_dial_search.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from flexure.methods.attack_model_result import radius_text
from flexure.methods.robust_dial_groups import ALL_SITES
from flexure.methods.robust_dial_result import (
    ORACLE,
    CurvePoint,
    DialRow,
    RobustDialSearch,
    within_text,
)
from flexure.report.attack_curves import NORMS, estimate_of, look_of, paired_text, share_text
from flexure.report.attack_dial_search import (
    best_shared,
    candidate_sections,
    dial_text,
    group_sections,
    map_sections,
    points_of,
    radius_of,
)
from flexure.report.attack_lines import Line, Mark, labelled_lines
from flexure.report.attack_plots import (
    side_by_side,
)
from flexure.report.canvas import INK
from flexure.report.page import Section, write_page
from flexure.report.tables import Table, percent, table_of

__all__ = ["robust_dial_page", "robust_dial_sections", "robust_dial_summary"]

SHOWS = (
    "How accurate this network is at each dial that was tried, without and under the attacks that "
    "are named, and what the dial chosen on validation data does on test data.",
    "How sure the test numbers and the paired differences to the plain network are, as far as the "
    "draw of test samples goes.",
)
DOES_NOT_SHOW = (
    "That a dial makes the network robust: attacks bound the robust accuracy from above, and a "
    "stronger one may find more.",
    "Anything of radii, norms and dials that were not tried.",
    "An unbiased number on validation data: the best of many dials looks better there than it is.",
    "What can be reached: the oracle is the best shared dial on the test data that it is reported "
    "on, by the attack of the search, and therefore too good; dials by groups may still do better.",
)


def robust_dial_page(
    path: str | os.PathLike[str],
    found: RobustDialSearch,
    *,
    title: str,
    run: Table | None = None,
) -> Path:
    """Writes the page of one search to `path`; see `write_page`."""
    return write_page(
        path,
        title=title,
        summary=robust_dial_summary(found),
        sections=robust_dial_sections(found),
        shows=SHOWS,
        does_not_show=DOES_NOT_SHOW,
        run=run,
    )


def robust_dial_summary(found: RobustDialSearch) -> tuple[str, ...]:
    """What was chosen, and what that does on test data, in sentences."""
    chosen, plain, at = found.chosen, found.plain, radius_of(found)
    head = (
        f"Chosen for {at} on {found.samples['val']} validation samples, among "
        f"{len(found.candidates)} candidates, by {found.attack}: {dial_text(chosen.dial)}; there "
        f"{percent(chosen.robust[found.eps])} right under attack and {percent(chosen.clean)} "
        f"without; plain network: {percent(plain.robust[found.eps])} and {percent(plain.clean)}."
    )
    return (head, *_test_sentences(found), *_overlap(found), *(f"Note: {n}." for n in found.notes))


def robust_dial_sections(found: RobustDialSearch) -> list[Section]:
    """Test data first, then what the choice rests on."""
    return [
        *_row_sections(found),
        *_curve_sections(found),
        *group_sections(found),
        *map_sections(found),
        *candidate_sections(found),
        _account_section(found),
    ]


def _test_sentences(found: RobustDialSearch) -> list[str]:
    if not found.rows:
        return [
            "No test data was given, so no gain is reported: on the validation data it would be "
            "optimistic, since the dial was chosen by them."
        ]
    plain, row, at = found.rows[0], found.row, radius_of(found)
    told = []
    if row is None or row.dial is None:
        told.append("The choice is the plain network: nothing was gained and nothing lost.")
    elif found.eps in row.robust:
        told.append(
            f"On {found.samples['test']} test samples, by {found.report_attack}, {at}: "
            f"{row.robust[found.eps]} % right under attack, plain network "
            f"{plain.robust[found.eps]} %; difference {row.robust_difference[found.eps]} points, "
            f"sample by sample."
        )
        told.append(
            f"Without an attack: {row.clean} %, plain network {plain.clean} %; difference "
            f"{row.clean_difference} points. {_loss_text(found, row)}"
        )
    if found.oracle is not None and found.eps in found.oracle.robust:
        told.append(
            f"{ORACLE[:1].upper()}{ORACLE[1:]}, for comparison only: "
            f"{dial_text(found.oracle.dial)}; {found.oracle.robust[found.eps]} % under attack, "
            f"{found.oracle.clean} % without."
        )
    return told


def _loss_text(found: RobustDialSearch, row: DialRow) -> str:
    """Whether the clean accuracy that was asked for is kept, and how surely."""
    if row.interval_within:
        return f"The loss is within {points_of(found)} by the interval, too."
    if math.isnan(row.clean_difference.low):
        where = "within" if row.mean_within else "beyond"
        return f"The loss is {where} {points_of(found)}; one sample has no interval."
    if row.mean_within:
        return f"The loss is within {points_of(found)} in the mean; the interval goes beyond."
    return f"The loss is beyond {points_of(found)}."


def _overlap(found: RobustDialSearch) -> list[str]:
    if not found.shared_samples:
        return []
    return [
        f"Note: {found.shared_samples} samples occur in the validation and the test data: test "
        f"numbers are optimistic."
    ]


def _row_sections(found: RobustDialSearch) -> list[Section]:
    """The best dial of each kind on test data."""
    if not found.rows:
        return []
    rows = [*found.rows, *([] if found.oracle is None else [found.oracle])]
    series = [("without an attack", [estimate_of(row.clean) for row in rows])]
    if any(found.eps in row.robust for row in rows):
        values = [estimate_of(row.robust.get(found.eps)) for row in rows]
        series.append((f"under attack, {radius_of(found)}", values))
    picture = side_by_side(
        [row.name for row in rows], series, title="Dials on test data", axis="accuracy (%)"
    )
    oracle = (
        ""
        if found.oracle is None
        else " But the oracle: it is the best of the shared dials on these test data by the attack "
        "of the search, is too good for that reason, and is here for comparison only."
    )
    return [
        Section(
            "The chosen dials on test data",
            pictures=(picture,),
            table=_choice_table(found, rows),
            caption=f"Each dial was chosen on validation data, and is the best of its kind there."
            f"{oracle} Attack: {found.report_attack}. Bars and brackets: 95 % intervals over "
            f"samples; differences to the plain network are paired sample by sample, in points. "
            f"Loss within {points_of(found)}: of the mean, and of the interval's lower end.",
        ),
        Section(
            "The chosen dials at every radius",
            table=_radius_table(found, rows),
            caption=f"On test data, by {found.report_attack}. Won: right under attack with this "
            f"dial and not with the plain network; lost: the other way round.",
        ),
    ]


def _choice_table(found: RobustDialSearch, rows: Sequence[DialRow]) -> Table:
    at = radius_of(found)
    columns = ("choice", "clean, %", "difference", f"{at}, %", f"difference at {at}",
               "loss within: mean / interval")  # fmt: skip
    cells: list[tuple[str | None, ...]] = []
    for row in rows:
        if row.dial is None:
            told = share_text(row.robust.get(found.eps))
            cells.append((row.name, share_text(row.clean), None, told, None, None))
            continue
        cells.append((
            f"{row.name}: {dial_text(row.dial)}", share_text(row.clean),
            paired_text(row.clean_difference), share_text(row.robust.get(found.eps)),
            paired_text(row.robust_difference.get(found.eps)),
            within_text(row).replace(", ", " / "),
        ))  # fmt: skip
    return table_of(columns, cells, *columns[1:])


def _radius_table(found: RobustDialSearch, rows: Sequence[DialRow]) -> Table:
    columns = ("choice", "radius", "right under attack, %", "difference, points", "won / lost")
    cells = []
    for row in rows:
        for eps, told in row.robust.items():
            between = None if row.dial is None else row.robust_difference.get(eps)
            won = None if between is None else f"{between.won} / {between.lost}"
            cells.append((row.name, radius_text(eps, found.norm), share_text(told),
                          paired_text(between), won))  # fmt: skip
    return table_of(columns, cells, *columns[1:])


def _curve_sections(found: RobustDialSearch) -> list[Section]:
    """Accuracy against beta, on test data, with the choice and the oracle marked."""
    points = sorted(found.curve, key=lambda point: point.beta)
    if not points:
        return []
    betas = [point.beta for point in points]
    lines = [Line("no attack", betas, [estimate_of(p.clean) for p in points], band=True)]
    for k, eps in enumerate(points[0].robust, 1):
        values = [estimate_of(point.robust.get(eps)) for point in points]
        stressed = eps == found.eps
        label = f"{NORMS.get(found.norm, found.norm)} {radius_text(eps, found.norm)}"
        role = "worst" if stressed else "line"
        lines.append(Line(label, betas, values, role, stressed, look_of(k)))
    picture = labelled_lines(
        sorted(lines, key=lambda line: line.role == "worst"),
        title="Accuracy against beta",
        x_label=f"beta, of all sites (no unit; {_at_one(found)})",
        y_label="accuracy on test data (%)",
        marks=_marks(found),
    )
    return [
        Section(
            "Accuracy against beta",
            pictures=(picture,),
            caption=f"On test data, by the attack of the search, all sites with one dial: "
            f"{_curve_setting(points)}. Bands are 95 % intervals over samples. The lines are what "
            f"the dial does, not what it was chosen by; the stressed one is the radius that it "
            f"was chosen for.",
        )
    ]


def _at_one(found: RobustDialSearch) -> str:
    if found.plain_at_one:
        return "1 is the plain network"
    return "at 1 activations are piecewise affine"


def _curve_setting(points: Sequence[CurvePoint]) -> str:
    first = points[0]
    kept = "not calibrated" if first.match is None else f"calibrated ({first.match})"
    return f"c = {first.c:.4g}, {kept}"


def _marks(found: RobustDialSearch) -> list[Mark]:
    """Where the best shared dial is, and where the oracle's."""
    best = best_shared(found)
    marks = []
    if best is not None and best.dial is not None:
        beta, c = best.dial.betas[ALL_SITES], best.dial.cs[ALL_SITES]
        who = "chosen" if best == found.chosen else "best shared dial"
        marks.append(Mark(f"{who} on validation data: beta = {beta:.4g}, c = {c:.4g}", beta))
    oracle = None if found.oracle is None else found.oracle.dial
    if oracle is not None and oracle.shared:
        beta, c = oracle.betas[ALL_SITES], oracle.cs[ALL_SITES]
        label = f"{ORACLE}: beta = {beta:.4g}, c = {c:.4g}"
        marks.append(Mark(label, beta, colour=INK, dashes=(0, (1, 2))))
    return marks


def _account_section(found: RobustDialSearch) -> Section:
    rows = [(f"time of {name}, s", f"{seconds:.4g}") for name, seconds in found.seconds.items()]
    rows += [(f"samples: {name}", str(count)) for name, count in found.samples.items()]
    rows += [("groups", str(len(found.groups))), ("seed", str(found.seed))]
    return Section("Account", table=table_of(("what", "value"), rows, "value"))
