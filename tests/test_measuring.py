"""What measures change for the time of a call is put back, whatever other threads do."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import flexure
from flexure.contracts import FlexureError
from flexure.measure.fields import measuring
from flexure.measuring import full_precision
from tests.measure.untouched import untouched


def net(size: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(size, 32), nn.Softplus(), nn.Linear(32, 4))


@pytest.mark.parametrize("shared", [True, False])
def test_threads_measure_one_after_the_other(shared: bool) -> None:
    models = [net()] * 6 if shared else [net() for _ in range(6)]
    x = torch.randn(6, 16)
    expected = [flexure.curvature(model, x).normalized for model in models]
    fast = torch.backends.mha.get_fastpath_enabled()
    with untouched(models[0], x), ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda model: flexure.curvature(model, x).normalized, models))
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert all(mine.equal(true) for mine, true in zip(found, expected, strict=True))
    for model in models:
        assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_measures_may_call_measures() -> None:
    model, x = net(), torch.randn(3, 16)
    inner: list[Any] = []

    def field(z: torch.Tensor) -> torch.Tensor:
        if not inner:
            inner.append(None)
            inner[0] = flexure.curvature(model, x, check=False)
        return model(z)[:, 0]

    with untouched(model, x):
        flexure.curvature(model, x, field=field, check=False)
    assert inner[0].converged.all()


def precisions() -> list[Any]:
    places = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    return [place.fp32_precision for place in places]


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch < 2.9")
@pytest.mark.parametrize("coarse", [True, False])
def test_tf32_is_off_inside_and_put_back(coarse: bool) -> None:
    backends = torch.backends
    given = backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32
    try:
        backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = coarse
        before = precisions()
        with pytest.raises(ZeroDivisionError, match="True"), full_precision():
            raise ZeroDivisionError(precisions() == ["ieee"] * 3)
        assert precisions() == before
        with measuring(None):
            assert precisions() == ["ieee"] * 3
        assert (backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32) == (coarse, coarse)
    finally:
        backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = given


def test_models_made_in_inference_mode_are_refused_before_they_are_touched() -> None:
    with torch.inference_mode():
        model, buffered = net(), nn.BatchNorm1d(16, affine=False)
    x = torch.randn(3, 16)
    for made in (model, nn.Sequential(buffered, net())):
        flags = [p.requires_grad for p in made.parameters()]
        with pytest.raises(FlexureError, match=r"outside of torch.inference_mode.*deepcopy"):
            flexure.curvature(made, x)
        assert [p.requires_grad for p in made.parameters()] == flags
    assert flexure.curvature(copy.deepcopy(model), x).converged.all()
