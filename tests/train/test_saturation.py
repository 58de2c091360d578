"""The saturated share of learned dials: recorded after every epoch, and warned of."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import flexure


def adapted(beta: float) -> tuple[nn.Module, flexure.Adaptation]:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    method = flexure.TrainableCT(init_beta=beta, learning_rate=1e-6)
    return model, flexure.adapt(model, method, example=torch.rand(2, 3))


BATCHES = [(torch.rand(4, 3), torch.tensor([0, 1, 0, 1]))]


def test_dials_at_an_end_are_recorded_and_warned_of() -> None:
    model, adaptation = adapted(0.995)
    optimizer = torch.optim.Adam(adaptation.parameter_groups())
    with pytest.warns(UserWarning, match="got 50.0%: they may follow noise"):
        history = flexure.fit(model, BATCHES, epochs=2, seed=0, optimizer=optimizer)
    assert history.saturated == (0.5, 0.5)  # every beta, no c


def test_dials_amid_the_range_are_recorded_only() -> None:
    model, adaptation = adapted(0.8)
    optimizer = torch.optim.Adam(adaptation.parameter_groups())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = flexure.fit(model, BATCHES, epochs=1, seed=0, optimizer=optimizer)
        assert history.saturated == (0.0,)
        adaptation.remove()
        assert flexure.fit(model, BATCHES, epochs=1, seed=0).saturated == ()
