"""The settings that a comparison tries: as many for every arm, the preferred ones first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flexure.contracts import FlexureError
from flexure.methods.arms import ARMS, RATE_FACTORS, arms_of
from flexure.methods.lora import LoRA
from flexure.methods.tune_result import ArmResult, Candidate, _end_of_sweep

MANY = (1.0, 0.3, 3.0, 10.0, 0.1, 30.0, 0.03, 100.0, 0.01, 300.0, 0.001, 1000.0)


def methods(name: str, count: int) -> list[Any]:
    (_, arm) = arms_of([name], MANY[:count])
    return [trial.method for trial in arm.trials]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 12])
def test_every_arm_with_a_choice_gets_as_many_trials_as_there_are_factors(count: int) -> None:
    found = {arm.name: len(arm.trials) for arm in arms_of(None, MANY[:count])}
    assert found.pop("probe") == 1  # it has nothing to choose
    assert found == dict.fromkeys(found, count)
    assert len(found) == 4


def test_the_default_search() -> None:
    count = len(RATE_FACTORS)
    assert [method.beta for method in methods("steered", count)] == [1.0, 0.95, 0.9, 0.8]
    pairs = [(m.init_beta, m.learning_rate) for m in methods("trainable_ct", count)]
    assert pairs == [(0.8, 0.02), (0.8, 0.06), (0.5, 0.02), (0.5, 0.06)]


def test_both_starts_are_tried_before_another_rate() -> None:
    pairs = [(m.init_beta, m.learning_rate) for m in methods("trainable_ct", 2)]
    assert pairs == [(0.8, 0.02), (0.5, 0.02)]
    pairs = [(m.init_beta, m.learning_rate) for m in methods("trainable_ct", 5)]
    assert pairs == [(0.8, 0.02), (0.8, 0.06), (0.8, 0.006), (0.5, 0.02), (0.5, 0.06)]


def test_more_factors_than_settings_are_refused() -> None:
    many = tuple(float(k + 1) for k in range(13))
    with pytest.raises(FlexureError, match=r"at most 12 rate factors with the arm 'steered'.*13"):
        arms_of(["steered"], many)
    assert len(arms_of(["lora"], many)[1].trials) == 13


def test_known_arms_beside_ones_own() -> None:
    found = arms_of({**ARMS, "mine": [LoRA(rank=2), LoRA(rank=3), LoRA(rank=4)]}, (1.0, 3.0))
    assert [len(arm.trials) for arm in found] == [1, 2, 2, 2, 2, 3]


@pytest.mark.parametrize(
    ("asked", "factor"),
    [
        ("lora", 1e300), ("full", 1e308), ("lora", 1e-323), ("full", 1e35),
        ({"mine": [LoRA(learning_rate=1e31)]}, 1.0),
    ],
)  # fmt: skip
def test_rates_that_no_optimizer_takes_are_refused(asked: Any, factor: float) -> None:
    with pytest.raises(FlexureError, match=r"at most 1e\+30, got .*give other rate factors"):
        arms_of(asked if isinstance(asked, dict) else [asked], (factor,))


def chosen(name: str, setting: int) -> list[str]:
    """What is told of the end of the default sweep when that setting is chosen."""
    (_, arm) = arms_of([name], RATE_FACTORS)
    tried = tuple(Candidate(t.label, 0.5, t.rate, None, t.beta) for t in arm.trials)
    given: dict[str, Any] = {"runs": (), "accuracy": None, "accuracies": (), "difference": None}
    result = ArmResult(name, {}, tried[setting].setting, tried, **given)
    alone = replace(result, candidates=tried[setting : setting + 1])
    assert _end_of_sweep(alone) == []  # no sweep, no end
    return _end_of_sweep(result)


def test_the_end_of_any_sweep_is_told() -> None:
    for largest in (1, 3):  # either start
        assert chosen("trainable_ct", largest) == [
            "trainable_ct: the chosen learning rate is the largest of the sweep; widen it"
        ]
    (told,) = chosen("lora", 1)
    assert told == "lora: the chosen learning rate is the smallest of the sweep; widen it"
    assert chosen("lora", 0) == []
    (told,) = chosen("steered", 3)
    assert told == "steered: the chosen beta is the smallest of the sweep; widen it"
    assert chosen("steered", 0) == chosen("steered", 2) == []
