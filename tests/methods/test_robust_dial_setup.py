"""What a search for a robust dial checks before it starts, tells besides numbers, and keeps."""

from __future__ import annotations

import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flexure
from flexure.attacks import PGD, Bounded
from flexure.contracts import DataError, FlexureError, SiteError
from flexure.methods.robust_dial_groups import ALL_SITES, TOP_LEVEL, site_groups
from flexure.methods.robust_dial_moves import SEARCHES
from flexure.methods.robust_dial_result import RobustDialSearch

EPS = 0.05
CHEAP = PGD(norm="linf", steps=1, random_start=False)


def made(kind: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Of 3 features, 2 classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), kind(), nn.Linear(8, 8), kind(), nn.Linear(8, 2))
    return model.eval()


def drawn(seed: int, count: int = 24) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 3, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(count) % 2


def searched(model: nn.Module | None = None, **changed: Any) -> RobustDialSearch:
    settings: dict[str, Any] = {
        "val": drawn(0), "eps": EPS, "radii": (EPS,), "betas": (0.8,), "cs": (0.2,),
        "matches": (None,), "groups": None, "budget": 4, "report_attack": "pgd", "attack": CHEAP,
        "clean_loss": 0.5,
    }  # fmt: skip
    return flexure.search_robust_dial(made() if model is None else model, **(settings | changed))


def never(stage: str, done: int, total: int) -> None:
    pytest.fail("the search began")


def refused(match: str, error: type[Exception] = FlexureError, **changed: Any) -> None:
    """Before anything was searched."""
    with pytest.raises(error, match=match):
        searched(**changed, progress=never)


def test_names_of_groups_that_mean_something_else_are_refused() -> None:
    with pytest.raises(FlexureError, match="all sites"):
        site_groups(["a", "b"], {ALL_SITES: "a", "rest": "*"})
    with pytest.raises(FlexureError, match="all sites"):
        site_groups([f"{ALL_SITES}.0"], "layers")
    with pytest.raises(FlexureError, match="top level"):
        site_groups(["act", f"{TOP_LEVEL}.act"], "layers")
    assert site_groups(["a", "b"], {TOP_LEVEL: "a", "rest": "*"}) == {
        TOP_LEVEL: ("a",), "rest": ("b",),
    }  # fmt: skip


def test_beta_1_of_smooth_activations_is_no_plain_network() -> None:
    model = made(nn.SiLU)
    with torch.no_grad():
        model[0].weight *= 4
    found = searched(model, test=drawn(1), matches=(None, "mean"), report_radii=())
    assert not found.plain_at_one
    assert any("silu" in note for note in found.notes)
    assert "beta = 1 is not the plain network" in str(found)
    ones = {
        one.dial.match: one
        for one in found.candidates
        if one.dial and one.dial.betas == {ALL_SITES: 1.0}
    }
    assert set(ones) == {None, "mean"}
    x, y = drawn(0)
    for match, one in ones.items():
        kept = {} if match is None else {"calibration": [x], "match": match}
        with flexure.steer(model, beta=1.0, c=0.2, example=x[:2], **kept), torch.no_grad():
            assert one.clean == float((model(x).argmax(1) == y).double().mean())
    assert ones[None].objective != found.plain.objective
    assert ones[None].objective != ones["mean"].objective
    assert found.curve[-1].beta == 1.0
    with torch.no_grad():
        kept = {"calibration": [x]} if found.curve[-1].match else {}
        x, y = drawn(1)
        with flexure.steer(model, beta=1.0, c=0.2, example=x[:2], **kept):
            assert found.curve[-1].clean.hits == int((model(x).argmax(1) == y).sum())


def test_beta_1_of_kinked_activations_is_the_plain_network_once() -> None:
    found = searched(made(lambda: nn.LeakyReLU(0.2)), matches=("mean", "mean+std"))
    assert found.plain_at_one
    assert found.notes == ()
    ones = [o for o in found.candidates if o.dial and o.dial.betas == {ALL_SITES: 1.0}]
    assert [one.dial.match for one in ones if one.dial] == [None]


@dataclass(frozen=True)
class Warning_:
    """PGD that warns."""

    norm: str = "linf"

    def run(self, model: Any, x: Tensor, y: Tensor, **more: Any) -> Tensor:
        warnings.warn("gradients are all zero", stacklevel=2)
        return PGD(norm="linf", steps=1).run(model, x, y, **more)


def test_warnings_of_the_reported_attack_are_told() -> None:
    found = searched(test=drawn(1), report_attack=Warning_(), oracle=False)
    told = [note for note in found.notes if "gradients are all zero" in note]
    assert len(told) == 2
    assert told[0].startswith("plain network: ")
    assert all(note in found.to_dict()["notes"] for note in told)
    assert f"Note: {told[0]}" in str(found)


def test_calibration_inputs_are_not_test_samples() -> None:
    x, y = drawn(1)
    refused("calibration", DataError, test=(x, y), calibration=x, matches=("mean",))
    refused("calibration", DataError, test=(x, y), calibration=[(x[:9], y[:9])])
    few = torch.cat([drawn(2)[0], x[:1]])
    found = searched(test=(x, y), calibration=few, oracle=False)
    assert found.notes == ("1 samples are in the calibration and the test data",)
    assert searched(calibration=x).notes == ()


@pytest.mark.parametrize("count", [1, 2])
def test_tiny_splits_are_not_the_same(count: int) -> None:
    x, y = drawn(0, count)
    refused("different samples", DataError, val=(x, y), test=(x.clone(), y))


def test_shared_samples_are_told() -> None:
    x, y = drawn(1)
    both = torch.cat([x, drawn(0)[0][:1]]), torch.cat([y, y[:1]])
    found = searched(test=both, oracle=False)
    assert found.shared_samples == 1
    assert "1 samples are in both splits" in str(found)


def test_a_normalisation_beside_that_of_a_bounded_is_refused() -> None:
    model = Bounded(made(), mean=[0.5] * 3, std=[0.5] * 3)
    for given in ({"mean": [0.5] * 3}, {"std": [0.5] * 3}):
        refused("no mean and std with a Bounded", model=model, **given)
        with pytest.raises(FlexureError, match="no mean and std with a Bounded"):
            flexure.attack_model(model, drawn(0), attacks=["pgd"], **given)


def robust(**changed: Any) -> tuple[nn.Module, RobustDialSearch]:
    """A search whose choice is calibrated."""
    model, (x, _) = made(), drawn(0)
    with flexure.steer(model, beta=0.2, c=0.0, example=x, calibration=[x]), torch.no_grad():
        y = model(x).argmax(1)
    found = searched(
        model, val=(x, y), matches=("mean",), betas=(0.2,), cs=(0.0,), eps=1e-6, clean_loss=0.0,
        **changed,
    )  # fmt: skip
    assert found.chosen.dial is not None
    assert found.chosen.dial.match == "mean"
    return model, found


def test_nothing_is_installed_in_a_model_that_changed() -> None:
    model, found = robust()
    with found.install(), pytest.raises(SiteError, match="steered already"):
        found.install()
    found.install().remove()
    with torch.no_grad():
        model[2].weight += 1
    with pytest.raises(FlexureError, match="changed since"):
        found.install()


def test_test_data_and_labels_are_looked_at_before_the_search() -> None:
    x, y = drawn(1)
    refused("test data: expected .* labels", DataError, test=(x, y + 5))
    refused("test data", DataError, test=(torch.cat([x, x], 1), y), model=_Strict())
    refused("val data: expected .* labels", DataError, val=(x, y + 5))
    refused("bounds", test=(x * 9, y))


class _Strict(nn.Module):
    """Says what is wrong, as a library error."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = made()

    def forward(self, x: Tensor) -> Any:
        if x.shape[1] != 3:
            raise FlexureError("expected 3 features; give 3")
        return self.inner(x)


class _Functional(nn.Module):
    """An activation whose channel axis no layer tells."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(made()[0].weight.detach())
        self.out = made()[4]

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.relu((x[:, None] * self.weight).sum(2)))


def test_calibration_is_tried_before_the_search() -> None:
    refused("channel axis", SiteError, model=_Functional(), matches=(None, "mean"))
    found = searched(_Functional(), matches=("mean",), axis=-1)
    assert {one.dial.match for one in found.candidates if one.dial} == {"mean", None}


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"cs": ("balanced",)}, "expected cs to be numbers"),
        ({"betas": 0.5}, "expected betas to be a sequence"),
        ({"cs": 0.5}, r"cs to be a sequence, got 0.5; give \(0.5,\)"),
        ({"radii": 0.1}, "expected radii to be a sequence"),
        ({"report_radii": 0.1}, "expected report_radii to be a sequence"),
        ({"matches": "mean"}, "expected matches to be a sequence"),
        ({"val": None}, "expected val"),
        ({"val": (drawn(0)[0].mul(255).byte(), drawn(0)[1])}, "floating point, got torch.uint8"),
        ({"calibration": drawn(0)[0].mul(255).byte()}, "calibration inputs of floating point"),
        ({"calibration": torch.zeros(0, 3)}, "expected calibration inputs"),
        ({"budget": 0}, "at least 1, got 0; leave it out"),
        ({"norm": "l7", "radii": None}, "norm"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(changed: dict[str, Any], match: str) -> None:
    refused(match, **changed)


def test_arrays_are_sequences() -> None:
    found = searched(betas=np.array([0.8, 0.9]), cs=np.array([0.2]))
    assert len(found.candidates) == 4


def test_the_curve_is_at_c_of_a_dial_below_1() -> None:
    found = searched(
        test=drawn(1), betas=(0.05, 0.1), cs=(0.0, 0.9), clean_loss=0.0, oracle=False,
        val=_labelled(drawn(0)[0]),
    )  # fmt: skip
    below = [one for one in found.candidates if one.dial and one.dial.betas != {ALL_SITES: 1.0}]
    assert not any(one.allowed for one in below)
    best = max(below, key=lambda one: one.objective)
    assert best.dial is not None
    assert {point.c for point in found.curve} == set(best.dial.cs.values()) == {0.9}
    assert any("no shared dial with beta below 1" in note for note in found.notes)
    told = searched(test=drawn(1), oracle=False)
    assert not any("no shared dial" in note for note in told.notes)


def _labelled(x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return x, made()(x).argmax(1)


def test_known_points_cost_no_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []

    def repeating(start: Any, score: float, seed: int) -> Any:
        first, known = (0.5, 0.9, 0.2, 0.2), (0.8, 0.8, 0.2, 0.2)
        at_one, same = (1.0, 0.9, 0.2, 0.2), (1.0, 0.9, 0.7, 0.2)
        last = (0.6, 0.9, 0.2, 0.2)
        yield from (point for point in (known, first, first, at_one, same, last))

    monkeypatch.setitem(SEARCHES, "greedy", repeating)  # type: ignore[arg-type]
    found = searched(
        groups="sites", search="greedy", budget=3,
        progress=lambda stage, done, total: told.append(done) if "group" in stage else None,
    )  # fmt: skip
    groups = [one.dial for one in found.candidates if one.stage == "groups"]
    assert [list(dial.betas.values()) for dial in groups if dial] == [
        [0.5, 0.9], [1.0, 0.9], [0.6, 0.9],
    ]  # fmt: skip
    assert told == [1, 2, 3]


def test_one_sample_has_no_interval() -> None:
    found = searched(test=drawn(1, 1), oracle=False)
    text = str(found)
    assert "nan" not in text
    plain, *rows = [line for line in text.splitlines() if line.endswith(" -")]
    assert plain.startswith("plain network")
    assert all("yes, -" in line or "no, -" in line for line in rows)
    assert rows


def test_a_search_can_be_stored_and_keeps_no_inputs() -> None:
    _, found = robust()
    again = pickle.loads(pickle.dumps(found))
    assert again == found == deepcopy(found)
    with pytest.raises(FlexureError, match="holds no network"):
        again.install()
    x, y = drawn(0)
    seen = weakref.ref(x)
    plain = searched(val=(x, y))
    del x
    gc.collect()
    assert plain.chosen.dial is not None
    assert seen() is None
    plain.install().remove()
