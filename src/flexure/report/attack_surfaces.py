"""Pictures of a network's loss around samples: maps, rays along the gradient, sizes of gradients.

Numbers in, inline SVG out; what is drawn is the business of a report's sections.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexure.contracts import FlexureError
from flexure.report.attack_plots import colour_bar
from flexure.report.canvas import (
    BLUE,
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
from flexure.report.log_axes import drawable, log_axis, log_ends

__all__ = ["Ray", "Spread", "Surface", "rays", "spreads", "surfaces"]

_OUTLIERS = 0.98  # share of a surface's heights that its colours tell apart
_DIVERGING = "PuOr_r"  # safe for colour-blind readers (Brewer): purple below 0, orange above


@dataclass(frozen=True)
class Surface:
    """A loss around one sample.

    Attributes:
        title: above the map.
        offsets: (G,) increasing, in radii, along both axes.
        losses: (G, G), row j at offsets[j] along the gradient; not finite where unknown.
    """

    title: str
    offsets: Any
    losses: Any


@dataclass(frozen=True)
class Ray:
    """The loss of one sample along its gradient, and what the gradient predicts of it.

    Attributes:
        label: which sample.
        x: (R,) distances, in radii.
        loss: (R,) as found.
        predicted: (R,) by the gradient at the sample; nan where there is none.
    """

    label: str
    x: Sequence[float]
    loss: Sequence[float]
    predicted: Sequence[float]


@dataclass(frozen=True)
class Spread:
    """How values above 0 are spread: their least, quartiles and largest."""

    label: str
    quantiles: tuple[float, float, float, float, float]


def surfaces(
    maps: Sequence[Surface], *, ball: str, x_label: str, y_label: str, value: str
) -> Picture:
    """Losses around samples: the label has most of the probability below 0, with the ball.

    Args:
        maps: one a sample, at most three are in a row.
        ball: "linf" or "l2": which points of the map are within the radius.
        x_label: of the direction along columns.
        y_label: of the direction along rows.
        value: what the loss is, with its unit.
    """
    import numpy as np

    if not maps:
        raise FlexureError("expected at least one loss surface to draw, got none")
    columns = 2 if len(maps) == 4 else min(len(maps), 3)
    side = 2.6 if columns > 1 else 3.3  # beside a single one, the colours' scale takes much room
    figure, axes = canvases((side, side), -(-len(maps) // columns), columns)
    places = [place for row in axes for place in row]
    heights = np.concatenate([np.asarray(one.losses, dtype=float).ravel() for one in maps])
    heights = np.abs(heights[np.isfinite(heights)])
    top = float(np.quantile(heights, _OUTLIERS)) if heights.size else 0.0
    drawn = None
    for place, one in zip(places, maps, strict=False):
        drawn = _draw_surface(place, one, top or 1.0, ball)
    for k, place in enumerate(places):
        place.set_visible(k < len(maps))
        place.tick_params(labelbottom=k + columns >= len(maps), labelleft=k % columns == 0)
    figure.supxlabel(x_label, fontsize=10.5, color=INK)
    figure.supylabel(y_label, fontsize=10.5, color=INK)
    colour_bar(figure, drawn, axes, value, extend="both")
    told = "; ".join(_surface_told(one) for one in maps)
    return finished(figure, f"{value} around {len(maps)} samples. {told}.")


def rays(lines: Sequence[Ray], *, title: str, x_label: str, y_label: str) -> Picture:
    """Losses along the gradient, and as thin lines what the gradient at the sample predicts."""
    if not lines:
        raise FlexureError("expected at least one ray to draw, got none")
    figure, axes = canvas(PANEL)
    for k, ray in enumerate(lines):
        style = look(k)
        axes.plot(ray.x, ray.loss, color=style.colour, linestyle=style.dashes,
                  label=label_text(ray.label))  # fmt: skip
        axes.plot(ray.x, ray.predicted, color=style.colour, linewidth=0.8)
    # What is found decides the heights: a wrong prediction may be anywhere.
    found = [one for ray in lines for one in ray.loss if math.isfinite(one)] or [0.0]
    low, high = min(*found, 0.0), max(*found, 0.0)
    room = 0.08 * ((high - low) or 1.0)
    axes.axhline(0, **REFERENCE, zorder=0)
    axes.plot([], [], color=INK, linewidth=0.8, label="thin: as the gradient predicts")
    axes.set(xlabel=x_label, ylabel=y_label, title=title_text(title, PANEL),
             ylim=(low - room, high + room))  # fmt: skip
    draw_legend(figure)
    ends = "; ".join(f"{ray.label}: from {ray.loss[0]:.3g} to {ray.loss[-1]:.3g}" for ray in lines)
    return finished(figure, f"{title}. {y_label} against {x_label}. {ends}.")


def spreads(rows: Sequence[Spread], *, title: str, axis: str) -> Picture:
    """Medians, middle halves and whole ranges of positive values, one below the other.

    A logarithmic axis cannot show 0: ranges that reach it go to the edge.

    Raises:
        FlexureError: no value is above 0.
    """
    shown = [value for row in rows for value in row.quantiles if drawable(value)]
    if not shown:
        raise FlexureError("expected at least one value above 0 to draw, got none")
    figure, axes = canvas((WIDE[0], 1.5 + 0.4 * len(rows)))
    ends = log_ends(shown)
    for k, row in enumerate(rows):
        least, lower, median, upper, largest = (min(max(q, ends[0]), ends[1])
                                                for q in row.quantiles)  # fmt: skip
        axes.plot([least, largest], [k, k], color=BLUE, linewidth=1.5,
                  label=None if k else "all")  # fmt: skip
        axes.plot([lower, upper], [k, k], color=BLUE, linewidth=5, alpha=0.7,
                  label=None if k else "middle half")  # fmt: skip
        axes.plot(median, k, linestyle="", marker="o", color=VERMILION, markersize=7,
                  label=None if k else "median")  # fmt: skip
    log_axis(axes, "x", ends)
    axes.set_yticks(range(len(rows)), [label_text(row.label) for row in rows])
    axes.set(xlabel=axis, ylim=(len(rows) - 0.5, -0.5), title=title_text(title, WIDE))
    draw_legend(figure)
    told = "; ".join(f"{row.label}: median {row.quantiles[2]:.3g}" for row in rows)
    return finished(figure, f"{title}. {axis}. {told}.")


def _draw_surface(axes: Any, one: Surface, top: float, ball: str) -> Any:
    import numpy as np

    offsets, losses = np.asarray(one.offsets, float), np.asarray(one.losses, float)
    # Rows are along the gradient, which is drawn to the right.
    shown = np.ma.masked_invalid(losses.T)
    half = (offsets[1] - offsets[0]) / 2 if len(offsets) > 1 else 1.0
    ends = (offsets[0] - half, offsets[-1] + half)
    drawn = axes.imshow(shown, cmap=_DIVERGING, vmin=-top, vmax=top, origin="lower",
                        extent=(*ends, *ends), interpolation="none")  # fmt: skip
    if len(offsets) > 1 and shown.min() < 0 < shown.max():
        axes.contour(offsets, offsets, shown, levels=[0.0], colors=["black"], linewidths=1.6)
    turns = np.linspace(0, 2 * np.pi, 5 if ball == "linf" else 121)
    axes.plot(np.cos(turns), np.sin(turns), color="black", linewidth=1.0, linestyle=(0, (5, 3)))
    axes.plot(0, 0, "o", color="white", markeredgecolor="black", markersize=5)
    axes.set(xlim=ends, ylim=ends, xticks=[-1, 0, 1], yticks=[-1, 0, 1],
             title=title_text(one.title, (2.7, 2.5)))  # fmt: skip
    return drawn


def _surface_told(one: Surface) -> str:
    import numpy as np

    losses = np.asarray(one.losses, float)
    known = losses[np.isfinite(losses)]
    share = np.mean(known > 0) if known.size else 0
    return f"{one.title}: above 0 in {share:.0%} of the map"
