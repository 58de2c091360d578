"""Pictures of measures for reports: numbers in, inline SVG with alternative text out.

Nothing here measures or writes files; style is `canvas.py`'s, and other pictures are in `plots.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexure.contracts import FlexureError
from flexure.report.canvas import (
    BLUE,
    DASHES,
    MARKERS,
    PANEL,
    REFERENCE,
    SERIES,
    VERMILION,
    WIDE,
    Curve,
    Picture,
    canvas,
    draw_legend,
    finished,
)

__all__ = [
    "Bin",
    "Fit",
    "Samples",
    "against_confidence",
    "contributions",
    "distributions",
    "fits",
    "log_curves",
    "reliability",
]

_RUNNING_BINS = 8  # of equal counts: enough to see a trend, each with samples to take a median of


@dataclass(frozen=True)
class Samples:
    """One value for each sample, of one network."""

    label: str
    values: Sequence[float]


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
    """The share of samples below each value, for positive values over several decades.

    Args:
        networks: one line each. Values that are not finite or not above 0 cannot be drawn on a
            logarithmic axis: the share that is drawn is in the picture's words.
        title: above the picture.
        axis: what the values are, with their unit.

    Raises:
        FlexureError: a network has no value that can be drawn.
    """
    import numpy as np

    figure, axes = canvas(PANEL)
    told = []
    for k, network in enumerate(networks):
        values = _drawable(network)
        share = 100 * np.arange(1, len(values) + 1) / len(values)
        axes.step(
            values, share, where="post", color=SERIES[k], linestyle=DASHES[k],
            label=network.label,
        )  # fmt: skip
        told.append(
            f"{network.label}: median {np.median(values):.3g}, {len(values)} of "
            f"{len(network.values)} samples drawn"
        )
    axes.set(xscale="log", xlabel=axis, ylabel="samples below (%)", title=title, ylim=(0, 101))
    draw_legend(figure)
    return finished(figure, f"{title}. Share of samples below each {axis}. {'; '.join(told)}.")


def log_curves(lines: Sequence[Curve], *, title: str, x_label: str, y_label: str) -> Picture:
    """Functions of one variable, both axes logarithmic.

    Args:
        lines: the functions; neighbours in pairs (a measurement, its bound) share a colour, and
            the second of a pair is dashed.
        title: above the picture.
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.
    """
    figure, axes = canvas(WIDE)
    for k, line in enumerate(lines):
        colour, dashes = SERIES[k // 2], DASHES[k % 2]
        axes.plot(line.x, line.y, linestyle=dashes, color=colour, label=line.label,
                  marker=MARKERS[k // 2], markersize=4)  # fmt: skip
        if line.errors is not None:
            low = [max(y - e, y / 10) for y, e in zip(line.y, line.errors, strict=True)]
            high = [y + e for y, e in zip(line.y, line.errors, strict=True)]
            axes.fill_between(line.x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label, title=title)
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
                  label=f"{fit.label}: slope {fit.slope:.2f}")  # fmt: skip
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    draw_legend(figure)
    slopes = ", ".join(f"{fit.label} {fit.slope:.3f}" for fit in networks)
    return finished(figure, f"{title}. {y_label} against {x_label}, with fitted lines: {slopes}.")


def against_confidence(
    samples: Samples, confidence: Sequence[float], *, title: str, axis: str
) -> Picture:
    """A positive value of each sample against the network's confidence, with running medians.

    Args:
        samples: the values; those that are not finite or not above 0 are left out.
        confidence: the largest predicted probability of each, in (0, 1].
        title: above the picture.
        axis: what the values are, with their unit.

    Raises:
        FlexureError: nothing can be drawn.
    """
    import numpy as np

    _drawable(samples)
    values, sure = np.asarray(samples.values, float), np.asarray(confidence, float)
    some = np.isfinite(values) & (values > 0)
    # The distance to certainty: most samples lie where a linear axis would show one line.
    doubt = np.clip(1 - sure[some], 1e-7, 1)
    values = values[some]
    figure, axes = canvas(PANEL)
    axes.plot(doubt, values, "o", color=BLUE, alpha=0.45, markersize=3, markeredgewidth=0,
              label="a sample")  # fmt: skip
    order = np.argsort(doubt)
    parts = [p for p in np.array_split(order, min(_RUNNING_BINS, len(order))) if len(p)]
    medians = [(np.median(doubt[p]), np.median(values[p])) for p in parts]
    axes.plot(*zip(*medians, strict=True), "-", color=VERMILION, label="running median")
    axes.set(xscale="log", yscale="log", title=title, ylabel=axis,
             xlabel="1 − confidence (probability)")  # fmt: skip
    draw_legend(figure)
    ends = f"from {medians[0][1]:.3g} for the surest to {medians[-1][1]:.3g} for the least sure"
    return finished(figure, f"{title}. {axis} of {len(values)} samples; the median goes {ends}.")


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
             title=title)  # fmt: skip
    axes.xaxis.get_major_locator().set_params(integer=True)
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
    axes.set(xlabel="confidence (probability)", ylabel="accuracy (share right)", title=title,
             xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))  # fmt: skip
    draw_legend(figure)
    told = "; ".join(f"{b.confidence:.2f}: {b.accuracy:.2f} of {b.count}" for b in bins)
    return finished(figure, f"{title}. Share right at each mean confidence: {told}.")


def _drawable(samples: Samples) -> Any:
    """The values that a logarithmic axis can show, sorted."""
    import numpy as np

    values = np.asarray(samples.values, dtype=float)
    values = np.sort(values[np.isfinite(values) & (values > 0)])
    if not len(values):
        raise FlexureError(
            f"expected positive finite values of {samples.label!r} to draw, got none among "
            f"{len(samples.values)}; measure more samples"
        )
    return values
