"""Flips and crops: what they do, and that seed, epoch and sample alone decide it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexure.contracts import DataError, FlexureError
from flexure.data import ArrayData, Augmentation, batches


def images(count: int = 24, side: int = 5) -> ArrayData:
    """Every pixel of every image is another number, and none is 0."""
    pixels = 1 + torch.arange(count * 3 * side * side).view(count, 3, side, side)
    return ArrayData(pixels, torch.arange(count), tuple(map(str, range(count))))


def epochs(count: int = 1, *, seed: int = 0, start: int = 0, **settings) -> list[dict[int, Tensor]]:
    """The augmented images of some epochs, by label, which is the index."""
    given = {"batch_size": 7, "shuffle": True, "augment": Augmentation()} | settings
    made = batches(images(), preprocess=lambda x: x.float(), seed=seed, **given)
    made.epoch = start
    return [
        {int(label): image for x, y in made for image, label in zip(x, y, strict=True)}
        for _ in range(count)
    ]


def same(one: dict[int, Tensor], other: dict[int, Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())


def windows(image: Tensor, crop: int, fill: float) -> list[Tensor]:
    """All that may become of an image, by loops."""
    side = image.shape[1]
    found = []
    for source in (image, torch.stack([image[..., side - 1 - i] for i in range(side)], -1)):
        big = torch.full((3, side + 2 * crop, side + 2 * crop), fill)
        big[:, crop : crop + side, crop : crop + side] = source
        corners = range(2 * crop + 1)
        found += [big[:, a : a + side, b : b + side] for a in corners for b in corners]
    return found


def test_images_become_one_of_their_windows() -> None:
    data = images()
    for crop, fill in ((2, 0.0), (1, -3.0), (4, 0.0)):
        (found,) = epochs(augment=Augmentation(crop=crop, fill=fill))
        for index, image in found.items():
            allowed = windows(data[index].float(), crop, fill)
            assert sum(torch.equal(image, window) for window in allowed) >= 1


def test_all_windows_are_equally_likely() -> None:
    data, augment = images(1), Augmentation(crop=1)
    draws = augment.draws(9000, torch.Generator().manual_seed(0))
    found = augment(data[0].float().expand(9000, -1, -1, -1), draws)
    counts = [int((found == w).flatten(1).all(1).sum()) for w in windows(data[0].float(), 1, 0.0)]
    assert sum(counts) == 9000
    assert min(counts) > 400  # binomial: mean 500, standard deviation 22
    assert max(counts) < 600


def test_parts_can_be_left_out() -> None:
    data = images()
    (flips,) = epochs(augment=Augmentation(crop=0))
    flipped = [not torch.equal(flips[i], data[i].float()) for i in range(24)]
    assert 4 < sum(flipped) < 20
    assert all(torch.equal(flips[i].flip(2), data[i].float()) for i in range(24) if flipped[i])
    (nothing,) = epochs(augment=Augmentation(flip=False, crop=0))
    assert all(torch.equal(nothing[i], data[i].float()) for i in range(24))


def test_seed_epoch_and_sample_decide_alone() -> None:
    expected = epochs(3)
    assert not same(expected[0], expected[1])
    assert not same(expected[0], epochs(seed=1)[0])
    for other in (
        epochs(3),
        epochs(3, batch_size=24),
        epochs(3, cache=True),
        epochs(3, shuffle=False),
    ):
        assert all(map(same, expected, other))
    assert same(epochs(start=2)[0], expected[2])
    state = torch.random.get_rng_state()
    epochs()
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_order_and_the_data_stay_as_they_are() -> None:
    def order(**settings) -> list[int]:
        made = batches(
            images(), preprocess=lambda x: x.float(), batch_size=7, seed=4, shuffle=True, **settings
        )
        return [int(label) for _, y in made for label in y]

    assert order(augment=Augmentation()) == order()
    made = batches(
        images(),
        preprocess=lambda x: x.float(),
        batch_size=24,
        seed=0,
        augment=Augmentation(),
        cache=True,
    )
    next(iter(made))
    before = made._cached.clone()
    next(iter(made))
    assert torch.equal(made._cached, before)


def test_what_does_not_fit() -> None:
    with pytest.raises(FlexureError, match="a seed to augment with"):
        batches(images(), preprocess=lambda x: x, batch_size=3, augment=Augmentation())
    for crop in (-1, 1.5):
        with pytest.raises(FlexureError, match="number of pixels"):
            Augmentation(crop=crop)
    for flip in ("no", 1, None):
        with pytest.raises(FlexureError, match="flip to be True or False"):
            Augmentation(flip=flip)
    for fill in (float("nan"), float("inf"), "x", None, True):
        with pytest.raises(FlexureError, match="fill to be a finite number"):
            Augmentation(fill=fill)
    for crop, shape in ((4, (2, 3, 4, 9)), (100, (2, 3, 9, 9))):
        small = Augmentation(crop=crop)
        with pytest.raises(DataError, match=f"more than crop={crop} pixels a side"):
            small(torch.rand(shape), small.draws(2, torch.Generator()))
    vectors = ArrayData(torch.rand(4, 2), torch.arange(4) % 2, ("a", "b"))
    made = batches(vectors, preprocess=lambda x: x, batch_size=3, seed=0, augment=Augmentation())
    with pytest.raises(DataError, match=r"images \(B, C, H, W\)"):
        next(iter(made))
