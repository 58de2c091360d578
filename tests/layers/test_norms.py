"""The norms of scalings and average pooling against dense matrices, and the table of modules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from flexure.contracts import FlexureError
from flexure.layers import (
    batch_norm_norm_bounds,
    conv_norm_bounds,
    linear_norm_bounds,
    module_norm_bounds,
)
from flexure.layers.norms import NormBounds
from flexure.layers.of_module import LINEAR_MODULES
from tests.reference.operators import dense_matrix, dense_norms

POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def check_exact(module: nn.Module, shape: tuple[int, ...]) -> None:
    truth, bounds = dense_norms(dense_matrix(module, shape)), module_norm_bounds(module, shape)
    for name in ("spectral", "row", "column", "row_sum", "column_sum"):
        exact, bound = getattr(truth, name), getattr(bounds, name)
        assert exact <= bound * (1 + 1e-14), name
        assert bound <= exact * (1 + 1e-4), name


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_average_pooling_is_exact(data: st.DataObject) -> None:
    spatial = data.draw(st.integers(1, 3))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(spatial))

    kernel = sizes(1, 3)
    options = {
        "stride": data.draw(st.none() | st.just(sizes(1, 3))),
        "padding": tuple(data.draw(st.integers(0, k // 2)) for k in kernel),
        "ceil_mode": data.draw(st.booleans()),
        "count_include_pad": data.draw(st.booleans()),
    }
    if spatial > 1:
        options["divisor_override"] = data.draw(st.none() | st.integers(1, 5))
    module = POOLS[spatial](kernel, **options)
    shape = (1, *sizes(1, 5))
    try:
        outputs = module(torch.zeros(1, *shape)).numel()
    except RuntimeError:
        outputs = 0
    assume(outputs > 0)
    check_exact(module, shape)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.AdaptiveAvgPool1d(3), (2, 7)),
        (nn.AdaptiveAvgPool2d(1), (2, 4, 3)),
        (nn.AdaptiveAvgPool2d((None, 5)), (1, 4, 3)),
        (nn.AdaptiveAvgPool3d(2), (1, 3, 2, 5)),
    ],
)
def test_adaptive_pooling_is_exact(module: nn.Module, shape: tuple[int, ...]) -> None:
    check_exact(module, shape)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_eval_mode_is_exact(affine: bool) -> None:
    module = nn.BatchNorm2d(5, affine=affine, dtype=torch.float64).eval()
    module.running_var.uniform_(0.01, 2)
    module.running_mean.normal_()
    if affine:
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
    check_exact(module, (5, 2, 3))


def test_batch_norm_without_statistics_has_no_norm() -> None:
    with pytest.raises(FlexureError, match="running statistics"):
        module_norm_bounds(nn.BatchNorm1d(3, track_running_stats=False), (3,))


def test_linear_is_exact() -> None:
    check_exact(nn.Linear(7, 4, dtype=torch.float64), (7,))
    weight = torch.randn(3, 5)
    assert linear_norm_bounds(weight.mT) == linear_norm_bounds(weight).transposed()


def test_interior_rows_and_columns_of_a_convolution_are_exact() -> None:
    for module in (
        nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False, dtype=torch.float64),
        nn.ConvTranspose2d(2, 3, 3, stride=2, dilation=2, bias=False, dtype=torch.float64),
    ):
        shape = (2, 9, 9)
        truth = dense_norms(dense_matrix(module, shape))
        bounds = module_norm_bounds(module, shape)
        for name in ("row", "column", "row_sum", "column_sum"):
            assert getattr(bounds, name) == pytest.approx(getattr(truth, name), rel=1e-12), name


def test_subclasses_with_their_own_forward_are_refused() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Named(nn.Linear):
        pass

    assert isinstance(module_norm_bounds(Named(2, 3), (2,)), NormBounds)
    for module in (Doubled(2, 3), nn.ReLU()):
        with pytest.raises(FlexureError, match=r"expected a linear module .*; "):
            module_norm_bounds(module, (2,))


def test_every_class_of_the_table_is_a_module() -> None:
    assert all(issubclass(cls, nn.Module) for cls in LINEAR_MODULES)


@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**-600, 2.0**600, 2.0**1000])
def test_norms_of_weights_whose_squares_leave_float64(scale: float) -> None:
    matrix = torch.randn(4, 5, dtype=torch.float64)
    kernel = torch.randn(4, 3, 3, 3, dtype=torch.float64)

    def bounds(factor: float) -> list[NormBounds]:
        conv = conv_norm_bounds(factor * kernel, input_size=8, stride=2, padding=1)
        return [linear_norm_bounds(factor * matrix), conv]

    for one, other in zip(bounds(1.0), bounds(scale), strict=True):
        expected = {k: v * scale for k, v in vars(one).items()}
        assert vars(other) == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_a_map_from_or_to_nothing_has_norm_zero(shape: tuple[int, int]) -> None:
    assert linear_norm_bounds(torch.zeros(shape)) == NormBounds(0.0, 0.0, 0.0, 0.0, 0.0)


def test_batch_norm_without_variance_is_refused() -> None:
    with pytest.raises(FlexureError, match=r"expected positive variances .* got .*; "):
        batch_norm_norm_bounds(torch.zeros(3), torch.zeros(3), eps=0.0)
