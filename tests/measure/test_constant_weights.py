"""Affine maps in the places of convolutions and BatchNorm are used where weights are constants."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flexure
from flexure.measure import constant_weights
from flexure.measure.constant_weights import ConstantWeights
from flexure.measure.fields import measuring

DOUBLE = torch.float64


def convolution(x: Tensor, w: Tensor) -> Tensor:
    return F.conv1d(x[:, None], w, padding=1).flatten(1)


def normalised(x: Tensor, w: Tensor) -> Tensor:
    return F.batch_norm(x, torch.zeros(5, dtype=x.dtype), torch.ones(5, dtype=x.dtype), w.flatten())


@pytest.mark.parametrize(
    ("layer", "shape"), [(convolution, (2, 1, 3)), (normalised, (5,))], ids=["conv", "norm"]
)
def test_fields_may_differentiate_with_respect_to_weights(
    layer: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    w = torch.randn(shape, dtype=DOUBLE)

    def field(x: Tensor) -> Tensor:
        own = w.clone().requires_grad_()
        loss = layer(x, own).sin().sum()
        return torch.autograd.grad(loss, own, create_graph=True)[0].sum() + x.square().sum(1)

    def sum_of_inputs(x: Tensor) -> Tensor:
        """The same, by the chain rule: of one sample, so that none depends on another."""
        return field(x)

    x = torch.randn(1, 5, dtype=DOUBLE)
    found = flexure.curvature(
        nn.Identity(), x, field=sum_of_inputs, check=False, tol=1e-8, max_products=9
    )
    hessian = torch.autograd.functional.hessian(lambda z: field(z).sum(), x).view(5, 5)
    torch.testing.assert_close(found.hessian_norm[0], torch.linalg.matrix_norm(hessian, 2))


def test_complex_convolutions_are_left_to_torch() -> None:
    x = torch.randn(3, 6, dtype=DOUBLE, requires_grad=True)
    w = torch.randn(2, 1, 3, dtype=torch.complex128)

    def field(x: Tensor) -> Tensor:
        return F.conv1d(x[:, None].to(w.dtype), w).abs().square().sum((1, 2))

    with ConstantWeights():
        (mine,) = torch.autograd.grad(field(x).sum(), x)
    (true,) = torch.autograd.grad(field(x).sum(), x)
    torch.testing.assert_close(mine, true)
    assert flexure.curvature(nn.Identity(), x.detach(), field=field).converged.all()


def test_parameters_of_a_measured_model_are_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what makes them fast."""
    calls: list[bool] = []
    real = constant_weights._constant

    def seen(*given: Tensor | None) -> bool:
        calls.append(real(*given))
        return calls[-1]

    monkeypatch.setattr(constant_weights, "_constant", seen)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten()).train()
    flexure.curvature(model, torch.randn(2, 1, 4, 4))
    assert len(calls) >= 2
    assert all(calls)
    calls.clear()
    with measuring(None), ConstantWeights():
        model.eval()(torch.randn(2, 1, 4, 4))
    assert calls == [False, False]
