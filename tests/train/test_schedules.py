"""Learning-rate schedules against the published procedures written out, and their refusals."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from flexure.contracts import FlexureError
from flexure.methods.probe import _BatchedAdam
from flexure.train import cosine, imagenette_schedule, lcnn_schedule, step_schedule


def test_the_default_is_the_published_probes_to_the_bit(monkeypatch):
    samples, batch = 70, 32  # three batches an epoch, the last a small one
    rates = []
    monkeypatch.setattr(_BatchedAdam, "_step", lambda self, gradient, rate: rates.append(rate))
    torch.manual_seed(0)
    adam = _BatchedAdam(torch.randn(1, samples, 3), torch.arange(samples) % 2, 2, seed=0)
    for epoch in range(1, 21):
        adam.epoch(epoch, batch, 1e-3)
    schedule = step_schedule(3)
    assert len(rates) == 60
    assert [1e-3 * schedule(update) for update in range(60)] == rates


def test_torchs_own_scheduler_applies_them():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, step_schedule(4, drops={2: 0.1}))
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5, 0.5, 0.05, 0.05]


def test_imagenette():
    schedule = imagenette_schedule(10)
    assert [schedule(update) for update in (0, 4, 9, 10, 599)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    epochs = {60: 0.2, 119: 0.2, 120: 0.04, 159: 0.04, 160: 0.008, 199: 0.008}
    for epoch, factor in epochs.items():
        assert schedule(epoch * 10) == pytest.approx(factor, rel=1e-15)


def test_low_curvature_networks():
    schedule = lcnn_schedule(7)
    assert [schedule(update) for update in (0, 1, 150 * 7 - 1)] == [1.0, 1.0, 1.0]
    assert [schedule(update) for update in (150 * 7, 175 * 7 - 1)] == [0.1, 0.1]
    assert schedule(175 * 7) == pytest.approx(0.01)


def test_a_drop_during_the_warm_up_multiplies_it():
    schedule = step_schedule(2, warmup_epochs=2, drops={1: 0.5})
    assert [schedule(update) for update in range(5)] == [0.25, 0.5, 0.375, 0.5, 0.5]


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_cosine_is_torchs(floor):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=floor)
    schedule = cosine(20, floor=floor)
    for update in range(21):
        assert schedule(update) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_cosine_warms_up_and_ends_at_its_floor():
    schedule = cosine(14, warmup=4, floor=0.2)
    assert [schedule(update) for update in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule(9) == pytest.approx(0.6)
    assert [schedule(update) for update in (14, 15, 1000)] == [0.2, 0.2, 0.2]


@pytest.mark.parametrize(
    "schedule", [step_schedule(3), imagenette_schedule(3), lcnn_schedule(3), cosine(9, warmup=2)]
)
def test_they_are_values(schedule):
    for twin in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert twin == schedule
        assert hash(twin) == hash(schedule)
        assert [twin(update) for update in range(600)] == [schedule(u) for u in range(600)]


def test_the_callers_mapping_is_copied():
    drops = {1: 0.5}
    schedule = step_schedule(2, warmup_epochs=0, drops=drops)
    drops[1] = 0.1
    assert schedule(2) == 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: step_schedule(0), "steps_per_epoch"),
        (lambda: step_schedule(2.5), "steps_per_epoch"),
        (lambda: step_schedule(True), "steps_per_epoch"),
        (lambda: step_schedule(3, warmup_epochs=-1), "warmup_epochs"),
        (lambda: step_schedule(3, drops={0: 0.1}), "epochs in drops"),
        (lambda: step_schedule(3, drops={5: 0.0}), "factors in drops"),
        (lambda: step_schedule(3, drops={5: math.nan}), "factors in drops"),
        (lambda: step_schedule(3, drops={5: math.inf}), "factors in drops"),
        (lambda: cosine(0), "total_steps"),
        (lambda: cosine(10, warmup=10), "below total_steps"),
        (lambda: cosine(10, warmup=-1), "warmup"),
        (lambda: cosine(10, floor=1.5), "floor"),
        (lambda: cosine(10, floor=math.nan), "floor"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(FlexureError, match=message):
        make()
