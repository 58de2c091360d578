"""Pictures of comparisons, dials and functions for reports: numbers in, inline SVG out.

Nothing here trains, measures or writes files; style is `canvas.py`'s, pictures of measures are in
`geometry_plots.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexure.contracts import FlexureError
from flexure.report.canvas import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PANEL,
    REFERENCE,
    SKY,
    VERMILION,
    WIDE,
    Curve,
    Picture,
    canvas,
    draw_legend,
    draw_line,
    finished,
    integer_axis,
)
from flexure.report.log_axes import log_axis, log_ends

__all__ = [
    "Estimate",
    "boundary",
    "curves",
    "estimates",
    "histogram",
    "over_depth",
    "score_against_beta",
]


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, all in the unit of the plot's axis."""

    label: str
    value: float
    low: float
    high: float


def score_against_beta(
    lines: Sequence[Curve],
    *,
    chosen: tuple[float, float],
    within: Sequence[tuple[float, float]],
    baseline: float | None,
    baseline_label: str = "beta = 1",
    score: str = "validation accuracy (%)",
    errors: str = "one standard error",
    axis: str = "beta (no unit; 1 is the unchanged network)",
) -> Picture:
    """Score of each beta, its error band, the chosen beta and those that are as good.

    Args:
        lines: one curve, or one for each value of the second dial.
        chosen: beta and score of the choice.
        within: betas and scores within one standard error of the best.
        baseline: score of the unchanged network, drawn as a level; None: no such level.
        baseline_label: what that is.
        score: what the score is, with its unit.
        errors: what the band is.
        axis: label of the axis of beta; state what its end is.
    """
    figure, axes = canvas(WIDE)
    for k, line in enumerate(lines):
        draw_line(axes, line, k, band=errors)
    if baseline is not None:
        axes.axhline(
            baseline, color=INK, linewidth=1.2, linestyle=(0, (6, 3)), label=baseline_label
        )
    if within:
        xs, ys = zip(*within, strict=True)
        axes.plot(
            xs, ys, "o", color=GREEN, markersize=5, label="within one standard error of the best"
        )
    axes.plot(*chosen, "D", color=VERMILION, markersize=9, label=f"chosen: beta = {chosen[0]:.4g}")
    axes.set(xlabel=axis, ylabel=score)
    draw_legend(figure)
    level = "" if baseline is None else f", against {baseline:.1f} at {baseline_label}"
    return finished(
        figure,
        f"{score} against beta; the chosen beta is {chosen[0]:.4g} with {chosen[1]:.1f}{level}; "
        f"{len(within)} values of beta lie within one standard error of the best.",
    )


def estimates(rows: Sequence[Estimate], *, axis: str, highlight: Sequence[str] = ()) -> Picture:
    """Values with their intervals, one below the other, against the line of no change.

    Args:
        rows: from top to bottom.
        axis: what the values are, with their unit.
        highlight: labels of the rows to stress (the summary among its parts).
    """
    if not rows:
        raise FlexureError("expected at least one estimate to draw, got none")
    figure, axes = canvas((WIDE[0], 1.2 + 0.34 * len(rows)))
    axes.axvline(0, **REFERENCE)
    for k, row in enumerate(rows):
        stressed = row.label in highlight
        colour, marker = (VERMILION, "D") if stressed else (BLUE, "o")
        axes.plot([row.low, row.high], [k, k], color=colour, linewidth=3 if stressed else 2)
        axes.plot(row.value, k, marker, color=colour, markersize=8 if stressed else 6)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(axis)
    values = "; ".join(f"{r.label}: {r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in rows)
    return finished(figure, f"{axis}, with intervals. {values}.")


def boundary(
    grid: Any,
    *,
    extent: tuple[float, float, float, float],
    points: Any,
    labels: Any,
    title: str,
) -> Picture:
    """The two decision regions of a binary classifier in the plane, and its data.

    Args:
        grid: `(rows, columns)` array of the margin (logit of class 1 minus logit of class 0),
            rows from the lowest to the highest second coordinate; the boundary is its zero level.
        extent: lowest and highest first coordinate, lowest and highest second coordinate.
        points: `(N, 2)` array.
        labels: `(N,)` array of 0 and 1.
        title: above the picture; state the setting.
    """
    import numpy as np

    figure, axes = canvas(PANEL)
    margin = np.asarray(grid, dtype=float)
    xs = np.linspace(extent[0], extent[1], margin.shape[1])
    ys = np.linspace(extent[2], extent[3], margin.shape[0])
    axes.contourf(xs, ys, margin > 0, levels=[-0.5, 0.5, 1.5], colors=[SKY, ORANGE], alpha=0.3)
    axes.contour(xs, ys, margin, levels=[0.0], colors=[INK], linewidths=1.6)
    for value, (colour, marker) in enumerate(((BLUE, "o"), (VERMILION, "^"))):
        mine = np.asarray(points)[np.asarray(labels) == value]
        axes.plot(mine[:, 0], mine[:, 1], marker, color=colour, markersize=2.6)
    axes.set(xlabel="x1 (no unit)", ylabel="x2 (no unit)", title=title, aspect="equal")
    return finished(
        figure, f"{title}. Data of two classes and the decision boundary between their regions."
    )


def curves(
    lines: Sequence[Curve],
    *,
    title: str,
    points: Curve | None = None,
    x_label: str = "x (no unit)",
    y_label: str = "y (no unit)",
    whole: bool = False,
    log: bool = False,
    looks: Sequence[int] = (),
) -> Picture:
    """Functions of one variable, with sample points if there are any.

    Args:
        lines: the functions.
        title: above the picture.
        points: samples.
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.
        whole: ticks of x at whole numbers only.
        log: whether y is logarithmic; values that are not above 0 are left out then.
        looks: which of all looks each line has, where not their first ones in order.
    """
    figure, axes = canvas(PANEL)
    if points is not None:
        axes.plot(points.x, points.y, ".", color=INK, alpha=0.55, markersize=4, label=points.label)
    for k, line in zip(looks or range(len(lines)), lines, strict=True):
        draw_line(axes, line, k, band=None)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    if log:
        log_axis(axes, "y", log_ends(y for line in lines for y in line.y))
    if whole:
        integer_axis(axes)
    draw_legend(figure)
    drawn = ", ".join(line.label for line in lines)
    return finished(figure, f"{title}. {y_label} against {x_label}: {drawn}.")


def histogram(
    values: Sequence[Any], *, title: str, axis: str, start: float | None = None, bins: int = 25
) -> Picture:
    """How numbers in [0, 1] are spread: mean share in each bin, and the seeds' one by one.

    Args:
        values: for each seed, an array of numbers in [0, 1].
        title: above the picture.
        axis: what the numbers are, with their unit.
        start: where all of them started, drawn as a line.
        bins: how many, of equal width.
    """
    import numpy as np

    figure, axes = canvas(PANEL)
    edges = np.linspace(0.0, 1.0, bins + 1)
    shares = np.array([100 * np.histogram(v, edges)[0] / max(len(v), 1) for v in values])
    axes.bar(edges[:-1], shares.mean(0), width=1 / bins, align="edge", color=BLUE, alpha=0.55)
    if len(shares) > 1:
        middle = np.broadcast_to((edges[:-1] + edges[1:]) / 2, shares.shape)
        some = shares > 0  # dashes along the axis would say nothing
        axes.plot(middle[some], shares[some], "_", color=INK, markersize=5, label="each seed")
    if start is not None:
        axes.axvline(start, **REFERENCE, label=f"start, {start:g}")
    axes.set(xlabel=axis, ylabel="share of values (%)", title=title, xlim=(0, 1), ylim=(0, None))
    draw_legend(figure)
    mean = float(np.mean([np.mean(v) for v in values]))
    return finished(figure, f"{title}. Histogram of {axis}; mean {mean:.3f}.")


def over_depth(
    sites: Sequence[Sequence[Any]], *, title: str, axis: str, start: float | None = None
) -> Picture:
    """How numbers are spread at each site, in network order: median, middle half and most.

    Args:
        sites: for each site, for each seed, an array of numbers.
        title: above the picture.
        axis: what the numbers are, with their unit.
        start: where all of them started, drawn as a line.
    """
    import numpy as np

    figure, axes = canvas(PANEL)
    x = np.arange(1, len(sites) + 1)
    pooled = [np.concatenate([np.asarray(v, dtype=float) for v in site]) for site in sites]
    low, quarter, median, upper, high = np.array(
        [np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95)) for values in pooled]
    ).T
    axes.vlines(x, low, high, color=SKY, linewidth=1.5, label="5 to 95 % of channels")
    axes.vlines(x, quarter, upper, color=BLUE, linewidth=4, label="25 to 75 %")
    axes.plot(x, median, "o", color=VERMILION, markersize=4.5, label="median")
    if start is not None:
        axes.axhline(start, **REFERENCE, label=f"start, {start:g}", zorder=0)
    axes.set(xlabel="site (number in network order)", ylabel=axis, title=title, ylim=(-0.03, 1.03))
    integer_axis(axes)
    draw_legend(figure)
    values = f"from {median[0]:.3f} at the first site to {median[-1]:.3f} at the last"
    return finished(figure, f"{title}. {axis} at {len(sites)} sites; the median goes {values}.")
