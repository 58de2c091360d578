"""Data-free bounds of a network's Lipschitz constant: over all inputs, kinks allowed.

The graph of bounds is that of `bounds.py`, whose Hessian needs curvatures; here only slopes count.
How fast a network changes at given inputs, `curvature.py` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flexure.columns import aligned
from flexure.contracts import FlexureError
from flexure.measure.bound_catalogue import Bounding, place
from flexure.measure.bound_graph import (
    WIDE,
    Bend,
    Input,
    Node,
    Reach,
    Sum,
    backward,
    reaches,
    rounding,
)
from flexure.measure.bound_layers import UNBOUNDED
from flexure.measure.bound_rules import Graph, Signal, parents_of
from flexure.measure.bound_trace import bounded
from flexure.measure.propagate import carriers_in

__all__ = ["LipschitzBound", "LipschitzBounding", "LipschitzStep", "bound_at", "lipschitz_bound"]


@dataclass(frozen=True)
class LipschitzStep:
    """One layer, activation or sum on the way to the logits.

    Attributes:
        name: the path of the module that called it; of a normalisation that was merged into the
            layer before it, both.
        kind: `layer` (a linear map, or a maximum), `activation`, `sum` or `join` (concatenation).
        norm: bound of its own Lipschitz constant; of a sum, of the map from all its operands.
        constant: bound of the Lipschitz constant from the input to its result.
    """

    name: str
    kind: str
    norm: float
    constant: float


@dataclass(frozen=True)
class LipschitzBound:
    """An upper bound of ‖z(x) − z(y)‖₂ / ‖x − y‖₂ over all inputs x and y, z the logits.

    Made by `lipschitz_bound`.

    Attributes:
        value: the bound; inf where a product overflowed: it then says nothing.
        steps: what the logits depend on, in the order of calls.
    """

    value: float
    steps: tuple[LipschitzStep, ...]

    def rows(self) -> list[dict[str, str]]:
        """The steps as a table: one dict a row, by column."""
        return [
            {
                "step": each.name,
                "kind": each.kind,
                "norm": f"{each.norm:.4g}",
                "from input": f"{each.constant:.4g}",
            }
            for each in self.steps
        ]

    @property
    def summary(self) -> str:
        """One line."""
        overflow = "" if math.isfinite(self.value) else "; inf: a product overflowed"
        return f"Lipschitz constant of the logits: at most {self.value:.6g}{overflow}"

    def __str__(self) -> str:
        return "\n".join([*aligned(self.rows(), ruled=True), self.summary])


def lipschitz_bound(model: nn.Module, input_shape: Sequence[int]) -> LipschitzBound:
    """Bounds the l2 Lipschitz constant from the input to the logits, from the weights alone.

    Between two inputs x and y, each activation changes by a diagonal matrix, with entries of at
    most its largest slope, times the change of its argument (kinks or not), a maximum over windows
    by means over them, and everything else is linear. So z(x) − z(y) = J (x − y), J a product and
    sum of such matrices, and what bounds every such J bounds the Lipschitz constant. A forward
    pass bounds the norms of the matrices from the input and of their rows, a backward pass those
    to the logits and their entries; the smaller of the two results is taken (`bound_graph.py`).
    Layers' norms are the certified ones of `flexure.layers`. A normalisation's factors are merged
    into the layer before it. Max-pooling has the root of the largest number of windows that an
    element falls into.

    What holds is said of the network of real numbers with these weights, as in `hessian_bound`,
    whose `lipschitz` is the same number: computed in float64 on the CPU, enlarged by what rounding
    may have taken, inf where it overflowed. For one sample alone in eval mode; modes are put back.

    Args:
        model: the network; logits, as a tensor or as `.logits`. It is run once, on zeros.
        input_shape: of one input, without the batch dimension.

    Raises:
        FlexureError: an operation whose slope has no bound, or none known here (LayerNorm,
            softmax, attention, products of two signals); the message names it and its module. Or
            the model draws random numbers, does not take the input, or its output is not (1, K).

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> with torch.no_grad():
        ...     for layer in (model[0], model[2]):
        ...         _ = layer.weight.copy_(torch.diag(torch.tensor([3.0, -1.0])))
        >>> round(lipschitz_bound(model, (2,)).value, 6)
        9.0
    """
    return bounded(model, input_shape, LipschitzBounding, bound_at)


class SlopeGraph(Graph):
    """A graph whose nodes have slopes and names, whether they have curvatures or not.

    Attributes:
        names: node -> what a user calls it.
    """

    kinks = True

    def __init__(self, shape: torch.Size) -> None:
        super().__init__(shape)
        self.names: dict[int, str] = {}


class LipschitzBounding(Bounding):
    """A tensor that carries a node of a `SlopeGraph`."""

    subject = "bound of the Lipschitz constant"
    graph = SlopeGraph

    @classmethod
    def passed(cls, out: Any, inputs: Any) -> None:
        """Names the nodes of a result."""
        before = [each.carried.index for each in carriers_in(inputs)]
        for each in carriers_in(out):
            signal: Signal = each.carried
            names = signal.graph.names  # type: ignore[attr-defined]
            if signal.index not in names and signal.index:
                # A layer whose node it does not come from has been merged with it.
                merged = set(before) - {signal.index, *parents_of(signal.node)}
                layers = [names[index] for index in merged if index in names]
                names[signal.index] = " + ".join([*layers, place()])

    @classmethod
    def advice(cls, func: Any) -> str:
        """What a user can do about an operation without a rule."""
        return "write it with operations that have one"

    @classmethod
    def _error(cls, what: str, reason: str) -> FlexureError:
        """Of what has no bound, curvatures are not the reason here."""
        return super()._error(what, reason.replace(UNBOUNDED, _STEEP))


_STEEP = (
    "its slope has no bound over all inputs, or none that is known here; use flexure.curvature on "
    "data instead"
)


def bound_at(output: Signal) -> LipschitzBound:
    """The bound, once the network's graph is known up to the node of its logits."""
    graph = output.graph
    needed = graph.needed(output.index)
    reach = reaches(graph.nodes, needed)
    seed = torch.ones((1, *output.shape), **WIDE)
    to_input = float(backward(graph.nodes, needed, reach, seed)[1])
    up = rounding(graph.nodes, needed)
    return LipschitzBound(
        value=up * min(reach[output.index].norm, to_input),
        steps=tuple(_steps(graph, needed, reach, up)),
    )


def _steps(
    graph: Graph, needed: Sequence[int], reach: dict[int, Reach], up: float
) -> Iterator[LipschitzStep]:
    names: dict[int, str] = graph.names  # type: ignore[attr-defined]
    for index in needed:
        node = graph.nodes[index]
        if not isinstance(node, Input):
            kind, norm = _of_its_own(node)
            yield LipschitzStep(names.get(index, ""), kind, up * norm, up * reach[index].norm)


def _of_its_own(node: Node) -> tuple[str, float]:
    """The kind of a node, and its norm as a map from all its parents."""
    if isinstance(node, Bend):
        return "activation", float(node.slope.max())
    if not isinstance(node, Sum) or len(node.terms) == 0:
        return "layer", 0.0
    norms = [term.map.norm for term in node.terms]
    if len(norms) == 1:
        return "layer", norms[0]
    return ("join", max(norms)) if node.disjoint else ("sum", math.hypot(*norms))
