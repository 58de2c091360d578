"""Resumed evaluations: to the bit those that were not interrupted, and nothing is done twice."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flexure.attacks import PGD, Bounded, robust_accuracy
from flexure.contracts import FlexureError
from tests.attacks import evaluations
from tests.attacks.evaluations import (
    LIBRARY,
    STOP,
    Draws,
    Interrupted,
    Moves,
    Noisy,
    evaluated,
    network,
    samples,
    without_seconds,
)

ATTACKS = [Moves(1), Draws(), Moves(2), PGD("linf", steps=2)]


@pytest.fixture(autouse=True)
def _counted():
    STOP.clear()
    evaluations.SIZES.clear()
    yield
    STOP.clear()


def interrupt(folder: Path, after: int, model: nn.Module, **settings) -> None:
    STOP["after"] = after
    with pytest.raises(Interrupted):
        evaluated(model, resume=folder, **settings)
    STOP.clear()
    evaluations.SIZES.clear()


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("model", [network, Noisy])
def test_interrupted_and_resumed_is_as_if_undisturbed(tmp_path, model, every: bool) -> None:
    settings = {"attack": ATTACKS, "every": every}
    expected = without_seconds(evaluated(model(), **settings))
    sizes, total = list(evaluations.SIZES), len(evaluations.SIZES)
    assert total > 5
    for after in (0, 1, 4, total - 1):
        folder = tmp_path / f"{after}"
        interrupt(folder, after, model(), **settings)
        torch.rand(after)
        assert without_seconds(evaluated(model(), resume=folder, **settings)) == expected
        assert sizes[after:] == evaluations.SIZES
    evaluations.SIZES.clear()
    again = evaluated(model(), resume=folder, **settings)
    assert without_seconds(again) == expected
    assert evaluations.SIZES == []
    assert again.attacks[0].seconds > 0  # those that it took


def test_attacks_of_another_library_resume(tmp_path) -> None:
    settings = {"attack": LIBRARY, "eps": 0.03}
    expected, done = evaluated(**settings), []
    stages = dict.fromkeys(expected.names)

    def stop(stage: str, batch: int, total: int) -> None:
        done.append(stage)
        if stage in stages and batch == min(2, total):
            stages.pop(stage)
            raise Interrupted

    for _ in expected.names:
        with pytest.raises(Interrupted):
            evaluated(resume=tmp_path, progress=stop, **settings)
        torch.rand(3)
    found = evaluated(resume=tmp_path, progress=stop, **settings)
    assert without_seconds(found) == without_seconds(expected)
    assert found.attacks[0].attacked > found.attacks[0].found > 0


def test_attacks_can_be_added_and_the_order_counts(tmp_path) -> None:
    evaluated(attack=[Moves(1)], resume=tmp_path)
    first = len(evaluations.SIZES)
    evaluations.SIZES.clear()
    more = evaluated(attack=[Moves(1), Moves(2)], resume=tmp_path)
    assert len(evaluations.SIZES) == -(-more.attacks[1].attacked // 7) < first
    evaluations.SIZES.clear()
    other = evaluated(attack=[Moves(2), Moves(1)], resume=tmp_path)
    assert without_seconds(other) == without_seconds(evaluated(attack=[Moves(2), Moves(1)]))
    evaluations.SIZES.clear()
    evaluated(attack=[Moves(1), Moves(2)], every=True, resume=tmp_path)
    assert len(evaluations.SIZES) == 2 * first
    evaluations.SIZES.clear()
    one = evaluated(attack=PGD("linf", steps=2), resume=tmp_path)
    two = evaluated(attack=PGD("linf", steps=3), resume=tmp_path)
    assert not torch.equal(one.x_adv, two.x_adv)


def test_what_came_before_an_attack_counts_though_none_was_beaten(tmp_path) -> None:
    """The attack's place is another, and with it its draws."""
    for attack in ([PGD("linf", steps=1)], [Still(), PGD("linf", steps=1)]):
        expected = without_seconds(evaluated(attack=attack))
        assert without_seconds(evaluated(attack=attack, resume=tmp_path)) == expected


@dataclass(frozen=True)
class Still:
    norm: str = "linf"

    def run(self, model, x, y, *, eps, generator):
        return x


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def scrambled(path: Path) -> None:
    """Inputs outside the ball, which the file's format does not tell."""
    data = bytearray(path.read_bytes())
    for start in range(len(data) - 7 * 40, len(data), 4):
        data[start : start + 4] = b"\x00\x00\x80\x3f"
    path.write_bytes(bytes(data))


def flags_zeroed(path: Path) -> None:
    """All samples beaten, and nothing else changed."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:start])["right"]["data_offsets"]
    assert any(data[start + begin : start + end])
    data[start + begin : start + end] = bytes(end - begin)
    path.write_bytes(bytes(data))


def of_another_batch(path: Path) -> None:
    path.write_bytes(sorted(path.parent.glob("Moves-*.safetensors"))[0].read_bytes())


@pytest.mark.parametrize("damage", [damaged, emptied, scrambled, flags_zeroed, of_another_batch])
def test_a_damaged_file_counts_as_none(tmp_path, damage) -> None:
    expected = without_seconds(evaluated(attack=ATTACKS, resume=tmp_path))
    path = sorted(tmp_path.glob("Moves-*.safetensors"))[2]
    evaluations.SIZES.clear()
    damage(path)
    assert without_seconds(evaluated(attack=ATTACKS, resume=tmp_path)) == expected
    assert len(evaluations.SIZES) == 1
    for path in tmp_path.glob("*.safetensors"):
        emptied(path)
    assert without_seconds(evaluated(attack=ATTACKS, resume=tmp_path)) == expected


def test_a_file_of_other_samples_counts_as_none(tmp_path) -> None:
    """Though its inputs are within the ball, which holds all."""
    given = {"attack": Draws(), "eps": 3.0}
    expected = without_seconds(evaluated(resume=tmp_path, **given))
    first, second, *_ = sorted(tmp_path.glob("Draws-*.safetensors"))
    second.write_bytes(first.read_bytes())
    assert without_seconds(evaluated(resume=tmp_path, **given)) == expected


def test_rounding_does_not_change_which_samples_are_attacked(tmp_path) -> None:
    class Shifted(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, x):
            return x[:, :3] - self.by * torch.eye(3)[0]

    x, y = samples()
    x[0, :3] = torch.tensor([0.5, 0.5, 0.1])
    given = {"attack": Moves(1), "eps": 0.01, "seed": 0, "resume": tmp_path}
    found = [robust_accuracy(Bounded(Shifted(by)), x, y * 0, **given) for by in (0, 1e-6)]
    assert bool(found[0].clean[0])
    assert without_seconds(found[0]) == without_seconds(found[1])


def test_other_work_is_refused(tmp_path) -> None:
    (x, y), attack = samples(), Moves(1)
    given = {"attack": attack, "eps": 0.1, "seed": 3, "batch_size": 7}
    robust_accuracy(Bounded(network()), x, y, resume=tmp_path, **given)
    other = network()
    with torch.no_grad():
        other[0].weight[0, 0] += 1e-3
    moved = x.clone()
    moved[3, 3] = 0.5
    for model, inputs, labels, settings, word in (
        (other, x, y, {}, "model"),
        (nn.Sequential(network()), x, y, {}, "model"),
        (network(), moved, y, {}, "inputs"),
        (network(), x[:39], y[:39], {}, "inputs, labels"),
        (network(), x, y.roll(1), {}, "labels"),
        (network(), x, y, {"eps": 0.2}, r"eps \(0.1 there, 0.2 here\)"),
        (network(), x, y, {"seed": 4}, "seed"),
        (network(), x, y, {"batch_size": 8}, "batch size"),
        (network(), x, y, {"attack": Moves(1, norm="l2")}, "norm"),
    ):
        with pytest.raises(FlexureError, match=f"of this evaluation, got .* another {word}"):
            robust_accuracy(Bounded(model), inputs, labels, resume=tmp_path, **(given | settings))
    with pytest.raises(FlexureError, match="another model, bounds"):
        robust_accuracy(Bounded(network(), bounds=(0, 2)), x, y, resume=tmp_path, **given)


def test_what_weights_do_not_show_is_told_by_the_scores(tmp_path) -> None:
    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.inner, self.factor = network(), factor

        def forward(self, x):
            return self.inner(x) * self.factor

    evaluated(Scaled(1.0), resume=tmp_path)
    evaluated(Scaled(1.0 + 1e-6), resume=tmp_path)  # no more than rounding
    with pytest.raises(FlexureError, match="one of the same weights with other logits"):
        evaluated(Scaled(1.01), resume=tmp_path)


def test_models_that_differ_only_away_from_the_inputs_are_told_apart(tmp_path) -> None:
    class Rounded(nn.Module):
        def __init__(self, rounded: bool) -> None:
            super().__init__()
            self.inner, self.rounded = network(), rounded

        def forward(self, x):
            return self.inner((x * 255).round() / 255 if self.rounded else x)

    x, y = samples()
    x = (x * 255).round() / 255
    given = {"attack": PGD("linf", steps=2), "eps": 0.1, "seed": 0, "resume": tmp_path}
    found = [robust_accuracy(Bounded(Rounded(True)), x, y, **given) for _ in range(2)]
    assert without_seconds(found[0]) == without_seconds(found[1])
    with pytest.raises(FlexureError, match="other logits, at the inputs or near them"):
        robust_accuracy(Bounded(Rounded(False)), x, y, **given)


def test_one_large_sample_does_not_cover_the_others(tmp_path) -> None:
    class Shifted(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, x):
            return torch.stack([0 * x[:, 0], x[:, 1] - self.by + 1e4 * (x[:, 2] > 0.99)], 1)

    x, y = samples()
    x[:, 2] *= 0.5
    x[0, 2] = 1.0
    given = {"attack": Moves(1), "eps": 0.01, "seed": 0, "resume": tmp_path}
    robust_accuracy(Bounded(Shifted(0.5)), x, y % 2, **given)
    with pytest.raises(FlexureError, match="other logits"):
        robust_accuracy(Bounded(Shifted(0.6)), x, y % 2, **given)


@pytest.mark.parametrize("held", ["attribute", "buffer"])
def test_models_that_count_their_calls_resume_as_if_undisturbed(tmp_path, held: str) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = network(), 0
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.calls += held == "attribute"
            self.count += held == "buffer"
            drawn = torch.Generator().manual_seed(self.calls + int(self.count))
            return self.inner(x + 0.1 * torch.randn(x.shape[1:], generator=drawn))

    settings = {"attack": [Moves(1), PGD("linf", steps=2)]}
    expected = without_seconds(evaluated(Counting(), **settings))
    interrupt(tmp_path, 3, Counting(), **settings)
    assert without_seconds(evaluated(Counting(), resume=tmp_path, **settings)) == expected


@dataclass(frozen=True)
class Holds:
    """Moves samples by what its field says."""

    field: object
    norm: str = "linf"

    def run(self, model, x, y, *, eps, generator):
        return x + eps * (self.field(1.0) if callable(self.field) else float(self.field.sum()))


def test_functions_and_arrays_of_attacks_are_told_apart(tmp_path) -> None:
    array = np.zeros(2000)
    array[700] = 1.0
    pairs = [(lambda x: x, lambda x: -x), (np.zeros(2000), array)]
    for place, pair in enumerate(pairs):
        found = [evaluated(attack=Holds(each), resume=tmp_path / f"{place}") for each in pair]
        assert not torch.equal(found[0].x_adv, found[1].x_adv)


def test_attacks_of_unknown_settings_are_not_resumed(tmp_path) -> None:
    class Bare:
        norm = "linf"

        def run(self, model, x, y, *, eps, generator):
            return x

    assert evaluated(attack=Bare()).names == ("Bare",)
    with pytest.raises(FlexureError, match=r"attacks that are dataclasses .* make Bare a frozen"):
        evaluated(attack=Bare(), resume=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FlexureError, match="expected a folder that can be written"):
        evaluated(resume=tmp_path / "file")


def test_attacks_that_hold_models_are_told_apart_by_their_weights(tmp_path) -> None:
    @dataclass(frozen=True)
    class Transferred:
        source: nn.Module
        norm: str = "linf"

        def run(self, model, x, y, *, eps, generator):
            return PGD("linf", steps=2).run(self.source, x, y, eps=eps, generator=generator)

    other = network()
    with torch.no_grad():
        other[0].weight.neg_()
    found = [evaluated(attack=Transferred(m), resume=tmp_path) for m in (network(), other)]
    assert not torch.equal(found[0].x_adv, found[1].x_adv)
    assert len(list(tmp_path.glob("Transferred-*"))) == 10
