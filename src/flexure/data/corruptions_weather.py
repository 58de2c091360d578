"""Weather of the common corruptions: snow, frost, fog and brightness.

Images here are `(H, W, C)` float64 in [0, 1]; results may leave the range. Which strength belongs
to which severity is the catalogue's in `corruptions`, and so are the references.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.random import Generator

from flexure.data.corruptions_blur import along_a_line, enlarged

__all__ = ["brightness", "clouds", "fog", "frost", "frost_texture", "snow"]

_LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in a grey level (ITU-R BT.601)."""

_ICE = np.array([0.84, 0.93, 1.0])
"""Red, green and blue of the brightest frost."""

_DIRECTIONS = 8
"""Of frost needles: enough to look like none is preferred."""

_FROST_DECAY = 1.75
"""Of the clouds below frost needles: that of the densest small fog."""


def snow(
    x: np.ndarray[Any, Any],
    draw: Generator,
    mean: float,
    std: float,
    zoom: float,
    threshold: float,
    radius: int,
    blur: float,
    kept: float,
) -> np.ndarray[Any, Any]:
    """Flakes that fall aslant, over an image paled where it is dark.

    The flakes are normal noise, enlarged, cut off below a threshold and blurred along a line; they
    are added once as they are and once turned by 180 degrees.

    Args:
        x: the image.
        draw: of the noise and of the angle, -135 ... -45 degrees.
        mean: of the noise.
        std: of the noise.
        zoom: how far it is enlarged; the size of flakes.
        threshold: below it there is no flake.
        radius: of the blur, see `along_a_line`.
        blur: its standard deviation in pixels.
        kept: the share of the image in its mean with the paled one.
    """
    noise = enlarged(draw.normal(mean, std, size=(*x.shape[:2], 1)), zoom)
    flakes = np.clip(np.where(noise < threshold, 0, noise), 0, 1)
    flakes = along_a_line(flakes, radius, blur, draw.uniform(-135, -45))
    pale = np.maximum(x, _grey(x) * 1.5 + 0.5)
    return np.asarray(kept * x + (1 - kept) * pale + flakes + flakes[::-1, ::-1])


def frost(
    x: np.ndarray[Any, Any], draw: Generator, kept: float, strength: float
) -> np.ndarray[Any, Any]:
    """kept·x + strength·`frost_texture`."""
    texture = frost_texture(x.shape[0], x.shape[1], draw)
    coloured = texture[..., None] * (_ICE if x.shape[2] == 3 else _LUMA @ _ICE)
    return np.asarray(kept * x + strength * coloured)


def frost_texture(height: int, width: int, draw: Generator) -> np.ndarray[Any, Any]:
    """Straight bright needles in all directions on a cloudy ground, `(height, width)` in [0, 1].

    A substitute for photographs of frost. Needles grow from seeds scattered at random, in
    directions drawn once an image, and fade along their length; where clouds are dark there are
    fewer of them.
    """
    side = max(height, width)
    ground = clouds(side, _FROST_DECAY, draw)[:height, :width]
    length = max(side // 10, 2)
    needles = np.zeros((height, width, 1))
    for angle in draw.uniform(0, 360, size=_DIRECTIONS):
        seeds = draw.random((height, width, 1)) < ground[..., None] / (_DIRECTIONS * length / 2)
        grown = along_a_line(seeds.astype(np.float64), length, length / 2, angle)
        needles = np.maximum(needles, grown / max(grown.max(), np.finfo(float).tiny))
    return np.asarray(0.5 * ground + 0.5 * needles[..., 0])


def fog(
    x: np.ndarray[Any, Any], draw: Generator, strength: float, decay: float
) -> np.ndarray[Any, Any]:
    """(x + strength·clouds)·m/(m + strength), m the image's largest value."""
    height, width = x.shape[:2]
    layer = clouds(max(height, width), decay, draw)[:height, :width, None]
    largest = x.max()
    return np.asarray((x + strength * layer) * largest / (largest + strength))


def clouds(side: int, decay: float, draw: Generator) -> np.ndarray[Any, Any]:
    """A fractal height map in [0, 1] by the diamond-square method, periodic.

    Each round halves the grid's step: the middle of every square, then of every diamond, becomes
    the mean of its four corners plus uniform noise, whose size falls by decay² a round.
    (Fournier, Fussell and Carpenter, "Computer rendering of stochastic models", 1982.)

    Args:
        side: smallest side wanted; the map has the next power of two.
        decay: > 1; the larger, the smoother.
        draw: of the noise.
    """
    size = 1 << max(side - 1, 1).bit_length()
    heights = np.zeros((size, size))
    step, noise = size, 1.0
    while step > 1:
        half = step // 2
        corners = heights[::step, ::step]
        across = corners + np.roll(corners, -1, axis=1)
        middles = (across + np.roll(across, -1, axis=0)) / 4
        middles += draw.uniform(-noise, noise, size=middles.shape)
        heights[half::step, half::step] = middles
        for axis, place in ((1, np.s_[::step, half::step]), (0, np.s_[half::step, ::step])):
            ends = corners + np.roll(corners, -1, axis=axis)
            sides = middles + np.roll(middles, 1, axis=1 - axis)
            heights[place] = (ends + sides) / 4 + draw.uniform(-noise, noise, size=ends.shape)
        step, noise = half, noise / decay**2
    heights -= heights.min()
    return np.asarray(heights / heights.max())


def brightness(x: np.ndarray[Any, Any], draw: Generator, added: float) -> np.ndarray[Any, Any]:
    """More value at the same hue and saturation: x·v'/v, v = max over channels, v' = min(v + a, 1).

    A black pixel has neither hue nor saturation and becomes the grey a.
    """
    value = x.max(axis=2, keepdims=True)
    more = np.minimum(value + added, 1)
    scale = np.divide(more, value, out=np.ones_like(value), where=value > 0)
    return np.asarray(np.where(value > 0, x * scale, more))


def _grey(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return x if x.shape[2] == 1 else np.asarray((x @ _LUMA)[..., None])
