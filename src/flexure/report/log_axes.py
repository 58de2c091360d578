"""Logarithmic axes: what can be drawn on one, how far it goes, and which of its ticks are labelled.

Matplotlib labels a decade or nothing, or so many ticks between decades that they overlap. Here an
axis has two to five labels whatever it spans. What is drawn is the business of `geometry_plots.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["decimal", "drawable", "log_axis", "log_ends"]

_LEAST, _MOST = 2, 5  # labels on an axis: fewer give no scale, more overlap in the smallest picture
_NARROWEST = 2.0  # ratio of an axis's ends, so that rounding does not look like structure
_MARGIN = 0.06  # of the axis's length, beyond the values on either side
_FARTHEST = 307.0  # power of ten; beyond are numbers of fewer digits, and none
_PLAIN = (1e-3, 1e4)  # ticks from the one to the other are written without a power of ten
# Leading digits of ticks, from few to many; the first that gives enough labels is taken.
_DIGITS = ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9))
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def drawable(value: float) -> bool:
    """Whether a logarithmic axis can show the value: finite and above 0."""
    return 0 < value < math.inf


def log_ends(values: Iterable[float]) -> tuple[float, float]:
    """Ends of an axis that shows all positive finite values, with a margin.

    (0.1, 10) where there is none.
    """
    logs = [_within(math.log10(value)) for value in values if drawable(value)]
    low, high = (min(logs), max(logs)) if logs else (-1.0, 1.0)
    lacking = max(math.log10(_NARROWEST) - (high - low), 0) / 2
    low, high = low - lacking, high + lacking
    margin = _MARGIN * (high - low)
    return 10 ** _within(low - margin), 10 ** _within(high + margin)


def log_axis(axes: Any, which: str, ends: tuple[float, float]) -> None:
    """Makes an axis logarithmic, from the one end to the other, with labelled ticks.

    Args:
        axes: of matplotlib.
        which: `"x"` or `"y"`.
        ends: of the axis, from `log_ends`.
    """
    from matplotlib.ticker import FixedLocator, NullFormatter

    ticks, minor = _ticks(*ends)
    axes.set(**{f"{which}scale": "log", f"{which}lim": ends})
    axis = getattr(axes, f"{which}axis")
    axis.set_ticks(ticks, labels=_labels(ticks))
    axis.set_minor_locator(FixedLocator(minor))
    axis.set_minor_formatter(NullFormatter())


def _within(log: float) -> float:
    return min(max(log, -_FARTHEST), _FARTHEST)


def _ticks(low: float, high: float) -> tuple[list[float], list[float]]:
    """The ticks with labels and those without."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = range(first, last + 1)
    inside = [k for k in decades if low <= 10.0**k <= high]
    if len(inside) > _MOST:
        step = -(-len(inside) // _MOST)
        chosen = [10.0**k for k in inside if k % step == 0]
        return chosen, [10.0**k for k in inside if k % step]
    minor = [d * 10.0**k for k in decades for d in range(1, 10) if low <= d * 10.0**k <= high]
    ticks: list[float] = []
    for digits in _DIGITS:
        denser = [d * 10.0**k for k in decades for d in digits if low <= d * 10.0**k <= high]
        if len(ticks) > _LEAST or (len(denser) > _MOST and len(ticks) >= _LEAST):
            break
        ticks = denser
    return ticks, [tick for tick in minor if tick not in ticks]


def _labels(ticks: Sequence[float]) -> list[str]:
    if all(_PLAIN[0] <= tick <= _PLAIN[1] for tick in ticks):
        return [f"{tick:g}" for tick in ticks]
    return [decimal(tick) for tick in ticks]


def decimal(value: float) -> str:
    """A positive number of few digits with its power of ten, such as 10⁻⁷ and 2·10⁴."""
    power = math.floor(math.log10(value) + 1e-9)  # the logarithm of a power of ten may be below it
    digits = f"{value / 10.0**power:.2g}"
    raised = f"10{str(power).translate(_SUPERSCRIPTS)}"
    return raised if digits == "1" else f"{digits}·{raised}"
