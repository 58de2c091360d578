"""Preprocessing taken apart: normalising its pixels gives the model's input again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexure.models import CIFAR, AsFloat, PilPreprocess, ProcessorPreprocess
from flexure.models.pixels import in_pixels

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


class Normalize:
    """The last transform of torchvision's and timm's: numbers, or tensors of them."""

    def __init__(self, mean: Any, std: Any) -> None:
        self.mean, self.std = mean, std

    def __call__(self, x: Tensor) -> Tensor:
        mean, std = (torch.as_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (x - mean) / std


class Compose:
    def __init__(self, *transforms: Any) -> None:
        self.transforms = list(transforms)

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class Preset(Normalize):
    """A whole transform that has mean and std, as torchvision's presets."""

    def __call__(self, image: Any) -> Tensor:
        return super().__call__(to_tensor(image))


class ToTensor:
    """Scales to [0, 1], as torchvision's."""

    def __call__(self, image: Any) -> Tensor:
        return to_tensor(image)


class Cropped:
    """An image's middle."""

    def __call__(self, image: Any) -> Any:
        return image.crop((2, 2, 10, 10))


def to_tensor(image: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def processor(**more: Any) -> ProcessorPreprocess:
    transformers = pytest.importorskip("transformers")
    size = {"height": 9, "width": 9}
    given = {"image_mean": list(MEAN), "image_std": list(STD), **more}
    return ProcessorPreprocess(transformers.ViTImageProcessor(size=size, **given))


@pytest.fixture
def image() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 12, 12), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CIFAR,
        lambda: PilPreprocess(Compose(to_tensor, Normalize(MEAN, STD))),
        lambda: PilPreprocess(Compose(to_tensor, Normalize(torch.tensor(MEAN), torch.tensor(STD)))),
        lambda: PilPreprocess(Preset(list(MEAN), list(STD))),
        processor,
    ],
)
def test_normalised_pixels_are_the_input(make: Any, image: Tensor) -> None:
    preprocess = make()
    pixels = in_pixels(preprocess)
    assert pixels is not None
    found = pixels.prepare(image)
    low, high = found.aminmax()
    assert 0 <= low < 0.1
    assert 0.9 < high <= 1
    mean, std = (torch.tensor(values)[:, None, None] for values in (pixels.mean, pixels.std))
    assert torch.allclose((found - mean) / std, preprocess(image), atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        AsFloat,
        lambda: processor(do_normalize=False),
        lambda: PilPreprocess(Compose(Cropped(), ToTensor())),  # RobustBench's for ImageNet
        lambda: PilPreprocess(Compose(ToTensor())),
        lambda: PilPreprocess(ToTensor()),
    ],
)
def test_without_normalisation_pixels_are_the_input(make: Any, image: Tensor) -> None:
    preprocess = make()
    pixels = in_pixels(preprocess)
    assert (pixels.mean, pixels.std) == (None, None)
    assert torch.equal(pixels.prepare(image), preprocess(image))
    assert pixels.prepare(image).max() <= 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: PilPreprocess(to_tensor),
        lambda: PilPreprocess(Compose()),
        lambda: PilPreprocess(Compose(Normalize(MEAN, STD), to_tensor)),
        lambda: PilPreprocess(Compose(ToTensor(), Cropped())),
        lambda: PilPreprocess(Compose(to_tensor, SimpleNamespace(mean=0.5, std=0.5))),
        lambda: PilPreprocess(Compose(to_tensor, Normalize(MEAN, STD[:2]))),
        lambda: processor(do_rescale=False),
        lambda: processor(rescale_factor=1 / 127.5),
        lambda: torch.neg,
    ],
)
def test_what_is_not_known_is_not_guessed(make: Any) -> None:
    assert in_pixels(make()) is None
