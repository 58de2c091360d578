"""Upper bounds of the operator norms of linear layers between l1, l2 and l-infinity.

The spectral norm of matrices and convolutions is that of `spectral.py`; here are the norms that
rows and columns give, and all of them for scalings and average pooling. Which function a module of
PyTorch needs is in `of_module.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flexure.contracts import FlexureError
from flexure.layers.geometry import Axis, Padding, Sizes, convolution_axes, per_axis
from flexure.layers.gram import gram_norm_bound, rounded_up
from flexure.layers.spectral import conv_norm_bound, linear_norm_bound, power_of_two

__all__ = [
    "NormBounds",
    "adaptive_avg_pool_norm_bounds",
    "avg_pool_norm_bounds",
    "batch_norm_norm_bounds",
    "conv_norm_bounds",
    "linear_norm_bounds",
    "scale_norm_bounds",
]


@dataclass(frozen=True)
class NormBounds:
    """Upper bounds of a linear map's norms; a transposed map has rows and columns exchanged.

    Attributes:
        spectral: l2 to l2, the largest singular value.
        row: l2 to l-infinity, the largest 2-norm of a row.
        column: l1 to l2, the largest 2-norm of a column.
        row_sum: l-infinity to l-infinity, the largest absolute row sum.
        column_sum: l1 to l1, the largest absolute column sum.
    """

    spectral: float
    row: float
    column: float
    row_sum: float
    column_sum: float

    def transposed(self) -> NormBounds:
        """Those of the transposed map."""
        return NormBounds(self.spectral, self.column, self.row, self.column_sum, self.row_sum)

    def times(self, other: NormBounds) -> NormBounds:
        """Those of the Kronecker product, exact if both are."""
        return NormBounds(
            *(rounded_up(getattr(self, name) * getattr(other, name)) for name in _FIELDS)
        )


_FIELDS = ("spectral", "row", "column", "row_sum", "column_sum")


def linear_norm_bounds(weight: Tensor) -> NormBounds:
    """All norms of a matrix `(out, in)`; all but the spectral one exact up to rounding.

    Raises:
        FlexureError: another shape, or a weight that is not finite.
    """
    return NormBounds(linear_norm_bound(weight), *_entries(weight.detach().cpu().double()))


def conv_norm_bounds(
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
) -> NormBounds:
    """All norms of a convolution; arguments and errors as in `conv_norm_bound`.

    Rows and columns are those of the interior, where no tap falls into the padding: exact where
    the layer has such a row or column, above the truth where it has none. An input point is read
    by the taps of one residue class of the stride. Copies made by reflect, replicate and irregular
    circular padding count as in `Embedding`: row sums never grow by them, column sums and 2-norms
    of columns by at most their number, 2-norms of rows by at most its root.
    """
    spectral = conv_norm_bound(
        weight,
        input_size=input_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        transposed=transposed,
        output_padding=output_padding,
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
    kernels = weight.detach().cpu().double()
    kernels = kernels.reshape(groups, -1, *kernels.shape[1:])
    bounds = _convolution(kernels, axes, spectral)
    return bounds.transposed() if transposed else bounds


def scale_norm_bounds(scale: Tensor) -> NormBounds:
    """All norms of a diagonal matrix: the largest absolute entry of `scale`, any shape."""
    largest = rounded_up(_largest(scale.detach().cpu().double().abs()), 0)
    return NormBounds(*(largest,) * len(_FIELDS))


def batch_norm_norm_bounds(
    running_var: Tensor | None, weight: Tensor | None = None, *, eps: float = 1e-5
) -> NormBounds:
    """All norms of batch normalisation in eval mode: max |weight|/sqrt(running_var + eps).

    Args:
        running_var: `(channels,)`.
        weight: `(channels,)`; None: 1.
        eps: as in PyTorch.

    Raises:
        FlexureError: there are no running statistics: in eval mode too it then normalises by the
            batch, which is not linear. Or a factor is not finite (a variance of 0 and no eps).
    """
    if running_var is None:
        raise FlexureError(
            "expected batch normalisation with running statistics, got none; a layer that "
            "normalises by its batch has no operator norm"
        )
    scale = (running_var.detach().cpu().double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.detach().cpu().double()
    if not bool(torch.isfinite(scale).all()):
        raise FlexureError(
            "expected positive variances and finite weights, got a factor that is nan or inf; "
            "give eps > 0, or check the running statistics"
        )
    return scale_norm_bounds(scale)


def avg_pool_norm_bounds(
    input_size: Sequence[int],
    kernel_size: Sizes,
    *,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> NormBounds:
    """All norms of average pooling: the Kronecker product of those along each axis, exact.

    Args:
        input_size: the spatial size, one number an axis.
        kernel_size: as in PyTorch, likewise the others.
        stride: None: the kernel's size.
        padding: zeros on either side.
        ceil_mode: whether a window may leave the padded input.
        count_include_pad: whether zeros of the padding count in the mean.
        divisor_override: what sums are divided by in place of the window's size.

    Raises:
        FlexureError: a number of sizes that is not that of axes.
    """
    spatial = len(input_size)
    kernels = per_axis("kernel_size", kernel_size, spatial)
    strides = kernels if stride is None else per_axis("stride", stride, spatial)
    paddings = per_axis("padding", padding, spatial)

    def pool(basis: Tensor, i: int) -> Tensor:
        counted = count_include_pad and divisor_override is None
        means = F.avg_pool1d(basis, kernels[i], strides[i], paddings[i], ceil_mode, counted)
        if divisor_override is None:
            return means
        # Means of what is inside have entries 1/count: all that are not 0 become 1.
        return (means > 0).double()

    bounds = _separable(input_size, pool)
    if divisor_override is None:
        return bounds
    return bounds.times(NormBounds(*(1.0 / abs(divisor_override),) * len(_FIELDS)))


def adaptive_avg_pool_norm_bounds(
    input_size: Sequence[int], output_size: int | Sequence[int | None] | None
) -> NormBounds:
    """All norms of adaptive average pooling, exact; sizes as in PyTorch."""
    if output_size is None or isinstance(output_size, int):
        output_size = (output_size,) * len(input_size)
    targets = [
        have if want is None else want for have, want in zip(input_size, output_size, strict=True)
    ]
    return _separable(input_size, lambda basis, i: F.adaptive_avg_pool1d(basis, targets[i]))


def _entries(matrix: Tensor) -> tuple[float, float, float, float]:
    """Row, column, row sum and column sum of a float64 matrix, rounded up."""
    rows, columns = matrix.shape
    scale = power_of_two(matrix)
    matrix = matrix / scale
    size = matrix.abs()
    return (
        scale * rounded_up(_largest(torch.linalg.vector_norm(matrix, dim=1)), columns),
        scale * rounded_up(_largest(torch.linalg.vector_norm(matrix, dim=0)), rows),
        scale * rounded_up(_largest(size.sum(1)), columns),
        scale * rounded_up(_largest(size.sum(0)), rows),
    )


def _largest(values: Tensor) -> float:
    """0 of none: a map from or to nothing."""
    return float(values.max()) if values.numel() else 0.0


def _convolution(kernels: Tensor, axes: Sequence[Axis], spectral: float) -> NormBounds:
    """All norms of a convolution with kernels `(groups, rows, columns, *kernel)`."""
    tori = [axis.embedding for axis in axes]
    copies = math.prod(torus.copies for torus in tori)
    overlap = math.prod(torus.overlap for torus in tori)
    column = column_sum = 0.0
    scale = power_of_two(kernels)
    kernels = kernels / scale
    for residue in itertools.product(*(range(torus.stride) for torus in tori)):
        reading = _taps_of(kernels, axes, residue)
        column = max(column, float((reading**2).flatten(3).sum((1, 3)).max()))
        column_sum = max(column_sum, float(reading.abs().flatten(3).sum((1, 3)).max()))
    flat = kernels.flatten(2)
    row = float((flat**2).sum(-1).max())
    row_sum = float(flat.abs().sum(-1).max())
    count = kernels[0].numel()
    return NormBounds(
        spectral,
        row=scale * rounded_up(math.sqrt(row * overlap), count),
        column=scale * rounded_up(math.sqrt(column * _folded(axes)) * copies, count),
        row_sum=scale * rounded_up(row_sum, count),
        column_sum=scale * rounded_up(column_sum * copies, count),
    )


def _taps_of(kernels: Tensor, axes: Sequence[Axis], residue: Sequence[int]) -> Tensor:
    """The kernels with the taps that read points of one residue class of the stride alone."""
    for i, (axis, rest) in enumerate(zip(axes, residue, strict=True)):
        places = torch.arange(axis.kernel) * axis.dilation % axis.embedding.stride
        keep = (places == rest).to(kernels.dtype)
        kernels = kernels * keep.reshape(-1, *(1,) * (len(axes) - 1 - i))
    return kernels


def _folded(axes: Sequence[Axis]) -> int:
    """How many taps of a kernel that is longer than its torus meet in one entry of a column."""
    return math.prod(a.embedding.overlap for a in axes if a.embedding.copies == 1)


def _separable(sizes: Sequence[int], apply: Callable[[Tensor, int], Tensor]) -> NormBounds:
    """The norms of a Kronecker product of matrices, each given by what it does to unit vectors."""
    total = NormBounds(*(1.0,) * len(_FIELDS))
    for i, size in enumerate(sizes):
        matrix = apply(torch.eye(size, dtype=torch.float64)[:, None], i)[:, 0].mT
        total = total.times(NormBounds(gram_norm_bound([matrix[None]]), *_entries(matrix)))
    return total
