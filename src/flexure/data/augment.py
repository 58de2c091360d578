"""Random flips and crops of prepared image batches, the same for the same seed, epoch and sample.

Which samples make a batch, and when, is decided by `batches`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor
from torch.nn import functional as F

from flexure.contracts import DataError, FlexureError

__all__ = ["Augmentation"]


@dataclass(frozen=True)
class Augmentation:
    """Horizontal flips and padded crops: `batches(data, ..., seed=0, augment=Augmentation())`.

    What happens to a sample is a function of the seed, of the epoch and of the sample's index in
    the data alone: a resumed training, and every method that trains on the same data with the same
    seed, see the same images. The defaults are those usual on CIFAR (He et al. 2016, "Deep residual
    learning for image recognition", section 4.2).

    Attributes:
        flip: mirror left and right with probability 1/2.
        crop: pixels added on each side before a window of the old size is taken at random; 0: none.
        fill: the value of the added pixels, on the scale of the prepared images: 0 is black where
            they lie in [0, 1], and the mean colour where they are normalised.

    Raises:
        FlexureError: a setting that does not fit.
    """

    flip: bool = True
    crop: int = 4
    fill: float = 0.0

    def __post_init__(self) -> None:
        if type(self.crop) is not int or self.crop < 0:
            raise FlexureError(
                f"expected crop to be a number of pixels, at least 0, got {self.crop!r}; 0: no crop"
            )
        if type(self.flip) is not bool:
            raise FlexureError(f"expected flip to be True or False, got {self.flip!r}")
        number = isinstance(self.fill, Real) and not isinstance(self.fill, bool)
        if not number or not math.isfinite(self.fill):
            raise FlexureError(
                f"expected fill to be a finite number, the value of pixels, got {self.fill!r}; "
                f"give 0.0, for example"
            )

    def draws(self, samples: int, generator: torch.Generator) -> Tensor:
        """What will be done to each sample of an epoch: flip or not, first row, first column.

        Args:
            samples: N, all of the data.
            generator: of the CPU.

        Returns:
            (N, 3) int64.
        """
        flips = torch.randint(2, (samples, 1), generator=generator)
        corners = torch.randint(2 * self.crop + 1, (samples, 2), generator=generator)
        return torch.cat([flips * int(self.flip), corners], 1)

    def __call__(self, x: Tensor, draws: Tensor) -> Tensor:
        """The changed images.

        Args:
            x: (B, C, H, W), floating point.
            draws: (B, 3), the rows of `draws` of these samples.

        Raises:
            DataError: `x` are no images, or too small for the crop.
        """
        if x.dim() != 4:
            raise DataError(
                f"expected prepared images (B, C, H, W) to flip and crop, got shape "
                f"{tuple(x.shape)}; leave augment out for other data"
            )
        if self.crop >= min(x.shape[2:]):
            raise DataError(
                f"expected images of more than crop={self.crop} pixels a side, got "
                f"{x.shape[2]} x {x.shape[3]}: a window could miss the image; choose a smaller crop"
            )
        flips, top, left = draws.to(x.device).unbind(1)
        if self.flip:
            x = torch.where(flips.bool()[:, None, None, None], x.flip(3), x)
        if not self.crop:
            return x
        height, width = x.shape[2:]
        padded = F.pad(x, [self.crop] * 4, value=self.fill)
        rows = top[:, None] + torch.arange(height, device=x.device)
        columns = left[:, None] + torch.arange(width, device=x.device)
        sample = torch.arange(len(x), device=x.device)[:, None, None]
        # The two index dimensions are apart, so that the channels come last.
        return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
