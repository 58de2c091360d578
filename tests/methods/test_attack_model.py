"""Attacking a model radius after radius: monotone, paired, resumed, and the same as the harness."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexure.attacks import PGD, Bounded, robust_accuracy
from flexure.attacks.norms import norm_named
from flexure.contracts import DataError, FlexureError
from flexure.methods.attack_model import RADII, _beaten_beyond, attack_model
from flexure.methods.attack_model_result import WORST, AttackReport, radius_text
from flexure.methods.attack_model_shares import paired_share, share
from flexure.record import to_json
from tests.report.attack_results import attacked as attacked_model
from tests.report.attack_results import examples, masking

EPS = {"linf": (0.02, 0.05, 0.1), "l2": (0.1, 0.3)}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)]
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        model[1].bias -= model[1].weight.sum(1) / 2  # grey is nowhere special
        model[3].bias.zero_()
    return model


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """40 samples, four of them misclassified."""
    x = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    y = network()(x).argmax(1)
    y[:4] = (y[:4] + 1) % 4
    return x, y


def attacked(data: Any, model: nn.Module | None = None, **more: Any) -> Any:
    settings: dict[str, Any] = {"attacks": ["pgd"], "eps": EPS, "seed": 3, **more}
    return attack_model(model or network(), data, **settings)


def test_the_first_radius_is_the_harness_itself(data) -> None:
    found = attacked(data)
    x, y = data
    for norm, radii in EPS.items():
        one = robust_accuracy(
            Bounded(network()), *data, attack="pgd", norm=norm, eps=radii[0], seed=3
        )
        assert torch.equal(found.models[0].clean, one.clean)
        # The survivors are the same samples in the same order, numbered without those that fail.
        right = one.clean.nonzero().flatten()
        among = robust_accuracy(
            Bounded(network()), x[right], y[right], attack="pgd", norm=norm, eps=radii[0], seed=3
        )
        assert found.models[0].found(norm, radii[0]).robust[right].equal(among.robust)
    assert found.clean.value == 0.9
    assert found.clean.hits == 36


def test_accuracy_never_increases_with_eps_and_only_survivors_are_attacked(data) -> None:
    found = attacked(data, attacks=["pgd", PGD("linf", steps=3), PGD("l2", steps=3)])
    (model,) = found.models
    for norm in EPS:
        before = model.clean
        for at in [at for at in model.at if at.norm == norm]:
            assert at.carried == int((model.clean & ~before).sum())
            left = before
            for stage in at.stages:
                assert torch.equal(stage.tried, left)
                assert torch.equal(stage.robust, left & ~stage.beaten)
                assert stage.alone is None
                left = stage.robust
            assert torch.equal(at.robust, left)
            before = left
    assert before.sum() < model.clean.sum()  # something was found
    for curve in found.curves:
        values = [one.value for one in curve.accuracy]
        assert values == sorted(values, reverse=True)
        assert curve.eps == (0.0, *EPS[curve.norm])


def test_every_tells_the_accuracy_under_each_attack_alone(data) -> None:
    weak = PGD("linf", steps=1, step_size=0.2)
    given = {"attacks": ["pgd", weak], "eps": {"linf": EPS["linf"]}}
    found, quick = attacked(data, every=True, **given), attacked(data, **given)
    model = found.models[0]
    beaten = torch.zeros(40, dtype=torch.bool)
    for at in model.at:
        strong, other = at.stages
        assert torch.equal(other.tried, model.clean)
        beaten = beaten | other.beaten
        assert torch.equal(other.alone, model.clean & ~beaten)
        assert torch.equal(at.robust, strong.alone & other.alone)
    assert int(model.at[-1].stages[1].alone.sum()) > int(model.at[-1].robust.sum())
    assert "alone" in found.rows()[1]
    assert "alone" not in quick.rows()[1]
    accuracy = [at.accuracy.value for at in quick.models[0].at]
    assert [at.accuracy.value for at in model.at] == pytest.approx(accuracy, abs=0.1)


def test_examples_beat_the_model_within_their_radius(data) -> None:
    found = attacked(data, keep=5)
    kept, model = found.examples, Bounded(network())
    assert [kept.norms.count(norm) for norm in EPS] == [5, 5]
    assert torch.equal(kept.before, kept.labels)
    assert torch.equal(model(kept.x_adv).argmax(1), kept.after)
    assert bool((kept.after != kept.labels).all())
    x, y = data
    assert torch.equal(kept.x, x[kept.positions])
    assert torch.equal(kept.labels, y[kept.positions])
    for row, (norm, eps, by) in enumerate(zip(kept.norms, kept.radii, kept.attacks, strict=True)):
        change = kept.x_adv[row : row + 1].double() - kept.x[row : row + 1].double()
        assert float(norm_named(norm).size(change)) <= eps * (1 + 1e-4)
        at = found.models[0].found(norm, eps)
        assert bool(at.stage(by).beaten[kept.positions[row]])
        smaller = [each for each in EPS[norm] if each < eps]
        assert all(
            bool(found.models[0].found(norm, each).robust[kept.positions[row]]) for each in smaller
        )
    assert bool((kept.x_adv >= 0).all())
    assert bool((kept.x_adv <= 1).all())
    assert len(attacked(data, keep=0).examples) == 0


def test_a_reference_is_compared_sample_by_sample(data) -> None:
    found = attacked(data, reference=network(5), names=("one", "other"))
    first, second = found.models
    assert (first.name, second.name) == ("one", "other")
    alone = attacked(data, model=network(5)).models[0]
    for mine, own in zip(second.at, alone.at, strict=True):
        assert torch.equal(mine.robust, own.robust)
    at = found.difference("linf", EPS["linf"][0])
    one, other = (model.found("linf", EPS["linf"][0]).robust for model in found.models)
    assert at.won == int((one & ~other).sum())
    assert at.lost == int((other & ~one).sum())
    assert at.value == pytest.approx(float(one.double().mean() - other.double().mean()))
    assert at.low < at.value < at.high
    assert found.difference().value == pytest.approx(
        found.clean.value - second.clean_accuracy.value
    )
    assert attacked(data).difference() is None
    text = str(found)
    assert "difference" in text.splitlines()[1]
    assert json.loads(json.dumps(to_json(found)))["differences"]["clean"]["won"] >= 0


def test_normalisation_moves_inside(data) -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * 0.25 + 0.5)

    inside = attacked(data, model=Normalised(), mean=(0.5,), std=(0.25,))
    for mine, own in zip(inside.models[0].at, attacked(data).models[0].at, strict=True):
        assert torch.equal(mine.robust, own.robust)
    given = Bounded(Normalised(), mean=(0.5,), std=(0.25,), bounds=(0.0, 1.0))
    assert attacked(data, model=given).settings["mean"].tolist() == [0.5]


def test_the_published_protocol_stands_beside(data) -> None:
    given = Bounded(network(), mean=(0.5,), std=(0.25,))
    x, _ = data
    y = given(x).argmax(1)
    found = attacked((x, y), model=given, protocol=("standard", "published"))
    plain = attacked((x, y), model=given)
    standard = [at for at in found.models[0].at if at.protocol == "standard"]
    for mine, own in zip(standard, plain.models[0].at, strict=True):
        assert torch.equal(mine.robust, own.robust)
        assert mine.reached is None
    published = [at for at in found.models[0].at if at.protocol == "published"]
    assert [(at.norm, at.eps) for at in published] == [(at.norm, at.eps) for at in standard]
    for at in published:
        assert at.reached[0] > 2 * at.eps
        (stage,) = at.stages
        assert torch.equal(stage.tried, found.models[0].clean)  # nothing is carried over
        one = robust_accuracy(
            given, x, y, attack="pgd", norm=at.norm, eps=at.eps, seed=3, protocol="published"
        )
        assert torch.equal(at.robust, one.robust)
    assert "not an l_p robustness" in str(found)
    assert not any(norm == "published" for norm in found.examples.norms)


def test_batches_are_the_same_as_one_pair(data) -> None:
    x, y = data
    pieces = [(x[:7], y[:7]), (x[7:30], y[7:30]), (x[30:], y[30:])]
    for mine, own in zip(attacked(pieces).models[0].at, attacked(data).models[0].at, strict=True):
        assert torch.equal(mine.robust, own.robust)


def test_the_model_is_left_alone(data) -> None:
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    attacked(data, model=model, masking=True, certify=True, eps={"linf": (0.05,)})
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Stops(Exception):
    pass


def test_interrupted_and_resumed_is_uninterrupted(data, tmp_path: Path) -> None:
    calls = []

    def stop(stage: str, done: int, total: int) -> None:
        calls.append(stage)
        if len(calls) == 9:
            raise Stops

    settings: dict[str, Any] = {"batch_size": 16, "attacks": ["pgd", PGD("linf", steps=2)]}
    settings |= {"eps": {"linf": EPS["linf"]}, "reference": network(5)}
    with pytest.raises(Stops):
        attacked(data, resume=tmp_path, progress=stop, **settings)
    parts = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert parts
    resumed, whole = attacked(data, resume=tmp_path, **settings), attacked(data, **settings)
    assert all(path.stat().st_mtime_ns == time for path, time in parts.items())
    for one, other in zip(resumed.models, whole.models, strict=True):
        for mine, own in zip(one.at, other.at, strict=True):
            assert torch.equal(mine.robust, own.robust)
            for stage, expected in zip(mine.stages, own.stages, strict=True):
                assert stage.name == expected.name
                assert torch.equal(stage.beaten, expected.beaten)
    assert torch.equal(resumed.examples.x_adv, whole.examples.x_adv)


def test_nothing_left_to_attack(data) -> None:
    x, _ = data
    wrong = attacked((x, (network()(x).argmax(1) + 1) % 4))
    assert wrong.clean.hits == 0
    assert all(at.stages == () and at.accuracy.hits == 0 for at in wrong.models[0].at)
    assert len(wrong.examples) == 0
    assert WORST in str(wrong)
    found = attacked(data, eps={"linf": (1.0, 2.0)})
    assert found.accuracy("linf", 1.0).hits == 0
    assert found.models[0].found("linf", 2.0).carried == 36
    assert [one.value for one in found.curves[0].accuracy] == [0.9, 0.0, 0.0]
    with pytest.raises(KeyError):
        found.accuracy("linf", 0.5)


def test_a_random_network_does_not_gain_from_chance(data) -> None:
    class Coin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 0.3 * torch.randn(len(x), 4)

    (model,) = attacked(data, model=Coin(), eps={"linf": (1e-4, 2e-4, 0.05)}).models
    for smaller, larger in zip(model.at, model.at[1:], strict=False):
        assert not bool((larger.robust & ~smaller.robust).any())


def test_masking_and_certificates_are_told(data) -> None:
    found = attacked(data, masking=True, certify=True, reference=network(5))
    half = found.clean.value / 2
    shares = {(at.norm, at.eps): abs(at.accuracy.value - half) for at in found.models[0].at}
    assert (found.masking.norm, found.masking.eps) == min(shares, key=shares.__getitem__)
    assert found.masking.verdict in str(found)
    assert [one.eps for one in found.certified] == list(EPS["l2"])
    for one in found.certified:
        at = found.models[0].found("l2", one.eps)
        certified = found.certificates.certified(one.eps)
        assert not bool((certified & ~at.robust).any())
        assert one.accuracy.hits == int(certified.sum())
    usual = attacked(data, certify=True, eps={"linf": (0.05,)})
    assert [one.eps for one in usual.certified] == list(RADII["l2"])
    assert "Certified accuracy" in str(usual)


def test_warnings_become_notes(data, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*args: Any, **more: Any) -> Any:
        found = robust_accuracy(*args, **more)
        return replace(found, warnings=(("the loss is flat",),) * len(found.names))

    monkeypatch.setattr("flexure.methods.attack_model_bench.robust_accuracy", told)
    assert "model: pgd: the loss is flat" in attacked(data).notes


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"attacks": []}, "expected a list of attacks"),
        ({"attacks": "pgd"}, "expected a list of attacks"),
        ({"attacks": ["nothing"]}, "expected attacks among"),
        ({"attacks": [PGD("l2")], "eps": {"linf": (0.1,)}}, "expected an attack in linf"),
        ({"attacks": ["pgd", PGD("l2")], "eps": {"linf": (0.1,)}}, "none in l2"),
        ({"eps": {}}, "expected eps by norm"),
        ({"eps": (0.1,)}, "expected eps by norm"),
        ({"eps": {"l1": (0.1,)}}, "expected norm to be one of"),
        ({"eps": {"linf": ()}}, "expected radii for linf"),
        ({"eps": {"linf": (0.0, 0.1)}}, "expected radii above 0"),
        ({"eps": {"linf": (-0.1,)}}, "expected eps to be a finite radius"),
        ({"keep": -1}, "expected keep"),
        ({"seed": 1.5}, "expected seed"),
        ({"batch_size": 0}, "expected batch_size"),
        ({"protocol": "best"}, "expected protocol"),
        ({"names": ("a", "a")}, "two different names"),
    ],
)
def test_what_is_refused(data, more: dict[str, Any], message: str) -> None:
    with pytest.raises(FlexureError, match=message):
        attacked(data, **more)


def test_data_that_are_refused(data) -> None:
    x, y = data
    with pytest.raises(DataError, match="tensors of one shape"):
        attacked([(x, y), (x[:, :, :2], y)])
    with pytest.raises(DataError, match="expected attacked samples, got none"):
        attacked([])
    with pytest.raises(FlexureError, match="within the bounds"):
        attacked((x * 3, y))


@pytest.mark.parametrize(
    ("eps", "norm", "text"),
    [(1 / 255, "linf", "1/255"), (0.5 / 255, "linf", "0.5/255"), (0.25, "l2", "0.25"),
     (0.0, "linf", "0"), (0.0123456, "linf", "0.01235")],
)  # fmt: skip
def test_radii_are_written_as_people_do(eps: float, norm: str, text: str) -> None:
    assert radius_text(eps, norm) == text


def test_shares() -> None:
    hits = torch.tensor([True] * 30 + [False] * 10)
    one = share(hits)
    # Wilson's interval by its definition: the p at which |p - 3/4| is 1.96 standard errors.
    for end in (one.low, one.high):
        z = abs(end - 0.75) / math.sqrt(end * (1 - end) / 40)
        assert z == pytest.approx(1.959964, abs=1e-5)
    assert str(one) == "75.0 [59.8, 85.8]"
    same = paired_share(hits, hits)
    assert (same.value, same.won, same.lost, same.certain) == (0.0, 0, 0, False)
    assert same.low < 0 < same.high
    better = paired_share(hits, torch.zeros(40, dtype=torch.bool))
    assert better.certain
    assert math.isnan(paired_share(hits[:1], hits[:1]).low)
    assert math.isnan(share(hits[:0]).value)


def test_what_the_search_for_masking_beats_is_told_at_its_radius_and_larger() -> None:
    judged, model = replace(masking(), samples=torch.arange(36, 100)), attacked_model()
    told = list(_beaten_beyond(judged, model))
    assert told
    for at in model.at:
        alive = at.robust.clone()
        alive[judged.samples[~judged.robust]] = False
        lower = at.eps >= judged.eps and int(alive.sum()) < int(at.robust.sum())
        (line,) = [t for t in told if f", {radius_text(at.eps, 'linf')} in" in t] or [None]
        assert (line is not None) == lower
        assert line is None or f"at most {share(alive)} %, not {at.accuracy} %" in line
    assert list(_beaten_beyond(None, model)) == []
    whole = AttackReport((model,), examples(0), masking=judged, notes=tuple(told))
    assert "Gradient masking of steered: linf" in str(whole)
    assert whole.to_dict()["masking"]["model"] == "steered"
