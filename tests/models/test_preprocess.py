"""Preprocessing of images and vectors."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flexure.contracts import DataError
from flexure.models import CIFAR, AsFloat, PilPreprocess, Preprocess

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def image(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def from_pil(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()


def test_cifar_normalises_without_resizing() -> None:
    x = image(3, 32, 32)
    torch.testing.assert_close(CIFAR(x), (x.float() / 255 - MEAN) / STD)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 64, 48), (1, 28, 28), (1, 101, 33)])
def test_cifar_resizes_as_pil_does(shape: tuple[int, ...]) -> None:
    x = image(*shape)
    rgb = x.expand(3, -1, -1)
    picture = Image.fromarray(rgb.permute(1, 2, 0).contiguous().numpy())
    expected = from_pil(picture.resize((32, 32), Image.Resampling.BILINEAR))
    got = CIFAR(x)
    assert got.shape == (3, 32, 32)
    assert got.dtype == torch.float32
    # PIL rounds to whole grey levels, after each of its two passes.
    assert ((got * STD + MEAN) * 255 - expected).abs().max() <= 1.01


def test_channels_follow_the_mean() -> None:
    one = Preprocess(size=None, mean=(0.5,), std=(0.25,))
    x = image(1, 6, 5)
    torch.testing.assert_close(one(x), (x / 255 - 0.5) / 0.25)
    with pytest.raises(DataError, match="1 or 1"):
        one(image(3, 6, 5))


@pytest.mark.parametrize("x", [torch.zeros(13), torch.zeros(3, 4, 4), image(4, 4), image(2, 4, 4)])
def test_what_is_no_image_is_refused(x: Tensor) -> None:
    for preprocess in (CIFAR, PilPreprocess(from_pil)):
        with pytest.raises(DataError, match="expected a uint8 image"):
            preprocess(x)


def test_as_float() -> None:
    x = image(3, 4, 5)
    torch.testing.assert_close(AsFloat()(x), x / 255)
    vector = torch.tensor([300.0, -2.0])
    assert torch.equal(AsFloat()(vector), vector)


def test_pil_transform_sees_rgb() -> None:
    x = image(1, 4, 6)
    assert torch.equal(PilPreprocess(from_pil)(x), x.expand(3, -1, -1).float())


@pytest.mark.parametrize("preprocess", [CIFAR, AsFloat(), PilPreprocess(from_pil)])
def test_frozen_picklable_and_printable(preprocess) -> None:
    copy = pickle.loads(pickle.dumps(preprocess))
    x = image(3, 9, 7)
    assert copy == preprocess
    assert torch.equal(copy(x), preprocess(x))
    assert repr(preprocess).startswith(type(preprocess).__name__)
    assert "\n" not in repr(preprocess)
    with pytest.raises(FrozenInstanceError):
        preprocess.new = 1
