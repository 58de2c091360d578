"""What an evaluation found, attack by attack: counts, costs, warnings, tables, parts."""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from dataclasses import dataclass, replace

import pytest
import torch

import flexure
from flexure.attacks import AttackResult, Robustness
from flexure.attacks.robustness import distinct
from flexure.attacks.warned import warned
from flexure.contracts import FlexureError
from tests.attacks.evaluations import Moves, evaluated


def made() -> Robustness:
    """Five samples, one of them wrong without an attack, under two attacks."""
    return Robustness(
        converged=torch.ones(5, dtype=torch.bool),
        clean=torch.tensor([1, 1, 1, 1, 0]).bool(),
        robust=torch.tensor([0, 0, 1, 1, 0]).bool(),
        x_adv=torch.arange(10.0).view(5, 2),
        distance=torch.zeros(5).double(),
        tried_by=torch.tensor([[1, 0], [1, 1], [1, 1], [1, 1], [0, 0]]).bool(),
        beaten_by=torch.tensor([[1, 0], [0, 1], [0, 0], [0, 0], [0, 0]]).bool(),
        seconds_by=torch.tensor([[1, 0], [1, 2], [1, 2], [1, 2], [0, 0]]).double(),
        norm="l2",
        eps=0.5,
        names=("first", "second"),
        warnings=((), ("3 zero gradients",)),
    )


def test_attacks_are_counted() -> None:
    first, second = made().attacks
    assert (first.attacked, first.found, first.accuracy) == (4, 1, 3 / 5)
    assert (second.attacked, second.found, second.accuracy) == (3, 1, 2 / 5)
    assert first.accuracy_alone == 3 / 5
    assert second.accuracy_alone is None
    assert first.robust.tolist() == [False, True, True, True, False]
    assert second.robust.tolist() == made().robust.tolist()
    assert made().robust_by.int().tolist() == [[0, 0], [1, 0], [1, 1], [1, 1], [0, 0]]
    assert (first.seconds, first.seconds_per_sample) == (4.0, 1.0)
    assert (second.seconds_per_sample, second.seconds_per_survivor) == (2.0, 3.0)
    none = made().taken(slice(4, 5)).attacks[0]
    assert math.isnan(none.seconds_per_sample)
    assert math.isnan(made().taken(slice(0, 1)).attacks[0].seconds_per_survivor)


def test_the_table() -> None:
    lines = str(made()).splitlines()
    assert lines[0] == ("clean accuracy 80.0%, robust accuracy 40.0% (l2, eps 0.5, 5 samples)")
    assert [line.split() for line in lines[2:4]] == [
        ["first", "4", "1", "60.0%", "60.0%", "1", "1.33"],
        ["second", "3", "1", "40.0%", "2", "3"],
    ]
    assert lines[1].split("  ")[0] == "attack"
    assert lines[4:] == ["warning of second: 3 zero gradients"]
    assert all(len(line) <= 100 for line in lines)


def test_numbers_as_json() -> None:
    told = json.loads(json.dumps(made().to_dict()))
    assert (told["norm"], told["eps"], told["samples"]) == ("l2", 0.5, 5)
    assert (told["clean_accuracy"], told["accuracy"]) == (0.8, 0.4)
    second = told["attacks"][1]
    assert (second["tried"], second["beaten"], second["accuracy"]) == (3, 1, 0.4)
    assert second["warnings"] == ["3 zero gradients"]


def test_parts_are_joined_with_the_warnings_of_all() -> None:
    whole = made()
    parts = [whole.taken(slice(0, 2)), whole.taken(slice(2, 5))]
    parts[1] = replace(parts[1], warnings=(("new",), ("7 zero gradients",)))
    joined = Robustness.joined(parts)
    assert joined.warnings == (("new",), ("7 zero gradients",))
    for name, value in whole.samples().items():
        assert torch.equal(joined.samples()[name], value)
    assert joined.attacks[1].seconds == whole.attacks[1].seconds
    for settings in ({"eps": 0.1}, {"names": ("first", "third")}):
        with pytest.raises(FlexureError, match="parts of one measurement"):
            Robustness.joined([whole, replace(whole, **settings)])
    with pytest.raises(FlexureError, match="at least one batch"):
        Robustness.joined([])


def test_seconds_are_of_the_attack_and_shared_out_to_samples() -> None:
    begun = time.perf_counter()
    found = evaluated()
    assert 0 < float(found.seconds_by.sum()) < time.perf_counter() - begun
    assert torch.equal(found.seconds_by > 0, found.tried_by)
    for one in found.attacks:
        assert one.seconds == pytest.approx(one.seconds_per_sample * one.attacked)
    assert isinstance(found.attacks[0], AttackResult)
    assert flexure.AttackResult is AttackResult


@dataclass(frozen=True)
class Warns:
    norm: str = "linf"

    def run(self, model, x, y, *, eps, generator):
        logging.getLogger("auto-attack").warning("there are %d points\nof no gradient", len(x))
        logging.getLogger("auto-attack").debug("silent")
        warnings.warn("a probability\ndistribution", UserWarning, stacklevel=1)
        warnings.warn("of code", DeprecationWarning, stacklevel=1)
        return x


def test_warnings_are_told_once_and_not_printed(capsys, recwarn) -> None:
    found = evaluated(attack=[Moves(1), Warns()])
    assert found.attacks[0].warnings == ("1 moved 7 samples",)
    texts = ("there are 7 points of no gradient", "a probability distribution")
    assert found.attacks[1].warnings == texts
    assert "warning of Warns: a probability distribution" in str(found)
    assert capsys.readouterr().err == ""
    assert not [each for each in recwarn if "probability" in str(each.message)]
    assert not [each for each in logging.getLogger().handlers if "Appending" in repr(each)]


def test_warnings_before_an_error() -> None:
    told: list[str] = []

    def fail() -> None:
        logging.getLogger("any").error("first")
        warnings.warn("second", stacklevel=1)
        raise KeyError

    with pytest.raises(KeyError), warned(told):
        fail()
    assert told == ["first", "second"]
    assert distinct(["a 1", "b", "a 2", "b", "a 1"]) == ("a 2", "b")
    assert distinct(["zero at 9 of 9", "zero at 10 of 64", "zero at 10 of 12"]) == (
        "zero at 10 of 64",
    )


def test_names_are_those_of_the_catalogue_or_the_attacks_own() -> None:
    @dataclass(frozen=True)
    class Named(Moves):
        name: str = "moves/up"

    found = evaluated(attack=["pgd", Named(1), Named(2), Moves(3), "pgd", Moves(4)])
    assert found.names == ("pgd", "moves/up", "moves/up #2", "Moves", "pgd #2", "Moves #2")
    for names, told in (
        (("x #2", "x"), ("x #2", "x")),
        (("p #1", "p #1"), ("p #1", "p #1 #2")),
        (("v", "v #2", "v", "v"), ("v", "v #2", "v #3", "v #4")),
    ):
        attacks = [Named(number, name=name) for number, name in enumerate(names)]
        found = evaluated(attack=attacks, every=True)
        assert found.names == told
        assert [one.warnings[0].split()[0] for one in found.attacks] == list("0123")[: len(names)]
