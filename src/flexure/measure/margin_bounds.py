"""Data-free bounds of how fast the differences of two logits can change.

They are sharper than √2 times that of all logits, from `lipschitz.py`, whose graph they read. What
they certify at given inputs is in `certificates.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from flexure.measure.bound_graph import (
    TINY,
    WIDE,
    Reach,
    Selection,
    Sum,
    norm_of,
    reaches,
    rounding,
    transposed,
)
from flexure.measure.bound_rules import Graph, Signal
from flexure.measure.bound_trace import bounded
from flexure.measure.lipschitz import LipschitzBounding, bound_at

__all__ = ["MarginBounds", "margin_bounds"]


@dataclass(frozen=True)
class MarginBounds:
    """Bounds of the l2 Lipschitz constants of z_y − z_k, z the logits.

    Attributes:
        logits: that of all logits together, L.
        of_label: label y -> (K,) float64 on the CPU, those against every class k; at most √2·L, 0
            where k = y.
    """

    logits: float
    of_label: Callable[[int], Tensor]


def margin_bounds(model: nn.Module, input_shape: Sequence[int]) -> MarginBounds:
    """Bounds the l2 Lipschitz constants from the input to the differences of two logits.

    Let z = T h + b, h the last value that an activation, a maximum or a sum of several values
    gives, T the linear map from there to the logits, and t_y its rows. Between two inputs h changes
    by at most L_h times their distance, and each h_i by at most l_i times it (`bound_graph.py`), so
    that z_y − z_k = (t_y − t_k)·h + const changes by at most

        min(‖t_y − t_k‖₂ · L_h, Σ_i |t_yi − t_ki| · l_i)

    times it (Cauchy and Schwarz, and the triangle inequality). With L the bound of all logits it is
    at most √2·L too, as ‖e_y − e_k‖₂ = √2 (Tsuzuku et al. 2018, Lipschitz-margin training,
    propositions 1 and 2). The smallest of the three is taken. A network without activations has
    h = x and L_h = 1: it is exact then.

    Args:
        model: see `lipschitz_bound`, whose conditions hold here.
        input_shape: of one input, without the batch dimension.

    Raises:
        FlexureError: see `lipschitz_bound`.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        >>> found = margin_bounds(model, (2,))
        >>> round(found.logits, 6), round(float(found.of_label(0)[1]), 6)
        (4.0, 5.0)
    """
    return bounded(model, input_shape, LipschitzBounding, _bounds)


def _bounds(output: Signal) -> MarginBounds:
    logits = bound_at(output).value
    head = _Head.before(output)

    @cache  # every chunk of the samples asks for its labels
    def of_label(label: int) -> Tensor:
        found = head.differences(label).clamp(max=math.sqrt(2.0) * logits)
        found[label] = 0.0
        return found

    return MarginBounds(logits, of_label)


@dataclass(frozen=True)
class _Head:
    """The linear map at a network's end.

    Attributes:
        rows: (K, n) T, up to rounding, and to the sign of all of it.
        slack: (K, n) what rounding may have changed of it.
        reach: of the n values that it is applied to.
        up: what covers the rounding of the reach, and of sums here.
    """

    rows: Tensor
    slack: Tensor
    reach: Reach
    up: float

    @classmethod
    def before(cls, output: Signal) -> _Head:
        """The composition of the linear maps before a node.

        It ends at the first sum of several values: bounds know no signs, and those of whole values
        are dropped on the way, which is no matter to a value alone.
        """
        graph: Graph = output.graph
        rows = torch.eye(math.prod(output.shape), **WIDE).reshape(-1, *output.shape)
        sizes, operations, index = rows, 0, output.index
        while isinstance(node := graph.nodes[index], Sum) and len(node.terms) == 1:
            (term,) = node.terms
            if isinstance(term.map, Selection):
                break
            rows = transposed(term.map.signed, term.map.shape, rows)
            sizes = term.map.pulled(sizes)
            operations += math.prod(node.shape) + math.prod(term.map.shape)
            index = term.parent
        needed = graph.needed(index)
        slack = 16 * operations * torch.finfo(torch.float64).eps * sizes + operations * TINY
        return cls(
            rows.flatten(1),
            slack.flatten(1),
            reaches(graph.nodes, needed)[index],
            rounding(graph.nodes, graph.needed(output.index)),
        )

    def differences(self, label: int) -> Tensor:
        """(K,) bounds for the row of a label minus each row."""
        size = (self.rows[label] - self.rows).abs() + self.slack[label] + self.slack
        by_norm = norm_of(size) * self.reach.norm
        by_elements = size @ self.reach.elements.flatten()
        return self.up * torch.fmin(by_norm, by_elements).nan_to_num(nan=math.inf)
