"""The search for a robust dial: what it evaluates, chooses, reports, keeps, and refuses."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import flexure
from flexure.attacks import PGD, Bounded, robust_accuracy
from flexure.contracts import DataError, FlexureError, SiteError
from flexure.methods.robust_dial_bench import Outcome
from flexure.methods.robust_dial_groups import ALL_SITES
from flexure.methods.robust_dial_result import ORACLE, RobustDial, RobustDialSearch
from flexure.methods.robust_dial_stages import DialObjective

EPS = 0.05
RADII = (0.02, 0.2)
MEAN, STD = [0.5] * 8, [0.5] * 8
WAVE = 0.12
NEAREST, FARTHEST = 0.15, 0.3


class Wavy(nn.Module):
    """The margin s + W(t), with W a triangle wave made of kinks, which dials below 1 smooth away.

    s is half the sum of the first four inputs, t twice the sum of the others (both from the middle
    of the range), and W goes from -0.12 to 0.12 and back when t rises by 0.4. Within eps = 0.05, t
    can be moved by 0.4, so to the wave's lowest point, and s by 0.1: robust is what has
    |s| > 0.1 + 0.12, and without the wave what has |s| > 0.1. The unit of `body` is never at its
    kink, but its softplus shifts the boundary, unless it is calibrated or c = 0.5.
    """

    def __init__(self) -> None:
        super().__init__()
        knots = torch.arange(-4, 4.1, 0.2)
        self.wave = nn.Sequential(nn.Linear(8, len(knots)), nn.ReLU())
        self.body = nn.Sequential(nn.Linear(8, 1), nn.ReLU())
        self.sum = nn.Linear(1 + len(knots), 1)
        self.act = nn.ReLU()
        slopes = 20 * WAVE * (-1.0) ** torch.arange(len(knots))
        slopes[0] /= 2
        first = torch.tensor([1.0] * 4 + [0.0] * 4) * STD[0]
        with torch.no_grad():
            self.wave[0].weight.copy_(2 * (STD[0] - first).expand(len(knots), -1))
            self.wave[0].bias.copy_(-knots)
            self.body[0].weight.copy_(first[None] / 2)
            self.body[0].bias.fill_(0.4)
            self.sum.weight.copy_(torch.cat([torch.ones(1), slopes])[None])
            self.sum.bias.fill_(9 - 0.4 - WAVE)

    def forward(self, x: Tensor) -> Tensor:
        margin = self.act(self.sum(torch.cat([self.body(x), self.wave(x)], 1)))[:, 0] - 9
        return 10 * torch.stack([-margin, margin], 1)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return Wavy().eval()


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    """60 inputs with |s| from 0.15 to 0.3, 30 of each class."""
    draws = torch.Generator().manual_seed(seed)
    u = 0.2 * torch.rand(60, 8, generator=draws) - 0.1
    s = NEAREST + (FARTHEST - NEAREST) * torch.rand(60, generator=draws)
    y = torch.arange(60) % 2
    wanted = s * (2 * y - 1)
    u[:, :4] += (wanted / 2 - u[:, :4].mean(1))[:, None]
    return 0.5 + u, y


@pytest.fixture(scope="module")
def splits() -> dict[str, tuple[Tensor, Tensor]]:
    return {"val": drawn(0), "test": drawn(1)}


def distances(x: Tensor) -> Tensor:
    """|s|, by hand."""
    return ((x[:, :4] - 0.5).sum(1) / 2).abs()


CHEAP = PGD(norm="linf", steps=12, random_start=False)


def searched(network: nn.Module, **changed: Any) -> RobustDialSearch:
    settings: dict[str, Any] = {
        "mean": MEAN, "std": STD, "eps": EPS, "radii": RADII, "betas": (0.5, 0.8),
        "cs": (0.0, 0.5), "matches": (None, "mean"), "budget": 12, "report_attack": "pgd",
        "report_radii": (), "attack": CHEAP, "clean_loss": 0.02,
    }  # fmt: skip
    return flexure.search_robust_dial(network, **(settings | changed))


@pytest.fixture(scope="module")
def found(network: nn.Module, splits: dict[str, tuple[Tensor, Tensor]]) -> RobustDialSearch:
    return searched(network, **splits)


def test_the_plain_network_is_first_and_beta_1_is_the_same_once(found: RobustDialSearch) -> None:
    plain, *shared = [one for one in found.candidates if one.stage != "groups"]
    assert plain.dial is None
    assert plain.stage == "plain"
    assert len(shared) == 2 * 2 * 2 + 1
    ones = [one for one in shared if one.dial and set(one.dial.betas.values()) == {1.0}]
    assert len(ones) == 1
    assert (ones[0].clean, ones[0].robust) == (plain.clean, plain.robust)


def test_candidates_have_the_accuracies_of_the_steered_network(
    network: nn.Module, splits: dict[str, tuple[Tensor, Tensor]], found: RobustDialSearch
) -> None:
    x, y = splits["val"]
    bounded = Bounded(network, mean=MEAN, std=STD)
    ready = (x - 0.5) / 0.5
    some = [*found.candidates[1:9:3], found.candidates[-1]]
    assert {one.stage for one in some} == {"shared", "groups"}
    assert len({one.dial.match for one in some if one.dial}) == 2
    for one in some:
        assert one.dial is not None
        beta, c = (
            {
                s: each.get(name, each.get(ALL_SITES))
                for name, some in found.groups.items()
                for s in some
            }
            for each in (one.dial.betas, one.dial.cs)
        )
        kept = {} if one.dial.match is None else {"calibration": [ready], "match": one.dial.match}
        with flexure.steer(network, beta=beta, c=c, example=ready[:2], **kept):
            by_hand = robust_accuracy(bounded, x, y, attack=CHEAP, eps=EPS, seed=42)
        assert one.clean == by_hand.clean_accuracy
        assert one.robust[EPS] == by_hand.accuracy


def test_more_radius_is_never_more_accuracy(found: RobustDialSearch) -> None:
    assert all(list(one.robust) == [EPS] for one in found.candidates)
    for point in found.curve:
        assert list(point.robust) == sorted({*RADII, EPS})
        values = [share.value for share in (point.clean, *point.robust.values())]
        assert values == sorted(values, reverse=True)


def test_the_best_that_keeps_its_clean_accuracy_is_chosen(found: RobustDialSearch) -> None:
    least = found.plain.clean - found.clean_loss - 1e-9
    assert all(one.allowed == (one.clean >= least) for one in found.candidates)
    assert any(not one.allowed for one in found.candidates)
    assert found.chosen.objective == max(o.objective for o in found.candidates if o.allowed)


def test_what_smooths_the_wave_away_is_chosen(
    splits: dict[str, tuple[Tensor, Tensor]], found: RobustDialSearch
) -> None:
    # Steps of the attack end beside the wave's lowest point by half of what t moves in a step.
    shown = {"val": found.plain.robust[EPS], "test": found.rows[0].robust[EPS].value}
    for (name, (x, _)), steps in zip(splits.items(), (CHEAP.steps, 40), strict=True):
        beside = 8 * EPS * 2.5 / steps / 2 * WAVE / 0.1
        least, most = (
            float((distances(x) > 0.1 + WAVE - off).double().mean()) for off in (-0.001, beside)
        )
        assert 0.3 < least <= shown[name] + 1e-9
        assert shown[name] <= most < 0.95
    assert found.plain.clean == 1.0
    assert found.chosen.dial is not None
    assert found.chosen.robust[EPS] == found.chosen.clean == 1.0
    wrong = [one for one in found.candidates if one.dial and _uncalibrated_softplus(one.dial)]
    assert [one.clean for one in wrong] == [pytest.approx(0.5, abs=0.05)]
    assert found.row is not None
    assert found.row.robust[EPS].value > 0.95
    assert found.gain is not None
    assert found.gain.low > 0.2


def _uncalibrated_softplus(dial: RobustDial) -> bool:
    return (dial.betas, dial.cs, dial.match) == ({ALL_SITES: 0.5}, {ALL_SITES: 0.0}, None)


def test_group_dials_differ_and_start_from_the_best_shared_one(found: RobustDialSearch) -> None:
    assert {name: len(sites) for name, sites in found.groups.items()} == {
        "wave": 1, "body": 1, "top level": 1,
    }  # fmt: skip
    groups = [one for one in found.candidates if one.stage == "groups"]
    assert len(groups) == 12
    allowed = [one for one in found.candidates if one.stage == "shared" and one.allowed]
    start = max(allowed, key=lambda one: one.objective)
    assert start.dial is not None
    assert {one.dial.match for one in groups if one.dial} == {start.dial.match}
    assert any(one.dial and len(set(one.dial.betas.values())) == 3 for one in groups)


def test_rows_are_paired_with_the_plain_network(
    network: nn.Module, splits: dict[str, tuple[Tensor, Tensor]], found: RobustDialSearch
) -> None:
    assert found.rows[0].dial is None
    row = found.row
    assert row is not None
    assert row.name.endswith("(chosen)")
    assert found.gain is not None
    x, y = splits["test"]
    bounded = Bounded(network, mean=MEAN, std=STD)
    with found.install() as steering:
        assert steering.model is network
        steered = robust_accuracy(bounded, x, y, attack="pgd", norm="linf", eps=EPS, seed=42)
    plain = robust_accuracy(bounded, x, y, attack="pgd", norm="linf", eps=EPS, seed=42)
    assert row.clean.value == steered.clean_accuracy
    assert row.robust[EPS].value == steered.accuracy
    assert found.gain.won == int((steered.robust & ~plain.robust).sum())
    assert found.gain.low <= found.gain.value <= found.gain.high
    difference = row.clean_difference
    assert difference.value == pytest.approx(row.clean.value - found.rows[0].clean.value)
    assert row.mean_within == (difference.value >= -found.clean_loss - 1e-9)
    assert row.interval_within == (difference.low >= -found.clean_loss - 1e-9)


def test_the_oracle_is_labelled_and_is_no_result(found: RobustDialSearch) -> None:
    assert found.oracle is not None
    assert found.oracle.name == ORACLE
    assert "oracle: best shared dial on test data" in str(found)
    assert found.oracle not in found.rows
    assert found.to_dict()["oracle_label"] == ORACLE


def test_the_curve_is_over_all_betas(found: RobustDialSearch) -> None:
    assert [point.beta for point in found.curve] == [0.5, 0.8, 1.0]
    assert len({(point.c, point.match) for point in found.curve}) == 1
    assert found.curve[-1].clean == found.rows[0].clean


def test_results_are_text_and_json(found: RobustDialSearch) -> None:
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["rows"][0]["name"] == "plain network"
    assert "plain network" in str(found)
    assert "paired" in str(found)
    with pytest.raises(AttributeError):
        found.eps = 1.0  # type: ignore[misc]


def test_dials_of_many_groups_are_told_by_their_range() -> None:
    betas = {str(k): 0.5 + 0.1 * k for k in range(5)}
    many = RobustDial(betas, dict.fromkeys(betas, 0.2), "mean")
    assert str(many) == "beta 0.5 to 0.9 in 5 groups; c 0.2 to 0.2 in 5 groups; calibrated on mean"
    assert not many.shared
    two = RobustDial({"a": 0.5, "b": 1.0}, {"a": 0.0, "b": 0.5}, None)
    assert str(two) == "beta 0.5, 1; c 0, 0.5; not calibrated"


def test_the_model_is_left_as_it_was(
    network: nn.Module, splits: dict[str, tuple[Tensor, Tensor]]
) -> None:
    network.train()
    modules = dict(network.named_modules())
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    searched(network, **splits, groups=None, betas=(0.8,), cs=(0.5,), oracle=False)
    assert dict(network.named_modules()) == modules
    assert all(torch.equal(before[name], now) for name, now in network.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert network.training
    network.eval()


def test_test_data_change_no_choice(
    network: nn.Module, splits: dict[str, tuple[Tensor, Tensor]], found: RobustDialSearch
) -> None:
    x, y = splits["test"]
    other = searched(network, val=splits["val"], test=(x.flip(1), 1 - y), oracle=False)
    assert other.candidates == found.candidates
    assert other.chosen == found.chosen
    assert other.rows != found.rows
    without = searched(network, val=splits["val"])
    assert without.candidates == found.candidates
    assert without.rows == ()
    assert without.gain is None
    assert without.row is None
    assert "nothing is reported" in str(without)


@dataclass(frozen=True)
class Counting:
    """PGD that counts the samples it is given."""

    norm: str = "linf"
    given: ClassVar[list[int]] = []

    def run(self, model: Any, x: Tensor, y: Tensor, **more: Any) -> Tensor:
        self.given.append(len(x))
        return PGD(norm="linf", steps=3).run(model, x, y, **more)


class Stopped(Exception):
    """Instead of a power failure."""


@pytest.mark.parametrize("at", ["shared dials", "group dials, start 1", "test, oracle"])
def test_what_was_interrupted_resumes_to_the_same_result(
    network: nn.Module, splits: dict[str, tuple[Tensor, Tensor]], tmp_path: Path, at: str
) -> None:
    smaller: dict[str, Any] = {"budget": 4, "matches": ("mean",), "attack": Counting()}
    smaller |= {"betas": (0.8,), "radii": ()}
    smaller |= {name: tuple(part[:30] for part in split) for name, split in splits.items()}

    def stop(stage: str, done: int, total: int) -> None:
        if stage == at and done == 2:
            raise Stopped

    Counting.given.clear()
    whole = searched(network, **smaller)
    needed = sum(Counting.given)
    Counting.given.clear()
    with pytest.raises(Stopped):
        searched(network, **smaller, resume=tmp_path, progress=stop)
    spent = sum(Counting.given)
    assert 0 < spent < needed
    resumed = searched(network, **smaller, resume=tmp_path)
    assert resumed == whole
    assert sum(Counting.given) == needed  # nothing was done twice
    assert searched(network, **smaller, resume=tmp_path) == whole
    assert sum(Counting.given) == needed


def test_a_folder_of_other_data_is_refused(
    network: nn.Module, splits: dict[str, tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    x, y = (part[:30] for part in splits["val"])
    few: dict[str, Any] = {"groups": None, "betas": (0.8,), "cs": (0.5,), "matches": (None,)}
    searched(network, val=(x, y), resume=tmp_path, **few)
    with pytest.raises(FlexureError, match="labels"):
        searched(network, val=(x, 1 - y), resume=tmp_path, **few)


@pytest.mark.parametrize("search", ["coordinate", "greedy"])
def test_every_search_of_groups_respects_its_budget(
    network: nn.Module, splits: dict[str, tuple[Tensor, Tensor]], search: str
) -> None:
    val = tuple(part[:40] for part in splits["val"])
    found = searched(
        network, val=val, search=search, budget=5, starts=2, groups={"wave": "w*", "rest": ["*"]}
    )
    groups = [one for one in found.candidates if one.stage == "groups"]
    assert len(groups) == 10
    assert {one.dial.match for one in groups if one.dial} == {None, "mean"}
    assert found.groups == {"wave": ("wave.1",), "rest": ("body.1", "act")}


def test_batches_and_a_bounded_model_are_the_same_search(
    network: nn.Module, splits: dict[str, tuple[Tensor, Tensor]]
) -> None:
    x, y = (part[:40] for part in splits["val"])
    few: dict[str, Any] = {"groups": None, "betas": (0.8,), "cs": (0.5,)}
    pair = searched(network, val=(x, y), **few)
    halves = [(x[:25], y[:25]), (x[25:], y[25:])]
    bounded = Bounded(network, mean=MEAN, std=STD)
    again = searched(bounded, val=halves, calibration=[(x, y)], mean=None, std=None, **few)
    assert again.candidates == pair.candidates


def test_the_objective_is_its_equation_and_knows_no_scale() -> None:
    margins = torch.tensor([4.0, 2.0, -2.0, 1.0], dtype=torch.float64)
    attacked = torch.tensor([1.0, -1.0, -2.0, 0.0], dtype=torch.float64)
    found = Outcome(margins > 0, margins, attacked, {})
    objective = DialObjective(plain=0.8, clean_loss=0.02)
    t = 0.15 * 2.0
    soft = float(torch.sigmoid(attacked / t).mean())
    expected = 0.5 * soft + 0.5 * 0.25 - 3 * (0.8 - 0.01 - 0.75)
    assert objective(found, 0.25) == pytest.approx(expected, rel=1e-12)
    scaled = replace(found, margins=100 * margins, attacked=100 * attacked)
    assert objective(scaled, 0.25) == pytest.approx(expected, rel=1e-12)
    assert not objective.allowed(found)
    assert DialObjective(plain=0.77, clean_loss=0.02).allowed(found)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"eps": 0.0}, "above 0"),
        ({"radii": (-1.0,)}, "eps"),
        ({"norm": "l2"}, "attacks in l2"),
        ({"norm": "l7", "attack": None}, "norm"),
        ({"betas": ()}, "betas"),
        ({"betas": (1.5,)}, "beta"),
        ({"cs": (-0.1,)}, "c"),
        ({"matches": ("std",)}, "matches"),
        ({"search": "random"}, "search"),
        ({"budget": 0}, "budget"),
        ({"starts": 1.5}, "starts"),
        ({"batch_size": None}, "batch_size"),
        ({"clean_loss": 1}, "clean_loss"),
        ({"seed": "a"}, "seed"),
        ({"report_attack": "unknown"}, "report_attack"),
        ({"report_attack": PGD(norm="l2")}, "attacks in linf"),
        ({"groups": "modules"}, "groups"),
        ({"mean": None}, "mean and std"),
        ({"calibration": []}, "calibration"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_attack(
    network: nn.Module,
    splits: dict[str, tuple[Tensor, Tensor]],
    changed: dict[str, Any],
    match: str,
) -> None:
    def never(stage: str, done: int, total: int) -> None:
        raise Stopped

    with pytest.raises(FlexureError, match=match):
        searched(network, val=splits["val"], progress=never, **changed)


def test_data_that_do_not_fit_are_refused(
    network: nn.Module, splits: dict[str, tuple[Tensor, Tensor]]
) -> None:
    x, y = splits["val"]
    with pytest.raises(DataError, match="same object"):
        searched(network, val=splits["val"], test=splits["val"])
    with pytest.raises(DataError, match="different samples"):
        searched(network, val=(x, y), test=(x[30:].clone(), y[30:]))
    with pytest.raises(FlexureError, match="bounds"):
        searched(network, val=(x * 255, y))
    with pytest.raises(DataError, match="one shape"):
        searched(network, val=[(x[:5], y[:5]), (x[5:9, 1:], y[5:9])])
    with pytest.raises(SiteError):
        searched(nn.Sequential(nn.Flatten(), nn.Linear(8, 2)), val=(x, y))


def test_where_the_network_is_best_as_it_is_nothing_is_installed(
    network: nn.Module, splits: dict[str, tuple[Tensor, Tensor]]
) -> None:
    found = searched(
        network, **splits, betas=(0.5,), cs=(0.0,), matches=(None,), groups=None, oracle=False
    )
    assert found.chosen.dial is None
    assert found.row == found.rows[0]
    assert found.gain is not None
    assert found.gain.value == 0
    assert found.oracle is None
    with pytest.raises(FlexureError, match="best as it is"):
        found.install()
