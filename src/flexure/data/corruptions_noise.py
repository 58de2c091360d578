"""Noise of the common corruptions: Gaussian, shot and impulse noise.

Images here are `(H, W, C)` float64 in [0, 1]; results may leave the range. Which strength belongs
to which severity is the catalogue's in `corruptions`, and so are the references.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.random import Generator

__all__ = ["gaussian_noise", "impulse_noise", "shot_noise"]


def gaussian_noise(x: np.ndarray[Any, Any], draw: Generator, std: float) -> np.ndarray[Any, Any]:
    """x + std·n, n standard normal for every value."""
    return np.asarray(x + draw.normal(scale=std, size=x.shape))


def shot_noise(x: np.ndarray[Any, Any], draw: Generator, photons: float) -> np.ndarray[Any, Any]:
    """Poisson(x·photons)/photons: mean x, variance x/photons."""
    return draw.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray[Any, Any], draw: Generator, share: float) -> np.ndarray[Any, Any]:
    """A share of all values (a pixel's channels apart) becomes 0 or 1, as many of each."""
    hit = draw.random(x.shape) < share
    return np.where(hit, draw.integers(2, size=x.shape), x)
