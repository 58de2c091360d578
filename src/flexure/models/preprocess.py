"""From an unprocessed sample to a model's input: the backbone's own preprocessing.

A sample is a `(C, H, W)` uint8 image or a `(D,)` float32 vector (`contracts.LabelledData`). All
classes here are frozen, picklable, and print what they do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flexure.contracts import DataError

__all__ = ["CIFAR", "AsFloat", "PilPreprocess", "Preprocess", "ProcessorPreprocess"]


@dataclass(frozen=True)
class Preprocess:
    """Resize, scale to [0, 1], normalise: (resize(x) / 255 - mean) / std.

    A grey image is repeated to as many channels as `mean` has.

    Attributes:
        size: height and width in pixels, bilinear with antialiasing; None: as it comes.
        mean: one number a channel, on the scale [0, 1].
        std: the same.
    """

    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """`(C, H, W)` uint8 -> `(len(mean), *size)` float32.

        Raises:
            DataError: not such an image.
        """
        image = _image(x, channels=len(self.mean)).float()
        if self.size is not None and image.shape[1:] != self.size:
            image = F.interpolate(
                image[None], self.size, mode="bilinear", align_corners=False, antialias=True
            )[0]
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (image / 255 - mean) / std


CIFAR = Preprocess(size=(32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""What the CIFAR ResNets were trained with: ImageNet's statistics (akamaster's trainer)."""


@dataclass(frozen=True)
class AsFloat:
    """Images scaled to [0, 1], vectors as they are: for models without preprocessing."""

    def __call__(self, x: Tensor) -> Tensor:
        """`(C, H, W)` uint8 or `(D,)` float -> the same shape, float32."""
        return x.float() / 255 if x.dtype == torch.uint8 else x.float()


@dataclass(frozen=True, repr=False)
class PilPreprocess:
    """Another library's transform of RGB PIL images.

    Attributes:
        transform: PIL image -> `(C, H, W)` tensor.
    """

    transform: Callable[[Any], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """`(C, H, W)` uint8 -> the transform's tensor.

        Raises:
            DataError: not such an image.
        """
        from PIL import Image

        pixels = _image(x, channels=3).permute(1, 2, 0).contiguous().cpu().numpy()
        return self.transform(Image.fromarray(pixels))

    def __repr__(self) -> str:
        """The transform on one line."""
        return f"{type(self).__name__}({' '.join(repr(self.transform).split())})"


@dataclass(frozen=True, repr=False)
class ProcessorPreprocess:
    """An image processor of the transformers library.

    Attributes:
        processor: what `AutoImageProcessor.from_pretrained` gave.
    """

    processor: Any

    def __call__(self, x: Tensor) -> Tensor:
        """`(C, H, W)` uint8 -> `pixel_values` of one image, `(3, H', W')` float32.

        Raises:
            DataError: not such an image.
        """
        pixels = _image(x, channels=3).cpu().numpy()
        # Told, not guessed: an image 3 pixels high looks like channels last.
        values = self.processor(images=pixels, input_data_format="channels_first")["pixel_values"]
        return torch.from_numpy(np.array(values[0], dtype=np.float32))

    def __repr__(self) -> str:
        """Its class and settings on one line."""
        settings = json.dumps(self.processor.to_dict(), sort_keys=True, default=str)
        return f"{type(self).__name__}({type(self.processor).__name__} {settings})"


def _image(x: Tensor, *, channels: int) -> Tensor:
    """`x` checked, a grey image repeated to `channels` channels."""
    if x.dtype != torch.uint8 or x.ndim != 3 or x.shape[0] not in (1, channels):
        raise DataError(
            f"expected a uint8 image ({channels} or 1, H, W), got {x.dtype} of shape "
            f"{tuple(x.shape)}; use a model for such data, or convert it"
        )
    return x.expand(channels, -1, -1)
