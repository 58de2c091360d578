"""Pictures of measures for reports: numbers in, inline SVG with alternative text out.

Nothing here measures or writes files; style is `canvas.py`'s, and other pictures are in `plots.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flexure.contracts import FlexureError
from flexure.report.canvas import (
    BLUE,
    DASHES,
    INK,
    MARKERS,
    PANEL,
    REFERENCE,
    SERIES,
    VERMILION,
    WIDE,
    Picture,
    canvas,
    draw_legend,
    finished,
    integer_axis,
    label_text,
    look,
    title_text,
)
from flexure.report.log_axes import drawable, log_axis, log_ends

__all__ = [
    "Bin",
    "Fit",
    "NoiseLine",
    "Samples",
    "against_doubt",
    "contributions",
    "distributions",
    "fits",
    "reliability",
    "under_noise",
]

_RUNNING_BINS = 8  # of equal counts: enough to see a trend, each with samples to take a median of
_THIN = 0.8  # points that a bound's line is wide where the dashes tell networks apart
_NO_DOUBT = 1e-16  # where samples without doubt are drawn if there are no others


@dataclass(frozen=True)
class Samples:
    """One value for each sample, of one network; at least 0, or nan where it is not defined."""

    label: str
    values: Sequence[float]

    @property
    def drawn(self) -> list[float]:
        """Those that a logarithmic axis can show, sorted."""
        return sorted(value for value in self.values if drawable(value))

    @property
    def zeros(self) -> int:
        """How many are 0."""
        return sum(value == 0 for value in self.values)

    @property
    def defined(self) -> int:
        """How many are numbers, infinite ones among them."""
        return sum(not math.isnan(value) for value in self.values)

    @property
    def counts(self) -> str:
        """How many are drawn, and what the others are."""
        left = {
            "zero": self.zeros,
            "not defined": len(self.values) - self.defined,
            "infinite": self.defined - self.zeros - len(self.drawn),
        }
        told = ", ".join(f"{count} {why}" for why, count in left.items() if count)
        return f"{len(self.drawn)} of {len(self.values)}" + (f" ({told})" if told else "")


@dataclass(frozen=True)
class NoiseLine:
    """What noise of each radius does, for one network; equally long sequences above 0.

    Attributes:
        label: what the line is, for the legend.
        x: radii.
        y: values.
        quartiles: the lower and upper ones around `y`, or None.
        network: which it belongs to, from 0: its colour and marker.
        is_bound: whether it is a bound, and dashed.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    quartiles: tuple[Sequence[float], Sequence[float]] | None
    network: int
    is_bound: bool


@dataclass(frozen=True)
class Fit:
    """Points and the straight line through them: `y = intercept + slope·x`."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    slope: float
    intercept: float


@dataclass(frozen=True)
class Bin:
    """Samples of similar confidence: how sure the network is of them, and how often right.

    Attributes:
        confidence: mean, in [0, 1].
        accuracy: share that is right, in [0, 1].
        low: lower end of its interval.
        high: upper end of its interval.
        count: samples.
    """

    confidence: float
    accuracy: float
    low: float
    high: float
    count: int


def distributions(networks: Sequence[Samples], *, title: str, axis: str) -> Picture:
    """The share of samples at or below each value, for values over several decades.

    Of all values that are defined: a logarithmic axis cannot show zeros, but the curve starts at
    their share, and ends below 100 % where some are infinite.

    Args:
        networks: one line each.
        title: above the picture.
        axis: what the values are, with their unit.

    Raises:
        FlexureError: a network has no value that can be drawn.
    """
    import numpy as np

    figure, axes = canvas(PANEL)
    for network in networks:
        _check_drawable(network)
    low, high = log_ends(value for network in networks for value in network.drawn)
    told = []
    for k, network in enumerate(networks):
        values, zeros = network.drawn, network.zeros
        share = 100 * np.arange(zeros, zeros + len(values) + 1) / network.defined
        axes.step(
            [low, *values, high], [*share, share[-1]], where="post", color=SERIES[k],
            linestyle=DASHES[k], label=label_text(network.label),
        )  # fmt: skip
        told.append(
            f"{network.label}: median of those drawn {np.median(values):.3g}, "
            f"{network.counts} samples drawn"
        )
    log_axis(axes, "x", (low, high))
    axes.set(xlabel=axis, ylabel="samples at or below (%)", ylim=(0, 101),
             title=title_text(title, PANEL))  # fmt: skip
    draw_legend(figure)
    return finished(
        figure, f"{title}. Share of samples at or below each {axis}. {'; '.join(told)}."
    )


def under_noise(
    lines: Sequence[NoiseLine], *, title: str, x_label: str, y_label: str, bounds: str = ""
) -> Picture:
    """What noise of growing radius does, and its bounds; both axes logarithmic.

    Args:
        lines: at least one.
        title: above the picture.
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.
        bounds: what stands in the legend for all bounds, which are thin then, and dashes tell
            networks apart; without, bounds are dashed, and each has a label of its own.

    Raises:
        FlexureError: no lines.
    """
    if not lines:
        raise FlexureError("expected at least one line to draw, got none; give larger radii")
    figure, axes = canvas(WIDE)
    for line in lines:
        style, thin = look(line.network), bool(bounds) and line.is_bound
        colour = style.colour
        dashes = "-" if thin else style.dashes if bounds else DASHES[int(line.is_bound)]
        axes.plot(line.x, line.y, linestyle=dashes, linewidth=_THIN if thin else 2.0,
                  **style.markers, markersize=3 if thin else 4.5, markeredgewidth=0.8,
                  label=None if thin else label_text(line.label))  # fmt: skip
        if line.quartiles is not None and len(line.x) > 1:
            axes.fill_between(line.x, *line.quartiles, color=colour, alpha=0.2, linewidth=0)
        elif line.quartiles is not None:  # a band over one place has no width
            axes.vlines(line.x, *line.quartiles, color=colour, alpha=0.5, linewidth=2)
    if bounds and any(line.is_bound for line in lines):
        axes.plot([], [], linewidth=_THIN, color=INK, label=label_text(bounds))
    log_axis(axes, "x", log_ends(x for line in lines for x in line.x))
    shown = [line.y for line in lines] + [end for line in lines for end in line.quartiles or ()]
    log_axis(axes, "y", log_ends(y for values in shown for y in values))
    axes.set(xlabel=x_label, ylabel=y_label, title=title_text(title, WIDE))
    draw_legend(figure)
    ends = "; ".join(f"{n.label}: from {n.y[0]:.3g} to {n.y[-1]:.3g}" for n in lines)
    return finished(figure, f"{title}. {y_label} against {x_label}. {ends}.")


def fits(networks: Sequence[Fit], *, title: str, x_label: str, y_label: str) -> Picture:
    """Points and the line through them, whose slope is what is reported."""
    figure, axes = canvas(WIDE)
    for k, fit in enumerate(networks):
        colour = SERIES[k]
        axes.plot(fit.x, fit.y, MARKERS[k], color=colour, markersize=6)
        line = [fit.intercept + fit.slope * x for x in fit.x]
        axes.plot(fit.x, line, linestyle=DASHES[k], color=colour, linewidth=1.4,
                  label=label_text(f"{fit.label}: slope {fit.slope:.3g}"))  # fmt: skip
    axes.set(xlabel=x_label, ylabel=y_label, title=title_text(title, WIDE))
    integer_axis(axes)
    draw_legend(figure)
    slopes = ", ".join(f"{fit.label} {fit.slope:.3g}" for fit in networks)
    return finished(figure, f"{title}. {y_label} against {x_label}, with fitted lines: {slopes}.")


def against_doubt(
    networks: Sequence[tuple[Samples, Sequence[float]]], *, axis: str
) -> tuple[Picture, ...]:
    """A value of each sample against the network's doubt, with running medians.

    One picture a network, titled with its name, all with the same axes. Doubt spans decades where
    a network is sure, and its axis is logarithmic: samples without any are drawn as triangles at
    its left end.

    Args:
        networks: the values, and for each the probability that the network leaves to classes it
            does not predict, in [0, 1). Values that are not finite or not above 0 are left out.
        axis: what the values are, with their unit.

    Raises:
        FlexureError: a network has no value that can be drawn.
    """
    points = []
    for samples, doubts in networks:
        _check_drawable(samples)
        pairs = zip(doubts, samples.values, strict=True)
        points.append(sorted(pair for pair in pairs if drawable(pair[1])))
    doubts = [doubt for pairs in points for doubt, _ in pairs]
    some = [doubt for doubt in doubts if doubt > 0]
    # Aside from the others: a third of a decade is more than their own scatter.
    edge = min(some) / 3 if some else _NO_DOUBT
    ends = log_ends([*some, *([edge] if len(some) < len(doubts) else [])])
    heights = log_ends(value for pairs in points for _, value in pairs)
    return tuple(
        _doubt_panel(samples, pairs, edge, ends, heights, axis)
        for (samples, _), pairs in zip(networks, points, strict=True)
    )


def _doubt_panel(
    samples: Samples,
    pairs: Sequence[tuple[float, float]],
    edge: float,
    ends: tuple[float, float],
    heights: tuple[float, float],
    axis: str,
) -> Picture:
    """One network's samples (doubt, value), sorted; those without doubt are drawn at the edge."""
    import numpy as np

    figure, axes = canvas(PANEL)
    sure = [value for doubt, value in pairs if doubt == 0]
    dots = {"color": BLUE, "alpha": 0.6, "linestyle": "", "markeredgewidth": 0}
    if len(sure) < len(pairs):
        axes.plot(*zip(*pairs[len(sure) :], strict=True), marker="o", markersize=3.5,
                  label="a sample", **dots)  # fmt: skip
    if sure:
        axes.plot([edge] * len(sure), sure, marker="<", markersize=5, label="no doubt: 0", **dots)
    groups = np.array_split(np.asarray(pairs), min(_RUNNING_BINS, len(pairs)))
    middles = [np.median(np.maximum(group, [edge, 0]), axis=0) for group in groups]
    axes.plot(*zip(*middles, strict=True), "-", color=VERMILION, marker="D", markersize=3,
              label="running median")  # fmt: skip
    log_axis(axes, "x", ends)
    log_axis(axes, "y", heights)
    axes.set(title=title_text(samples.label, PANEL), ylabel=axis,
             xlabel="doubt, 1 − confidence (probability)")  # fmt: skip
    draw_legend(figure)
    going = f"from {middles[0][1]:.3g} for the surest to {middles[-1][1]:.3g} for the least sure"
    return finished(
        figure,
        f"{samples.label}. {axis} of {len(pairs)} samples against doubt, {len(sure)} of them "
        f"without any; the median goes {going}.",
    )


def contributions(shares: Sequence[float], *, title: str, highest: str) -> Picture:
    """What each layer adds to a bound, in network order.

    Args:
        shares: of each layer, adding to 1.
        title: above the picture.
        highest: the name of the layer with the largest share.
    """
    figure, axes = canvas(WIDE)
    x = range(1, len(shares) + 1)
    axes.bar(x, [100 * share for share in shares], color=BLUE, alpha=0.75)
    axes.set(xlabel="activation (number in network order)", ylabel="share of the bound (%)",
             title=title_text(title, WIDE), xlim=(0.4, len(shares) + 0.6))  # fmt: skip
    integer_axis(axes)
    top = 100 * max(shares)
    return finished(
        figure, f"{title}. {len(shares)} activations; the largest share is {top:.1f} %, {highest}."
    )


def reliability(bins: Sequence[Bin], *, title: str) -> Picture:
    """Accuracy against confidence in bins, with intervals; a calibrated network is on the line."""
    if not bins:
        raise FlexureError("expected at least one bin with samples, got none; give data")
    figure, axes = canvas(PANEL)
    axes.plot([0, 1], [0, 1], **REFERENCE, label="calibrated")
    x = [b.confidence for b in bins]
    axes.vlines(x, [b.low for b in bins], [b.high for b in bins], color=BLUE, linewidth=2)
    axes.plot(x, [b.accuracy for b in bins], "o", color=BLUE, markersize=5, label="samples in bins")
    axes.set(xlabel="confidence (probability)", ylabel="accuracy (share right)",
             title=title_text(title, PANEL), xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))  # fmt: skip
    draw_legend(figure)
    told = "; ".join(f"{b.confidence:.2f}: {b.accuracy:.2f} of {b.count}" for b in bins)
    return finished(figure, f"{title}. Share right at each mean confidence: {told}.")


def _check_drawable(samples: Samples) -> None:
    if not samples.drawn:
        raise FlexureError(
            f"expected positive finite values of {samples.label!r} to draw, got none among "
            f"{len(samples.values)}; measure more samples"
        )
