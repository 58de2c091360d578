"""Blurs of the common corruptions: defocus, glass, motion and zoom.

Images here are `(H, W, C)` float64 in [0, 1]. Which strength belongs to which severity is the
catalogue's in `corruptions`, and so are the references.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.random import Generator

__all__ = [
    "along_a_line",
    "defocus_blur",
    "defocus_kernel",
    "enlarged",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
]


def defocus_blur(
    x: np.ndarray[Any, Any], draw: Generator, radius: float, smoothing: float
) -> np.ndarray[Any, Any]:
    """Correlation with `defocus_kernel`, borders mirrored."""
    from scipy import ndimage

    kernel = defocus_kernel(radius, smoothing)
    return np.asarray(ndimage.correlate(x, kernel[:, :, None], mode="mirror"))


def defocus_kernel(radius: float, smoothing: float) -> np.ndarray[Any, Any]:
    """A disk of `radius` pixels, its edge smoothed by a small Gaussian, of sum 1; `(K, K)`.

    The Gaussian spans one pixel on each side, two for disks of more than 8 pixels.

    Args:
        radius: in pixels.
        smoothing: standard deviation of that Gaussian in pixels.
    """
    from scipy import ndimage

    reach = 1 if radius <= 8 else 2
    half = math.floor(radius) + reach
    steps = np.arange(-half, half + 1)
    disk = (steps[:, None] ** 2 + steps**2 <= radius**2).astype(np.float64)
    edge = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * smoothing**2))
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, edge, axis=axis, mode="constant")
    return np.asarray(disk / disk.sum())


def glass_blur(
    x: np.ndarray[Any, Any], draw: Generator, std: float, reach: int, rounds: int
) -> np.ndarray[Any, Any]:
    """Gaussian blur, pixels that take the value of a near one, and Gaussian blur again.

    From the last pixel to the first, each takes the value that a pixel up to `reach` rows and
    columns away has at that moment. (The code that made the official files is written as an
    exchange of both, but its arrays share memory, so that it copies; so does this.)

    Args:
        x: the image.
        draw: of the offsets, in -reach ... reach - 1.
        std: of the Gaussian, in pixels.
        reach: in pixels.
        rounds: how often all pixels are visited.
    """
    height, width = x.shape[:2]
    blurred = _gaussian(x, std)
    rows, columns = range(height - reach, reach, -1), range(width - reach, reach, -1)
    source = list(range(height * width))
    for _ in range(rounds):
        offsets = draw.integers(-reach, reach, size=(len(rows), len(columns), 2))
        jumps = iter((offsets @ np.array([width, 1])).ravel().tolist())
        for row in rows:
            for column in columns:
                place = row * width + column
                source[place] = source[place + next(jumps)]
    return _gaussian(blurred.reshape(height * width, -1)[source].reshape(x.shape), std)


def motion_blur(
    x: np.ndarray[Any, Any], draw: Generator, radius: int, std: float
) -> np.ndarray[Any, Any]:
    """`along_a_line` at an angle drawn from -45 ... 45 degrees."""
    return along_a_line(x, radius, std, draw.uniform(-45, 45))


def along_a_line(
    x: np.ndarray[Any, Any], radius: int, std: float, angle: float
) -> np.ndarray[Any, Any]:
    """The mean of copies moved along a line to one side, in whole pixels, borders repeated.

    The copy moved by i = 0 ... 2·radius pixels weighs exp(-i²/(2 std²)). This is how ImageMagick
    describes its motion blur, which the official files were made with.

    Args:
        x: `(H, W, C)`.
        radius: half of the farthest move, in pixels.
        std: in pixels.
        angle: of the line to the rows, in degrees.
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * std**2))
    weights /= weights.sum()
    radians = math.radians(angle)
    down = np.ceil(steps * math.sin(radians) - 0.5).astype(int)
    right = np.ceil(steps * math.cos(radians) - 0.5).astype(int)
    height, width = x.shape[:2]
    result = np.zeros_like(x)
    for weight, i, j in zip(weights, down, right, strict=True):
        rows = np.clip(np.arange(height) + i, 0, height - 1)
        columns = np.clip(np.arange(width) + j, 0, width - 1)
        result += weight * x[rows[:, None], columns]
    return result


def zoom_blur(
    x: np.ndarray[Any, Any], draw: Generator, step: float, count: int
) -> np.ndarray[Any, Any]:
    """The mean of the image and of `enlarged` by 1, 1 + step, ..., `count` factors."""
    zoomed = sum(enlarged(x, 1 + step * i) for i in range(count))
    return np.asarray((x + zoomed) / (count + 1))


def enlarged(x: np.ndarray[Any, Any], factor: float) -> np.ndarray[Any, Any]:
    """The middle of an image, enlarged to its size by linear interpolation.

    Sizes are rounded to whole pixels, so that a small image does not change at a factor near 1.
    """
    from scipy import ndimage

    parts = [math.ceil(side / factor) for side in x.shape[:2]]
    top, left = ((side - part) // 2 for side, part in zip(x.shape, parts, strict=False))
    middle = x[top : top + parts[0], left : left + parts[1]]
    large = ndimage.zoom(middle, (factor, factor, 1), order=1)
    top, left = ((big - side) // 2 for big, side in zip(large.shape[:2], x.shape[:2], strict=True))
    return np.asarray(large[top : top + x.shape[0], left : left + x.shape[1]])


def _gaussian(x: np.ndarray[Any, Any], std: float) -> np.ndarray[Any, Any]:
    from scipy import ndimage

    return np.asarray(ndimage.gaussian_filter(x, (std, std, 0), mode="nearest"))
