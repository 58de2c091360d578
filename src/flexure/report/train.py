"""What training by several methods says in a report: its sentences, sections and page.

Reads a finished `FlatTraining`; trains, measures and chooses nothing. Tables are in
`train_tables.py`, sections with pictures in `train_sections.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from flexure.methods.flat_notes import BLIND
from flexure.methods.flat_quantities import FlatQuantity
from flexure.methods.flat_result import FlatRow, FlatTraining
from flexure.report.page import Section, write_page
from flexure.report.tables import Table, percent, table_of
from flexure.report.train_sections import (
    attack_sections,
    boundary_sections,
    curve_sections,
    learned_sections,
    noise_sections,
    tradeoff_sections,
)
from flexure.report.train_tables import (
    GEOMETRY,
    attack_names,
    covers,
    discrepancy_table,
    estimate_table,
    estimate_text,
    geometry_table,
    kinks_text,
    median_table,
    methods_table,
    more_table,
)

__all__ = ["flat_page", "flat_sections", "flat_summary"]

SHOWS = (
    "What each way to train this network gave on this data, from the same initial weights and "
    "batches, with the same optimiser, schedule and number of epochs: accuracy, accuracy under one "
    "attack, and the geometry of the loss at test samples.",
    "How sure the numbers and the differences are, as far as the draws go that the intervals name.",
)
DOES_NOT_SHOW = (
    "That a model is robust: an attack that finds nothing is no proof, and another may find more.",
    "How the methods rank with other numbers: each was trained once with its weight or radius as "
    "given, at one learning rate, and none was tuned.",
    "What another training set or longer training would give.",
    "That one method beats all others: with many of them one may look best by chance, and no "
    "interval allows for that.",
)
_SPACE = "\N{NO-BREAK SPACE}"
_ONE_SEED = (
    "What another training would give: there is one run of each method, and intervals are over "
    "test samples alone."
)


def flat_page(
    path: str | os.PathLike[str], found: FlatTraining, *, title: str, run: Table | None = None
) -> Path:
    """Writes the page of one comparison to `path`; see `write_page`."""
    return write_page(
        path,
        title=title,
        summary=flat_summary(found),
        sections=flat_sections(found),
        shows=SHOWS,
        does_not_show=(*DOES_NOT_SHOW, *([_ONE_SEED] if len(found.seeds) == 1 else [])),
        run=run,
    )


def flat_summary(found: FlatTraining) -> tuple[str, ...]:
    """What was found, in sentences."""
    sizes = ", ".join(f"{n} {name}" for name, n in found.samples.items())
    epochs = found.settings.get("epochs")
    what = [
        f"{len(found.methods)} {'method' if len(found.methods) == 1 else 'methods'}",
        f"{len(found.seeds)} {'seed' if len(found.seeds) == 1 else 'seeds'}",
        *([] if epochs is None else [f"{epochs} epochs"]),
    ]
    told = covers(found)
    intervals = f" Intervals in brackets: 95 %, over {told}." if told else ""
    names = ["normalized", "gradient_norm", "accuracy", *attack_names(found)[-1:]]
    leaders = [text for name in names if (text := _leader(found, found.quantities[name]))]
    some = any(row.differences for row in found.rows)
    paired = " Differences are paired by seed and sample." if some else ""
    return (
        f"{', '.join(what)}; samples: {sizes}.{intervals}{paired}",
        *leaders,
        *_cost(found),
        *_failures(found),
        *(f"Note: {note}." for note in found.told),
    )


def flat_sections(found: FlatTraining) -> list[Section]:
    """Tables and pictures, the columns of the paper's tables first."""
    return [
        _geometry_section(found),
        *_difference_sections(found, "curvature, gradients, accuracy", GEOMETRY),
        *tradeoff_sections(found),
        *attack_sections(found),
        *_difference_sections(found, "accuracy under attack", attack_names(found)),
        *noise_sections(found),
        *boundary_sections(found),
        *learned_sections(found),
        *curve_sections(found),
        *_more_sections(found),
        Section(
            "The methods",
            table=methods_table(found),
            caption="The time of an epoch is that of its updates by the wall clock, without "
            "validation and saving.",
        ),
        *_note_sections(found),
    ]


def _leader(found: FlatTraining, quantity: FlatQuantity) -> str:
    """Which method is best in a quantity, and how sure that is; empty where none has it."""
    known = {
        row.method: told.value
        for row in found.rows
        if (told := row.estimates.get(quantity.name)) is not None and math.isfinite(told.value)
    }
    blind = [m for m in known if quantity.of_hessian and found[m].kinks]
    values = {method: value for method, value in known.items() if method not in blind}
    left = _left_out(found, quantity, blind)
    if not values:
        return left
    best = (max if quantity.better == "higher" else min)(values.values())
    first, *tied = (found[method] for method, value in values.items() if value == best)
    label = quantity.label.replace(" (share)", "")
    label = "mean " * (quantity.kind == "mean") + label
    if len(found.methods) > 1:
        *some, last = (_quoted(row) for row in (first, *tied))
        names = f"{', '.join(some)} and {last}" if some else last
        word = "highest" if quantity.better == "higher" else "lowest"
        label = f"{word} {label}: {names}" + (" (the only finite one)" if len(values) == 1 else "")
    text = f"{label[:1].upper()}{label[1:]}, {_value(found, quantity, first)}."
    others = sorted((m for m in values if values[m] != best), key=lambda m: abs(values[m] - best))
    compared = dict.fromkeys([*(m for m in others if m == found.baseline), *others[:1]])
    against = [_against(found, quantity, first, found[m]) for m in compared]
    return " ".join([text, *against, *([left] if left else [])])


def _left_out(found: FlatTraining, quantity: FlatQuantity, methods: Sequence[str]) -> str:
    """Which networks cannot be compared by a quantity, and why; empty where all can."""
    if not methods:
        return ""
    *some, last = (_quoted(found[method]) for method in methods)
    names = f"{', '.join(some)} and {last}" if some else last
    functions = dict.fromkeys(name for method in methods for name in found[method].kinks)
    have = "has" if len(methods) == 1 else "have"
    return (
        f"Not compared by {quantity.label.split(' (')[0]}: {names}, which {have} kinks "
        f"({', '.join(functions)}); {BLIND}."
    )


def _quoted(row: FlatRow) -> str:
    """A method's name amid a sentence, where "at" is another word."""
    return f"“{row.method}”"


def _value(found: FlatTraining, quantity: FlatQuantity, row: FlatRow) -> str:
    """A value with its interval, and the accuracy at which it was reached."""
    told = estimate_text(quantity, row.estimates.get(quantity.name)) or ""
    if quantity.kind == "share":
        head, *ends = told.split(" ", 1)
        return " ".join([f"{head}{_SPACE}%", *ends])
    accuracy = row.estimates.get("accuracy")
    return told if accuracy is None else f"{told} at {percent(accuracy.value)} accuracy"


def _against(found: FlatTraining, quantity: FlatQuantity, first: FlatRow, other: FlatRow) -> str:
    """The paired difference to another method."""
    told = quantity.difference(first.runs, other.runs)
    text = estimate_text(quantity, told, "+")
    of = f"{_quoted(other)}, which has {_value(found, quantity, other)}"
    if told is None or text is None:
        return f"Not to be compared, run by run, with {of}."
    unsure = told.has_interval and told.low <= 0 <= told.high
    which = "higher" if quantity.better == "higher" else "lower"
    sure = f": the interval includes 0, the data do not tell which is {which}" if unsure else ""
    unit = " points" * (quantity.kind == "share")
    head, *ends = text.split(" ", 1)
    return f"Against {of}: {' '.join([head + unit, *ends])}{sure}."


def _cost(found: FlatTraining) -> list[str]:
    """How long an epoch takes, over the baseline's."""
    told = [
        f"{_quoted(row)} {row.relative_time:.2f}"
        for row in found.rows
        if row.method != found.baseline and math.isfinite(row.relative_time)
    ]
    if not told:
        return []
    return [f"Time of an epoch, over that of “{found.baseline}”: {', '.join(told)}."]


def _failures(found: FlatTraining) -> list[str]:
    """Which trainings failed, and why the first of each method did."""
    told = []
    for row in found.rows:
        failed = [run for run in row.runs if run.failure is not None]
        if failed:
            seeds = ("seed " if len(failed) == 1 else "seeds ") + ", ".join(
                str(run.seed) for run in failed
            )
            rest = " Its numbers rest on the others." if row.finished else ""
            told.append(
                f"{len(failed)} of {len(row.runs)} trainings by {_quoted(row)} failed ({seeds}): "
                f"{failed[0].failure}.{rest}"
            )
    return told


def _measured(found: FlatTraining) -> str:
    measured = found.samples.get("measured")
    return f"the first {measured} test samples" if measured else "test samples"


def _geometry_section(found: FlatTraining) -> Section:
    draws = covers(found)
    intervals = f"; in brackets 95 % intervals over {draws}, cut off at 0" if draws else ""
    return Section(
        "Curvature, gradients and accuracy",
        table=geometry_table(found),
        caption=f"Means over samples and runs{intervals}. Geometry is that of the cross-entropy at "
        f"the true label, on {_measured(found)}; accuracy is on all test samples. Curvature is the "
        f"Hessian norm over the gradient norm, of each sample.{kinks_text(found)}",
    )


def _difference_sections(found: FlatTraining, what: str, names: Sequence[str]) -> list[Section]:
    """What each method changes, paired by seed and sample."""
    rows = [row for row in found.rows if row.method != found.baseline]
    if not any(name in row.differences for row in rows for name in names):
        return []
    return [
        Section(
            f"Minus {found.baseline}: {what}",
            table=estimate_table(found, names, rows, lambda row: row.differences, "+"),
            caption="Differences on the same samples, and between runs of the same seed, with 95 % "
            f"intervals; of accuracies in percentage points.{kinks_text(found)}",
        )
    ]


def _more_sections(found: FlatTraining) -> list[Section]:
    """Tables without pictures, those that have columns and rows."""
    made = (
        (
            "Training and test data",
            discrepancy_table(found),
            "How much larger each mean is on test samples than on training samples, (test "
            "− train) / train: +1 is twice as large. In brackets 95 % intervals.",
        ),
        (
            "Medians",
            median_table(found),
            f"Over samples, {_measured(found)}; means over runs.",
        ),
        (
            "More numbers",
            more_table(found),
            "The likelihood and the calibration error (15 bins) are those on all test samples. The "
            "curvature rate is the growth of derivatives with their order.",
        ),
    )
    return [
        Section(title, table=table, caption=caption)
        for title, table, caption in made
        if table.rows and len(table.columns) > 1
    ]


def _note_sections(found: FlatTraining) -> list[Section]:
    """What a reader must know of the numbers: refusals, failures, values that are bounds."""
    notes = [note for note in found.notes if note not in found.told]
    return [Section("Notes", table=table_of(["note"], [[n] for n in notes]))] if notes else []
