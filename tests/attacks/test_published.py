"""The published evaluation: what the library does to normalised inputs, called what it is."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from flexure.attacks import (
    APGD,
    FAB,
    PGD,
    Bounded,
    PublishedRobustness,
    Robustness,
    robust_accuracy,
)
from flexure.contracts import FlexureError
from tests.measure.untouched import untouched

MEAN, STD = (0.4, 0.5, 0.6), (0.25, 0.2, 0.3)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(27, 16), nn.Tanh(), nn.Linear(16, 5))


def bounded() -> Bounded:
    return Bounded(network(), mean=MEAN, std=STD)


def images(count: int = 14) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = bounded()(x).argmax(1)
    y[0] = (y[0] + 1) % 5
    return x, y


def normalised(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std


def published(attack: object, x: Tensor, y: Tensor, *, eps: float, **settings) -> Robustness:
    return robust_accuracy(
        bounded(), x, y, attack=attack, eps=eps, seed=4, batch_size=5, protocol="published",
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_is_what_the_library_does_to_normalised_inputs(norm: str) -> None:
    from pyautoattack import AutoAttack

    (x, y), eps = images(), 0.03 if norm == "linf" else 0.2
    whole = AutoAttack(
        network(), attacks=["apgd-ce", "fab-t"], norm={"linf": "Linf", "l2": "L2"}[norm],
        eps=eps, seed=4, version="custom",
    )  # fmt: skip
    whole.apgd.n_restarts, whole.fab.n_iter, whole.fab.n_target_classes = 1, 3, 2
    z_adv, predicted = whole.run_standard_evaluation(normalised(x), y, batch_size=5)
    attacks = [APGD(norm, steps=100), FAB(norm, steps=3, targets=2)]
    found = published(attacks, x, y, eps=eps)
    assert isinstance(found, PublishedRobustness)
    assert torch.equal(found.robust, predicted == y)
    change = (z_adv - normalised(x)).double().flatten(1)
    size = change.norm(dim=1) if norm == "l2" else change.abs().amax(1)
    torch.testing.assert_close(found.distance, size, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(normalised(found.x_adv), z_adv, rtol=1e-5, atol=1e-5)
    assert found.largest > 3 * eps
    pixels = (found.x_adv - x).double().flatten(1)
    size = pixels.norm(dim=1) if norm == "l2" else pixels.abs().amax(1)
    torch.testing.assert_close(found.distance_in_pixels, size)
    assert torch.equal(found.x_adv[found.robust], x[found.robust])


def test_the_clamp_alone_changes_predictions() -> None:
    """At eps = 0 the standard protocol gives the clean accuracy; this one does not."""
    x, y = images()
    with torch.no_grad():
        clamped = network()(normalised(x).clamp(0, 1)).argmax(1) == y
    found = published(APGD("linf", steps=1), x, y, eps=0)
    assert torch.equal(found.robust, found.clean & clamped)
    assert found.accuracy < found.clean_accuracy
    assert found.largest > 0.5
    standard = robust_accuracy(bounded(), x, y, attack=APGD("linf", steps=1), eps=0, seed=4)
    assert torch.equal(standard.clean, found.clean)
    assert standard.accuracy == standard.clean_accuracy


def test_it_says_that_it_is_no_robustness() -> None:
    x, y = images()
    found = published(APGD("linf", steps=2), x, y, eps=0.03)
    assert isinstance(found, PublishedRobustness)
    text = str(found)
    assert "NOT an l_p robustness" in text
    assert f"{found.largest:.4g} normalised" in text
    assert f"{found.largest_in_pixels:.4g} in the inputs' units" in text
    told = json.loads(json.dumps(found.to_dict()))
    assert (told["protocol"], told["l_p_robustness"]) == ("published", False)
    assert told["largest_distance"] == found.largest
    assert told["largest_distance_in_pixels"] == found.largest_in_pixels
    assert found.taken(slice(3)).distance_in_pixels.shape == (3,)


def test_it_is_resumed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = images()
    given = {"attack": APGD("linf", steps=2), "eps": 0.03}
    whole = published(x=x, y=y, **given, resume=tmp_path)
    monkeypatch.setattr(APGD, "run", forbidden)
    again = published(x=x, y=y, **given | {"attack": APGD("linf", steps=2)}, resume=tmp_path)
    assert torch.equal(again.x_adv, whole.x_adv)
    with pytest.raises(FlexureError):
        robust_accuracy(
            bounded(), x, y, attack=given["attack"], eps=0.03, seed=4, batch_size=5, resume=tmp_path
        )


def forbidden(*args: object, **settings: object) -> None:
    raise AssertionError


def test_what_it_needs() -> None:
    x, y = images(4)
    attack = APGD("linf", steps=1)
    with pytest.raises(FlexureError, match="mean and std"):
        robust_accuracy(
            Bounded(network()), x, y, attack=attack, eps=0.1, seed=0, protocol="published"
        )
    with pytest.raises(FlexureError, match="protocol"):
        robust_accuracy(bounded(), x, y, attack=attack, eps=0.1, seed=0, protocol="other")
    with pytest.raises(FlexureError, match="within the bounds"):
        published(attack, normalised(x), y, eps=0.1)
    model = bounded()
    with untouched(model, x, y):
        robust_accuracy(model, x, y, attack=attack, eps=0.1, seed=0, protocol="published")


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [0.0, 0.02])
def test_attacks_that_return_what_they_tried(norm: str, eps: float) -> None:
    """PGD moves all samples; those that it did not beat are as they were in the result."""
    x, y = images()
    attack = PGD(norm, steps=3)
    found = published(attack, x, y, eps=eps)
    assert isinstance(found, PublishedRobustness)
    assert 0 < int(found.robust.sum()) < int(found.clean.sum())
    kept = ~found.beaten_by.any(1)
    assert torch.equal(found.x_adv[kept], x[kept])
    assert (found.distance[kept] == 0).all()
    assert (found.distance_in_pixels[kept] == 0).all()
    assert found.largest == float(found.distance[~kept].max()) > 0
    if not eps:
        clamped = normalised(x).clamp(0, 1)
        with torch.no_grad():
            assert torch.equal(found.robust, found.clean & (network()(clamped).argmax(1) == y))
        torch.testing.assert_close(normalised(found.x_adv)[~kept], clamped[~kept])


class Returns:
    norm = "linf"

    def __init__(self, made: object) -> None:
        self.made = made

    def run(self, model, x, y, *, eps, generator) -> object:
        return self.made


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, r"inputs \(4, 3, 3, 3\), got NoneType"),
        (torch.zeros(2, 3, 3, 3), r"inputs \(4, 3, 3, 3\), got \(2, 3, 3, 3\)"),
        (torch.full((4, 3, 3, 3), torch.nan), "finite inputs, got nan"),
    ],
)
def test_attacks_return_finite_inputs(made: object, message: str) -> None:
    x, _ = images(4)
    with pytest.raises(FlexureError, match=message):
        robust_accuracy(
            bounded(), x, bounded()(x).argmax(1), attack=Returns(made), eps=0.1, seed=0,
            protocol="published",
        )  # fmt: skip
