"""Adversarial examples as pictures: the original, what was made of it, and the change enlarged.

Arrays in, inline SVG out, which holds the images at their own resolution. Which examples there are
and what is said of them is the business of a report's sections.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexure.contracts import FlexureError
from flexure.report.canvas import INK, Picture, canvases, finished, label_text

__all__ = ["Example", "affordable", "drawable_as_image", "example_picture", "nice_factor"]

_SIDE = 1.5  # inches that an image is wide and high
_WIDTH = 1.62  # inches that it has on the page, with what is beside it
_BELOW, _LINE = 0.24, 0.148  # inches for the text below, and for a line of that above
_LONG = 4.0  # ratio of an image's sides beyond which it would be a thin strip
_SIZE = 9.0  # points, of the text above an image
_LETTERS = 21  # of that text in a line
_ROWS = 3  # lines of it; a class name that needs more is cut
_CHANNELS = (1, 3)
_PIXELS = 700_000  # in all images of a page: some 2 MB of a perturbation, which does not compress
_MOST = 12  # examples: more would be seen by nobody
_LEADING = (5, 2, 1)  # first digits of a factor


@dataclass(frozen=True)
class Example:
    """One sample and what beats a model on it.

    Attributes:
        x: (C, H, W) the sample, within the bounds.
        x_adv: (C, H, W) its adversarial version.
        label: name of the true class.
        predicted: name of the class that is predicted at x_adv.
        size: how large the change is, in words.
        name: which sample it is, and which attack found it, in words.
        bounds: lowest and highest value of inputs.
    """

    x: Any
    x_adv: Any
    label: str
    predicted: str
    size: str
    name: str
    bounds: tuple[float, float]


def drawable_as_image(shape: Sequence[int]) -> bool:
    """Whether an input of this shape, without the batch, is a grey or a coloured image."""
    if len(shape) != 3 or shape[0] not in _CHANNELS:
        return False
    return 1 < max(shape[1:]) <= _LONG * min(shape[1:])


def affordable(shape: Sequence[int]) -> int:
    """How many examples of images of this shape a page can hold, at least one."""
    return max(1, min(_MOST, _PIXELS // (3 * shape[1] * shape[2])))


def nice_factor(largest: float, span: float) -> float:
    """By what to multiply a change whose largest value is given, for images of values in a span.

    The largest 1, 2 or 5 times a power of ten at which it stays within half of the span: mid-grey
    plus the change is then an image. 1 where there is no change.
    """
    if not largest > 0 or not math.isfinite(largest):
        return 1.0
    room = (span / 2) / largest * (1 + 1e-6)
    power = 10.0 ** math.floor(math.log10(room))
    return next(lead * power for lead in _LEADING if lead * power <= room or lead == 1)


def example_picture(example: Example) -> Picture:
    """The original, the adversarial version, and the change enlarged around mid-grey.

    Raises:
        FlexureError: the inputs are no grey or coloured images.
    """
    import numpy as np

    x, x_adv = (np.asarray(one, dtype=float) for one in (example.x, example.x_adv))
    if not drawable_as_image(x.shape):
        raise FlexureError(
            f"expected an image (1 or 3 channels, height, width) to draw, got {tuple(x.shape)}; "
            f"tell of other inputs in a table"
        )
    low, high = example.bounds
    change = (x_adv - x) / (high - low)
    factor = nice_factor(float(np.abs(change).max()), 1.0)
    images = ((x - low) / (high - low), (x_adv - low) / (high - low), 0.5 + factor * change)
    texts = [
        _title("original", f"label: {example.label}"),
        _title("adversarial", f"predicted: {example.predicted}"),
        _title(f"change × {factor:g}", example.size),
    ]
    above = _LINE * (1 + max(text.count("\n") for text in texts)) + _LINE / 2
    figure, (row,) = canvases((_WIDTH, _SIDE + above + _BELOW), 1, 3)
    figure.set_layout_engine("none")  # narrow images stay apart: what is above them needs the room
    for k, (axes, image, text) in enumerate(zip(row, images, texts, strict=True)):
        axes.set_position(_place(k, above))
        _draw(axes, image)
        axes.set_title(text, fontsize=_SIZE, color=INK)
    name = textwrap.shorten(example.name, 3 * _LETTERS, placeholder=" …")
    figure.text(0.5, 0.02, label_text(name), fontsize=_SIZE, color=INK, ha="center", va="bottom")
    return finished(
        figure,
        f"{example.name}: an image of class {example.label}, its adversarial version, predicted as "
        f"{example.predicted}, and the change times {factor:g} ({example.size}); mid-grey is none.",
    )


def _place(k: int, above: float) -> tuple[float, float, float, float]:
    """Of the k-th image in the figure: left, bottom, width, height as shares of it."""
    height = _SIDE + above + _BELOW
    left = (k + (1 - _SIDE / _WIDTH) / 2) / 3
    return left, _BELOW / height, _SIDE / _WIDTH / 3, _SIDE / height


def _draw(axes: Any, image: Any) -> None:
    import numpy as np

    shown = np.clip(image, 0.0, 1.0)
    shown = np.repeat(shown, 3, axis=0) if len(shown) == 1 else shown
    # Without interpolation the file holds the image's own pixels, whatever its size on the page.
    axes.imshow(shown.transpose(1, 2, 0), interpolation="none")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, linewidth=0.6)


def _title(first: str, text: str) -> str:
    """A line, and others in so many lines; what does not fit is cut."""
    lines = textwrap.wrap(text, _LETTERS, max_lines=_ROWS, placeholder=" …") or [""]
    return "\n".join(map(label_text, [first, *lines]))
