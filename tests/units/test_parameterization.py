"""The rows that turn raw parameters into dials: recovery from beta near 1, and pure noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from flexure.contracts import FlexureError
from flexure.units.functional import ctu
from flexure.units.parameterization import (
    DEFAULT,
    PARAMETERIZATIONS,
    Parameterization,
    find_parameterization,
    saturated_share,
)
from flexure.units.trainable import TrainableCTU
from tests.units.shared import DOUBLE

BETAS = torch.tensor([0.3, 0.7, 0.9, 0.5, 0.98])
CS = torch.tensor([0.3, 0.5, 0.8, 0.1, 0.6])

every_row = pytest.mark.parametrize("row", PARAMETERIZATIONS.values(), ids=lambda row: row.name)


@every_row
def test_values_come_back(row: Parameterization) -> None:
    values = torch.tensor([0.0, 1e-6, 0.01, 0.5, 0.8, 0.99, 0.99999, 1.0])
    got = row.to_value(row.to_raw(values))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, values, rtol=1e-6, atol=1e-7)
    anything = row.to_value(torch.linspace(-50, 50, 10_001))
    assert 0 <= anything.min() <= anything.max() <= 1


@every_row
def test_derivatives(row: Parameterization) -> None:
    raw = torch.tensor([-7.3, -0.4, 0.2, 0.7, 1.3, 2.6], dtype=DOUBLE, requires_grad=True)
    assert gradcheck(row.to_value, raw)
    start = row.to_raw(torch.tensor([0.3, 0.8])).requires_grad_()
    assert bool((torch.autograd.grad(row.to_value(start).sum(), start)[0] > 0).all())


def test_the_default_keeps_values_and_never_absorbs() -> None:
    row = PARAMETERIZATIONS[DEFAULT]
    values = torch.rand(1000)
    assert torch.equal(row.to_value(row.to_raw(values)), values)
    folds = torch.tensor([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0])
    raw = torch.cat([folds, 20 * torch.randn(1000)]).requires_grad_()
    (slope,) = torch.autograd.grad(row.to_value(raw).sum(), raw)
    assert torch.equal(slope.abs(), torch.ones_like(slope))


def train(
    row: Parameterization, betas: Tensor, cs: Tensor, *, batch: int, noise: float, scale: float = 1
) -> TrainableCTU:
    """2,000 Adam steps from beta = 0.99999 towards units at known dials, fresh noisy batches."""
    unit = TrainableCTU(
        parameterization=row.name, init_beta=0.99999, channels=len(betas), axis=-1, name="site"
    )
    adam = torch.optim.Adam(unit.parameters(), lr=row.learning_rate, eps=row.epsilon)
    for _ in range(2000):
        x = torch.randn(batch, len(betas))
        y = ctu(x, betas, cs) + noise * torch.randn(x.shape)
        adam.zero_grad()
        (scale * (unit(x) - y).square().mean()).backward()
        adam.step()
    return unit


def test_the_default_recovers_from_beta_near_one() -> None:
    unit = train(PARAMETERIZATIONS[DEFAULT], BETAS, CS, batch=256, noise=0.1)
    assert (unit.beta - BETAS).abs().max() < 0.05


@pytest.mark.parametrize("case", [{"batch": 64, "scale": 1e-4}, {"batch": 16}])
def test_the_default_recovers_where_gradients_are_tiny_or_rare(case: dict[str, float]) -> None:
    """Almost no input is near the bend there, and Adam's usual eps would hide those that are."""
    betas, cs = BETAS.repeat(20), CS.repeat(20)
    unit = train(PARAMETERIZATIONS[DEFAULT], betas, cs, noise=0.0, **case)
    assert ((unit.beta - betas).abs() < 0.05).float().mean() > 0.95


def test_the_published_one_is_absorbed() -> None:
    unit = train(PARAMETERIZATIONS["sigmoid"], BETAS[:2], CS[:2], batch=256, noise=0.1)
    assert unit.beta.min() > 0.99


def walk(row: Parameterization, start: float, pairs: int = 2000) -> Tensor:
    """The dials after 30,000 Adam steps of independent N(0, 1) gradients."""
    raw = row.to_raw(torch.full((pairs,), start)).requires_grad_()
    adam = torch.optim.Adam([raw], lr=row.learning_rate, eps=row.epsilon)
    for _ in range(30_000):
        raw.grad = torch.randn(pairs)
        adam.step()
    return row.to_value(raw.detach())


def test_noise_saturates_few_of_the_default() -> None:
    row = PARAMETERIZATIONS[DEFAULT]
    beta, c = walk(row, 0.8), walk(row, 0.5)
    assert saturated_share(beta, c) < 0.03
    pairs = torch.stack([beta, c])
    assert ((pairs < 0.01) | (pairs > 0.99)).any(0).float().mean() < 0.05


def test_noise_saturates_most_of_the_published_one() -> None:
    assert saturated_share(walk(PARAMETERIZATIONS["sigmoid"], 0.8, pairs=200)) > 0.5


def test_saturated_share_counts_both_ends() -> None:
    values = torch.tensor([0.0, 0.009, 0.011, 0.5, 0.989, 0.991, 1.0, 0.3])
    assert saturated_share(values) == 0.5
    assert saturated_share(values[2:5], torch.ones(2, 1)) == 0.4
    assert saturated_share() == 0.0


def test_unknown_name() -> None:
    with pytest.raises(FlexureError, match="'reflected', 'sigmoid', got 'softmax'"):
        find_parameterization("softmax")
