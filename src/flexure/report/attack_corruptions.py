"""What common corruptions and shifts say in a report: its sentences, sections and page.

Reads a finished `CorruptionAccuracy`; corrupts and measures nothing.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from flexure.methods.attack_model_shares import PairedShare, Share
from flexure.methods.corruption_accuracy_result import (
    CorruptedCell,
    CorruptionAccuracy,
    CorruptionMean,
)
from flexure.methods.crossed import CrossedMean
from flexure.report.attack_lines import Line, labelled_lines
from flexure.report.attack_plots import side_by_side
from flexure.report.page import Section, write_page
from flexure.report.plots import Estimate, estimates
from flexure.report.tables import Table, table_of

__all__ = ["corruption_page", "corruption_sections", "corruption_summary"]

SHOWS = (
    "How many of these images are classified rightly after each corruption, at each severity, and "
    "how two models differ on the very same corrupted images.",
    "How sure the accuracies and the differences are, as far as the draw of images goes.",
)
DOES_NOT_SHOW = (
    "Robustness against an attack: corruptions are drawn without regard to the model.",
    "What other corruptions or other severities would give.",
    "What another training of the same network, or another draw of the random corruptions, would "
    "give: intervals are over images.",
)
_OWN = (
    "Numbers to hold against published ones: these corruptions were generated here from these "
    "images, and are not the official files."
)


def corruption_page(
    path: str | os.PathLike[str],
    found: CorruptionAccuracy,
    *,
    title: str,
    run: Table | None = None,
) -> Path:
    """Writes the page of one evaluation to `path`; see `write_page`."""
    generated = found.cells and found.official is None
    return write_page(
        path,
        title=title,
        summary=corruption_summary(found),
        sections=corruption_sections(found),
        shows=SHOWS,
        does_not_show=(*DOES_NOT_SHOW, *([_OWN] if generated else [])),
        run=run,
    )


def corruption_summary(found: CorruptionAccuracy) -> tuple[str, ...]:
    """What was found, in sentences."""
    names = " and ".join(found.names[: _models(found)])
    source = "" if found.official is None else f" Corrupted images: {found.official}."
    head = (
        f"{names} on {found.samples} images; {_count(len(found.corruptions), 'corruption')}, "
        f"{_count(len(found.shifts), 'shift')}. Intervals in brackets: 95 %, over images.{source}"
    )
    told = [_sentence(found, "As they are", found.clean)]
    told += [_sentence(found, f"Shift “{cell.name}”", cell) for cell in found.shifts]
    if found.mean is not None:
        told.append(_sentence(found, "Mean over all corruptions and severities", found.mean))
    told += [_sentence(found, f"Mean over {name}", found.over(name)) for name in found.groups]
    return (head, *told, *(f"Note: {note.rstrip('.')}." for note in found.notes))


def corruption_sections(found: CorruptionAccuracy) -> list[Section]:
    """Corruption by corruption, differences, severities, and the table of all numbers."""
    return [
        _side_section(found),
        *_difference_sections(found),
        *_severity_sections(found),
        _table_section(found),
    ]


def _models(found: CorruptionAccuracy) -> int:
    return 1 if found.clean.reference is None else 2


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _sentence(found: CorruptionAccuracy, what: str, one: CorruptedCell | CorruptionMean) -> str:
    values = [
        f"{name} {_text(told)} %"
        for name, told in zip(found.names, (one.accuracy, one.reference_accuracy), strict=True)
        if told is not None
    ]
    told = one.difference
    if told is None:
        return f"{what}: {values[0]}."
    low, high = told.low, told.high
    doubt = "; the interval includes 0, no difference is shown" if low <= 0 <= high else ""
    return f"{what}: {', '.join(values)}; difference {_text(told, '+')} points{doubt}."


def _text(told: Share | PairedShare | CrossedMean, sign: str = "") -> str:
    """In per cent, or in points, with the interval where there is one."""
    value = 100 * (told.mean if isinstance(told, CrossedMean) else told.value)
    if not (math.isfinite(told.low) and math.isfinite(told.high)):
        return f"{value:{sign}.1f}"
    return f"{value:{sign}.1f} [{100 * told.low:{sign}.1f}, {100 * told.high:{sign}.1f}]"


def _estimate(told: Share | PairedShare | CrossedMean | None, label: str = "") -> Estimate | None:
    if told is None:
        return None
    value = told.mean if isinstance(told, CrossedMean) else told.value
    return Estimate(label, 100 * value, 100 * told.low, 100 * told.high)


def _rows(found: CorruptionAccuracy) -> dict[str, CorruptedCell | CorruptionMean]:
    """What is drawn, by name: as they are, shifts, corruptions, and the mean of all."""
    rows: dict[str, CorruptedCell | CorruptionMean] = {"as they are": found.clean}
    rows |= {f"shift: {cell.name}": cell for cell in found.shifts}
    for name in found.corruptions:
        rows[name + "*" * (name in found.substitutes)] = found.over(name)
    if found.mean is not None:
        rows[f"mean: {found.mean.name}"] = found.mean
    return rows


def _stars(found: CorruptionAccuracy) -> str:
    if not found.substitutes:
        return ""
    return " *: differs in kind from the official corruption of that name, see the notes above."


def _side_section(found: CorruptionAccuracy) -> Section:
    rows = _rows(found)
    series = [(found.names[0], [_estimate(one.accuracy) for one in rows.values()])]
    if _models(found) > 1:
        series.append((found.names[1], [_estimate(r.reference_accuracy) for r in rows.values()]))
    return Section(
        "Corruption by corruption",
        pictures=(side_by_side(list(rows), series, title="Accuracy", axis="accuracy (%)"),),
        caption=f"Of a corruption the mean over its severities. Bars are 95 % intervals over "
        f"{found.samples} images.{_stars(found)}",
    )


def _difference_sections(found: CorruptionAccuracy) -> list[Section]:
    """Paired differences, where two models were measured."""
    rows = {name: one.difference for name, one in _rows(found).items()}
    drawn = [
        row
        for name, told in rows.items()
        if (row := _estimate(told, name)) is not None and math.isfinite(row.low + row.high)
    ]
    if not drawn:
        return []
    first, second = found.names
    return [
        Section(
            f"{first} minus {second}",
            pictures=(
                estimates(
                    drawn,
                    axis=f"accuracy minus that of {second} (points)",
                    highlight=[row.label for row in drawn if row.label.startswith("mean: ")],
                ),
            ),
            caption="Differences image by image, of a corruption of the means over its "
            "severities, with 95 % intervals over images. Right of the dashed line the first is "
            f"better.{_stars(found)}",
        )
    ]


def _severity_sections(found: CorruptionAccuracy) -> list[Section]:
    """Accuracy against the severity, over all corruptions; 0 is as they are."""
    severities = sorted({cell.severity for cell in found.cells if cell.severity is not None})
    if not severities:
        return []
    means = [found.at(severity) for severity in severities]
    x = [0, *severities]
    values = [_estimate(found.clean.accuracy), *(_estimate(one.accuracy) for one in means)]
    lines = [Line(found.names[0], x, values, band=True)]
    if _models(found) > 1:
        values = [
            _estimate(found.clean.reference_accuracy),
            *(_estimate(one.reference_accuracy) for one in means),
        ]
        lines.append(Line(found.names[1], x, values, band=True, look=1))
    picture = labelled_lines(
        lines,
        title="Mean over corruptions",
        x_label="severity (no unit; 0: images as they are)",
        y_label="accuracy (%)",
    )
    return [
        Section(
            "Accuracy against the severity",
            pictures=(picture,),
            caption="Means over all corruptions; bands are 95 % intervals over images.",
        )
    ]


def _table_section(found: CorruptionAccuracy) -> Section:
    rows = found.rows()
    columns = tuple(rows[0])
    cells = [tuple(row[column] or None for column in columns) for row in rows]
    errors = (
        " Errors/errors: the first model's errors over the second's, of several corruptions the "
        "mean of theirs."
        if _models(found) > 1
        else ""
    )
    return Section(
        "All numbers",
        table=table_of(columns, cells, *columns[2:]),
        caption="Accuracy in %, differences in points, in brackets 95 % intervals over images. Of "
        "a corruption the mean over its severities; the columns 1 to 5 are the first model's "
        f"accuracy at each.{errors}{_stars(found)}",
    )
