"""A network as a graph of linear maps and bends, and two passes of bounds over it.

`bounds.py` says what the bounds mean and combines them; `bound_rules.py` turns a network's calls
into nodes. Nothing here looks at a network. All arithmetic is float64 on the CPU.

With T a linear map, |T| the map with the absolute values of its entries, and v a vector of bounds:

- |T u| <= |T| |u| elementwise, and |(T u)_i| <= ‖row i of T‖₂·‖u‖₂;
- ‖T‖₂ <= sqrt(max row sum of |T| · max column sum of |T|) (Schur's test), which is exact for
  views, slices, means and pools without overlap.

Each pass carries both an elementwise bound and one of the 2-norm, and keeps at every node what is
smaller: a bound of the 2-norm bounds each element, and the elements' bounds give one of the 2-norm.

What is too small for float64 is rounded up, never to 0: a later factor may be as large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "WIDE",
    "Bend",
    "Input",
    "LinearMap",
    "Node",
    "Reach",
    "Selection",
    "Sum",
    "Term",
    "backward",
    "norm_of",
    "reaches",
    "rounding",
    "transposed",
]

WIDE: Any = {"dtype": torch.float64, "device": "cpu"}
"""Where all arithmetic happens."""

TINY = torch.finfo(torch.float64).tiny
FAINT = 1e-290
"""A sum of products below it may have lost some of them."""


class LinearMap:
    """A linear map between tensors, known by the magnitudes of its entries.

    Args:
        magnitude: applies |T| to a non-negative tensor of `shape`.
        shape: of what it is applied to, with the batch dimension of 1.
        signed: applies T itself; None: no entry of T is negative.
        squares: applies the map whose entries are the squares of (T/scale)'s; None: they are
            bounded by the largest entry times the entries.
        scale: a power of two near T's largest entry.
        norm: a certified upper bound of ‖T‖₂, computed when needed.
    """

    def __init__(
        self,
        magnitude: Callable[[Tensor], Tensor],
        shape: Sequence[int],
        *,
        signed: Callable[[Tensor], Tensor] | None = None,
        squares: Callable[[Tensor], Tensor] | None = None,
        scale: float = 1.0,
        norm: Callable[[], float] | None = None,
    ) -> None:
        self.magnitude, self.signed = magnitude, signed or magnitude
        self.shape = tuple(shape)
        self.squares = squares
        self.scale = scale
        self._norm = norm

    def pulled(self, bounds: Tensor) -> Tensor:
        """|T|ᵀ of `(K, *output shape)`: `(K, *shape)`."""
        return transposed(self.magnitude, self.shape, bounds)

    @cached_property
    def row_sums(self) -> Tensor:
        """Of |T|, of the output's shape."""
        return self.magnitude(torch.ones(self.shape, **WIDE))

    @cached_property
    def column_sums(self) -> Tensor:
        """Of |T|, of the input's shape."""
        return self.pulled(torch.ones_like(self.row_sums)[None])[0]

    @cached_property
    def row_norms(self) -> Tensor:
        """Bounds of the 2-norms of T's rows, of the output's shape."""
        if self.squares is None:
            squares, scale = self.row_sums, math.sqrt(self._largest)
        else:
            squares, scale = self.squares(torch.ones(self.shape, **WIDE)), self.scale
        return self._root(squares, scale, self.row_sums)

    @cached_property
    def column_norms(self) -> Tensor:
        """Bounds of the 2-norms of T's columns, of the input's shape."""
        if self.squares is None:
            squares, scale = self.column_sums, math.sqrt(self._largest)
        else:
            ones = torch.ones_like(self.row_sums)[None]
            squares, scale = transposed(self.squares, self.shape, ones)[0], self.scale
        return self._root(squares, scale, self.column_sums)

    def _root(self, squares: Tensor, scale: float, sums: Tensor) -> Tensor:
        """`scale·sqrt(squares)`, at most the sums; squares may have lost what is below TINY."""
        lost = TINY * max(math.prod(self.shape), self.row_sums.numel())
        return torch.fmin(sums, (squares + lost).sqrt() * scale)

    @cached_property
    def norm(self) -> float:
        """An upper bound of ‖T‖₂."""
        schur = math.sqrt(_largest(self.row_sums)) * math.sqrt(_largest(self.column_sums))
        return _smallest(schur, math.inf if self._norm is None else self._norm())

    @property
    def _largest(self) -> float:
        """No entry of |T| exceeds its row's sum or its column's."""
        return min(_largest(self.row_sums), _largest(self.column_sums))


class Selection(LinearMap):
    """Maxima over windows: between two inputs they differ by a T that depends on both.

    The difference of two maxima is a mean of the differences of the elements that are largest at
    one or the other: T's rows are means over windows. |T| u is at most the maxima of u >= 0, its
    row sums are 1, and |T|ᵀ v at most each element's sum over the windows that it is in. So
    ‖T‖₂ is at most the root of the largest number of windows that an element is in.

    Args:
        maxima: of a non-negative tensor of `shape`.
        shape: as in `LinearMap`.
        sums: over the same windows, linear.
    """

    def __init__(
        self,
        maxima: Callable[[Tensor], Tensor],
        shape: Sequence[int],
        sums: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(maxima, shape)
        self.sums = sums

    def pulled(self, bounds: Tensor) -> Tensor:
        """At least |T|ᵀ of `(K, *output shape)`, whatever T: `(K, *shape)`."""
        return transposed(self.sums, self.shape, bounds)


@dataclass(frozen=True, eq=False)
class Input:
    """The network's input, `(1, *input_shape)`."""

    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Term:
    """One summand of a linear node: a map applied to the node at `parent`."""

    parent: int
    map: LinearMap


@dataclass(frozen=True, eq=False)
class Sum:
    """A node that is a sum of linear maps of others, plus a constant.

    Attributes:
        shape: of its value.
        terms: the summands.
        disjoint: whether no element of it gets more than one summand (concatenation).
        merged: factors -> the signal of a node that is this one times them, or None; of
            `bound_rules.py`.
    """

    shape: tuple[int, ...]
    terms: tuple[Term, ...]
    disjoint: bool = False
    merged: Callable[[Tensor], Any] | None = None


@dataclass(frozen=True, eq=False)
class Bend:
    """An activation: a function of each element of another node.

    Attributes:
        shape: of its value.
        parent: the node that it is applied to.
        slope: max |φ'| over R, broadcasting to `shape`.
        curvature: max |φ''| over R, likewise.
        name: the module or site, for the table.
    """

    shape: tuple[int, ...]
    parent: int
    slope: Tensor
    curvature: Tensor
    name: str = ""


Node = Input | Sum | Bend
"""Nodes refer to their parents by position in the list, and come after them."""


@dataclass(frozen=True, eq=False)
class Reach:
    """How fast a node can change with the input x.

    Attributes:
        elements: bounds of ‖∂(element)/∂x‖₂, of the node's shape.
        norm: a bound of ‖∂(node)/∂x‖₂, its Lipschitz constant.
    """

    elements: Tensor
    norm: float

    @staticmethod
    def of(elements: Tensor, norm: float) -> Reach:
        """Both bounds, each improved by the other."""
        elements = _defined(elements)
        norm = _smallest(norm, float(norm_of(elements.flatten())))
        return Reach(elements.clamp(max=norm), norm)


def reaches(nodes: Sequence[Node], needed: Sequence[int]) -> dict[int, Reach]:
    """The forward pass: how fast each of the nodes `needed` can change with the input."""
    found: dict[int, Reach] = {}
    for index in needed:
        node = nodes[index]
        if isinstance(node, Input):
            elements, norm = torch.ones(node.shape, **WIDE), 1.0
        elif isinstance(node, Bend):
            before = found[node.parent]
            elements = _times(node.slope, before.elements)
            norm = float(_times(node.slope.max(), before.norm))
        else:
            elements, norm = _summed(node, found)
        found[index] = Reach.of(elements, norm)
    return found


@dataclass(frozen=True, eq=False)
class Bent:
    """What one activation contributes to the Hessian of K functions of the output.

    Attributes:
        node: its position.
        sensitivity: (K,) bounds of max over its units of |∂f/∂a|.
        bound: (K,) bounds of ‖Zᵀ diag(∂f/∂a · φ'') Z‖₂, Z = ∂z/∂x.
    """

    node: int
    sensitivity: Tensor
    bound: Tensor


def backward(
    nodes: Sequence[Node], needed: Sequence[int], reach: dict[int, Reach], seed: Tensor
) -> tuple[list[Bent], Tensor]:
    """The backward pass: what each activation contributes, for K functions of the output.

    Args:
        nodes: the graph; the output is the last of `needed`.
        needed: positions of the nodes that the output depends on, ascending.
        reach: the forward pass's.
        seed: (K, *output shape), bounds of |∂f/∂(output)|; in the 2-norm each f's is at most 1.

    Returns:
        A `Bent` for each activation, and (K,) bounds of ‖∂f/∂x‖₂.
    """
    ones = torch.ones(len(seed), **WIDE)
    pending = {needed[-1]: [(seed, ones)]}
    bent = []
    to_input = torch.zeros(len(seed), **WIDE)
    for index in reversed(needed):
        elements, norms = _met(pending.pop(index))
        node = nodes[index]
        if isinstance(node, Input):
            to_input = norms
        elif isinstance(node, Bend):
            bent.append(_contribution(index, node, reach[node.parent], elements))
            passed = (_times(node.slope, elements), _times(node.slope.max(), norms))
            pending.setdefault(node.parent, []).append(passed)
        else:
            for term in node.terms:
                by_norm = _outer(norms, term.map.column_norms)
                below = _below(term.map.pulled, elements, by_norm)
                passed = (below, _times(norms, term.map.norm))
                pending.setdefault(term.parent, []).append(passed)
    return bent[::-1], to_input


def norm_of(rows: Tensor) -> Tensor:
    """2-norms over the last dimension, whose squares neither vanish nor overflow."""
    if rows.shape[-1] == 0:
        return rows.sum(-1)
    largest = rows.amax(-1)
    plain = (largest == 0) | ~torch.isfinite(largest)
    unit = torch.where(plain, 1.0, largest)
    return torch.where(plain, largest, unit * (rows / unit[..., None]).norm(dim=-1))


def rounding(nodes: Sequence[Node], needed: Sequence[int]) -> float:
    """What a product of a sensitivity and a squared reach is multiplied by to cover rounding.

    All numbers are non-negative, so that errors are relative and add up along the graph: a node's
    bounds are some sums of at most as many terms as it and its parents have elements, and some
    more operations; a product takes each node's three times, forward (squared) and backward.
    """
    elements = sum(math.prod(nodes[index].shape) + 16 for index in needed)
    return 1.0 + 16 * elements * torch.finfo(torch.float64).eps


def _summed(node: Sum, found: dict[int, Reach]) -> tuple[Tensor, float]:
    """Bounds of the elements and of the norm of a sum of maps."""
    elements = torch.zeros(node.shape, **WIDE)
    norms = []
    for term in node.terms:
        before = found[term.parent]
        by_norm = _times(term.map.row_norms, before.norm)
        elements = elements + _below(term.map.magnitude, before.elements, by_norm)
        norms.append(float(_times(torch.tensor(term.map.norm, **WIDE), before.norm)))
    return elements, math.hypot(*norms) if node.disjoint else sum(norms)


def _met(passed: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The sum of what a node's consumers pass back; both bounds, each improved by the other."""
    elements = _defined(sum((e for e, _ in passed[1:]), start=passed[0][0]))
    norms = _defined(sum((n for _, n in passed[1:]), start=passed[0][1]))
    norms = torch.minimum(norms, norm_of(_rows(elements)))
    return torch.minimum(elements, _outer(norms, torch.ones(elements.shape[1:], **WIDE))), norms


def _contribution(index: int, node: Bend, before: Reach, sensitivity: Tensor) -> Bent:
    """‖Zᵀ diag(d) Z‖₂ <= min(max_i |d_i|·‖Z‖₂², Σ_i |d_i|·‖row i of Z‖₂²)."""
    # Roots, whose products stay within float64 where their squares do.
    roots = _rows(_defined(_times(node.curvature, sensitivity))).sqrt()
    by_norm = _times(roots.amax(1), before.norm)
    by_units = norm_of(_times(roots, before.elements.expand(node.shape).flatten()))
    root = torch.fmin(by_norm, by_units)
    bound = _defined(_times(root, root))
    return Bent(index, _rows(sensitivity).amax(1), bound)


def _rows(bounds: Tensor) -> Tensor:
    """`(K, *shape)` as `(K, elements)`, numbers too."""
    return bounds[:, None].flatten(1)


def transposed(apply: Callable[[Tensor], Tensor], shape: Sequence[int], given: Tensor) -> Tensor:
    """The transpose of a linear function of a tensor of `shape`, of each of K tensors."""
    zeros = torch.zeros(tuple(shape), **WIDE)
    pull: Any = torch.func.vjp(apply, zeros)[1]
    result: Tensor = torch.func.vmap(lambda row: pull(row)[0])(given)
    return result


def _below(apply: Callable[[Tensor], Tensor], elements: Tensor, by_norm: Tensor) -> Tensor:
    """The smaller of |T|·elements and the bounds by norms; the latter where products got lost."""
    by_sums = apply(elements)
    faint = by_sums < FAINT
    if bool(faint.any()):
        faint &= apply((elements > 0).to(elements)) > 0
    return torch.where(faint, by_norm, torch.fmin(by_sums, by_norm))


def _times(a: Tensor, b: Tensor | float) -> Tensor:
    """The product of what is not negative, rounded up where it is too small."""
    other = torch.as_tensor(b, **WIDE)
    product = a * other
    return torch.where((product < TINY) & (a > 0) & (other > 0), TINY, product)


def _outer(norms: Tensor, elements: Tensor) -> Tensor:
    return _times(norms.reshape(-1, *(1,) * elements.dim()), elements)


def _largest(values: Tensor) -> float:
    return float(values.max())


def _smallest(*bounds: float) -> float:
    return min((bound for bound in bounds if not math.isnan(bound)), default=math.inf)


def _defined(bounds: Tensor) -> Tensor:
    """0·inf after an overflow is no bound: inf is."""
    return torch.where(bounds.isnan(), math.inf, bounds)
