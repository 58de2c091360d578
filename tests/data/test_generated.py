"""Two moons and two circles by address."""

from __future__ import annotations

import pytest
import torch

from flexure.contracts import AddressError, DataError
from flexure.data import load_data, split


@pytest.mark.parametrize("name", ["moons", "circles"])
def test_defaults(name: str) -> None:
    loaded = load_data(f"sklearn:{name}")
    assert set(loaded) == {"train"}
    data = loaded["train"]
    assert len(data) == 2000
    assert data[0].shape == (2,)
    assert data[0].dtype == torch.float32
    assert data.classes == ("0", "1")
    assert data.labels.bincount().tolist() == [1000, 1000]
    defaults = "n=2000&noise=0.1&seed=0" + ("&factor=0.5" if name == "circles" else "")
    assert torch.equal(load_data(f"sklearn:{name}?{defaults}")["train"].items, data.items)
    assert torch.equal(load_data(f"sklearn:{name}")["train"].items, data.items)
    other = load_data(f"sklearn:{name}?seed=1")["train"]
    assert not torch.equal(other.items, data.items)
    parts = split(loaded, seed=0)
    assert (len(parts.train), len(parts.val), len(parts.test)) == (1280, 320, 400)


@pytest.mark.parametrize("name", ["moons", "circles"])
def test_odd_numbers_have_one_more_of_the_second_class(name: str) -> None:
    data = load_data(f"sklearn:{name}?n=7")["train"]
    assert data.labels.bincount().tolist() == [3, 4]


def test_without_noise_they_are_the_curves() -> None:
    moons = load_data("sklearn:moons?n=50&noise=0")["train"]
    centre = torch.stack([moons.labels.float(), 0.5 * moons.labels], 1)
    radii = (moons.items - centre).norm(dim=1)
    torch.testing.assert_close(radii, torch.ones(50), atol=1e-6, rtol=0)
    below = (moons.items - centre)[:, 1] * (1 - 2 * moons.labels)
    assert float(below.min()) > -1e-6
    circles = load_data("sklearn:circles?n=50&noise=0&factor=0.25")["train"]
    radii = circles.items.norm(dim=1)
    torch.testing.assert_close(radii, torch.where(circles.labels == 1, 0.25, 1.0))


def test_noise_is_that_of_each_coordinate() -> None:
    clean, noisy = (
        load_data(f"sklearn:circles?n=20000&noise={s}&seed=3")["train"] for s in (0, 0.2)
    )
    spread = [
        (data.items.norm(dim=1) - torch.where(data.labels == 1, 0.5, 1.0))
        for data in (clean, noisy)
    ]
    assert float(spread[0].abs().max()) < 1e-6
    assert float(spread[1][noisy.labels == 0].std()) == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("moons?n=two", "n=.* a number of samples"),
        ("moons?n=1", "n=.* a number of samples"),
        ("moons?n=99999999999", "n=.* a number of samples"),
        ("moons?noise=-1", "noise=.* a standard deviation"),
        ("moons?noise=nan", "noise=.* a standard deviation"),
        ("moons?noise=inf", "noise=.* a standard deviation"),
        ("moons?seed=-1", "seed=.* an integer"),
        ("moons?seed=1.5", "seed=.* an integer"),
        ("moons?factor=0.5", "expected options n=..., noise=..., seed=..."),
        ("circles?factor=1", r"factor=.* in \(0, 1\)"),
        ("moons?n", "expected options"),
        ("spirals", "sklearn:moons, sklearn:circles, got sklearn:spirals"),
        ("digits?n=5", "expected one of"),
    ],
)
def test_addresses_that_cannot_be_read(rest: str, message: str) -> None:
    with pytest.raises((AddressError, DataError), match=message):
        load_data(f"sklearn:{rest}")
