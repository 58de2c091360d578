"""Trainable CT through `adapt` comes back from beta next to 1, as SPEC.md asks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flexure.methods.adapt import adapt
from flexure.methods.trainable_ct import TrainableCT
from flexure.units import ctu

BETAS = torch.tensor([0.3, 0.7, 0.9, 0.5]).repeat(4)
CS = torch.tensor([0.3, 0.5, 0.8, 0.1]).repeat(4)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_recovers_a_known_optimum_with_its_own_parameter_groups(scale: float) -> None:
    """Also where the loss is small: eps is far below the gradient of a beta next to 1."""
    width = len(BETAS)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(torch.eye(width))
            layer.bias.zero_()
    adaptation = adapt(model, TrainableCT(init_beta=0.99999), example=torch.zeros(2, width))
    # The head stays as it is, so that the optimum is known.
    groups = [group for group in adaptation.parameter_groups() if group["name"] != "head"]
    adam = torch.optim.Adam(groups)
    for _ in range(2000):
        x = torch.randn(48, width)
        loss = scale * (model(x) - ctu(x, BETAS, CS)).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    for beta, c in zip(adaptation.betas().values(), adaptation.cs().values(), strict=True):
        assert (beta - BETAS).abs().max() < 0.05
        assert (c - CS).abs().max() < 0.05
