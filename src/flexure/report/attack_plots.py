"""Pictures of dials chosen for robustness, and of several models' shares side by side.

Numbers in, inline SVG out. Lines of accuracy are in `attack_lines.py`, images in
`attack_images.py`, loss surfaces in `attack_surfaces.py`; what is drawn is the business of a
report's sections.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexure.contracts import FlexureError
from flexure.report.canvas import (
    INK,
    PANEL,
    REFERENCE,
    VERMILION,
    WIDE,
    Picture,
    canvas,
    canvases,
    draw_legend,
    finished,
    label_text,
    look,
    title_text,
)
from flexure.report.plots import Estimate

__all__ = [
    "Candidates",
    "GroupDial",
    "candidate_scatter",
    "colour_bar",
    "dial_map",
    "group_dials",
    "side_by_side",
]

_ROW = 0.27  # inches that a row of a list is high
_CELL = (0.62, 0.34)  # inches of a field of a map
_MOST_TEXT = 400  # fields of a map with numbers in them: more cannot be read
_NAME = 46  # letters of a name beside a row; longer ones lose their beginning
_SEQUENTIAL = "cividis"  # safe for colour-blind readers (Nuñez, Anderton and Renslow 2018)
_BRIGHT = 0.55  # of a colour, from which black can be read on it


@dataclass(frozen=True)
class Candidates:
    """Settings of one kind: clean and robust accuracy of each, in per cent."""

    label: str
    clean: Sequence[float]
    robust: Sequence[float]


@dataclass(frozen=True)
class GroupDial:
    """The dial of one group of sites: what it is called, its beta and c."""

    label: str
    beta: float
    c: float


def candidate_scatter(
    groups: Sequence[Candidates],
    *,
    title: str,
    x_label: str,
    y_label: str,
    chosen: tuple[float, float],
    plain: tuple[float, float] | None = None,
    limit: float | None = None,
) -> Picture:
    """Clean against robust accuracy of everything that was tried, the choice, and the limit.

    Args:
        groups: settings of one kind each.
        title: above the picture.
        x_label: of the clean accuracy.
        y_label: of the robust accuracy.
        chosen: both of the choice, in per cent.
        plain: both of the plain network.
        limit: the clean accuracy that a choice must have.
    """
    figure, axes = canvas(WIDE)
    for k, group in enumerate(groups):
        style = look(k + k // 5)  # all colours but that of the choice
        axes.plot(group.clean, group.robust, linestyle="", markersize=4.5, alpha=0.75,
                  **style.markers, label=label_text(group.label))  # fmt: skip
    if limit is not None:
        axes.axvline(limit, **REFERENCE, label=f"limit: {limit:.1f} % clean", zorder=0)
    if plain is not None:
        axes.plot(*plain, linestyle="", marker="X", color=INK, markersize=9, label="plain network")
    axes.plot(*chosen, linestyle="", marker="D", color=VERMILION, markersize=10,
              markerfacecolor="none", markeredgewidth=2, label="chosen")  # fmt: skip
    axes.set(xlabel=x_label, ylabel=y_label, title=title_text(title, WIDE))
    axes.grid(color=INK, alpha=0.12, linewidth=0.8)
    draw_legend(figure)
    count = sum(len(group.clean) for group in groups)
    return finished(
        figure,
        f"{title}. {y_label} against {x_label} of {count} settings; chosen: {chosen[0]:.1f} clean, "
        f"{chosen[1]:.1f} robust.",
    )


def dial_map(
    betas: Sequence[float],
    cs: Sequence[float],
    values: Any,
    *,
    title: str,
    value: str,
    chosen: tuple[float, float] | None = None,
    barred: Any = None,
    ends: tuple[float, float] | None = None,
) -> Picture:
    """A value over both dials, as colours with numbers.

    Args:
        betas: increasing, along x.
        cs: increasing, along y.
        values: (cs, betas) in per cent; nan where there is none.
        title: above the picture.
        value: what it is, with its unit.
        chosen: beta and c of the choice.
        barred: (cs, betas) bool: settings that must not be chosen, with a cross after the number.
        ends: of the colours, for maps beside each other; default: those of the values.
    """
    import matplotlib
    import numpy as np

    heights = np.asarray(values, dtype=float)
    width = 1.6 + _CELL[0] * len(betas)
    figure, axes = canvas((max(width, PANEL[0]), 1.1 + max(_CELL[1] * len(cs), 0.8)))
    colours = matplotlib.colormaps[_SEQUENTIAL]
    found = heights[np.isfinite(heights)]
    if not found.size:
        raise FlexureError("expected at least one value to draw, got none")
    low, high = float(found.min()), float(found.max())
    least, largest = ends or (low, high)
    drawn = axes.imshow(heights, cmap=colours, vmin=least, vmax=largest or 1.0, aspect="auto",
                        origin="lower", interpolation="none")  # fmt: skip
    if heights.size <= _MOST_TEXT:
        for row, column in np.argwhere(np.isfinite(heights)).tolist():
            one = heights[row, column]
            bright = sum(colours(drawn.norm(one))[:3]) / 3 > _BRIGHT
            cross = "×" if barred is not None and barred[row][column] else ""
            axes.text(column, row, f"{one:.0f}{cross}", ha="center", va="center", fontsize=9,
                      color="black" if bright else "white")  # fmt: skip
    axes.set_xticks(range(len(betas)), [f"{beta:.3g}" for beta in betas])
    axes.set_yticks(range(len(cs)), [f"{c:.3g}" for c in cs])
    if chosen is not None and chosen[0] in betas and chosen[1] in cs:
        place = (list(betas).index(chosen[0]) - 0.5, list(cs).index(chosen[1]) - 0.5)
        axes.add_patch(_frame(place))
    axes.set(xlabel="beta (no unit)", ylabel="c (no unit)",
             title=title_text(title, (max(width, PANEL[0]), 1.0)))  # fmt: skip
    colour_bar(figure, drawn, axes, value)
    told = "" if chosen is None else f" Chosen: beta = {chosen[0]:.4g}, c = {chosen[1]:.4g}."
    return finished(figure, f"{title}. {value} over beta and c: {low:.1f} to {high:.1f}.{told}")


def _frame(place: tuple[float, float]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(place, 1, 1, fill=False, edgecolor=VERMILION, linewidth=3, clip_on=False)


def group_dials(groups: Sequence[GroupDial], *, title: str) -> Picture:
    """Beta and c of each group of sites, in network order from top to bottom."""
    if not groups:
        raise FlexureError("expected at least one group of sites to draw, got none")
    figure, (pair,) = canvases((WIDE[0] / 1.6, 1.0 + _ROW * len(groups)), 1, 2)
    rows = range(len(groups))
    for k, (axes, name) in enumerate(zip(pair, ("beta", "c"), strict=True)):
        values = [getattr(group, name) for group in groups]
        axes.hlines(rows, 0, values, color=look(k).colour, linewidth=1.2, alpha=0.5)
        axes.plot(values, rows, linestyle="", markersize=6, **look(k).markers)
        axes.set(xlabel=f"{name} (no unit)", xlim=(-0.03, 1.03), ylim=(len(groups) - 0.4, -0.6))
        axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.8)
    pair[0].set_yticks(rows, [_short(group.label) for group in groups])
    figure.suptitle(title_text(title, WIDE), fontsize=10.5, color=INK)
    told = "; ".join(f"{g.label}: beta {g.beta:.3g}, c {g.c:.3g}" for g in groups)
    return finished(figure, f"{title}. {told}.")


def side_by_side(
    rows: Sequence[str],
    series: Sequence[tuple[str, Sequence[Estimate | None]]],
    *,
    title: str,
    axis: str,
) -> Picture:
    """Shares of several models, one row a thing that was done to their inputs.

    Args:
        rows: names, from top to bottom.
        series: name of a model, and one share with its interval for each row, in per cent.
        title: above the picture.
        axis: what the shares are, with their unit.
    """
    if not rows:
        raise FlexureError("expected at least one row to draw, got none")
    figure, axes = canvas((WIDE[0] + 1.0, 1.1 + (_ROW + 0.06 * len(series)) * len(rows)))
    apart = 0.5 / max(len(series), 1)
    told = []
    for k, (name, values) in enumerate(series):
        style = look(k)
        there = [(row + (k - (len(series) - 1) / 2) * apart, one)
                 for row, one in enumerate(values) if one is not None]  # fmt: skip
        axes.plot([one.value for _, one in there], [place for place, _ in there], linestyle="",
                  markersize=6, label=label_text(name), **style.markers)  # fmt: skip
        for place, one in there:
            if math.isfinite(one.low) and math.isfinite(one.high):
                axes.hlines(place, one.low, one.high, color=style.colour, linewidth=1.8, alpha=0.55)
        told += [f"{name}, {rows[k]}: {one.value:.1f}" for k, one in enumerate(values) if one]
    axes.set_yticks(range(len(rows)), [_short(row) for row in rows])
    axes.set(xlabel=axis, title=title_text(title, WIDE), ylim=(len(rows) - 0.4, -0.6))
    axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.8)
    draw_legend(figure)
    return finished(figure, f"{title}. {axis}. {'; '.join(told)}.")


def colour_bar(figure: Any, drawn: Any, axes: Any, label: str, **words: Any) -> None:
    """The scale of a map's colours beside its axes."""
    bar = figure.colorbar(drawn, ax=axes, **words)
    bar.set_label(label, color=INK)
    bar.outline.set_edgecolor(INK)
    bar.ax.tick_params(color=INK, labelcolor=INK)


def _short(name: str) -> str:
    return label_text(name if len(name) <= _NAME else f"… {name[-_NAME:]}")
