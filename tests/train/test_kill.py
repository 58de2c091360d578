"""A training that is killed again and again ends, bit by bit, as one that nothing disturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from flexure.train.checkpoint import load_state
from tests.train.test_checkpoint import identical

SCRIPT = Path(__file__).with_name("killable.py")


class Trainings:
    """Starts trainings in children of a warm process, and kills them."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(
        self, folder: Path, epochs: int, *, after: int | None = None, delay: float = 0.0,
        call: str = "never", what: str = "network",
    ) -> int:  # fmt: skip
        """One child, killed `delay` seconds after its update `after`; returns its exit status."""
        self.server.stdin.write(f"{folder} {epochs} {what} {call}\n".encode())
        child = int(self.server.stdout.readline())
        if after is not None and self._saw(after):
            time.sleep(delay)
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        while not (line := self.server.stdout.readline()).startswith(b"ended"):
            assert line, "the warm process is gone"
        return int(line.split()[1])

    def _saw(self, updates: int) -> bool:
        return all(self.server.stdout.read(1) == b"." for _ in range(updates))

    def close(self) -> None:
        self.server.kill()
        self.server.wait()
        self.server.stdin.close()
        self.server.stdout.close()


@pytest.fixture(scope="module")
def trainings():
    trainings = Trainings()
    yield trainings
    trainings.close()


def result(folder: Path):
    return load_state(folder / "result")


def killed_often(
    trainings: Trainings, folder: Path, kills: int, seed: int, what: str = "network"
) -> int:
    """Kills a training so many times and lets it end; returns how many kills hit a save."""
    folder.mkdir()
    draw = random.Random(seed)
    epochs = kills  # four updates each; a child lives for about two of them
    during_a_save = 0
    for kill in range(kills):
        if kill % 3 == 2:
            call = f"{draw.choice(['fsync', 'replace'])}:{draw.randint(1, 5)}"
            status = trainings.run(folder, epochs, call=call, what=what)
        else:
            after, delay = draw.randint(0, 3), draw.random() * 0.01
            status = trainings.run(folder, epochs, after=after, delay=delay, what=what)
        assert status == -signal.SIGKILL
        during_a_save += any(name.endswith(".tmp") for name in os.listdir(folder))
    assert result(folder) is None
    assert trainings.run(folder, epochs, what=what) == 0
    return during_a_save


def undisturbed(trainings: Trainings, folder: Path, kills: int, what: str = "network"):
    assert trainings.run(folder, kills, what=what) == 0
    return result(folder)


def test_a_killed_training_ends_as_an_undisturbed_one(tmp_path, trainings):
    kills = 12
    hits = killed_often(trainings, tmp_path / "killed", kills, seed=0)
    expected = undisturbed(trainings, tmp_path / "undisturbed", kills)
    assert identical(result(tmp_path / "killed"), expected)
    assert hits >= 3
    assert len(expected["history"]["val_accuracy"]) == kills


def test_an_ended_training_is_not_trained_again(tmp_path, trainings):
    first = undisturbed(trainings, tmp_path, 2)
    assert identical(undisturbed(trainings, tmp_path, 2), first)


@pytest.mark.slow
def test_a_hundred_kills(tmp_path, trainings):
    hits = killed_often(trainings, tmp_path / "killed", 100, seed=1)
    expected = undisturbed(trainings, tmp_path / "undisturbed", 100)
    assert identical(result(tmp_path / "killed"), expected)
    assert hits >= 25


@pytest.mark.slow
def test_an_adaptation_that_is_killed(tmp_path, trainings):
    killed_often(trainings, tmp_path / "killed", 12, seed=2, what="adaptation")
    expected = undisturbed(trainings, tmp_path / "undisturbed", 12, what="adaptation")
    assert identical(result(tmp_path / "killed"), expected)
    assert "2.raw_beta" in expected["model"]
