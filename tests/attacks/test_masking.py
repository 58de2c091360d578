"""Masked gradients: called so where they were masked on purpose, and not on honest networks."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

import flexure
from flexure.attacks import PGD, Bounded
from flexure.attacks.masking_attacks import check_growth
from flexure.attacks.masking_evidence import (
    ALLOWED_BLIND,
    ALLOWED_EFFORT,
    CONFIDENCE,
    exceeds,
    fewest_that_exceed,
    more_often,
)
from flexure.attacks.masking_subject import Subject
from flexure.contracts import FlexureError
from tests.attacks.masking_networks import (
    MASKS,
    Changed,
    NoiseForGradient,
    SixteenBits,
    affine,
    convnet,
    held_out,
    mlp,
    quantised,
    straight_through,
    trained,
)
from tests.measure.untouched import untouched

QUICK = {"samples": 32, "steps": 8, "restarts": 1, "longer": 2, "targets": 2, "queries": 40}
QUICK |= {"pictures": 2, "points": 5}


def report(model: nn.Module, **settings) -> flexure.MaskingReport:
    x, y = settings.pop("data", None) or held_out(32)
    chosen = {"eps": 0.1, "seed": 0, **QUICK, **settings}
    return flexure.masking_report(Bounded(model), x, y, **chosen)


def suspicious(found: flexure.MaskingReport) -> set[str]:
    return {check.name for check in found.checks if check.suspicious}


# The verdict


@pytest.mark.parametrize("mask", MASKS)
def test_masked_networks(mask: str) -> None:
    model = Changed(trained(mlp), **MASKS[mask]).train()
    x, y = held_out(32)
    with untouched(model, x, y):
        found = report(model, data=(x, y))
    assert found.verdict == "masked", str(found)
    assert found.reasons
    assert json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "mask",
    [
        "round, 8",
        "round straight through, 255",
        "logits x 1e3",
        "noise",
        "rare noise",
        "half cut",
        "detached",
    ],
)
def test_masked_robust_networks(mask: str) -> None:
    assert report(Changed(trained(mlp, 0.1), **MASKS[mask])).verdict == "masked"


@pytest.mark.parametrize(
    ("make", "trained_at", "eps"),
    [(mlp, a, e) for a in (0.0, 0.1) for e in (0.02, 0.1, 0.25)] + [(convnet, 0.1, 0.1)],
)
def test_honest_networks(make, trained_at: float, eps: float) -> None:
    model = trained(make, trained_at)
    source = Bounded(trained(convnet if make is mlp else mlp))
    found = report(model, eps=eps, source=source)
    assert found.verdict == "not masked", str(found)
    assert suspicious(found) == set()
    assert {check.name for check in found.checks if check.suspicious is None} <= {"transfer back"}
    assert found.accuracy <= found.gradient_accuracy <= found.clean_accuracy


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
def test_sixteen_bits_are_no_masking(autocast: bool, given: torch.dtype) -> None:
    """Rounding hides small changes: that is no sign, and no acquittal."""
    found = report(SixteenBits(trained(mlp, 0.1), autocast, given))
    assert found.verdict == "undecided", str(found)
    assert suspicious(found) == set()
    assert found["slopes"].suspicious is None
    assert any(reason.startswith("slopes skipped: rounding") for reason in found.reasons)


@pytest.mark.parametrize("offset", [1e5, 1e7])
def test_what_all_logits_share_hides_no_randomness(offset: float) -> None:
    change = {"before": lambda x: x + 0.2 * torch.randn_like(x), "after": lambda z: z + offset}
    found = report(Changed(trained(mlp, 0.1), **change))
    assert found.verdict == "masked", str(found)
    assert "randomness" in suspicious(found)


@pytest.mark.parametrize(
    ("levels", "offset", "verdict"),
    [(None, 1e4, "undecided"), (8, 1e4, "masked"), (255, 1e4, "undecided"),
     (255, 1e6, "undecided"), (255, 10, "masked"), (None, 10, "not masked")],
)  # fmt: skip
def test_slopes_that_cannot_be_judged_leave_it_undecided(levels, offset, verdict: str) -> None:
    before = None if levels is None else straight_through(quantised(levels))
    found = report(Changed(trained(mlp, 0.1), before, lambda z: z + offset))
    assert found.verdict == verdict, str(found)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_random_rarely_is_seen_whatever_the_seed(seed: int) -> None:
    found = report(Changed(trained(mlp), **MASKS["rare noise"]), seed=seed)
    assert "randomness" in suspicious(found)


def test_what_is_random_next_to_samples_alone() -> None:
    def off_the_grid(x: Tensor) -> Tensor:
        off = ((16 * x - (16 * x).round()).abs() > 1e-3).flatten(1).any(1)
        return x + 0.2 * off.view(-1, 1, 1, 1) * torch.randn_like(x)

    assert "randomness" in suspicious(report(Changed(trained(mlp), off_the_grid)))


def test_a_flat_cross_entropy_is_told_as_what_it_is() -> None:
    """Of an honest network that is sure of many samples: attacks on the margin work."""
    honest = report(trained(mlp, 0.1, 4))
    sure = report(Changed(trained(mlp, 0.1, 4), after=lambda z: 30 * z))
    assert sure.verdict == "undecided", str(sure)
    assert suspicious(sure) == {"gradient norms"}
    assert sure.gradient_accuracy == honest.gradient_accuracy
    zero = sure["gradient norms"].numbers["cross-entropy"]["zero"]
    told = f"gradients of the float32 cross-entropy vanish at {zero} of"
    assert told in sure["gradient norms"].sentence
    assert "attacks on margins do not" in sure["gradient norms"].sentence
    left = f"leave {sure.gradient_accuracy:.1%} of the samples"
    assert sure.reasons[-1] == f"attacks on margins, which have gradients here, {left}"
    assert sure.flat_entropy
    assert not honest.flat_entropy


@pytest.mark.parametrize("seed", [1, 2**64 - 1, -3])
def test_honest_networks_in_l2_and_at_other_samples(seed: int) -> None:
    data = held_out(60, start=100)
    found = report(trained(mlp, 0.1), data=data, norm="l2", eps=0.5, seed=seed)
    assert found.verdict == "not masked", str(found)
    assert len(found.samples) == 32


def test_robustness_is_no_masking() -> None:
    """The robust network keeps what the plain one loses, and both are believed."""
    plain, robust = report(trained(mlp)), report(trained(mlp, 0.1))
    assert robust.accuracy > plain.accuracy + 0.2


def test_few_samples_leave_it_undecided() -> None:
    found = report(trained(mlp), data=held_out(12))
    assert found.verdict == "undecided"
    assert any("at least 16 are needed" in reason for reason in found.reasons)


def test_no_sample_is_right() -> None:
    x, y = held_out(20)
    with torch.no_grad():
        y = (trained(mlp)(x).argmax(1) + 1) % 10
    found = report(trained(mlp), data=(x, y))
    assert (found.verdict, found.surface, found.accuracy) == ("undecided", None, 0.0)
    assert found.gradient_accuracy is None
    assert "undecided" in str(found)


def test_without_the_library_of_square_it_is_undecided(monkeypatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "pyautoattack"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    found = report(trained(mlp))
    assert found["square"].suspicious is None
    assert found.verdict == "undecided"
    assert any(
        reason.startswith("square skipped: expected the library") for reason in found.reasons
    )
    assert report(Changed(trained(mlp), **MASKS["noise"])).verdict == "masked"


# The checks


def test_each_mask_shows_where_it_should() -> None:
    expected = {
        "round, 16": {"gradient norms", "square", "growing eps"},
        "round straight through, 255": {"slopes"},
        "logits x 1e3": {"gradient norms"},
        "noise": {"randomness"},
        "half cut": {"slopes"},
        "noise for a gradient": {"slopes", "square", "growing eps"},
        "detached": {"gradient norms"},
        "ripple": {"loss surface", "growing eps"},
    }
    for mask, names in expected.items():
        found = report(Changed(trained(mlp), **MASKS[mask]), queries=200)
        assert names <= suspicious(found), mask


def test_gradients_and_slopes_of_an_affine_network() -> None:
    """Closed form: the margin of two classes is affine, and its gradient the same everywhere."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 2).double()
    x = torch.rand(32, 16, dtype=torch.float64) * 0.5 + 0.25
    y = layer(x).argmax(1)
    w = (layer.weight[0] - layer.weight[1]).detach()
    sign = 1.0 - 2.0 * y
    found = report(layer, data=(x, y), eps=0.01, points=5)
    norms = found["gradient norms"].numbers["margin"]["quantiles"]
    assert norms == pytest.approx([float(w.norm())] * 5)
    assert found["slopes"].numbers["ratios"] == pytest.approx([1.0] * 5)
    assert found["slopes"].numbers["wrong"] == found["slopes"].numbers["wrong across"] == 0
    assert found["slopes"].numbers["judged across"] == 32
    margins = (layer(x)[:, 0] - layer(x)[:, 1]).detach() * sign
    surface = found.surface
    rows = surface.samples
    torch.testing.assert_close(surface.margins, margins[rows])
    rise = 0.01 * float(w.abs().sum())
    torch.testing.assert_close(surface.losses[:, 2, 2], -margins[rows])
    torch.testing.assert_close(surface.losses[:, 4, 2] - surface.losses[:, 2, 2],
                               torch.full((2,), rise, dtype=torch.float64))  # fmt: skip
    torch.testing.assert_close(surface.losses[:, 0, :] + surface.losses[:, 4, :].flip(1),
                               -2 * margins[rows, None].expand(2, 5))  # fmt: skip
    torch.testing.assert_close(surface.ray_losses, surface.ray_predicted)
    torch.testing.assert_close(surface.ray_losses[:, -1], rise - margins[rows])
    assert surface.losses.shape == (2, 5, 5)
    assert surface.offsets.tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    robust = margins > rise
    assert (margins - rise).abs().min() > 1e-6
    assert torch.equal(found.robust, robust)
    assert found.accuracy == found.gradient_accuracy == float(robust.double().mean())


def test_the_surface_across_is_orthogonal_in_l2() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 2).double()
    x = torch.rand(32, 16, dtype=torch.float64) * 0.5 + 0.25
    surface = report(layer, data=(x, layer(x).argmax(1)), norm="l2", eps=0.01).surface
    w = (layer.weight[0] - layer.weight[1]).detach()
    across = surface.losses[:, 2, :]
    torch.testing.assert_close(across, across[:, :1].expand_as(across))
    rise = surface.losses[:, 4, 0] - surface.losses[:, 2, 0]
    torch.testing.assert_close(rise, torch.full((2,), 0.01 * float(w.norm())).double())


def test_growing_radii_end_where_all_balls_meet() -> None:
    x, y = held_out(32)
    found = report(trained(mlp), data=(x, y))["growing eps"].numbers
    assert found["eps"][0] == 0.1
    assert found["eps"][-1] == pytest.approx(0.5)
    assert np.allclose(np.diff(np.log(found["eps"])), np.log(5) / 4)
    assert sorted(found["accuracy"], reverse=True) == found["accuracy"]
    assert found["stuck"] == 0
    blind = report(Changed(trained(mlp), **MASKS["round, 255"]))["growing eps"]
    assert blind.numbers["stuck"] >= 5
    assert blind.suspicious
    at_once = report(trained(mlp), data=(x, y), eps=0.6)["growing eps"].numbers
    assert at_once["eps"] == [0.6]


def test_inputs_without_bounds_meet_at_their_mean() -> None:
    x, y = held_out(32)
    model = Bounded(trained(mlp), bounds=None)
    found = flexure.masking_report(model, x, y, eps=0.1, seed=0, **QUICK)
    assert found.verdict == "undecided", str(found)
    assert found["square"].suspicious is None
    assert "finite bounds" in found["square"].sentence
    right = trained(mlp)(x).argmax(1) == y
    largest = float((x[right] - x[right].mean(0)).abs().max())
    assert found["growing eps"].numbers["eps"][-1] == pytest.approx(largest, rel=1e-5)


def test_transfer_finds_what_useless_gradients_leave() -> None:
    honest = trained(mlp)
    masked = Changed(copy.deepcopy(honest), before=NoiseForGradient.apply)
    found = report(masked, source=Bounded(honest))
    assert {"transfer", "transfer back"} <= suspicious(found)
    assert found["transfer back"].numbers["own"] > found["transfer back"].numbers["back"]
    back = report(honest, source=Bounded(masked))
    assert back["transfer"].suspicious is False
    silent = report(honest, source=Bounded(Changed(copy.deepcopy(honest), **MASKS["detached"])))
    assert silent["transfer"].suspicious is silent["transfer back"].suspicious is None
    assert silent.verdict == "not masked"


def test_targets_find_what_one_ascent_leaves() -> None:
    """Square finds it too: without targets this honest network would be called masked."""
    found = report(trained(affine, 0.1, 10), data=held_out(64), eps=0.15, samples=64, queries=300)
    targets = found["targets"].numbers
    assert targets["after"] < targets["before"]
    assert found.verdict == "not masked", str(found)


def test_noise_below_rounding_is_no_randomness() -> None:
    shaken = Changed(trained(mlp), after=lambda z: z + 1e-6 * torch.randn_like(z))
    assert report(shaken)["randomness"].suspicious is False
    few = Changed(trained(mlp), after=lambda z: z + 1e-2 * torch.randn_like(z))
    assert report(few)["randomness"].suspicious is True


def test_randomness_from_other_generators() -> None:
    def by_numpy(z: Tensor) -> Tensor:
        return z + torch.tensor(np.random.normal(size=z.shape), dtype=z.dtype)

    model = Changed(trained(mlp), after=by_numpy)
    with untouched(model):
        found = report(model)
    assert found["randomness"].suspicious is True
    assert found.to_dict() == report(model).to_dict()


# Evidence


@given(st.integers(0, 60), st.integers(1, 60), st.sampled_from([0.02, 0.05, 0.1, 0.25, 0.5]))
def test_exact_binomial_tests(count: int, total: int, share: float) -> None:
    """Against SciPy's test, and its Clopper–Pearson limit."""
    count = min(count, total)
    test = stats.binomtest(count, total, share, alternative="greater")
    assert exceeds(count, total, share) == (count > 0 and test.pvalue <= 1 - CONFIDENCE)
    if count and abs(test.pvalue - (1 - CONFIDENCE)) > 1e-9:
        low = test.proportion_ci(CONFIDENCE, method="exact").low
        assert exceeds(count, total, share) == (low > share)
    fewest = fewest_that_exceed(total, share)
    assert exceeds(count, total, share) == (count >= fewest)


def test_one_of_forty_is_no_evidence() -> None:
    assert not exceeds(1, 40, 0.02)
    assert fewest_that_exceed(40, 0.02) == 4
    assert not exceeds(0, 0, 0.02)
    assert not more_often(0, 0)
    assert not more_often(6, 0)
    assert more_often(7, 0)
    assert not more_often(20, 15)
    with pytest.raises(FlexureError, match="expected a count"):
        exceeds(3, 2, 0.1)


# What is given, and what comes back


def test_same_seed_same_report() -> None:
    source = Bounded(trained(convnet))
    one, two, other = (report(trained(mlp), seed=s, source=source) for s in (3, 3, 4))
    assert one.to_dict() == two.to_dict()
    assert one.to_dict() != other.to_dict()
    batched = report(trained(mlp), seed=3, source=source, batch_size=7)
    assert batched.verdict == one.verdict
    assert torch.equal(batched.robust, one.robust)


def test_at_most_so_many_samples() -> None:
    x, y = held_out(100)
    found = report(trained(mlp), data=(x, y), samples=20)
    assert len(found.samples) == len(found.robust) == 20
    assert torch.equal(found.samples, found.samples.unique())
    with torch.no_grad():
        right = (trained(mlp)(x).argmax(1) == y)[found.samples]
    assert found.surface.samples.tolist() == found.samples[right][:2].tolist()
    assert torch.equal(found.surface.labels, y[found.surface.samples])


def test_it_prints_a_table_and_its_reasons() -> None:
    found = report(trained(mlp))
    lines = str(found).splitlines()
    assert lines[0].startswith("linf, eps 0.1, 32 samples: clean accuracy ")
    assert lines[-3] == "verdict: not masked"
    assert all(any(line.startswith(check.name) for line in lines) for check in found.checks)
    with pytest.raises(KeyError):
        found["nothing"]
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert stored["verdict"] == "not masked"
    assert [check["name"] for check in stored["checks"]] == [c.name for c in found.checks]
    assert len(stored["surface"]["losses"]) == 2


def test_checks_are_told_as_they_are_made() -> None:
    told: list[tuple[str, int, int]] = []
    found = report(trained(mlp), progress=lambda *args: told.append(args))
    assert told == [("masking", k, 9) for k in range(10)]
    assert len(found.checks) == 9


def test_what_is_evidence_is_told_truly() -> None:
    found = report(trained(mlp))
    for name in ("square", "restarts", "steps", "targets"):
        right = round(found.clean_accuracy * len(found.robust))
        share = ALLOWED_BLIND if name == "square" else ALLOWED_EFFORT
        fewest = fewest_that_exceed(right, share)
        assert found[name].sentence.endswith(f"so, {fewest} or more of {right} are evidence")


def test_no_attack_runs_where_all_balls_meet_already(monkeypatch) -> None:
    x, y = held_out(32)
    subject = Subject(Bounded(trained(mlp)), x, y, "linf", 0.6, 0, 32)
    monkeypatch.setattr(Subject, "withstands", lambda *_: pytest.fail("an attack ran"))
    found = check_growth(subject, PGD("linf"), torch.zeros(32, dtype=torch.bool))
    assert found.numbers["eps"] == [0.6]


def test_a_source_that_is_steered_too() -> None:
    model = trained(mlp)
    for source in (Bounded(model), model):
        with pytest.raises(FlexureError, match=r"shares . modules.*copy\.deepcopy"):
            report(model, source=source)
    twin = copy.deepcopy(model)
    for own, given_ in zip(model.parameters(), twin.parameters(), strict=True):
        given_.data = own.data  # weights may be shared
    assert report(model, source=Bounded(twin))["transfer"].suspicious is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 0}, "eps above 0"),
        ({"eps": -1}, "expected eps"),
        ({"samples": 0}, "at least one of samples"),
        ({"norm": "l1"}, "expected norm"),
        ({"steps": 0}, "expected steps"),
        ({"restarts": 1.5}, "expected restarts"),
        ({"points": True}, "expected points"),
        ({"seed": "a"}, "expected seed"),
        ({"batch_size": 0}, "batch_size"),
        ({"data": (torch.rand(4, 1, 8, 8) * 255, torch.zeros(4).long())}, "within the bounds"),
        ({"data": (torch.rand(4, 1, 8, 8), torch.zeros(3).long())}, "labels"),
    ],
)
def test_what_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(FlexureError, match=message):
        report(trained(mlp), **settings)


# Real networks


def real(folder: Path, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    model = flexure.load_model(
        f"flexure:resnet20?weights={folder / 'resnet-cifar10' / 'resnet20.safetensors'}"
    ).model
    with np.load(folder / "cifar10-lossless" / "test846.npz") as file:
        images, labels = torch.tensor(file["images"][:count]), torch.tensor(file["labels"][:count])
    return model, images.permute(0, 3, 1, 2) / 255, labels


NORMALISED = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
REAL = {"eps": 1 / 255, "seed": 0, "samples": 24, "steps": 10, "restarts": 2, "queries": 100}
REAL |= {"points": 5}


@pytest.mark.slow
@pytest.mark.parametrize("dial", [None, (0.7, 0.5), (0.95, 0.5), (0.75, 0.0)])
def test_resnet_20_is_not_masked(real_data: Path, dial) -> None:
    model, x, y = real(real_data, 200)
    source = Bounded(copy.deepcopy(model), **NORMALISED)
    if dial is not None:
        mean, std = (torch.tensor(v)[:, None, None] for v in NORMALISED.values())
        inputs = (x[50:] - mean) / std
        flexure.steer(
            model, beta=dial[0], c=dial[1], example=inputs[:2], calibration=inputs.split(75)
        )
    found = flexure.masking_report(Bounded(model, **NORMALISED), x[:50], y[:50], source=source,
                                   **REAL)  # fmt: skip
    assert found.verdict == "not masked", str(found)
    assert suspicious(found) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "mask",
    [
        {"before": quantised(8)},
        {"before": quantised(255)},
        {"before": straight_through(quantised(8))},
        {"before": straight_through(quantised(255))},
        {"after": lambda z: 1e3 * z},
        {"before": lambda x: x + 0.02 * torch.randn_like(x)},
    ],
)
def test_masked_resnet_20(real_data: Path, mask: dict) -> None:
    model, x, y = real(real_data, 30)
    masked = Bounded(Changed(Bounded(model, **NORMALISED), **mask))
    assert flexure.masking_report(masked, x, y, **REAL).verdict == "masked"
