"""The saturated share of learned dials: recorded after every epoch, and warned of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import count

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


def test_the_warning_is_of_the_weights_that_are_kept() -> None:
    model, adaptation = adapted(0.8)
    dials = list(adaptation.parameter_groups()[0]["params"])
    optimizer = torch.optim.SGD(adaptation.parameter_groups(), lr=0.0)

    def drift(backward: Callable[[], float], optimizer: torch.optim.Optimizer) -> float:
        value = backward()
        if drift.steps:  # in the second epoch every dial goes to an end
            with torch.no_grad():
                for dial in dials:
                    dial.fill_(50.0)
        drift.steps += 1
        return value

    x, y = BATCHES[0]
    rising = count()  # the loss grows from call to call: the first epoch is the best

    def loss(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 0 * output.mean() + next(rising)

    batches = [(x, y.float())]
    settings = {"epochs": 2, "seed": 0, "optimizer": optimizer, "update": drift, "loss": loss}
    drift.steps = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = flexure.fit(model, batches, val=batches, **settings)
    assert history.saturated[0] == 0.0
    assert history.saturated[1] > 0.05
    drift.steps = 0
    with pytest.warns(UserWarning, match="of the kept beta and c"):
        flexure.fit(model, batches, val=batches, keep="last", **settings)


def test_dials_amid_the_range_are_recorded_only() -> None:
    model, adaptation = adapted(0.8)
    optimizer = torch.optim.Adam(adaptation.parameter_groups())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = flexure.fit(model, BATCHES, epochs=1, seed=0, optimizer=optimizer)
        assert history.saturated == (0.0,)
        adaptation.remove()
        assert flexure.fit(model, BATCHES, epochs=1, seed=0).saturated == ()
