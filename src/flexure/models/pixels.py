"""Pixels of a model: its inputs in [0, 1], with the normalisation apart, to be moved inside it.

Preprocessing itself is `preprocess`'s business; what is done in pixel space, the attacks'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from flexure.models.preprocess import AsFloat, PilPreprocess, Preprocess, ProcessorPreprocess

__all__ = ["Pixels", "in_pixels"]


@dataclass(frozen=True)
class Pixels:
    """A preprocessing of images taken apart: input = (prepare(image) - mean) / std.

    Attributes:
        prepare: `(C, H, W)` uint8 -> `(C', H', W')` in [0, 1].
        mean: one number a channel; None: there is no normalisation.
        std: the same.
    """

    prepare: Callable[[Tensor], Tensor]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def in_pixels(preprocess: Any) -> Pixels | None:
    """A preprocessing of images taken apart; None where its normalisation is not known."""
    apart = _APART.get(type(preprocess))
    return None if apart is None else apart(preprocess)


def _own(preprocess: Preprocess) -> Pixels:
    count = len(preprocess.mean)
    plain = replace(preprocess, mean=(0.0,) * count, std=(1.0,) * count)
    return Pixels(plain, preprocess.mean, preprocess.std)


def _pil(preprocess: PilPreprocess) -> Pixels | None:
    """By the last of the transforms, or the whole of one preset: what has mean and std.

    One that ends by scaling to [0, 1] has no normalisation: the model does it, or none is done.
    """
    transform = preprocess.transform
    last = [transform, *getattr(transform, "transforms", [])][-1]
    if type(last).__name__ in _SCALING:
        return Pixels(preprocess)
    return _undone(preprocess, getattr(last, "mean", None), getattr(last, "std", None))


_SCALING = frozenset(("ToTensor", "MaybeToTensor"))
"""Classes of torchvision's and timm's transforms from 8-bit images to tensors in [0, 1]."""


def _processor(preprocess: ProcessorPreprocess) -> Pixels | None:
    """By the settings of a processor that scales to [0, 1] and then normalises, or does not."""
    told = preprocess.processor.to_dict()
    if not told.get("do_rescale") or abs(255 * told.get("rescale_factor", 0.0) - 1) > 1e-6:
        return None
    if not told.get("do_normalize"):
        return Pixels(preprocess)
    return _undone(preprocess, told.get("image_mean"), told.get("image_std"))


def _undone(preprocess: Callable[[Tensor], Tensor], mean: Any, std: Any) -> Pixels | None:
    means, stds = _numbers(mean), _numbers(std)
    if means is None or stds is None or len(means) != len(stds):
        return None
    return Pixels(_Undone(preprocess, means, stds), means, stds)


def _numbers(values: Any) -> tuple[float, ...] | None:
    given = values.tolist() if isinstance(values, Tensor) else values
    if not isinstance(given, Sequence) or not all(isinstance(value, Real) for value in given):
        return None
    return tuple(map(float, given)) or None


@dataclass(frozen=True)
class _Undone:
    """A preprocessing whose last step, a normalisation, is undone."""

    preprocess: Callable[[Tensor], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """`(C, H, W)` in [0, 1]: rounding, and interpolation beyond the ends, are cut off."""
        found = self.preprocess(x)
        mean, std = (found.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return torch.clamp(found * std + mean, 0, 1)


_APART: Mapping[type, Callable[[Any], Pixels | None]] = {
    Preprocess: _own,
    AsFloat: Pixels,
    PilPreprocess: _pil,
    ProcessorPreprocess: _processor,
}
"""Preprocessing -> how it is taken apart."""
