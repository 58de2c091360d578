"""Descriptions and digests: the same for the same settings, others for others."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from flexure.train.identity import describe, digest


@dataclass
class Settings:
    scale: float
    of: Any = torch.relu


class Holder:
    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.cache = object()

    def method(self) -> None: ...


MAKERS = {
    "dataclass": Settings,
    "object": Holder,
    "method": lambda value: Holder(value).method,
    "partial": lambda value: functools.partial(torch.add, alpha=value),
    "tensor": lambda value: torch.full((2,), value),
    "module": lambda value: nn.PReLU(1, value),
    "settings of a module": lambda value: nn.CrossEntropyLoss(label_smoothing=value),
    "nested": lambda value: {"a": [Settings(1.0, of=Settings(value))]},
    "number": float,
}


@pytest.mark.parametrize("name", MAKERS)
def test_settings_and_nothing_else_are_told_apart(name: str):
    make = MAKERS[name]
    assert describe(make(0.5)) == describe(make(0.5))
    assert describe(make(0.5)) != describe(make(0.25))
    assert " at 0x" not in describe(make(0.5))


def test_functions_are_their_names():
    assert describe(test_functions_are_their_names) == f"{__name__}.test_functions_are_their_names"
    assert describe(torch.relu) != describe(torch.tanh)
    assert describe(None) == "None"


def test_what_training_changes_is_left_out():
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    assert describe(one) != describe(two)
    own = {id(p) for p in (*one.parameters(), *two.parameters())}
    assert describe(Settings(1.0, of=one), own) == describe(Settings(1.0, of=two), own)
    assert describe(one.weight, own) == describe(two.weight, own)


def test_digests_are_of_values_shapes_dtypes_and_order():
    x = torch.arange(6.0)
    same = [x, (x.clone(), "text"), {"a": x}]
    assert len({digest(value) for value in same}) == 1
    others = [x, x.reshape(2, 3), x.double(), x + 1, x.flip(0), [x, x], x.bool(), x[:0], x.half()]
    assert len({digest(value) for value in others}) == len(others)
    assert digest([x, x + 1]) != digest([x + 1, x])
    assert digest(x.to_sparse()) == digest(x)
