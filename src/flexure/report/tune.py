"""What a comparison of adaptation methods says in a report: its sentences, sections and page.

Reads a finished comparison; chooses and computes no result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from flexure.methods.tune_result import ArmResult, Difference, TuneResult
from flexure.report.canvas import Curve
from flexure.report.page import Section, write_page
from flexure.report.plots import Estimate, curves, estimates, histogram, over_depth
from flexure.report.search import verdict
from flexure.report.tables import Table, gain_text, percent, table_of
from flexure.units.parameterization import saturated_share

__all__ = ["tune_page", "tune_sections", "tune_summary"]

SHOWS = (
    "How each way to adapt this network did on this data, with the same head, samples, order, "
    "schedule and number of epochs, each at the setting that validation data chose for it.",
    "How sure the differences to the probe are, as far as test samples and seeds go.",
)
DOES_NOT_SHOW = (
    "What other training data would give: all seeds share one split.",
    "What a wider sweep, more epochs or another schedule would give; arms with more to tune may "
    "have more to gain from them.",
    "That one arm beats another: only differences to the probe have intervals, and with several "
    "arms one of them may look better by chance.",
)
_MIB = 2**20


def tune_page(
    path: str | os.PathLike[str], found: TuneResult, *, title: str, run: Table | None = None
) -> Path:
    """Writes the page of one comparison to `path`; see `write_page`."""
    return write_page(
        path,
        title=title,
        summary=tune_summary(found),
        sections=tune_sections(found),
        shows=SHOWS,
        does_not_show=DOES_NOT_SHOW,
        run=run,
    )


def tune_summary(found: TuneResult) -> tuple[str, ...]:
    """What the comparison found, in sentences."""
    sizes = ", ".join(f"{n} {name}" for name, n in found.samples.items())
    what = (
        f"{len(found.arms)} ways to adapt one network, {len(found.seeds)} "
        f"seed{'s' * (len(found.seeds) != 1)}, {found.epochs} epochs; samples: {sizes}."
    )
    arms = [_sentence(arm) for arm in found.arms]
    return what, *arms, *(f"Note: {note}." for note in found.notes)


def tune_sections(found: TuneResult) -> list[Section]:
    """Table, differences, curves, and what was learned."""
    sections = [_table_section(found)]
    if len(found.arms) > 1 and found.arms[1].difference is not None:
        sections.append(_difference_section(found))
    sections += [_curve_section(found), _sweep_section(found)]
    for arm in found.arms:
        if arm.saturated is not None:
            sections += _dial_sections(arm)
    return sections


def _sentence(arm: ArmResult) -> str:
    setting = f" ({arm.setting})" if arm.setting else ""
    if arm.accuracy is None:
        score = percent(fmean(run.score for run in arm.runs))
        return f"{arm.name}{setting}: {score} on validation data, which chose; no test data given."
    accuracy, told = arm.accuracy, arm.difference
    text = f"{arm.name}{setting}: {percent(accuracy.mean)} on test data"
    if told is None:
        return f"{text}, {percent(accuracy.low)} to {percent(accuracy.high)}."
    if not told.wins + told.losses:
        return f"{text}; right on the same samples as the probe, from every seed alike."
    gain = gain_text(told.points, told.low, told.high, level=told.level)
    return f"{text}; against the probe {gain}. {verdict(told.low, told.high)}"


def _table_section(found: TuneResult) -> Section:
    tested = next((arm.accuracy for arm in found.arms if arm.accuracy), None)
    intervals = (
        "No test data was given."
        if tested is None
        else f"In brackets: 95 % intervals over {tested.covers}; they are adjusted to hold near "
        "0 and 100 % and where few samples differ. The difference is paired by seed and sample; "
        "won and lost count the samples that the arm, or the probe, gets right more often."
    )
    columns = (
        "arm", "trained numbers + head", "setting", "test accuracy, %",
        "against the probe, points", "won / lost", "training, s", "step, MiB",
    )  # fmt: skip
    rows = [_row(arm) for arm in found.arms]
    return Section(
        "The arms",
        table=table_of(columns, rows, *(set(columns) - {"arm", "setting"})),
        caption=f"{intervals} Training: wall-clock seconds of one run, mean over seeds, with "
        "validation and saving. Step: peak memory that one training step (forward, backward, first "
        "update by Adam) needs beyond the network and the batch.",
    )


def _row(arm: ArmResult) -> tuple[Any, ...]:
    accuracy, told = arm.accuracy, arm.difference
    return (
        arm.name,
        f"{arm.parameters:,} + {arm.head_parameters:,}",
        arm.setting or None,
        accuracy and _interval(100 * accuracy.mean, 100 * accuracy.low, 100 * accuracy.high, ""),
        told and _difference(told),
        told and f"{told.wins} / {told.losses}",
        f"{arm.seconds:.1f}",
        None if arm.step_bytes is None else f"{arm.step_bytes / _MIB:.1f}",
    )


def _difference(told: Difference) -> str:
    if not told.wins + told.losses:
        return "right on the same samples"
    return _interval(told.points, told.low, told.high, "+")


def _interval(value: float, low: float, high: float, sign: str) -> str:
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def _difference_section(found: TuneResult) -> Section:
    rows = [
        Estimate(arm.name, d.points, d.low, d.high)
        for arm in found.arms
        if (d := arm.difference) is not None
    ]
    covers = next(arm.difference.covers for arm in found.arms if arm.difference)
    return Section(
        "Against the probe",
        pictures=(estimates(rows, axis="test accuracy minus the probe's (points)"),),
        caption=f"Mean difference and its 95 % interval over {covers} (two-way random effects, "
        "with one sample won and one lost by every seed added). "
        "The dashed line is the probe.",
    )


def _curve_section(found: TuneResult) -> Section:
    accuracy = _curves(found, lambda run: [100 * value for value in run.val_accuracy])
    loss = _curves(found, lambda run: run.losses)
    bands = "" if len(found.seeds) == 1 else " The bands are one standard deviation over seeds."
    return Section(
        "Learning curves",
        pictures=(
            curves(
                accuracy,
                title="Validation accuracy",
                x_label="epoch",
                y_label="validation accuracy (%)",
                whole=True,
            ),
            curves(
                loss,
                title="Training loss",
                x_label="epoch",
                y_label="mean training loss (nats)",
                whole=True,
            ),
        ),
        caption="At the chosen setting of each arm: mean over seeds after each epoch. Validation "
        f"accuracy chose the settings and the epochs that count, so it is optimistic.{bands}",
    )


def _curves(found: TuneResult, values: Callable[[Any], Sequence[float]]) -> list[Curve]:
    lines = []
    for arm in found.arms:
        epochs = list(zip(*(values(run) for run in arm.runs), strict=True))
        spread = [stdev(epoch) for epoch in epochs] if len(arm.runs) > 1 else None
        x = range(1, len(epochs) + 1)
        lines.append(Curve(arm.name, x, [fmean(epoch) for epoch in epochs], spread))
    return lines


def _sweep_section(found: TuneResult) -> Section:
    rows = [
        (
            arm.name,
            candidate.setting or "the only one",
            None if candidate.score is None else f"{100 * candidate.score:.2f}",
            "chosen" if candidate.setting == arm.setting else candidate.failure,
        )
        for arm in found.arms
        for candidate in arm.candidates
    ]
    return Section(
        "What was tried",
        table=table_of(
            ("arm", "setting", "validation accuracy, %", ""), rows, "validation accuracy, %"
        ),
        caption=f"Validation accuracy after the best epoch, from the first seed "
        f"({found.seeds[0]}); the highest was chosen, of equals the first. Test data took no part.",
    )


def _dial_sections(arm: ArmResult) -> list[Section]:
    """Histograms of the learned dials ([CT] Figs. 5 and 6), and the same by depth."""
    dials = (
        ("beta", "beta (no unit; 1 is ReLU)", [run.betas for run in arm.runs]),
        ("c", "c (no unit)", [run.cs for run in arm.runs]),
    )
    spread, depth = [], []
    for name, axis, runs in dials:
        start = arm.method.get(f"init_{name}")
        start = start if isinstance(start, float) else None
        values = [torch.cat([*run.values()]) for run in runs]
        share = percent(saturated_share(*values))
        title = f"Learned {name}, {share} saturated"
        arrays = [value.numpy() for value in values]
        spread.append(histogram(arrays, title=title, axis=axis, start=start))
        sites = [[run[site].numpy() for run in runs] for site in runs[0]]
        title = f"Learned {name} over depth"
        depth.append(over_depth(sites, title=title, axis=axis, start=start))
    share, several = percent(arm.saturated or 0.0), len(arm.runs) > 1
    pooled = "bars are means over seeds, dashes the seeds" if several else "one seed"
    return [
        Section(
            f"What {arm.name} learned",
            (f"Saturated, that is below 0.01 or above 0.99: {share} of all values.",),
            tuple(spread),
            caption=f"All channels of all sites; {pooled}. Values that gather at 0 and 1 can be "
            "the work of noise alone.",
        ),
        Section(
            f"What {arm.name} learned, over depth",
            pictures=tuple(depth),
            caption="The spread over the channels of each site"
            + (", all seeds together." if several else "."),
        ),
    ]
