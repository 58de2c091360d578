"""Digital common corruptions: contrast, elastic transform, pixelation and JPEG.

Images here are `(H, W, C)` float64 in [0, 1]. Which strength belongs to which severity is the
catalogue's in `corruptions`, and so are the references.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.random import Generator

__all__ = ["contrast", "elastic_transform", "jpeg_compression", "pixelate"]


def contrast(x: np.ndarray[Any, Any], draw: Generator, kept: float) -> np.ndarray[Any, Any]:
    """m + kept·(x - m), m the mean of each channel."""
    mean = x.mean(axis=(0, 1), keepdims=True)
    return np.asarray(mean + kept * (x - mean))


def elastic_transform(
    x: np.ndarray[Any, Any], draw: Generator, strength: float, smoothing: float, affine: float
) -> np.ndarray[Any, Any]:
    """A random affine map, and then a smooth random displacement of every pixel.

    The affine map moves three points, a third of the shorter side right, left, above or below the
    middle, by up to `affine` along each axis. The displacements are uniform noise in [-1, 1],
    smoothed by a Gaussian (Simard, Steinkraus and Platt, "Best practices for convolutional neural
    networks applied to visual document analysis", 2003).

    Args:
        x: the image.
        draw: of the points' moves and of the noise.
        strength: factor of the smoothed noise, in shorter sides.
        smoothing: standard deviation of the Gaussian, in shorter sides.
        affine: in shorter sides.
    """
    from scipy import ndimage

    height, width = x.shape[:2]
    side = min(height, width)
    grid = np.indices((height, width), dtype=np.float64)
    x = _at(x, _affine(grid, affine * side, draw), mode="mirror")
    noise = draw.uniform(-1, 1, size=(2, height, width))
    spread = smoothing * side
    smooth = ndimage.gaussian_filter(noise, (0, spread, spread), mode="reflect", truncate=3)
    return _at(x, grid + strength * side * smooth, mode="reflect")


def pixelate(x: np.ndarray[Any, Any], draw: Generator, kept: float) -> np.ndarray[Any, Any]:
    """Resized to a share `kept` of each side, and back, each value the mean over a box."""
    from PIL import Image

    image, (height, width) = _picture(x), x.shape[:2]
    small = image.resize((int(width * kept), int(height * kept)), Image.Resampling.BOX)
    return _pixels(small.resize((width, height), Image.Resampling.BOX))


def jpeg_compression(
    x: np.ndarray[Any, Any], draw: Generator, quality: int
) -> np.ndarray[Any, Any]:
    """Written as JPEG of that quality, colours at half the resolution, and read again."""
    from PIL import Image

    file = io.BytesIO()
    _picture(x).save(file, "JPEG", quality=quality)
    with Image.open(file) as image:
        return _pixels(image)


def _affine(grid: np.ndarray[Any, Any], reach: float, draw: Generator) -> np.ndarray[Any, Any]:
    """Where each pixel `(2, H, W)` of the result comes from."""
    shape = np.array(grid.shape[1:])
    middle, third = shape // 2, min(shape) // 3
    points = middle + third * np.array([[1, 1], [-1, 1], [-1, -1]])
    moved = points + draw.uniform(-reach, reach, size=points.shape)
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), points)
    return np.asarray(np.tensordot(back[:2].T, grid, 1) + back[2][:, None, None])


def _at(
    x: np.ndarray[Any, Any], places: np.ndarray[Any, Any], *, mode: str
) -> np.ndarray[Any, Any]:
    """The image's values at places `(2, H, W)` between its pixels, by linear interpolation."""
    from scipy import ndimage

    channels = np.moveaxis(x, 2, 0)
    return np.stack([ndimage.map_coordinates(c, places, order=1, mode=mode) for c in channels], 2)


def _picture(x: np.ndarray[Any, Any]) -> Any:
    from PIL import Image

    levels = np.rint(x * 255).astype(np.uint8)
    return Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)


def _pixels(image: Any) -> np.ndarray[Any, Any]:
    values = np.asarray(image, dtype=np.float64) / 255
    return values[..., None] if values.ndim == 2 else values
