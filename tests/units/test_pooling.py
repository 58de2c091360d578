"""Max-pooling as a spline of many pieces: two pieces give ctu, beta = 1 the maximum."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flexure.methods.steer import steer
from flexure.surgery import sites
from flexure.units import ctu
from flexure.units.pooling import soft_maximum
from tests.networks import resnet18


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("c", [0.0, 0.4, 1.0, "balanced"])
def test_two_pieces_are_ctu(beta: float, c: float) -> None:
    x = torch.linspace(-20, 20, 401, dtype=torch.float64)
    pieces = torch.stack([x, torch.zeros_like(x)], -1)
    torch.testing.assert_close(soft_maximum(pieces, beta, c), ctu(x, beta, c))
    both = torch.stack([x + 2, x / 3], -1)  # only the difference of the pieces is softened
    torch.testing.assert_close(soft_maximum(both, beta, c), x / 3 + ctu(2 * x / 3 + 2, beta, c))


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9999999, 1.0])
def test_missing_pieces_have_no_part(beta: float) -> None:
    pieces = torch.randn(50, 4, dtype=torch.float64)
    gone = torch.cat([pieces, torch.full((50, 2), -torch.inf, dtype=torch.float64)], -1)
    gone.requires_grad_()
    found = soft_maximum(gone, beta, 0.3)
    torch.testing.assert_close(found, soft_maximum(pieces, beta, 0.3))
    found.sum().backward()
    assert torch.isfinite(gone.grad).all()


def test_gradients() -> None:
    a = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    beta = torch.full((6, 1), 0.7, dtype=torch.float64, requires_grad=True)
    c = torch.full((6, 1), 0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(soft_maximum, (a, beta, c))
    assert torch.autograd.gradgradcheck(soft_maximum, (a, beta, c))


POOLS = [
    (nn.MaxPool1d(3, 2, 1), (2, 4, 11)),
    (nn.MaxPool2d(3, 2, 1), (2, 4, 9, 12)),
    (nn.MaxPool2d((2, 3), (1, 2)), (4, 9, 12)),
    (nn.MaxPool2d(2, ceil_mode=True), (2, 4, 9, 11)),
    (nn.MaxPool2d(3, 2, 1, ceil_mode=True), (2, 4, 8, 10)),
    (nn.MaxPool3d(2, 3, 1), (1, 3, 6, 7, 8)),
]


@pytest.mark.parametrize(("pool", "shape"), POOLS)
def test_windows_are_the_pools(pool: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    model = nn.Sequential(nn.Identity(), pool)
    expected = pool(x)
    with steer(model, beta=1.0, example=x, pooling=True) as steering:
        assert torch.equal(model(x), expected)
        steering.beta = 1 - 1e-7
        torch.testing.assert_close(model(x), expected)
        steering.dial(0.0, 1.0)
        assert model(x).shape == expected.shape
        assert not torch.allclose(model(x), expected)


def test_flat_windows_average_at_beta_0() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Identity(), nn.MaxPool2d(2))
    with steer(model, beta=0.0, c=1.0, example=x, pooling=True):
        torch.testing.assert_close(model(x), F.avg_pool2d(x, 2))


def test_only_where_asked_for() -> None:
    model, x = resnet18(4).eval(), torch.randn(1, 3, 32, 32)
    report = sites(model, x)
    assert [r.activation for r in report.refused] == ["max_pool2d"]
    assert "pooling=True" in str(report)
    assert "maxpool" not in [site.name for site in report.sites]
    with steer(model, beta=0.7, example=x, pooling=True, calibration=[x]) as steering:
        assert steering.units["maxpool"].activation == "max_pool2d"
        assert steering.units["maxpool"].shift.shape == (4,)
    dilated = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2, dilation=2))
    report = sites(dilated, x, pooling=True)
    assert [r.activation for r in report.refused] == ["gapped_max_pool"]
