"""Pictures of networks trained by several methods: numbers in, inline SVG with a text out.

Each method has one colour and marker in all pictures. Nothing here measures or writes files; style
is `canvas.py`'s, lines over epochs and sites are `plots.py`'s, noise is `geometry_plots.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from flexure.contracts import FlexureError
from flexure.report.canvas import (
    INK,
    MARKERS,
    PANEL,
    SERIES,
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
from flexure.report.plots import Estimate

__all__ = ["ClassMap", "against_radius", "class_map", "class_maps", "tradeoff"]

_APART = 0.14  # of the smallest step between radii, between the marks of neighbouring methods
_STEPS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the margin of probability, one tint each
_TINTS = (0.10, 0.18, 0.26, 0.34, 0.44)  # opacities
_NARROW = 3.0  # of a map's sides, beyond which its axes have scales of their own
_AROUND = (0.75, 0.85)  # inches beside and above a map: labels, ticks, title


@dataclass(frozen=True)
class ClassMap:
    """What a network says all over the plane of its two inputs, and the data.

    Attributes:
        title: above the map.
        x: (G,) increasing first coordinates.
        y: (G,) increasing second coordinates.
        probabilities: (G, G, classes), [i, j] at (x[j], y[i]); finite.
        points: (N, 2) data.
        labels: (N,) their classes.
    """

    title: str
    x: Any
    y: Any
    probabilities: Any
    points: Any
    labels: Any


def against_radius(
    methods: Sequence[tuple[str, Sequence[Estimate | None]]],
    radii: Sequence[float],
    *,
    title: str,
    x_label: str,
    y_label: str,
) -> Picture:
    """A value of each method at each radius, with intervals, side by side where they would overlap.

    Args:
        methods: name, and a value for each radius, None where there is none.
        radii: increasing.
        title: above the picture.
        x_label: what the radii are, with their unit.
        y_label: what the values are, with their unit.

    Raises:
        FlexureError: no method has a value.
    """
    if not any(one is not None for _, values in methods for one in values):
        raise FlexureError("expected at least one value to draw, got none")
    figure, axes = canvas(WIDE)
    steps = [after - before for before, after in pairwise(radii)] or [1.0]
    apart = min(_APART, 0.7 / max(len(methods), 1)) * min(steps)
    told = []
    for k, (name, values) in enumerate(methods):
        there = [(r, one) for r, one in zip(radii, values, strict=True) if one is not None]
        if not there:
            continue
        style = look(k)
        x = [r + (k - (len(methods) - 1) / 2) * apart for r, _ in there]
        y = [one.value for _, one in there]
        axes.plot(x, y, linestyle=style.dashes, linewidth=1.4, markersize=5, **style.markers,
                  label=label_text(name))  # fmt: skip
        ends = [(place, one.low, one.high) for place, (_, one) in zip(x, there, strict=True)
                if _has_interval(one)]  # fmt: skip
        if ends:
            axes.vlines(*zip(*ends, strict=True), color=style.colour, linewidth=1.4, alpha=0.5)
        listed = ", ".join(f"{one.value:.1f} at {r:g}" for r, one in there)
        told.append(f"{name}: {listed}")
    axes.set_xticks(list(radii), labels=[f"{r:g}" for r in radii])
    axes.set(xlabel=x_label, ylabel=y_label, title=title_text(title, WIDE))
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.8)
    draw_legend(figure)
    return finished(figure, f"{title}. {y_label} against {x_label}. {'; '.join(told)}.")


def tradeoff(
    methods: Sequence[tuple[str, Estimate, Estimate] | None],
    *,
    title: str,
    x_label: str,
    y_label: str,
) -> Picture:
    """Two numbers of each method against each other, with intervals; y is logarithmic.

    Args:
        methods: name, value along x, value along y, or None for one that is not drawn: the others
            look as if it was.
        title: above the picture.
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.

    Raises:
        FlexureError: no method has a positive finite value along y.
    """
    shown = [
        (k, *one) for k, one in enumerate(methods)
        if one is not None and drawable(one[2].value) and math.isfinite(one[1].value)
    ]  # fmt: skip
    if not shown:
        raise FlexureError("expected at least one method with a positive value to draw, got none")
    figure, axes = canvas(WIDE)
    heights = log_ends(
        v for _, _, _, y in shown for v in (y.value, *((y.low, y.high) if _has_interval(y) else ()))
    )
    log_axis(axes, "y", heights)
    for k, name, x, y in shown:
        style = look(k)
        if _has_interval(x):
            axes.hlines(y.value, x.low, x.high, color=style.colour, linewidth=1.6)
        if _has_interval(y):  # an end that the axis has no place for is beyond its edge
            axes.vlines(x.value, max(y.low, heights[0]), y.high, color=style.colour, linewidth=1.6)
        # Without filling: of marks at one place, all are seen.
        axes.plot(x.value, y.value, linestyle="", marker=style.marker, color=style.colour,
                  markersize=9, markeredgewidth=1.8, markerfacecolor="none",
                  label=label_text(name))  # fmt: skip
    axes.set(xlabel=x_label, ylabel=y_label, title=title_text(title, WIDE))
    draw_legend(figure)
    told = "; ".join(f"{name}: {x.value:.4g}, {y.value:.3g}" for _, name, x, y in shown)
    return finished(figure, f"{title}. {y_label} against {x_label}. {told}.")


def class_map(found: ClassMap) -> Picture:
    """One map: classes as colours, the more opaque the surer, their boundaries, and the data."""
    size = _map_size(found)
    figure, axes = canvas(size)
    _draw_map(axes, found)
    axes.set(xlabel="x1 (input unit)", ylabel="x2 (input unit)",
             title=title_text(found.title, size))  # fmt: skip
    return finished(figure, f"{found.title}. {_described(found)}")


def class_maps(maps: Sequence[ClassMap], *, columns: int | None = None) -> Picture:
    """Several maps in one picture, with the same axes.

    Args:
        maps: row by row.
        columns: maps in a row; default: all up to three, else three.

    Raises:
        FlexureError: no maps.
    """
    if not maps:
        raise FlexureError("expected at least one map to draw, got none; give 2-D data")
    wide = min(len(maps), columns or 3)
    rows = -(-len(maps) // wide)
    size = _map_size(maps[0])
    figure, axes = canvases(size, rows, wide)
    places = [place for row in axes for place in row]
    for place, one in zip(places, maps, strict=False):
        _draw_map(place, one)
        place.set_title(title_text(one.title, size))
    for place in places[len(maps) :]:
        place.set_visible(False)
    for k, place in enumerate(places[: len(maps)]):
        below_is_empty = k + wide >= len(maps)
        place.tick_params(labelbottom=below_is_empty, labelleft=k % wide == 0)
        place.set(xlabel="x1 (input unit)" if below_is_empty else "",
                  ylabel="x2 (input unit)" if k % wide == 0 else "")  # fmt: skip
    told = "; ".join(one.title for one in maps)
    return finished(figure, f"{len(maps)} decision maps: {told}. {_described(maps[0])}")


def _map_size(found: ClassMap) -> tuple[float, float]:
    """Of a picture, in inches: as wide as a panel, or as high."""
    across, up = _sides(found)
    ratio = up / across if max(across, up) <= _NARROW * min(across, up) else 1.0
    wide = PANEL[0] - _AROUND[0]
    width = wide / max(ratio, 1.0)
    return width + _AROUND[0], wide * min(ratio, 1.0) + _AROUND[1]


def _sides(found: ClassMap) -> tuple[float, float]:
    return float(found.x[-1] - found.x[0]), float(found.y[-1] - found.y[0])


def _draw_map(axes: Any, found: ClassMap) -> None:
    import numpy as np

    probabilities = np.asarray(found.probabilities, dtype=float)
    x, y = np.asarray(found.x, dtype=float), np.asarray(found.y, dtype=float)
    for k in range(probabilities.shape[2]):
        others = np.delete(probabilities, k, axis=2)
        margin = probabilities[..., k] - (others.max(2) if others.size else 0.0)
        if not margin.max() > 0:
            continue
        colour = SERIES[k % len(SERIES)]
        tints = [(colour, tint) for tint in _TINTS]
        axes.contourf(x, y, margin, levels=_STEPS, colors=tints, extend="neither")
        if k and margin.min() < 0:  # the lines around class 0 are those of its neighbours
            axes.contour(x, y, margin, levels=[0.0], colors=[INK], linewidths=1.4)
    points, labels = np.asarray(found.points), np.asarray(found.labels)
    for k in np.unique(labels).tolist():
        mine = points[labels == k]
        axes.plot(mine[:, 0], mine[:, 1], linestyle="", marker=MARKERS[k % len(MARKERS)],
                  color=SERIES[k % len(SERIES)], markersize=3.4, markeredgewidth=0.3,
                  markeredgecolor=INK)  # fmt: skip
    axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    sides = sorted(_sides(found))
    if sides[1] <= _NARROW * sides[0]:
        axes.set_aspect("equal")
    else:
        axes.set_box_aspect(1)


def _described(found: ClassMap) -> str:
    classes = found.probabilities.shape[2]
    return (
        f"Regions of {classes} classes, shaded by how sure the network is, the boundaries between "
        f"them, and {len(found.points)} samples."
    )


def _has_interval(one: Estimate) -> bool:
    return math.isfinite(one.low) and math.isfinite(one.high)
