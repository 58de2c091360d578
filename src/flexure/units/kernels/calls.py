"""Hands dense float32 CPU tensors to the kernels of `ctu.c`, in the layouts of `layout.py`.

Only memory is handled here: which pointer, how far apart, on which thread. The coefficients come
from `blocked.py`, the library from `build.py`.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from flexure.units.kernels.build import load
from flexure.units.layout import Layout
from flexure.units.plain import LN2, Dial

__all__ = ["Coefficients", "Sums", "backward", "serves", "values"]

# As in ctu.c: the least exponent of a non-zero x where beta = 1, and elsewhere.
EXPONENTS = 127.0
LEAST_EXPONENT = -100.0
SUMS = 4
# Coefficients that vary by column are repeated until their period is at least this long.
SHORTEST_PERIOD = 512
# Elements worth a thread of their own. Threads of Python compete with those of torch, which spin
# for milliseconds after each pass: below this, one thread alone was faster on two cores.
PER_THREAD = 1 << 22
# One thread here is as fast as about three in pure Python, which has all of torch's threads for
# tensors of more elements than the second number.
AS_FAST_AS_THREADS = 2
SMALL = 1 << 16


class Coefficients(Protocol):
    """What `blocked.py` computes from the dials."""

    @property
    def c(self) -> Dial:
        """c"""

    @property
    def fall(self) -> Dial:
        """-eta"""

    @property
    def decay(self) -> Dial:
        """-gamma/log 2"""

    @property
    def soft(self) -> Dial:
        """(1-c)·(1-beta)"""

    @property
    def relu(self) -> Tensor | None:
        """where beta = 1"""


class Sums:
    """The sums of a backward pass, to be read like `layout.Totals`."""

    def __init__(self, sums: Tensor) -> None:
        self._sums = sums

    def result(self, index: int) -> Tensor:
        """The total in float64, as `Layout.spread`."""
        return self._sums[index]


def serves(*tensors: Tensor) -> bool:
    """Whether a kernel is loaded, can read the memory of these dense tensors, and is the faster."""
    return (
        load() is not None
        and torch._C._len_torch_dispatch_stack() == 0  # a mode would not see what a kernel does
        and all(map(_is_memory, tensors))
        and _pays(tensors[0].numel())
    )


def values(source: Tensor, target: Tensor, layout: Layout, k: Coefficients) -> None:
    """Writes the values at `source` into `target`: dense, of the same strides, or the same."""
    library, plan = _library(), _Plan(source, layout, k)
    x, y = source.data_ptr(), target.data_ptr()

    def run(first: int, n: int, number: int) -> None:
        at = 4 * first
        if plan.period:
            library.flexure_ctu_columns(x + at, y + at, n, *plan.columns())
        else:
            library.flexure_ctu_rows(x + at, y + at, *plan.rows(first, n))

    _each(run, plan.pieces())
    if target is source and not source.is_inference():
        torch.autograd.graph.increment_version(source)


def backward(
    grad: Tensor, x: Tensor, layout: Layout, k: Coefficients, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Sums]:
    """`grad` times the slope at a dense `x`, if needed, and the sums of `_ctu_sums` in blocked.py.

    Without need of a derivative in a dial the sums are undefined.
    """
    if grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    library, plan = _library(), _Plan(x, layout, k)
    target = torch.empty_like(x) if needs[0] else None
    pieces = plan.pieces()
    sums = plan.sums(len(pieces))
    xs, gs, adds = x.data_ptr(), grad.data_ptr(), any(needs[1:])
    ys = 0 if target is None else target.data_ptr()

    def run(first: int, n: int, number: int) -> None:
        at = 4 * first
        memory = (xs + at, gs + at, ys + at if ys else None)
        index = first // plan.unit if plan.by_row else number
        total = sums[index] if plan.period else sums[:, index]
        into = total.data_ptr() if adds else None
        if plan.period:
            library.flexure_ctu_columns_backward(*memory, n, *plan.columns(), into)
        else:
            library.flexure_ctu_rows_backward(*memory, *plan.rows(first, n), into, sums.stride(0))

    _each(run, pieces)
    return target, Sums(plan.gathered(sums))


class _Plan:
    """How one tensor is cut into pieces for threads, and the table of coefficients for it.

    Attributes:
        period: length of the table if coefficients vary by column, else 0.
        by_row: whether they vary by row.
        unit: pieces are multiples of so many elements, but for the last.
    """

    def __init__(self, x: Tensor, layout: Layout, k: Coefficients) -> None:
        self._elements = x.numel()
        self._places = layout.columns
        self.by_row = layout.varies == "row"
        table = _table(layout, k)
        if layout.varies == "column":
            repeats = -(-SHORTEST_PERIOD // self._places)
            table = table.repeat(1, min(repeats, layout.rows))
        self._table = table.contiguous()
        self._width = table.shape[1]
        self.period = self._width if layout.varies == "column" else 0
        self.unit = self.period or (self._places if self.by_row else 1)

    def pieces(self) -> list[tuple[int, int]]:
        """First element and number of elements of each piece."""
        threads = max(1, min(torch.get_num_threads(), self._elements // PER_THREAD))
        length = -(-self._elements // (threads * self.unit)) * self.unit
        firsts = range(0, self._elements, length)
        return [(first, min(length, self._elements - first)) for first in firsts]

    def rows(self, first: int, n: int) -> tuple[int, ...]:
        """Arguments of the kernels by rows: rows, columns, table, its width, its step."""
        table = self._table.data_ptr()
        if not self.by_row:
            return 1, n, table, self._width, 0
        step = int(self._width > 1)
        start = first // self.unit * step
        return n // self.unit, self.unit, table + 4 * start, self._width, step

    def columns(self) -> tuple[int, int]:
        """Arguments of the kernels by columns: table, its width."""
        return self._table.data_ptr(), self._width

    def sums(self, pieces: int) -> Tensor:
        """Room for the sums of every row, every piece, or every place in every piece."""
        if self.period:
            return torch.zeros((pieces, SUMS, self.period), dtype=torch.float64)
        count = self._elements // self.unit if self.by_row else pieces
        return torch.zeros((SUMS, count), dtype=torch.float64)

    def gathered(self, sums: Tensor) -> Tensor:
        """The sums as `Layout.spread`, behind a dimension of SUMS."""
        if self.period:
            return sums.sum(0).view(SUMS, -1, self._places).sum(1, keepdim=True)
        return sums.unsqueeze(2) if self.by_row else sums.sum(1)


def _table(layout: Layout, k: Coefficients) -> Tensor:
    """`(5, width)`: one column for every row or column of the view, or one for all of them."""
    relu: Dial = LEAST_EXPONENT
    gate = k.c
    if k.relu is not None:
        relu = torch.where(k.relu, EXPONENTS, LEAST_EXPONENT)
        gate = torch.where(k.relu, 0.0, k.c)
    rows = (k.fall * (-1.0 / LN2), -k.decay, gate, k.soft, relu)
    if not any(isinstance(v, Tensor) for v in rows):
        return torch.tensor(rows, dtype=torch.float32).unsqueeze(1)
    flat = [torch.as_tensor(v, dtype=torch.float32).reshape(-1) for v in rows]
    width = max(len(v) for v in flat)
    return torch.stack([v.expand(width) for v in flat])


def _is_memory(t: Tensor) -> bool:
    """Whether what a tensor means is what its memory says."""
    return (
        t.dtype == torch.float32
        and t.device.type == "cpu"
        and t.layout == torch.strided
        and type(t) in (Tensor, torch.nn.Parameter)
        and t.numel() > 0
        and not t.is_neg()
        and not t._is_zerotensor()
    )


def _pays(elements: int) -> bool:
    """Whether the kernel is faster than torch's threads."""
    threads = torch.get_num_threads()
    few = threads <= AS_FAST_AS_THREADS or elements <= SMALL
    return few or elements // threads >= PER_THREAD


def _each(run: Callable[[int, int, int], None], pieces: list[tuple[int, int]]) -> None:
    """Calls `run(first, n, number)` for every piece, each on a thread of its own."""
    others = [
        threading.Thread(target=run, args=(*piece, number))
        for number, piece in enumerate(pieces[1:], start=1)
    ]
    for thread in others:
        thread.start()
    run(*pieces[0], 0)
    for thread in others:
        thread.join()


@functools.cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its arguments, as in ctu.c."""
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    table, rows = (pointer, count), (count, count, pointer, count, count)
    for name, types in {
        "rows": (pointer, pointer, *rows),
        "columns": (pointer, pointer, count, *table),
        "rows_backward": (pointer, pointer, pointer, *rows, pointer, count),
        "columns_backward": (pointer, pointer, pointer, count, *table, pointer),
    }.items():
        function = getattr(library, f"flexure_ctu_{name}")
        function.argtypes, function.restype = types, None
    return library


def _library() -> ctypes.CDLL:
    library = load()
    if library is None:
        raise RuntimeError("expected a loaded kernel, got none; ask serves() first")
    return _declared(library)
