"""How a tensor and the dials that broadcast against it are cut into blocks that fit a cache.

Shapes and views only: no arithmetic on values except the sums that undo a broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexure.contracts import FlexureError

__all__ = ["Layout", "Totals", "dense", "padded", "widest"]

# Elements of one block on one thread: a few buffers of it fit a cache and are cheap to map, and
# the fixed cost of a pass (a microsecond) is small against the pass. Threads get twice as much
# each, because they meet after every pass; the limit keeps the temporaries small on many cores.
# benchmarks/units.py measures it.
CPU_BLOCK = 1 << 17
LARGEST_CPU_BLOCK = 1 << 21
# Where launching a pass is what costs, blocks only bound the memory of the temporaries.
DEVICE_BLOCK = 1 << 25
# Fewer contiguous elements per dial value, and the dials are repeated to make rows longer.
SHORTEST_ROW = 128


def dense(x: Tensor) -> Tensor:
    """`x` itself if it fills its memory without gaps or overlaps, else a copy that does."""
    if x.permute(_memory_order(x)).is_contiguous():
        return x
    return torch.empty_like(x).copy_(x)


def padded(dial: Tensor, x: Tensor) -> tuple[int, ...]:
    """The shape of `dial` with as many dimensions as `x`.

    Raises:
        FlexureError: it does not broadcast to the shape of `x`.
    """
    shape = (1,) * (x.dim() - dial.dim()) + tuple(dial.shape)
    if dial.numel() == 1:
        return (1,) * x.dim()
    if len(shape) == x.dim() and all(p in (1, n) for p, n in zip(shape, x.shape, strict=True)):
        return shape
    raise FlexureError(
        f"expected beta and c to broadcast to the input's shape {tuple(x.shape)}, got shape "
        f"{tuple(dial.shape)}; for channels on axis 1 of (N, C, H, W) use shape (C, 1, 1)"
    )


@dataclass(frozen=True)
class Layout:
    """A dense tensor in memory order, as `(rows, columns)`, or flat where no dial varies.

    Attributes:
        order: the dimensions, outermost in memory first.
        sizes: their sizes, in that order.
        split: dimensions before it make up the rows, the others the columns.
        varies: what distinguishes the dials' values: `"row"`, `"column"` or nothing.
        device: where the tensor lives.
    """

    order: tuple[int, ...]
    sizes: tuple[int, ...]
    split: int
    varies: str | None
    device: torch.device

    @classmethod
    def of(cls, x: Tensor, dials: Sequence[Tensor]) -> Layout:
        """The layout of a dense `x` for dials that broadcast to its shape.

        Raises:
            FlexureError: a dial does not broadcast to the shape of `x`.
        """
        order = _memory_order(x)
        sizes = tuple(x.shape[d] for d in order)
        shapes = [padded(p, x) for p in dials]
        varying = [any(shape[d] > 1 for shape in shapes) for d in order]
        if not any(varying):
            return cls(order, sizes, 0, None, x.device)
        last = len(order) - varying[::-1].index(True)
        if math.prod(sizes[last:]) >= SHORTEST_ROW:
            return cls(order, sizes, last, "row", x.device)
        return cls(order, sizes, varying.index(True), "column", x.device)

    @property
    def rows(self) -> int:
        """Length of the first dimension of `view`; 1 where it is flat."""
        return math.prod(self.sizes[: self.split])

    @property
    def columns(self) -> int:
        """Length of the last dimension of `view`."""
        return math.prod(self.sizes[self.split :])

    def view(self, x: Tensor) -> Tensor:
        """`x`, laid out like the tensor of `of`, as `(rows, columns)` or `(columns,)`."""
        x = x.permute(self.order)
        return x.view(-1) if self.varies is None else x.view(self.rows, self.columns)

    def blocks(self, x: Tensor, times: int = 1) -> tuple[Tensor, ...]:
        """`view` cut along its first dimension; the last block may be shorter.

        Args:
            x: laid out like the tensor of `of`.
            times: the usual size, for work whose few buffers leave room in the cache.
        """
        return torch.split(self.view(x), times * self._step())

    def buffers(self, count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """`count` uninitialised tensors of the size of the first block."""
        if self.varies is None:
            shape: tuple[int, ...] = (min(self._step(), self.columns),)
        else:
            shape = (min(self._step(), self.rows), self.columns)
        return torch.empty((count, *shape), dtype=dtype, device=self.device).unbind(0)

    def parts(self, dial: Tensor) -> tuple[Tensor, ...] | None:
        """A dial as `spread`, cut like `blocks`; None where every block uses all of it."""
        return torch.split(dial, self._step()) if self.varies == "row" and dial.dim() else None

    def spread(self, dial: Tensor) -> Tensor:
        """A dial as `(rows, 1)`, `(1, columns)` or `()`: it broadcasts against `view`."""
        if dial.numel() == 1:
            return dial.reshape(())
        if self.varies is None:  # an axis without channels
            return dial.reshape(-1)
        rank = len(self.order)
        dial = dial.reshape((1,) * (rank - dial.dim()) + dial.shape).permute(self.order)
        if self.varies == "row":
            shape = self.sizes[: self.split] + (1,) * (rank - self.split)
            return dial.expand(shape).reshape(-1, 1)
        shape = (1,) * self.split + self.sizes[self.split :]
        return dial.expand(shape).reshape(1, -1)

    def gather(self, sums: Tensor, dial: Tensor) -> Tensor:
        """The transpose of `spread`: sums per row or column, summed to the shape of `dial`."""
        if dial.numel() == 0:
            return sums.new_zeros(dial.shape)
        if self.varies is None or dial.numel() == 1:
            return sums.sum().reshape(dial.shape)
        rank = len(self.order)
        if self.varies == "row":
            sums = sums.reshape(self.sizes[: self.split] + (1,) * (rank - self.split))
        else:
            sums = sums.reshape((1,) * self.split + self.sizes[self.split :])
        back = [self.order.index(d) for d in range(rank)]
        padded = (1,) * (rank - dial.dim()) + tuple(dial.shape)
        return sums.permute(back).sum_to_size(padded).reshape(dial.shape)

    def _step(self) -> int:
        if self.device.type == "cpu":
            threads = torch.get_num_threads()
            block = CPU_BLOCK if threads == 1 else min(2 * CPU_BLOCK * threads, LARGEST_CPU_BLOCK)
        else:
            block = DEVICE_BLOCK
        return block if self.varies is None else max(1, block // max(1, self.columns))


class Totals:
    """Sums of products over everything that shares a dial's value, gathered block by block."""

    def __init__(self, layout: Layout, count: int, dtype: torch.dtype) -> None:
        self._varies = layout.varies
        self._parts: list[list[Tensor]] = [[] for _ in range(count)]
        if self._varies == "column":
            shape = (count, 1, layout.columns)
            self._sums = torch.zeros(shape, dtype=dtype, device=layout.device).unbind(0)

    def add(self, index: int, p: Tensor, q: Tensor, room: Tensor) -> None:
        """Adds the sum of `p·q` over the next block; `room` is overwritten."""
        if self._varies is None:
            self._parts[index].append(torch.dot(p, q))
        elif self._varies == "row":
            self._parts[index].append(torch.sum(torch.mul(p, q, out=room), 1, keepdim=True))
        else:
            self._sums[index].add_(torch.sum(torch.mul(p, q, out=room), 0, keepdim=True))

    def put(self, index: int, total: Tensor) -> None:
        """Adds the sum over the next block of a flat layout, taken elsewhere."""
        self._parts[index].append(total)

    def result(self, index: int) -> Tensor:
        """The total in float64 (in the working dtype where a device has none), as `spread`."""
        if self._varies == "column":
            return widest(self._sums[index])
        if self._varies == "row":
            return widest(torch.cat(self._parts[index]))
        return widest(torch.stack(self._parts[index])).sum()


def widest(x: Tensor) -> Tensor:
    """`x` in float64, or as it is on a device without it."""
    return x if x.device.type == "mps" else x.double()


def _memory_order(x: Tensor) -> tuple[int, ...]:
    strides = x.stride()
    return tuple(sorted(range(x.dim()), key=lambda d: -strides[d]))
