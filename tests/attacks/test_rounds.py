"""Attacks in rounds: survivors only, in full batches, the same over two processes as in one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexure.attacks import PGD, Bounded, robust_accuracy
from tests.attacks import evaluations
from tests.attacks.evaluations import Moves, directions, evaluated, network, samples
from tests.measure.untouched import untouched

ROOT = Path(__file__).parents[2]


@settings(max_examples=12, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    size=st.integers(1, 50),
    every=st.booleans(),
    eps=st.sampled_from([0.02, 0.1, 0.3, 0.9]),
    wrong=st.sampled_from([0, 8, 40]),
)
def test_rounds_are_those_of_one_sample_after_the_other(numbers, size, every, eps, wrong) -> None:
    (x, y), model = samples(wrong=wrong), network()
    evaluations.SIZES.clear()
    attacks = [Moves(number) for number in numbers]
    found = robust_accuracy(
        Bounded(model), x, y, attack=attacks, eps=eps, seed=0, batch_size=size, every=every
    )
    counts = []
    for row in range(len(x)):
        right, last, tried, beaten = bool(found.clean[row]), x[row], [], []
        with torch.no_grad():
            assert right == (int(model(x[row : row + 1]).argmax()) == int(y[row]))
            for number in numbers:
                tried.append(right and (every or not any(beaten)))
                version = (x[row] + eps * directions(number, x[row])).clamp(0, 1)
                wrong_there = int(model(version[None]).argmax()) != int(y[row])
                if tried[-1] and not any(beaten):
                    last = version
                beaten.append(tried[-1] and wrong_there)
        assert found.tried_by[row].tolist() == tried
        assert found.beaten_by[row].tolist() == beaten
        assert bool(found.robust[row]) == (right and not any(beaten))
        torch.testing.assert_close(found.x_adv[row], last, rtol=0, atol=1e-6)
        counts.append(tried)
    full = [sum(column) for column in zip(*counts, strict=True)]
    expected = [min(size, n - at) for n in full for at in range(0, n, size)]
    assert expected == evaluations.SIZES


def test_an_attacks_place_in_the_list_decides_its_draws_and_nothing_else_does() -> None:
    two = evaluated(attack=[PGD("linf", steps=1)] * 2, every=True)
    one = evaluated(attack=PGD("linf", steps=1))
    assert torch.equal(one.beaten_by[:, 0], two.beaten_by[:, 0])
    assert two.names == ("PGD", "PGD #2")
    again = evaluated(attack=[Moves(1), PGD("linf", steps=1)], every=True)
    assert torch.equal(again.beaten_by[:, 1], two.beaten_by[:, 1])


def test_the_worst_case_of_every_attack_on_all_is_that_of_the_cascade() -> None:
    cascade, every = evaluated(), evaluated(every=True)
    assert torch.equal(cascade.robust, every.robust)
    assert torch.equal(cascade.x_adv[~cascade.robust], every.x_adv[~every.robust])
    assert [one.attacked for one in every.attacks] == [32, 32, 32]
    assert [one.accuracy for one in cascade.attacks] == [one.accuracy for one in every.attacks]
    assert cascade.attacks[1].accuracy_alone is None
    alone = [evaluated(attack=Moves(k)).accuracy for k in (1, 2)]
    assert [one.accuracy_alone for one in every.attacks][:2] == alone
    assert min(one.accuracy_alone for one in every.attacks) >= every.accuracy


def test_no_radius_and_no_survivors() -> None:
    none = evaluated(eps=0)
    assert not none.tried_by.any()
    assert none.names == ("Moves", "Moves #2", "PGD")
    assert torch.equal(none.robust, none.clean)
    all_wrong = robust_accuracy(
        Bounded(network()), *samples(wrong=40), attack=Moves(1), eps=0.1, seed=0
    )
    assert all_wrong.accuracy == all_wrong.clean_accuracy == 0.0
    assert not all_wrong.tried_by.any()


def test_models_that_draw_give_the_same_again_in_batches_of_their_own() -> None:
    model = evaluations.Noisy()
    with untouched(model):
        one = evaluations.without_seconds(evaluated(model))
    torch.rand(3)
    assert evaluations.without_seconds(evaluated(model)) == one
    assert evaluations.without_seconds(evaluated(model, seed=4)) != one
    two = evaluated(model, attack=[Global(), Global()], every=True, batch_size=None)
    assert not torch.equal(two.beaten_by[:, 0], two.beaten_by[:, 1])


@dataclass(frozen=True)
class Global:
    """Draws from the global generator alone."""

    norm: str = "linf"

    def run(self, model, x, y, *, eps, generator):
        return x + eps * torch.randn_like(x).sign()


def test_attacks_are_told_the_seed_and_their_place() -> None:
    told = []

    @dataclass(frozen=True)
    class Told:
        norm: str = "linf"

        def run(self, model, x, y, *, eps, generator):
            told.append((generator.stream, len(generator.each)))
            return x

    evaluated(attack=[Told(), Told()], batch_size=20, seed=-5)
    assert told == [((-5, 0), 20), ((-5, 0), 12), ((-5, 1), 20), ((-5, 1), 12)]


def test_progress_tells_of_every_batch() -> None:
    said: list[tuple[str, int, int]] = []
    found = evaluated(progress=lambda *told: said.append(told))
    assert said[:6] == [("clean", k, 6) for k in range(1, 7)]
    stages = dict.fromkeys(stage for stage, _, _ in said)
    assert tuple(stages) == ("clean", *found.names)
    for one in found.attacks:
        batches = -(-one.attacked // 7)
        assert [told for told in said if told[0] == one.name] == [
            (one.name, k, batches) for k in range(1, batches + 1)
        ]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes returned."""
    folder = tmp_path_factory.mktemp("two")
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.attacks.evaluations", str(folder), str(rank)],
            env=environment,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", evaluations.EVALUATIONS)
def test_two_processes_find_what_one_finds(found, name: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    evaluations.SIZES.clear()
    try:
        alone = evaluations.without_seconds(evaluations.EVALUATIONS[name]())
    finally:
        torch.set_num_threads(threads)
    (first, its), (second, others) = (result[name] for result in found)
    assert first == second == alone
    assert sorted(its + others) == sorted(evaluations.SIZES)
    assert bool(others) == (name not in ("one batch", "library"))


def test_two_processes_resume_from_one_folder(found) -> None:
    for rank in range(2):
        assert found[rank]["kept"][0] == found[rank]["resumed"][0] == found[0]["cascade"][0]
        assert found[rank]["kept"][1] == found[rank]["cascade"][1]
        assert found[rank]["resumed"][1] == []


def test_an_error_or_another_course_of_one_process_ends_both(found) -> None:
    said = [result["error"] for result in found]
    assert said[0] == "ValueError: out of paper"
    assert "process 0: ValueError: out of paper" in said[1]
    for result in found:
        assert "the same model, data and settings on all 2 processes" in result["other"]
