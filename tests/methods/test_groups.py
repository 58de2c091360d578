"""The parameter groups of an adaptation, in every optimiser of torch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import flexure
from flexure.units.parameterization import PARAMETERIZATIONS

OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")  # no groups, or other tensors
}


def adapted() -> tuple[nn.Module, flexure.Adaptation]:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    return model, flexure.adapt(model, flexure.TrainableCT(), example=torch.rand(2, 3))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_them_and_moves_the_dials(name: str) -> None:
    model, adaptation = adapted()
    before = adaptation.betas()["1"].clone()
    optimizer = OPTIMIZERS[name](adaptation.parameter_groups())
    x, y = torch.randn(32, 3), torch.randint(0, 2, (32,))
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    after = adaptation.betas()["1"]
    assert bool(after.isfinite().all())
    # Adadelta's steps grow from nothing, and scale with the rate.
    least = 1e-6 if name == "Adadelta" else 1e-4
    assert float((after - before).abs().max()) > least


@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam"])
def test_adam_and_its_kin_get_the_small_eps(name: str) -> None:
    _, adaptation = adapted()
    dials, head = OPTIMIZERS[name](adaptation.parameter_groups()).param_groups
    assert dials["eps"] == PARAMETERIZATIONS["reflected"].epsilon
    assert head["eps"] == 1e-8


@pytest.mark.parametrize("name", ["Adadelta", "Adagrad", "Adafactor"])
def test_others_keep_their_own(name: str) -> None:
    _, adaptation = adapted()
    optimizer = OPTIMIZERS[name](adaptation.parameter_groups())
    assert optimizer.param_groups[0]["eps"] == optimizer.defaults["eps"]


def test_an_eps_that_the_caller_gives_counts() -> None:
    _, adaptation = adapted()
    dials, head = torch.optim.Adam(adaptation.parameter_groups(), eps=1e-5).param_groups
    assert (dials["eps"], head["eps"]) == (1e-5, 1e-5)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_optimizers_are_copied_with_their_groups(again: Any) -> None:
    _, adaptation = adapted()
    found = again(torch.optim.Adam(adaptation.parameter_groups()))
    assert found.param_groups[0]["eps"] == PARAMETERIZATIONS["reflected"].epsilon
