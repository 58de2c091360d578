"""Accuracy over radii, betas or severities as lines that carry their names at their ends.

Numbers in, inline SVG out. Of many lines at one value, names are moved apart and tied to their
lines. What is drawn, and in which words, is the business of the sections of a report; other
pictures of attacks are in `attack_plots.py`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexure.contracts import FlexureError
from flexure.report.canvas import (
    INK,
    VERMILION,
    WIDE,
    Picture,
    canvas,
    draw_legend,
    finished,
    label_text,
    look,
    title_text,
)
from flexure.report.plots import Estimate

__all__ = ["Line", "Mark", "labelled_lines"]

_NAME = 26  # letters of a name in a line of it
_SIZE = 9.5  # points, of the names at the ends of lines
_HIGH = 12.5  # points that a line of such a name takes
_LETTER = 0.62  # mean width of a letter over the text's size, DejaVu Sans
_TICK = 10.5  # points, of the numbers along the axis
_AROUND = 62  # points that axes have less than their figure: labels and ticks of y
_LEADER = 14  # points between the axes and the piece of line before a name
_HANDLE = 24  # points that this piece is long
_BELOW = 80  # points that axes are less high than their figure: title, numbers and label of x
_SPREAD = 6.0  # ratio of the largest to the smallest place from which a root shows them better
_FULL = 70.0  # per cent, from which on the axis goes to 100
_LEGEND = 0.3  # inches below the axes for what has no name at an end
_ROLES: dict[str, dict[str, Any]] = {
    "line": {"linewidth": 1.5, "markersize": 4.5},
    "worst": {"linewidth": 3.2, "markersize": 6.5, "color": VERMILION, "marker": "D",
              "markerfacecolor": VERMILION, "linestyle": "-"},
    "certified": {"linewidth": 2.0, "markersize": 5.5, "color": INK, "marker": "s",
                  "markerfacecolor": "none", "linestyle": (0, (4, 2))},
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One line of accuracy; equally long sequences.

    Attributes:
        label: written at its end.
        x: increasing places.
        y: accuracies with their intervals in per cent, None where there is none.
        role: "line"; "worst", stressed; or "certified", a bound from below.
        band: whether intervals are drawn.
        look: which of all looks a "line" has.
    """

    label: str
    x: Sequence[float]
    y: Sequence[Estimate | None]
    role: str = "line"
    band: bool = False
    look: int = 0

    @property
    def there(self) -> list[tuple[float, Estimate]]:
        """Places and values of those that are known."""
        pairs = zip(self.x, self.y, strict=True)
        return [(x, y) for x, y in pairs if y is not None and math.isfinite(y.value)]


@dataclass(frozen=True)
class Mark:
    """A point to look at, or, without y, a place along x.

    Attributes:
        label: for the legend; marks of one label share an entry.
        x: its place.
        y: its accuracy in per cent, or None: a line across.
        shape: of matplotlib's markers.
        colour: of the palette.
        dashes: of the line across.
    """

    label: str
    x: float
    y: float | None = None
    shape: str = "*"
    colour: str = VERMILION
    dashes: Any = (0, (6, 3))


def labelled_lines(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    marks: Sequence[Mark] = (),
    scale: float = 1.0,
    rooted: bool = False,
) -> Picture:
    """Lines of accuracy in per cent, each with its name at its end.

    Args:
        lines: the last is drawn on top; those without values are left out.
        title: above the picture.
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.
        marks: points and places to look at, told by a legend.
        scale: what numbers along x are multiplied by where they are written.
        rooted: whether places that spread far are drawn at their square roots, and x_label says so.

    Raises:
        FlexureError: no line has a value.
    """
    shown = [line for line in lines if line.there]
    if not shown:
        raise FlexureError("expected at least one accuracy to draw, got none")
    names = ["\n".join(map(label_text, textwrap.wrap(line.label, _NAME))) for line in shown]
    figure, axes = canvas(_size(names, marks))
    _scale_of(axes, shown, scale, rooted, x_label)
    for line in shown:
        _draw(axes, line)
    for mark in marks:
        _draw_mark(axes, mark, first=mark.label not in axes.get_legend_handles_labels()[1])
    axes.set(ylabel=y_label, title=title_text(title, WIDE), ylim=_heights(shown))
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.8)
    _name_ends(axes, shown, names)
    if marks:
        draw_legend(figure)
    told = "; ".join(_told(line, scale) for line in shown)
    marked = "".join(f" {m.label}: {scale * m.x:.4g}." for m in marks)
    return finished(figure, f"{title}. {y_label} against {x_label}. {told}.{marked}")


def _size(names: Sequence[str], marks: Sequence[Mark]) -> tuple[float, float]:
    """Of the figure in inches: the axes keep their size whatever the names."""
    rows = sum(1 + name.count("\n") for name in names)
    longest = max(len(row) for name in names for row in name.split("\n"))
    room = _LEADER + 1.4 * _HANDLE + _LETTER * _SIZE * longest
    legend = _LEGEND if marks else 0.0
    return WIDE[0] + room / 72, max(WIDE[1], 1.1 + rows * _HIGH / 72) + legend


def _scale_of(axes: Any, lines: Sequence[Line], scale: float, rooted: bool, label: str) -> None:
    """The axis of x: its scale, and as many numbers as have room."""
    places = sorted({x for line in lines for x in line.x})
    some = [place for place in places if place > 0]
    by_root = rooted and len(some) > 1 and places[0] >= 0 and some[-1] >= _SPREAD * some[0]
    if by_root:
        axes.set_xscale("function", functions=(_root, _square))
    lengths = [math.sqrt(place) if by_root else place for place in places]
    span = (lengths[-1] - lengths[0]) or 1.0
    low, high = lengths[0] - 0.03 * span, lengths[-1] + 0.02 * span
    if by_root:
        low, high = (-((0.03 * span) ** 2) if low < 0 else low**2), high**2
    axes.set_xlim(low, high)
    room = 72 * WIDE[0] - _AROUND
    kept: list[float] = []
    edge = math.inf
    halves = [(_LETTER * _TICK * len(f"{scale * place:.3g}") + 8) / 2 for place in places]
    centres = [room * (length - lengths[0]) / span for length in lengths]
    start = centres[0] + halves[0]  # the first is always told: it is what was asked for
    for place, centre, half in reversed(list(zip(places, centres, halves, strict=True))):
        alone = centre - half >= start or len(kept) == 0
        if place == places[0] or (alone and centre + half <= edge):
            kept, edge = [place, *kept], centre - half
    axes.set_xticks(kept, labels=[f"{scale * place:.3g}" for place in kept])
    axes.minorticks_off()
    axes.set_xlabel(label + (", square-root scale" if by_root else ""))


def _root(values: Any) -> Any:
    import numpy as np

    return np.sign(values) * np.sqrt(np.abs(values))


def _square(values: Any) -> Any:
    import numpy as np

    return np.sign(values) * np.square(values)


def _style(line: Line) -> dict[str, Any]:
    own = look(line.look)
    return {"linestyle": own.dashes, **own.markers, **_ROLES[line.role]}


def _draw(axes: Any, line: Line) -> None:
    style = _style(line)
    x = [place for place, _ in line.there]
    axes.plot(x, [one.value for _, one in line.there], **style)
    ends = [(place, one.low, one.high) for place, one in line.there
            if math.isfinite(one.low) and math.isfinite(one.high)]  # fmt: skip
    if not line.band or not ends:
        return
    if len(ends) > 1:
        axes.fill_between(*zip(*ends, strict=True), color=style["color"], alpha=0.18, linewidth=0)
    else:  # a band over one place has no width
        axes.vlines(*zip(*ends, strict=True), color=style["color"], alpha=0.5, linewidth=2)


def _draw_mark(axes: Any, mark: Mark, *, first: bool) -> None:
    label = label_text(mark.label) if first else None
    if mark.y is None:
        axes.axvline(mark.x, color=mark.colour, linestyle=mark.dashes, linewidth=1.6, label=label,
                     zorder=0)  # fmt: skip
    else:
        axes.plot(mark.x, mark.y, linestyle="", marker=mark.shape, color=mark.colour, markersize=11,
                  markerfacecolor="none", markeredgewidth=1.8, label=label)  # fmt: skip


def _heights(lines: Sequence[Line]) -> tuple[float, float]:
    """Ends of the axis of y, which starts at 0: a share of nothing is what attacks lead to."""
    top = max(max(one.value, one.high if math.isfinite(one.high) and line.band else one.value)
              for line in lines for _, one in line.there)  # fmt: skip
    high = 102.0 if top > _FULL else max(1.06 * top, 10.0)
    return -0.02 * high, high


def _name_ends(axes: Any, lines: Sequence[Line], names: Sequence[str]) -> None:
    """Writes each name beside the axes at its line's last value, none over another."""
    low, high = axes.get_ylim()
    # Of the figure's height, what the axes have: the rest is for the title and the labels of x.
    point = (high - low) / (72 * axes.get_figure().get_size_inches()[1] - _BELOW)
    order = sorted(range(len(lines)), key=lambda k: (lines[k].there[-1][1].value, -k))
    sizes = [point * _HIGH * (1 + names[k].count("\n")) for k in order]
    wanted = [lines[k].there[-1][1].value for k in order]
    start, end = (1 + points / (72 * WIDE[0] - _AROUND) for points in (_LEADER, _LEADER + _HANDLE))
    aside = axes.get_yaxis_transform()  # x in widths of the axes, y in per cent
    for k, height in zip(order, _apart(wanted, sizes, low, high), strict=True):
        line, style = lines[k], _style(lines[k])
        place, value = line.there[-1][0], line.there[-1][1].value
        axes.annotate("", xy=(place, value), xycoords="data", xytext=(start, height),
                      textcoords=aside, annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": style["color"], "linewidth": 0.8,
                                  "shrinkA": 0, "shrinkB": 3})  # fmt: skip
        axes.plot([start, (start + end) / 2, end], [height] * 3, markevery=[1], transform=aside,
                  clip_on=False, scalex=False, scaley=False, **style)  # fmt: skip
        axes.text(end + (end - start) / 5, height, names[k], transform=aside, va="center",
                  ha="left", fontsize=_SIZE, color=INK, linespacing=1.05,
                  fontweight="bold" if line.role == "worst" else "normal")  # fmt: skip


def _apart(wanted: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Sorted heights moved as little as it takes for names of these sizes not to overlap.

    Names that touch form a block around the mean of what they want, as long as it is inside.
    """
    blocks: list[tuple[list[int], float, float]] = []  # members, centre, size
    for k, (height, size) in enumerate(zip(wanted, sizes, strict=True)):
        members, centre, total = [k], _inside(height, size, low, high), size
        while blocks and blocks[-1][1] + blocks[-1][2] / 2 > centre - total / 2:
            others, _, more = blocks.pop()
            members, total = [*others, *members], total + more
            mean = sum(wanted[m] for m in members) / len(members)
            centre = _inside(mean, total, low, high)
        blocks.append((members, centre, total))
    found = []
    for members, centre, total in blocks:
        edge = centre - total / 2
        for member in members:
            found.append(edge + sizes[member] / 2)
            edge += sizes[member]
    return found


def _inside(height: float, size: float, low: float, high: float) -> float:
    return max(min(height, high - size / 2), low + size / 2)


def _told(line: Line, scale: float) -> str:
    listed = ", ".join(f"{one.value:.1f} at {scale * x:.4g}" for x, one in line.there)
    return f"{line.label}: {listed}"
