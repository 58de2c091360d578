"""Certified upper bounds of the l2 operator norm of linear layers and convolutions.

What is bounded is the linear map from the whole input of one sample to its whole output, for any
input size, stride, padding, padding mode, dilation and groups. Other norms and other layers are in
`norms.py`; the arithmetic of the bound in `gram.py`; the embedding in a torus in `geometry.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from flexure.contracts import FlexureError
from flexure.layers.geometry import Axis, Padding, Sizes, convolution_axes, padded_axis
from flexure.layers.gram import EPS, ITERATIONS, TOLERANCE, gram_norm_bound

__all__ = ["Route", "conv_norm_bound", "linear_norm_bound", "operator_norm", "power_of_two"]

Route: TypeAlias = Literal["auto", "dense", "torus"]
"""How a convolution is bounded: by its own matrix, by a torus, or the first where it is tiny."""

DENSE_ENTRIES = 2**18
"""Matrices up to this many entries (512 by 512) are iterated themselves."""

CHUNK_ENTRIES = 2**22
"""Matrix entries taken at once: 64 MiB of complex128, a few times over."""


def linear_norm_bound(
    weight: Tensor, *, iterations: int = ITERATIONS, tolerance: float = TOLERANCE
) -> float:
    """An upper bound of the largest singular value of a matrix, by Gram iteration.

    Never below it, rounding included (see `gram_norm_bound`), and within 1e-4 of it at the
    default settings.

    Args:
        weight: `(out, in)`, any floating dtype; computed in float64.
        iterations: squarings at most.
        tolerance: relative distance to a lower bound at which iterating stops.

    Raises:
        FlexureError: another shape, or a weight that is not finite.
    """
    _check_weight(weight, (2,), "(out, in)")
    scaled, scale = _scaled(weight)
    return scale * gram_norm_bound([scaled[None]], iterations=iterations, tolerance=tolerance)


def conv_norm_bound(
    weight: Tensor,
    *,
    input_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: Sizes = 0,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
    route: Route = "auto",
) -> float:
    """An upper bound of the l2 operator norm of a convolution in 1, 2 or 3 dimensions.

    A zero-padded convolution is a part (some rows and columns) of a periodic one on a torus that
    is large enough, so that its norm is at most that one's; a circularly padded one whose stride
    divides the input is the periodic one. The periodic convolution is block-diagonal in frequency:
    with stride s on N points, frequency f of the output has the block `(C(f), C(f + N/s), ...) /
    sqrt(s)`, C the transform of the kernel, `(out, in)` (polyphase form), and its Gram matrices
    are iterated. Reflect, replicate and irregular circular padding multiply by the norm of the
    padding operator. A transposed convolution has the norm of the one that it transposes. Small
    layers are bounded by their own matrix, which is tight for every mode.

    Never below the norm, rounding included. Above it by the torus' looseness: none for regular
    circular padding; `tests/layers/test_spectral.py` measures the others.

    Args:
        weight: as in PyTorch, `(out, in/groups, *kernel)`, transposed `(in, out/groups, *kernel)`.
        input_size: the spatial size of the layer's input; a number stands for all axes.
        stride: as in PyTorch.
        padding: as in PyTorch, or `(before, after)` for each axis.
        dilation: as in PyTorch.
        groups: as in PyTorch.
        padding_mode: `"zeros"`, `"circular"`, `"reflect"` or `"replicate"`.
        transposed: whether it is a transposed convolution.
        output_padding: of a transposed convolution.
        iterations: as in `gram_norm_bound`.
        tolerance: likewise.
        route: see `Route`.

    Raises:
        FlexureError: arguments that do not fit together, or a weight that is not finite.
    """
    _check_weight(weight, (3, 4, 5), "(out, in/groups, *kernel)")
    if groups < 1 or weight.shape[0] % groups:
        raise FlexureError(
            f"expected groups that divide the {weight.shape[0]} rows of the weight, got {groups}; "
            "give the layer's own groups"
        )
    axes = convolution_axes(
        weight.shape[2:],
        input_size=input_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        padding_mode=padding_mode,
        transposed=transposed,
        output_padding=output_padding,
    )
    scaled, scale = _scaled(weight)
    kernels = scaled.reshape(groups, -1, *scaled.shape[1:])
    settings = {"iterations": iterations, "tolerance": tolerance}
    if route == "dense" or (route == "auto" and _dense_entries(kernels, axes) <= DENSE_ENTRIES):
        return scale * gram_norm_bound(_dense_blocks(kernels, axes), **settings)  # type: ignore[arg-type]
    bound = gram_norm_bound(_frequency_blocks(kernels, axes), **settings)  # type: ignore[arg-type]
    copies = math.prod(axis.embedding.copies for axis in axes)
    return scale * (bound + _symbol_error(kernels)) * math.sqrt(copies) * (1.0 + 4 * EPS)


def operator_norm(
    apply: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    *,
    iterations: int = 100,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> float:
    """A lower bound of the l2 operator norm of any linear map, by power iteration on AᵀA.

    The transpose is autograd's. The result is `‖Av‖` for a unit vector v, so never above the norm
    (rounding aside), and grows towards it: the counterpart of the upper bounds, and independent
    of them.

    Args:
        apply: a differentiable map that is linear up to a constant (a bias is taken off).
        shape: of its input, batch dimension included if `apply` wants one.
        iterations: products with A and with its transpose.
        generator: of the CPU, for the start vector; None: seed 0.
        dtype: of the vectors; the map's own.
        device: of the vectors.
    """
    generator = generator or torch.Generator().manual_seed(0)
    v = torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)
    v = v / v.norm()
    with torch.enable_grad():
        constant = apply(torch.zeros_like(v)).detach()
        largest = 0.0
        for _ in range(iterations):
            v = v.detach().requires_grad_()
            image = apply(v) - constant
            largest = max(largest, float(image.detach().norm()))
            (back,) = torch.autograd.grad(image, v, image.detach())
            size = back.norm()
            if not bool(size > 0):
                break
            v = back / size
    return largest


def power_of_two(values: Tensor) -> float:
    """That above the largest entry, by which entries can be divided so that squares stay finite."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    return 2.0 ** min(math.frexp(largest)[1], 1023) if 0 < largest < math.inf else 1.0


def _check_weight(weight: Tensor, ndims: tuple[int, ...], shape: str) -> None:
    if weight.ndim not in ndims or not weight.is_floating_point():
        raise FlexureError(
            f"expected a floating-point weight of shape {shape}, got {weight.dtype} "
            f"{tuple(weight.shape)}; pass the layer's weight"
        )
    if not bool(torch.isfinite(weight).all()):
        raise FlexureError("expected a finite weight, got nan or inf; check the model's weights")


def _scaled(weight: Tensor) -> tuple[Tensor, float]:
    """The weight in float64, divided by a power of two that brings its largest entry below 1."""
    wide = weight.detach()
    # The one accelerator type without float64 computes on the CPU.
    wide = wide.cpu() if wide.device.type == "mps" else wide
    wide = wide.double()
    scale = power_of_two(wide)
    return wide / scale, scale


def _dense_entries(kernels: Tensor, axes: Sequence[Axis]) -> int:
    groups, rows, columns = kernels.shape[:3]
    points = math.prod(axis.size for axis in axes) * math.prod(axis.windows for axis in axes)
    return groups * rows * columns * points


def _dense_blocks(kernels: Tensor, axes: Sequence[Axis]) -> Iterator[Tensor]:
    """The matrix of each group, `(1, outputs, inputs)`: the convolution of every unit vector."""
    columns = kernels.shape[2]
    sizes = [axis.size for axis in axes]
    count = columns * math.prod(sizes)
    basis = torch.eye(count, dtype=kernels.dtype, device=kernels.device)
    basis = basis.reshape(count, columns, *sizes)
    for i, axis in enumerate(axes):
        basis = padded_axis(basis, axis, i, len(axes))
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(axes) - 1]
    strides, dilations = [a.stride for a in axes], [a.dilation for a in axes]
    for kernel in kernels:
        images = convolve(basis, kernel, stride=strides, dilation=dilations)
        for i, axis in enumerate(axes):
            images = images.narrow(2 + i, 0, axis.windows)
        yield images.reshape(count, -1).mT[None]


def _frequency_blocks(kernels: Tensor, axes: Sequence[Axis]) -> Iterator[Tensor]:
    """The blocks of the periodic convolution, `(B, out, in·strides)` over groups and frequencies.

    The kernel is real, so that block −f is the conjugate of block f: one of the two is enough.
    """
    groups, rows, columns = kernels.shape[:3]
    tori = [axis.embedding for axis in axes]
    periods = torch.tensor([torus.period for torus in tori])
    coarse = torch.tensor([torus.period // torus.stride for torus in tori])
    taps = _grid([axis.kernel for axis in axes]) * torch.tensor([a.dilation for a in axes])
    aliases = _grid([torus.stride for torus in tori]) * coarse
    flat = kernels.reshape(groups * rows * columns, -1).mT
    frequencies = _half(_grid(coarse.tolist()), coarse)
    step = max(1, CHUNK_ENTRIES // (len(aliases) * flat.shape[1]))
    for some in torch.split(frequencies, step):
        at = (some[:, None, :] + aliases).reshape(-1, len(axes))
        # Whole turns are taken off in integers: the angles are then accurate to their last digit.
        turns = ((at[:, None, :] * taps) % periods).double() / periods
        angles = (2.0 * math.pi * (turns.sum(-1) % 1.0)).to(flat.device)
        symbol = torch.complex(angles.cos() @ flat, -angles.sin() @ flat)
        symbol = symbol.reshape(len(some), len(aliases), groups, rows, columns)
        blocks = symbol.permute(0, 2, 3, 1, 4).reshape(len(some) * groups, rows, -1)
        yield blocks / math.sqrt(len(aliases))


def _grid(sizes: Sequence[int]) -> Tensor:
    """All points of a grid, `(product, axes)` int64."""
    return torch.tensor(list(itertools.product(*(range(size) for size in sizes))))


def _half(points: Tensor, sizes: Tensor) -> Tensor:
    """Of every point and its negative on a torus, the one that comes first in the grid."""
    place = torch.tensor([math.prod(sizes[i + 1 :].tolist()) for i in range(len(sizes))])
    return points[(points * place).sum(1) <= ((-points % sizes) * place).sum(1)]


def _symbol_error(kernels: Tensor) -> float:
    """A bound of the 2-norm of the rounding errors of a frequency's block, for scaled weights."""
    taps = math.prod(kernels.shape[3:])
    absolute = kernels.abs().flatten(3).sum(-1)
    largest = float(torch.linalg.matrix_norm(absolute).max()) if absolute.numel() else 0.0
    return 4.0 * (taps + 16) * EPS * largest
