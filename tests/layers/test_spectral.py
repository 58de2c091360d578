"""Bounds of l2 operator norms against the SVD of dense matrices: never below, and how far above."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flexure.contracts import FlexureError
from flexure.layers import (
    conv_norm_bound,
    conv_norm_bounds,
    linear_norm_bound,
    module_norm_bounds,
    operator_norm,
)
from flexure.layers.gram import TOLERANCE
from tests.reference.operators import dense_matrix, dense_norms

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = ("spectral", "row", "column", "row_sum", "column_sum")


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix.detach().double())[0])


def arguments(conv: Any) -> dict[str, Any]:
    names = ("stride", "padding", "dilation", "groups", "padding_mode", "transposed")
    return {name: getattr(conv, name) for name in (*names, "output_padding")}


@st.composite
def convolutions(draw: st.DrawFn, transposed: bool) -> tuple[Any, tuple[int, ...]]:
    """A layer in float64 with random weights, and an input size that it takes."""
    spatial = draw(st.sampled_from((1, 2, 2, 3)))
    few = 3 if spatial == 3 else 8
    sizes = [draw(st.integers(1, few)) for _ in range(spatial)]
    kernel = [draw(st.integers(1, 4)) for _ in range(spatial)]
    stride = [draw(st.integers(1, 3)) for _ in range(spatial)]
    dilation = [draw(st.integers(1, 2)) for _ in range(spatial)]
    padding: Any = [draw(st.integers(0, 3)) for _ in range(spatial)]
    groups = draw(st.sampled_from((1, 1, 2)))
    common = {"dilation": dilation, "groups": groups, "bias": False, "dtype": torch.float64}
    channels = (groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3)))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    if transposed:
        extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
        layer = TRANSPOSED[spatial](
            *channels, kernel, stride=stride, padding=padding, output_padding=extra, **common
        )
    else:
        mode = draw(st.sampled_from(("zeros", "zeros", "circular", "reflect", "replicate")))
        if draw(st.booleans()):
            padding, stride = draw(st.sampled_from(("same", "valid"))), [1] * spatial
        layer = CONVS[spatial](
            *channels, kernel, stride=stride, padding=padding, padding_mode=mode, **common
        )
    try:
        layer(torch.zeros(1, channels[0], *sizes, dtype=torch.float64))
    except RuntimeError:  # too much padding for the mode, or too little for the kernel
        assume(False)
    return layer, tuple(sizes)


@settings(max_examples=60, deadline=None)
@given(convolutions(transposed=False))
def test_no_convolution_exceeds_its_bounds(case: tuple[Any, tuple[int, ...]]) -> None:
    check_bounds(*case)


@settings(max_examples=40, deadline=None)
@given(convolutions(transposed=True))
def test_no_transposed_convolution_exceeds_its_bounds(case: tuple[Any, tuple[int, ...]]) -> None:
    check_bounds(*case)


def check_bounds(layer: Any, sizes: tuple[int, ...]) -> None:
    matrix = dense_matrix(layer, (layer.in_channels, *sizes))
    assume(matrix.numel() > 0)
    truth = dense_norms(matrix)
    options = {"input_size": sizes, **arguments(layer)}
    dense, torus = (
        conv_norm_bound(layer.weight, route=route, **options) for route in ("dense", "torus")
    )
    assert truth.spectral <= dense <= truth.spectral * (1 + 1e-4)
    assert truth.spectral <= torus
    bounds = conv_norm_bounds(layer.weight, **options)
    for name in NORMS:
        assert getattr(truth, name) <= getattr(bounds, name) * (1 + 1e-14), name
    assert module_norm_bounds(layer, (layer.in_channels, *sizes)) == bounds


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "groups", "sizes"),
    [
        ((3, 3), (1, 1), (1, 1), 1, (8, 6)),
        ((3, 2), (2, 1), (1, 2), 1, (8, 5)),
        ((5, 3), (2, 3), (1, 1), 2, (6, 9)),
        ((3, 3), (1, 1), (2, 1), 2, (5, 5)),
        ((5,), (2,), (1,), 1, (4,)),  # a window longer than the input
        ((3, 3, 3), (1, 2, 1), (1, 1, 1), 1, (3, 4, 3)),
    ],
)
def test_circular_torus_is_exact(
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    sizes: tuple[int, ...],
) -> None:
    weight = torch.randn(4, 4 // groups, *kernel, dtype=torch.float64)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = [(r // 2, r - r // 2) for r in reach]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]

    def apply(x: Tensor) -> Tensor:
        widths = [width for pair in reversed(padding) for width in pair]
        wrapped = F.pad(x, widths, mode="circular")
        return convolve(wrapped, weight, stride=stride, dilation=dilation, groups=groups)

    truth = norm(dense_matrix(apply, (4, *sizes)))
    bound = conv_norm_bound(
        weight,
        input_size=sizes,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode="circular",
        route="torus",
    )
    assert truth <= bound <= truth * (1 + 1e-4)


# The largest ratio of the torus' bound to the SVD over a few random kernels, rounded up: small
# inputs are where the zeros around them matter most, and copied borders count in full.
LOOSENESS = {
    ("zeros", 3, 1, 4): 1.25,
    ("zeros", 3, 1, 8): 1.08,
    ("zeros", 3, 1, 16): 1.03,
    ("zeros", 3, 2, 8): 1.10,
    ("zeros", 5, 1, 8): 1.25,
    ("reflect", 3, 1, 8): 2.10,
    ("replicate", 3, 1, 8): 2.25,
}


@pytest.mark.parametrize(("mode", "kernel", "stride", "size"), list(LOOSENESS))
def test_how_loose_a_torus_is(mode: str, kernel: int, stride: int, size: int) -> None:
    ratios = []
    for _ in range(5):
        layer = nn.Conv2d(
            4, 4, kernel, stride, kernel // 2, padding_mode=mode, bias=False, dtype=torch.float64
        )
        truth = norm(dense_matrix(layer, (4, size, size)))
        bound = conv_norm_bound(layer.weight, input_size=size, route="torus", **arguments(layer))
        ratios.append(bound / truth)
    assert min(ratios) >= 1.0
    assert max(ratios) <= LOOSENESS[mode, kernel, stride, size]


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (64, 10), (128, 128)])
def test_linear_is_within_one_in_ten_thousand(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    assert norm(weight) <= linear_norm_bound(weight) <= norm(weight) * (1 + 1e-4)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_equal_singular_values_and_scales(scale: float) -> None:
    weight = scale * torch.linalg.qr(torch.randn(96, 96, dtype=torch.float64))[0]
    ratio = linear_norm_bound(weight) / scale
    assert 1.0 <= ratio <= 1 + 1e-4


def test_clustered_singular_values() -> None:
    left, right = (torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0] for _ in range(2))
    values = 1 - 1e-5 * torch.arange(64, dtype=torch.float64)
    weight = (left * values) @ right
    assert norm(weight) <= linear_norm_bound(weight) <= 1 + 1e-4


def test_never_below_norms_that_are_known_exactly() -> None:
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(6):
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    assert linear_norm_bound(hadamard) >= 8.0
    for count in (1, 3, 7, 49):
        assert linear_norm_bound(torch.ones(count, count)) >= count
        kernel = torch.full((1, 1, count), 0.1, dtype=torch.float64)
        options = {"input_size": 2 * count, "padding": count // 2, "padding_mode": "circular"}
        # The kernel's sum in real numbers: what float64 holds for 0.1 is above it.
        assert conv_norm_bound(kernel, route="torus", **options) >= count / 10


def test_more_iterations_are_never_looser() -> None:
    weight = torch.randn(40, 30)
    bounds = [linear_norm_bound(weight, iterations=k, tolerance=0.0) for k in range(16)]
    assert all(a >= b for a, b in itertools.pairwise(bounds))
    assert bounds[0] > 1.4 * norm(weight)
    assert bounds[-1] >= norm(weight)
    conv = torch.randn(6, 5, 3, 3)
    bounds = [
        conv_norm_bound(conv, input_size=12, padding=1, iterations=k, route="torus")
        for k in range(10)
    ]
    assert all(a * (1 + TOLERANCE) >= b for a, b in itertools.pairwise(bounds))


def test_against_power_iteration_on_a_layer_of_resnet() -> None:
    weight = torch.randn(64, 64, 3, 3) / 24
    bound = conv_norm_bound(weight, input_size=32, padding=1)
    below = operator_norm(
        lambda x: F.conv2d(x, weight, padding=1), (1, 64, 32, 32), dtype=torch.float32
    )
    assert below <= bound <= 1.02 * below


def test_chunks_of_frequencies_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(6, 3, 3, 3)
    options = {"input_size": 11, "padding": 1, "stride": 2, "groups": 1, "route": "torus"}
    whole = conv_norm_bound(weight, **options)
    monkeypatch.setattr("flexure.layers.spectral.CHUNK_ENTRIES", 200)
    assert conv_norm_bound(weight, **options) == pytest.approx(whole, rel=2 * TOLERANCE)


def test_equal_singular_values_at_every_frequency() -> None:
    weight = torch.zeros(96, 96, 3, 3)
    weight[:, :, 1, 1] = torch.eye(96)
    bound = conv_norm_bound(weight, input_size=7, padding=1)
    assert 1.0 <= bound <= 1 + 1e-4


def test_kernel_folded_to_nothing() -> None:
    weight = torch.tensor([[[1.0, 0.0, -1.0]]], dtype=torch.float64)
    options = {"input_size": 2, "padding": 1, "padding_mode": "circular"}
    assert conv_norm_bound(weight, route="torus", **options) <= 1e-12
    assert conv_norm_bound(0 * weight, **options) == 0.0


def test_operator_norm_is_a_lower_bound_that_ignores_the_bias() -> None:
    layer = nn.Linear(20, 30, dtype=torch.float64)
    truth = norm(layer.weight)
    found = [operator_norm(layer, (1, 20), iterations=k) for k in (1, 10, 2000)]
    assert found[0] < found[1] <= found[2] <= truth * (1 + 1e-12)
    assert found[2] == pytest.approx(truth, rel=1e-6)
    assert layer.weight.grad is None
    assert operator_norm(lambda x: 0 * x, (3,)) == 0.0


@pytest.mark.parametrize(
    ("weight", "options"),
    [
        (torch.ones(2, 2, 3), {"input_size": 2}),
        (torch.ones(2, 2, 3), {"input_size": (4, 4)}),
        (torch.ones(2, 2, 3), {"input_size": 4, "padding": "full"}),
        (torch.ones(2, 2, 3), {"input_size": 4, "padding": "same", "stride": 2}),
        (torch.ones(2, 2, 3), {"input_size": 4, "padding": 4, "padding_mode": "reflect"}),
        (torch.ones(2, 2, 3), {"input_size": 4, "padding_mode": "constant"}),
        (torch.ones(3, 2, 3), {"input_size": 4, "groups": 2}),
        (torch.ones(2, 2), {"input_size": 4}),
        (torch.full((1, 1, 1), math.nan), {"input_size": 4}),
    ],
)
def test_refusals_say_what_to_do(weight: Tensor, options: dict[str, Any]) -> None:
    with pytest.raises(FlexureError, match=r"expected .* got .*; "):
        conv_norm_bound(weight, **options)


def test_the_weight_is_left_alone() -> None:
    layer = nn.Conv2d(3, 4, 3)
    before = layer.weight.detach().clone()
    conv_norm_bounds(layer.weight, input_size=40)
    assert torch.equal(layer.weight, before)
    assert layer.weight.grad is None
    assert layer.weight.requires_grad
