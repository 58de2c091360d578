"""What every picture of a report shares: palette, style, canvas, lines, and the way into SVG.

One idea a picture, in the Okabe-Ito palette (safe for colour-blind readers), with shapes and dashes
that tell the same story as the colours. Ink is `currentColor` and the background is transparent,
so a picture follows the light or dark page around it. What is drawn is the business of `plots.py`
and `geometry_plots.py`; pyplot's global state is not touched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexure.contracts import FlexureError

__all__ = [
    "BLUE",
    "DASHES",
    "GREEN",
    "INK",
    "MARKERS",
    "ORANGE",
    "PANEL",
    "REFERENCE",
    "SERIES",
    "SKY",
    "VERMILION",
    "WIDE",
    "Curve",
    "Look",
    "Picture",
    "canvas",
    "canvases",
    "draw_legend",
    "draw_line",
    "finished",
    "integer_axis",
    "label_text",
    "look",
    "title_text",
]

# Okabe and Ito (2008), "Color universal design".
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE = "#56B4E9", "#CC79A7"
SERIES = (BLUE, ORANGE, PURPLE, SKY, GREEN, VERMILION)  # the last two also mark single points
MARKERS = ("o", "^", "s", "D", "v", "P")
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (8, 2)), (0, (1, 3)))
_MORE_MARKERS = ("X", "*", "<", ">", "p", "h")
# Stands for the page's text colour until the SVG is written; no picture uses it otherwise.
INK = "#010203"

_LEGEND_SIZE, _TITLE_SIZE = 9.5, 10.5  # points
_ROW = 14.5  # points that a line of them is high
_LETTER = 0.62  # mean width of a letter over the text's size, DejaVu Sans
_HANDLE = 42  # points beside a legend's label: its line, and the space between columns
_AXIS = 62  # points that axes have less than their figure: labels and ticks of y

_STYLE: dict[str, Any] = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": _TITLE_SIZE,
    "figure.facecolor": "none",
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same picture on every machine
    "font.size": 10.5,
    "legend.frameon": False,
    "legend.fontsize": _LEGEND_SIZE,
    "lines.linewidth": 2.0,
    "svg.fonttype": "path",
    "svg.hashsalt": "flexure",  # the same numbers give the same bytes
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
REFERENCE: dict[str, Any] = {"color": INK, "linewidth": 1.2, "linestyle": (0, (6, 3))}
WIDE = (5.6, 3.9)  # inches; see `Picture.width`
PANEL = (3.6, 3.3)
_REM = 0.078  # of the page's text size, a point of a picture: so three panels fill the page's width


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        svg: an `<svg>` element for use inside an HTML page.
        alt: what it shows, in words, for readers who do not see it.
    """

    svg: str
    alt: str

    @property
    def width(self) -> float:
        """On a page that is wide enough, in units of its text size (rem).

        Such that text has one size in all pictures, whatever their own.
        """
        box = re.search(r'viewBox="\S+ \S+ (\S+) \S+"', self.svg)
        return _REM * float(box.group(1)) if box else 0.0


@dataclass(frozen=True)
class Curve:
    """One line of a plot; equally long sequences.

    Attributes:
        label: what the line is, for the legend.
        x: positions.
        y: values, in the unit of the plot's y axis.
        errors: half-width of the band around `y` (one standard error), or nothing.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[float] | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.x), len(self.y), len(self.x if self.errors is None else self.errors)}
        if len(lengths) != 1 or not len(self.x):
            raise FlexureError(
                f"expected x, y and errors of one length above 0 for the curve {self.label!r}, "
                f"got {len(self.x)}, {len(self.y)} and "
                f"{'none' if self.errors is None else len(self.errors)}"
            )


@dataclass(frozen=True)
class Look:
    """How one of many lines or points is told from the others.

    Attributes:
        colour: of the palette, one of six.
        marker: its shape, one of twelve.
        hollow: whether markers have no filling: of those whose colour an earlier one has.
        dashes: of a line; with the colour, another pair for each.
    """

    colour: str
    marker: str
    hollow: bool
    dashes: Any

    @property
    def markers(self) -> dict[str, Any]:
        """Of matplotlib's `plot`: shape, colour and filling."""
        face = "none" if self.hollow else self.colour
        return {"marker": self.marker, "color": self.colour, "markerfacecolor": face}


def look(index: int) -> Look:
    """The index-th one's: colours repeat from the seventh on, and their markers are hollow."""
    shapes = (*MARKERS, *_MORE_MARKERS)
    turns = index // len(SERIES)
    return Look(
        SERIES[index % len(SERIES)],
        shapes[index % len(shapes)],
        turns > 0,
        DASHES[(index + turns) % len(DASHES)],
    )


def canvas(size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure of a size in inches, and its axes, in the style of all pictures."""
    figure, ((axes,),) = canvases(size, 1, 1)
    return figure, axes


def canvases(size: tuple[float, float], rows: int, columns: int) -> tuple[Any, Any]:
    """A figure of axes in rows and columns, of a size in inches each, and the (rows, columns) axes.

    All have the same scales, which those at the left and lower edges have labels of.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # Several axes of fixed shape would be cut off at the edges otherwise.
    layout: Any = "compressed" if rows * columns > 1 else "constrained"
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(columns * size[0], rows * size[1]), layout=layout)
        return figure, figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)


def draw_line(axes: Any, line: Curve, index: int, *, band: str | None) -> None:
    """Draws the index-th line of a picture; `band` says in the legend what its errors are."""
    colour, dashes = look(index).colour, look(index).dashes
    axes.plot(line.x, line.y, linestyle=dashes, color=colour, label=line.label)
    if line.errors is not None:
        low = [y - e for y, e in zip(line.y, line.errors, strict=True)]
        high = [y + e for y, e in zip(line.y, line.errors, strict=True)]
        label = None if band is None or index else f"± {band}"
        axes.fill_between(line.x, low, high, color=colour, alpha=0.2, linewidth=0, label=label)


def draw_legend(figure: Any) -> None:
    """Writes the legend; for long labels, in more lines, the figure grows and not its axes less."""
    (axes,) = figure.axes
    handles, labels = axes.get_legend_handles_labels()
    room = 72 * figure.get_size_inches()[0]
    fitting = all(len(label) <= _letters(room / 2 - _HANDLE, _LEGEND_SIZE) for label in labels)
    wide = _letters(room - _HANDLE, _LEGEND_SIZE)
    texts = [_lines(label, wide) for label in labels]
    rows = (1 + len(texts)) // 2 if fitting else sum(1 + text.count("\n") for text in texts)
    more = max(rows - 1, 0) + axes.get_title().count("\n")
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + more * _ROW / 72)
    # Below the axes: nothing of the picture can end up behind it.
    figure.legend(
        handles,
        texts,
        loc="outside lower center",
        ncols=2 if fitting else 1,
        fontsize=_LEGEND_SIZE,
        frameon=False,
        labelcolor=INK,
    )


def label_text(text: str) -> str:
    """A name as it is in a legend: no mathematics in dollar signs, and shown whatever it is."""
    # Matplotlib leaves out of the legend what starts with an underscore.
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def title_text(text: str, size: tuple[float, float]) -> str:
    """A title above the axes of a canvas of that size in inches, in as many lines as it needs."""
    return _lines(label_text(text), _letters(72 * size[0] - _AXIS, _TITLE_SIZE))


def integer_axis(axes: Any) -> None:
    """Ticks of x at whole numbers only, one being enough."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def _letters(points: float, size: float) -> int:
    return int(points / (_LETTER * size))


def _lines(text: str, letters: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, letters, drop_whitespace=False)) or text


def finished(figure: Any, alt: str) -> Picture:
    """The figure as a picture; `alt` is what it shows, in words."""
    import io

    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return Picture(_inline(buffer.getvalue(), alt), alt)


def _inline(document: str, alt: str) -> str:
    """An SVG document as an element of an HTML page: scalable, described, with ids of its own."""
    import hashlib
    from html import escape

    body = document[document.index("<svg") :].replace(INK, "currentColor")
    # The page may set a lighter blue on a dark background; elsewhere the palette's own is used.
    body = re.sub(BLUE, f"var(--blue, {BLUE})", body, flags=re.IGNORECASE)
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    # Ids are global in a page, and matplotlib numbers every figure's from the start.
    own = hashlib.sha256((body + alt).encode()).hexdigest()[:8]
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", body)
    opening = re.match(r"<svg[^>]*>", body)
    box = re.search(r'viewBox="([^"]+)"', body)
    if opening is None or box is None:  # matplotlib has changed what it writes
        raise RuntimeError("expected an <svg> element with a viewBox from matplotlib")
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box.group(1)}" role="img" aria-label="{escape(alt, quote=True)}">'
    )
    return head + body[opening.end() :].strip()
