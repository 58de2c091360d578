"""Where a convolution reads and writes along each axis, and the torus that it fits on.

Says which periodic convolution a padded, strided, dilated convolution is a part of. Norms are
computed in `spectral.py` and `norms.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from flexure.contracts import FlexureError, is_number

__all__ = ["Axis", "Embedding", "Padding", "Sizes", "convolution_axes", "per_axis"]

Sizes = int | Sequence[int]
"""One number for all axes, or one an axis."""

Padding = int | str | Sequence[int | tuple[int, int]]
"""`"same"`, `"valid"`, a number, or for each axis a number or what is added before and after."""

MODES = ("zeros", "circular", "reflect", "replicate")


@dataclass(frozen=True)
class Embedding:
    """One axis of a convolution, as a part of a periodic one.

    The operator's 2-norm is at most sqrt(copies) times that of the periodic convolution of
    `period` points whose outputs are every `stride`-th.

    Attributes:
        period: points of the torus, a multiple of `stride`.
        stride: between outputs on the torus.
        copies: how many points of the padded input one input point fills at most.
        overlap: how many taps of one window read the same input point at most.
        exact: whether the periodic convolution is the operator itself.
    """

    period: int
    stride: int
    copies: int
    overlap: int
    exact: bool


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution (of the convolution that a transposed one transposes).

    Attributes:
        size: input points.
        kernel: taps.
        stride: between windows.
        before: points of padding before the first, after the last.
        after: likewise.
        dilation: between taps.
        mode: the padding mode.
        outputs: windows that count; None: all that fit.
    """

    size: int
    kernel: int
    stride: int = 1
    before: int = 0
    after: int = 0
    dilation: int = 1
    mode: str = "zeros"
    outputs: int | None = None

    @property
    def window(self) -> int:
        """Points from the first to the last tap."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def padded(self) -> int:
        """Points with the padding."""
        return self.before + self.size + self.after

    @property
    def windows(self) -> int:
        """Output points."""
        fitting = (self.padded - self.window) // self.stride + 1
        return fitting if self.outputs is None else min(fitting, self.outputs)

    @cached_property
    def embedding(self) -> Embedding:
        """The smallest torus that the axis fits on.

        Zeros: windows of a torus read what those of the padded input read if the zeros before and
        after, which share their place, are as many as the larger padding, and if no two windows
        start at the same point. Circular: the input is the torus. Reflect and replicate: the
        windows of an input as large as the padded one, with the norm of the padding operator,
        whose square is the largest number of copies of one point (RᵀR is diagonal).
        """
        if self.before == self.after == 0 or self.mode == "zeros":
            return self._on_zeros(self.before, self.size, self.after, 1)
        if self.mode == "circular" and self.stride * (self.windows - 1) < self.size:
            # Where the stride does not divide the torus, its windows are some of those of stride 1.
            fits = self.size % self.stride == 0 and self.stride * self.windows <= self.size
            folds = -(-self.window // self.size)
            full = fits and self.stride * self.windows == self.size
            return Embedding(self.size, self.stride if fits else 1, 1, folds, full)
        return self._on_zeros(0, self.padded, 0, self.copies)

    @cached_property
    def copies(self) -> int:
        """The largest number of times that the padding operator copies a point."""
        if self.mode == "zeros":
            return 1
        places = torch.arange(self.size, dtype=torch.float64)[None, None]
        return int(padded_axis(places, self, 0).long().flatten().bincount().max())

    def _on_zeros(self, before: int, size: int, after: int, copies: int) -> Embedding:
        last = self.stride * (self.windows - 1) + self.window - before
        points = max(min(size, last) + max(before, last - size), self.stride * self.windows)
        period = -(-points // self.stride) * self.stride
        return Embedding(period, self.stride, copies, copies, exact=False)


def convolution_axes(
    kernel: Sequence[int],
    *,
    input_size: Sizes,
    stride: Sizes,
    padding: Padding,
    dilation: Sizes,
    padding_mode: str,
    transposed: bool,
    output_padding: Sizes,
) -> tuple[Axis, ...]:
    """The axes of a convolution, or of that which a transposed convolution transposes.

    Raises:
        FlexureError: arguments that PyTorch would refuse for a layer or its input.
    """
    spatial = len(kernel)
    sizes, strides, dilations, extra = (
        per_axis(name, value, spatial)
        for name, value in (
            ("input_size", input_size),
            ("stride", stride),
            ("dilation", dilation),
            ("output_padding", output_padding),
        )
    )
    if padding_mode not in MODES or (transposed and padding_mode != "zeros"):
        allowed = ("zeros",) if transposed else MODES
        raise FlexureError(f"expected padding_mode in {allowed}, got {padding_mode!r}; choose one")
    axes = []
    for i, (before, after) in enumerate(_paddings(padding, kernel, strides, dilations)):
        size, outputs = sizes[i], None
        if transposed:
            reach = dilations[i] * (kernel[i] - 1) + 1
            size = (sizes[i] - 1) * strides[i] - before - after + reach + extra[i]
            outputs = sizes[i]
        axis = Axis(size, kernel[i], strides[i], before, after, dilations[i], padding_mode, outputs)
        _check(axis)
        axes.append(axis)
    return tuple(axes)


def padded_axis(x: Tensor, axis: Axis, dim: int, spatial: int = 1) -> Tensor:
    """`x`, `(B, C, *sizes)`, padded along spatial axis `dim` of `spatial`."""
    mode = "constant" if axis.mode == "zeros" else axis.mode
    widths = [0] * (2 * spatial)
    widths[2 * (spatial - 1 - dim)] = axis.before
    widths[2 * (spatial - 1 - dim) + 1] = axis.after
    return F.pad(x, widths, mode=mode)


def per_axis(name: str, value: Sizes, spatial: int) -> tuple[int, ...]:
    """One whole number an axis; a sequence of one stands for all, as in PyTorch's functions.

    Raises:
        FlexureError: one is no whole number, or the number of axes is another.
    """
    several = isinstance(value, Sequence) and not isinstance(value, str)
    values: tuple[object, ...] = tuple(value) if several else (value,)  # type: ignore[arg-type]
    whole = tuple(int(x) for x in values if is_number(x) and isinstance(x, Integral))
    full = whole * spatial if len(whole) == 1 else whole
    if len(whole) != len(values) or len(full) != spatial:
        raise FlexureError(
            f"expected {name} to be a whole number or {spatial} of them, got {value!r}; give one "
            f"an axis"
        )
    return full


def _paddings(
    padding: Padding, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """Points before and after, for each axis; `"same"` puts the odd one after, as PyTorch does."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        if any(s != 1 for s in stride):
            raise FlexureError(
                f"expected stride 1 with padding 'same', got {tuple(stride)}; give the padding"
            )
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    if isinstance(padding, str):
        raise FlexureError(
            f"expected padding 'same', 'valid' or numbers, got {padding!r}; give one of them"
        )
    widths = [padding] if isinstance(padding, int) else list(padding)
    widths = widths * len(kernel) if len(widths) == 1 else widths
    if len(widths) != len(kernel):
        raise FlexureError(
            f"expected padding for {len(kernel)} axes, got {padding!r}; give one an axis"
        )
    return [(width, width) if isinstance(width, int) else width for width in widths]


def _check(axis: Axis) -> None:
    limit = {"zeros": None, "replicate": None, "circular": axis.size, "reflect": axis.size - 1}
    widest = limit[axis.mode]
    if widest is not None and max(axis.before, axis.after) > widest:
        raise FlexureError(
            f"expected {axis.mode} padding of at most {widest} for an input of {axis.size}, got "
            f"{(axis.before, axis.after)}; give the input's true size"
        )
    if min(axis.size, axis.kernel, axis.stride, axis.dilation) < 1 or axis.windows < 1:
        raise FlexureError(
            f"expected an input that the kernel fits in, got {axis.size} points with padding "
            f"{(axis.before, axis.after)} for a window of {axis.window}; give the input's true size"
        )
