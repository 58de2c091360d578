"""Digests: the same for the same, in another process too; another for anything else."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from flexure.fingerprints import described, fingerprint, tensor_digest


@dataclass(frozen=True)
class Settings:
    steps: int = 3
    inner: object = None


@dataclass(frozen=True)
class Others:
    steps: int = 3
    inner: object = None


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_settings_are_told_apart() -> None:
    values = [
        Settings(), Settings(4), Settings(inner=Settings()), Others(), (1, 2), (1, (2,)), {"a": 1},
        {"b": 1}, Settings(inner=model()), Settings(inner=torch.zeros(2)), "1", 1,
        Settings(inner=torch.zeros(2, 1)), Settings(inner=torch.ones(2)), [Settings(4)],
    ]  # fmt: skip
    texts = [described(value) for value in values]
    assert len(set(texts)) == len(values)
    assert described(Settings(inner=model())) == described(Settings(inner=model()))
    assert described([object()]) == described([object()])  # not by where they are
    assert described(Settings) != described(Settings())


def counter(start: int, *, step: int = 1, named: bool = False) -> object:
    held = [start]

    def stepped(x: int) -> int:
        return x + held[0] * step if named is False else stepped(x)

    return stepped


class Opaque:
    """Without a repr of its own."""

    def __init__(self, value: object) -> None:
        self.value = value

    def method(self) -> None:
        """None."""


def test_functions_arrays_sets_and_objects_are_told_apart() -> None:
    long = np.zeros(5000)
    long[2500] = 1.0
    values = [
        lambda x: x, lambda x: x + 1, lambda x: x + 1.0, lambda x, y=1: x, lambda x, y=2: x,
        lambda x, *, y=2: x, lambda x: [x for _ in range(2)], lambda x: [x for _ in range(3)],
        counter(1), counter(2), counter(1, step=2), counter(1, named=True), Settings, {1}, {1, 2},
        np.zeros(5000), long, np.zeros((5000, 1)), np.zeros(5000, dtype=np.float32),
        np.array([{"a": 1}], dtype=object), np.array([{"a": 2}], dtype=object), Opaque(1),
        Opaque(2), Opaque(1).method, Opaque(2).method, Opaque(1).__init__, partial(counter, 1),
        partial(counter, 2), partial(counter, start=1), "0x1f", "0x2f", b"0x1f", Opaque(Opaque),
    ]  # fmt: skip
    texts = [described(value) for value in values]
    assert len(set(texts)) == len(values)
    for make in (lambda: counter(1), lambda: Opaque([1]), lambda: np.arange(3), lambda: {"b", "a"}):
        assert described(make()) == described(make())
    around: list[object] = []
    around.append(around)
    assert described(around) == described([around])[1:-1]


@pytest.mark.parametrize("change", ["weight", "buffer", "layer", "name"])
def test_models_are_told_apart(change: str) -> None:
    other = model()
    if change == "weight":
        other[0].weight.data[0, 0] += 1e-6
    elif change == "buffer":
        other[1].running_mean[0] = 1e-9
    elif change == "layer":
        other[1].eps = 1e-3
    else:
        other = nn.Sequential(*model().children(), nn.Identity())
    assert fingerprint(other) != fingerprint(model())
    assert fingerprint(model().eval()) == fingerprint(model().train())


def test_tensors_are_told_apart() -> None:
    tensors = [
        torch.zeros(4), torch.zeros(2, 2), torch.zeros(4).double(), torch.tensor([0.0, 0, 0, -0.0]),
        torch.zeros(0), torch.zeros(4).half(), torch.zeros(4, dtype=torch.bfloat16),
    ]  # fmt: skip
    assert len({tensor_digest(each) for each in tensors}) == len(tensors)
    across = torch.arange(6.0).view(2, 3).T
    assert tensor_digest(across) == tensor_digest(across.contiguous())


def test_another_run_of_python_gives_the_same() -> None:
    code = (
        "import torch; from flexure.fingerprints import described; "
        "print(described([{'b': torch.arange(3)}, torch.nn.ReLU(), 'x', set('abcdefg')])); "
        "print(described(lambda x: x in {'a', 'b', 'c', 'd'}))"
    )
    texts = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60,
            env=os.environ | {"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert texts[0] == texts[1]
    here = described([{"b": torch.arange(3)}, nn.ReLU(), "x", set("abcdefg")])
    assert texts[0].splitlines()[0] == here
