"""Common corruptions: the catalogue of the fifteen, an image corrupted, a data set corrupted.

How a corruption changes pixels is in `corruptions_noise`, `_blur`, `_weather` and `_digital`; files
of corrupted images that others made are read by `corrupted_files`.

The corruptions and their strengths are those of Hendrycks and Dietterich, "Benchmarking neural
network robustness to common corruptions and perturbations" (ICLR 2019), and of the code that made
their files CIFAR-10-C and ImageNet-C; the code is this library's own, on numpy, scipy and Pillow.
(The package `imagecorruptions` is not used: it is no longer maintained, and needs numba and
OpenCV.) Numbers on these images are compared among themselves; with published ones only those on
the official files. These differ:

- Other random numbers were drawn, and some corruptions are substitutes, as the catalogue says.
- Values are rounded to whole grey levels once, at the end. That code cuts them off to whole levels,
  and does so on the way too: after the first Gaussian of glass blur, and with the flakes of snow.
- Its images for 224 x 224 pixels were saved as JPEG; these are not.
- Its defocus kernel for radii of 8 and 10 ends at the radius; this one goes on for as many pixels
  as its smoothing reaches.
- Images of up to 96 pixels, such as those of 64 x 64, get the strengths for 32 x 32, though that
  code has a set of its own for 64 x 64.

Glass blur of severity 1 at 32 x 32 pixels smooths by so little (a standard deviation of 0.05
pixels) that it moves pixels and changes none: so do the official files' strengths.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexure.contracts import DataError, LabelledData
from flexure.data.corruptions_blur import defocus_blur, glass_blur, motion_blur, zoom_blur
from flexure.data.corruptions_digital import (
    contrast,
    elastic_transform,
    jpeg_compression,
    pixelate,
)
from flexure.data.corruptions_noise import gaussian_noise, impulse_noise, shot_noise
from flexure.data.corruptions_weather import brightness, fog, frost, snow

__all__ = ["CONSTANTS", "CORRUPTIONS", "SEVERITIES", "Corrupted", "Corruption", "corrupt"]

SEVERITIES = (1, 2, 3, 4, 5)

CONSTANTS = ("cifar-c", "imagenet-c")
"""The two sets of strengths: for images of 32 x 32, and of 224 x 224 pixels."""

_SMALL = 96
"""Images with a shorter side up to this many pixels get the strengths for 32 x 32: on the scale of
factors between 32 and 224, the middle is sqrt(32·224) = 85; 96 is the usual size above it."""


@dataclass(frozen=True)
class Corruption:
    """One row of the catalogue.

    Attributes:
        name: as in the official files.
        group: `"noise"`, `"blur"`, `"weather"` or `"digital"`.
        apply: (image `(H, W, C)` float64 in [0, 1], generator, *strength) -> likewise, not
            necessarily within [0, 1].
        strengths: set of `CONSTANTS` -> the arguments after the generator, one tuple a severity.
        substitute: in what it differs in kind from the official one; None: in no such way.
    """

    name: str
    group: str
    apply: Callable[..., np.ndarray[Any, Any]]
    strengths: Mapping[str, tuple[tuple[float, ...], ...]]
    substitute: str | None = None


def corrupt(
    image: Tensor,
    name: str,
    severity: int,
    *,
    seed: int | tuple[int, ...],
    constants: str | None = None,
) -> Tensor:
    """An image with a common corruption; the same image for the same arguments.

    Args:
        image: `(C, H, W)` uint8, C 1 or 3.
        name: one of `CORRUPTIONS`.
        severity: 1 ... 5.
        seed: at least 0; several numbers (a seed and an image's index) make one.
        constants: which of `CONSTANTS`; default: by the image's shorter side, `"cifar-c"` up to 96
            pixels. Strengths in pixels do not scale with the image, apart from those of
            `elastic_transform`.

    Returns:
        `(C, H, W)` uint8.

    Raises:
        DataError: no such image, name, severity, seed or set of constants.
    """
    row = _row(name, severity, constants)
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] not in (1, 3):
        raise DataError(
            f"expected an image (C, H, W) uint8 with 1 or 3 channels to corrupt, got {image.dtype} "
            f"of shape {tuple(image.shape)}; common corruptions are defined for pixels only"
        )
    if min(image.shape[1:]) < 8:
        raise DataError(
            f"expected an image of at least 8 x 8 pixels to corrupt, got {image.shape[1]} x "
            f"{image.shape[2]}; enlarge it first"
        )
    parts = seed if isinstance(seed, tuple) else (seed,)
    if not parts or not all(map(_is_seed, parts)):
        raise DataError(
            f"expected a seed of at least 0, or a tuple of some, got {seed!r}; choose another"
        )
    which = constants or CONSTANTS[min(image.shape[1:]) > _SMALL]
    draw = np.random.default_rng((*parts, zlib.crc32(name.encode()), severity))
    x = image.permute(1, 2, 0).cpu().numpy() / 255.0
    changed = row.apply(x, draw, *row.strengths[which][severity - 1])
    levels = np.rint(np.clip(changed, 0, 1) * 255).astype(np.uint8)
    return torch.from_numpy(levels).permute(2, 0, 1).contiguous()


@dataclass(frozen=True, eq=False)
class Corrupted:
    """Labelled images with a common corruption, made when they are asked for.

    An image depends on the seed and on its index, not on the order in which images are read.

    Attributes:
        data: the clean images.
        name: one of `CORRUPTIONS`.
        severity: 1 ... 5.
        seed: at least 0.
        constants: see `corrupt`.

    Raises:
        DataError: no such name, severity, seed or set of constants.
    """

    data: LabelledData
    name: str
    severity: int
    seed: int
    constants: str | None = None

    def __post_init__(self) -> None:
        _row(self.name, self.severity, self.constants)
        if not _is_seed(self.seed):
            raise DataError(f"expected a seed of at least 0, got {self.seed!r}; choose another")

    @property
    def labels(self) -> Tensor:
        """`(N,)` int64."""
        return self.data.labels

    @property
    def classes(self) -> tuple[str, ...]:
        """One name a class."""
        return self.data.classes

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} items")
        return corrupt(
            self.data[place],
            self.name,
            self.severity,
            seed=(self.seed, place),
            constants=self.constants,
        )


def _row(name: str, severity: int, constants: str | None) -> Corruption:
    if not isinstance(name, str) or name not in CORRUPTIONS:
        raise DataError(
            f"expected a corruption among {', '.join(CORRUPTIONS)}, got {name!r}; choose one"
        )
    if type(severity) is not int or severity not in SEVERITIES:
        raise DataError(
            f"expected a severity, a whole number from 1 to 5, got {severity!r}; choose one"
        )
    if constants is not None and constants not in CONSTANTS:
        raise DataError(f"expected constants among {CONSTANTS}, got {constants!r}; choose one")
    return CORRUPTIONS[name]


def _is_seed(value: Any) -> bool:
    return type(value) is int and value >= 0


def _strengths(small: tuple[Any, ...], large: tuple[Any, ...]) -> dict[str, Any]:
    """One number a severity, or a tuple of them, for each set."""
    both = zip(CONSTANTS, (small, large), strict=True)
    return {k: tuple(s if isinstance(s, tuple) else (s,) for s in five) for k, five in both}


_LINE = "written after ImageMagick's description of its motion blur, not that program"

# The official code for 224 x 224 multiplies by 244.
_ELASTIC = 244 / 224

_ROWS = (
    Corruption(
        "gaussian_noise",
        "noise",
        gaussian_noise,
        _strengths((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    ),
    Corruption(
        "shot_noise",
        "noise",
        shot_noise,
        _strengths((500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    ),
    Corruption(
        "impulse_noise",
        "noise",
        impulse_noise,
        _strengths((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    ),
    Corruption(
        "defocus_blur",
        "blur",
        defocus_blur,
        _strengths(
            ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
            ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        ),
    ),
    Corruption(
        "glass_blur",
        "blur",
        glass_blur,
        _strengths(
            ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
            ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        ),
    ),
    Corruption(
        "motion_blur",
        "blur",
        motion_blur,
        _strengths(
            ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
            ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        ),
        substitute=_LINE,
    ),
    Corruption(
        "zoom_blur",
        "blur",
        zoom_blur,
        _strengths(
            ((0.01, 7), (0.01, 12), (0.01, 16), (0.01, 21), (0.01, 26)),
            ((0.01, 12), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11)),
        ),
    ),
    Corruption(
        "snow",
        "weather",
        snow,
        _strengths(
            (
                (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
                (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
                (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
                (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
                (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
            ),
            (
                (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
                (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
                (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
                (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
                (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
            ),
        ),
        substitute=f"the flakes' blur is {_LINE}",
    ),
    Corruption(
        "frost",
        "weather",
        frost,
        _strengths(
            ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
            ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        ),
        substitute="a generated texture, not the photographs of frost",
    ),
    Corruption(
        "fog",
        "weather",
        fog,
        _strengths(
            ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
            ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        ),
    ),
    Corruption(
        "brightness",
        "weather",
        brightness,
        _strengths((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    ),
    Corruption(
        "contrast",
        "digital",
        contrast,
        _strengths((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    ),
    Corruption(
        "elastic_transform",
        "digital",
        elastic_transform,
        _strengths(
            (
                (0, 0, 0.08),
                (0.05, 0.2, 0.07),
                (0.08, 0.06, 0.06),
                (0.1, 0.04, 0.05),
                (0.1, 0.03, 0.03),
            ),
            tuple(
                tuple(_ELASTIC * share for share in shares)
                for shares in (
                    (2, 0.7, 0.1),
                    (2, 0.08, 0.2),
                    (0.05, 0.01, 0.02),
                    (0.07, 0.01, 0.02),
                    (0.12, 0.01, 0.02),
                )
            ),
        ),
    ),
    Corruption(
        "pixelate",
        "digital",
        pixelate,
        _strengths((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    ),
    Corruption(
        "jpeg_compression",
        "digital",
        jpeg_compression,
        _strengths((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    ),
)

CORRUPTIONS: Mapping[str, Corruption] = {row.name: row for row in _ROWS}
"""Name -> what it does; the benchmark's order. A new corruption is a row above."""
