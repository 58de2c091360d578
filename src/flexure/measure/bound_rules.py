"""The calls of a network as nodes of a graph of bounds: one rule a kind of function.

A rule has the arguments of the torch function that it stands for, after the function itself;
where the network passes what depends on its input, the rule gets a `Signal`. It adds nodes to the
graph and returns their signals. The graph is in `bound_graph.py`; which function has which rule,
and which is refused, in `bound_catalogue.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from flexure.contracts import FlexureError
from flexure.layers.spectral import power_of_two
from flexure.measure.bound_graph import (
    WIDE,
    Bend,
    Input,
    LinearMap,
    Node,
    Selection,
    Sum,
    Term,
)

__all__ = [
    "BoundRule",
    "Graph",
    "Signal",
    "bent",
    "concatenated",
    "constant",
    "moved",
    "parents_of",
    "scaled",
    "selected",
    "shifted",
    "summed",
    "weighted",
]


class Graph:
    """What a network computes, as far as it has been seen.

    Args:
        shape: of the input, with the batch dimension of 1.

    Attributes:
        kinks: whether functions whose slope jumps are nodes: they have no curvature.
        nodes: parents come before their children; nodes that nothing depends on do no harm.
        padded: nodes that pad another by copies: its signal, the widths and the mode of `F.pad`.
    """

    kinks: ClassVar[bool] = False

    def __init__(self, shape: torch.Size) -> None:
        self.nodes: list[Node] = [Input(tuple(shape))]
        self.padded: dict[int, tuple[Signal, tuple[int, ...], str]] = {}

    def add(self, node: Node) -> Signal:
        """The signal of a new node."""
        self.nodes.append(node)
        return Signal(self, len(self.nodes) - 1)

    def needed(self, output: int) -> list[int]:
        """Positions of the nodes that one depends on, itself included, ascending."""
        found = {output}
        for index in range(output, -1, -1):
            if index in found:
                found.update(parents_of(self.nodes[index]))
        return sorted(found)


@dataclass(frozen=True, eq=False)
class Signal:
    """A value that depends on the network's input, as rules see it: a node of a graph."""

    graph: Graph
    index: int

    @property
    def node(self) -> Node:
        """The node."""
        return self.graph.nodes[self.index]

    @property
    def shape(self) -> torch.Size:
        """Of the value, with the batch dimension of 1."""
        return torch.Size(self.node.shape)


BoundRule: TypeAlias = "Callable[..., Any]"
"""`rule(function, *args, **kwargs)`: a `Signal`, or a sequence of them for several results."""


def moved(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The rule of functions that are linear with entries >= 0: they move, copy, sum or average.

    Constants beside the signals (an operand of `cat`, say) are no part of the linear map.
    """
    return _replayed(function, args, kwargs, disjoint=False)


def concatenated(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """As `moved`, where each element of the result comes from one of the operands."""
    return _replayed(function, args, kwargs, disjoint=True)


def summed(x: Any, y: Any, weight: Any = 1.0) -> Signal:
    """x + weight·y, of two signals, or of a signal and a constant."""
    if not isinstance(x, Signal):
        return shifted(scaled(y, constant(weight)), x)
    if not isinstance(y, Signal):
        return shifted(x, y)
    y = scaled(y, constant(weight))
    shape = _broadcast(x.shape, y.shape)
    terms = tuple(
        Term(each.index, LinearMap(lambda values: values.expand(shape), each.shape))
        for each in (x, y)
    )
    return x.graph.add(Sum(tuple(shape), terms))


def weighted(
    signal: Signal,
    apply: Callable[[Tensor, Tensor], Tensor],
    weight: Tensor,
    *,
    norm: Callable[[Tensor], float] | None = None,
    scaled_weight: Callable[[Tensor, Tensor], Tensor] | None = None,
    axis: int = -1,
) -> Signal:
    """A linear map with weights of any sign.

    Args:
        signal: what it is applied to.
        apply: `(x, weight) -> T x`, linear in both.
        weight: float64, on the CPU.
        norm: weight -> a certified bound of ‖T‖₂.
        scaled_weight: `(weight, (channels,) factors)` -> the weight of the map that multiplies the
            result's channels; None: factors are not merged into the weight.
        axis: of those channels in the result.
    """
    size, scale = weight.abs(), power_of_two(weight)
    square = (weight / scale).square()
    linear = LinearMap(
        lambda x: apply(x, size),
        signal.shape,
        signed=lambda x: apply(x, weight),
        squares=lambda x: apply(x, square),
        scale=scale,
        norm=None if norm is None else lambda: norm(weight),
    )
    shape = apply(torch.zeros(signal.shape, **WIDE), weight).shape

    def merged(factors: Tensor) -> Signal | None:
        channels = _per_channel(factors, shape, axis)
        if channels is None or scaled_weight is None:
            return None
        changed = scaled_weight(weight, channels)
        return weighted(signal, apply, changed, norm=norm, scaled_weight=scaled_weight, axis=axis)

    return signal.graph.add(Sum(tuple(shape), (Term(signal.index, linear),), merged=merged))


def scaled(signal: Signal, factors: Tensor) -> Signal:
    """The signal times a constant that broadcasts; merged into what it comes from if possible."""
    node = signal.node
    if _broadcast(signal.shape, factors.shape) == signal.shape:
        if factors.numel() == 1 and abs(float(factors)) == 1.0:
            return signal
        if isinstance(node, Bend):
            size = factors.abs()
            slope, curvature = node.slope * size, node.curvature * size
            return signal.graph.add(Bend(node.shape, node.parent, slope, curvature, node.name))
        merged = node.merged(factors) if isinstance(node, Sum) and node.merged else None
        if isinstance(merged, Signal):
            return merged
    return weighted(signal, torch.mul, factors)


def shifted(signal: Signal, shift: Any) -> Signal:
    """The signal plus a constant that broadcasts: the signal itself, if nothing is copied."""
    shape = _broadcast(signal.shape, getattr(shift, "shape", ()))
    if shape == signal.shape:
        return signal
    result: Signal = moved(torch.Tensor.expand, signal, shape)
    return result


def selected(
    signal: Signal, maxima: Callable[[Tensor], Tensor], sums: Callable[[Tensor], Tensor]
) -> Signal:
    """Maxima over windows of the signal; `sums` are those over the same windows."""
    selection = Selection(maxima, signal.shape, sums)
    shape = maxima(torch.zeros(signal.shape, **WIDE)).shape
    return signal.graph.add(Sum(tuple(shape), (Term(signal.index, selection),)))


def bent(signal: Signal, slope: Any, curvature: Any, name: str) -> Signal:
    """An activation, by its largest |φ'| and |φ''|, which broadcast over the signal.

    Raises:
        FlexureError: one of them is negative or nan.
    """
    slope, curvature = constant(slope), constant(curvature)
    for what, value in (("slope", slope), ("curvature", curvature)):
        if not bool((value >= 0).all()):
            raise FlexureError(
                f"expected a largest {what} of at least 0 in {name or 'an activation'}, got "
                f"{float(value.min())}; give the largest absolute value"
            )
    return signal.graph.add(Bend(tuple(signal.shape), signal.index, slope, curvature, name))


def constant(value: Any) -> Tensor:
    """A constant in the arithmetic of the bounds: float64, on the CPU."""
    return torch.as_tensor(value, **WIDE).detach()


def parents_of(node: Node) -> list[int]:
    """Positions of the nodes that a node is computed from."""
    if isinstance(node, Bend):
        return [node.parent]
    return [term.parent for term in node.terms] if isinstance(node, Sum) else []


def _broadcast(*shapes: Sequence[int]) -> torch.Size:
    shape: torch.Size = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return shape


def _replayed(function: Callable[..., Any], args: Any, kwargs: Any, *, disjoint: bool) -> Any:
    """One node for each result of a function of signals, with a map from each of them."""
    signals = list(_signals((args, kwargs)))

    def results(values: list[Tensor]) -> Any:
        plain_args, plain_kwargs = _filled((args, kwargs), iter(values))
        return function(*plain_args, **plain_kwargs)

    zeros = [torch.zeros(each.shape, **WIDE) for each in signals]

    def node_of(pick: Callable[[Any], Tensor]) -> Signal:
        terms = []
        for place, signal in enumerate(signals):

            def magnitude(x: Tensor, place: int = place) -> Tensor:
                return pick(results([*zeros[:place], x, *zeros[place + 1 :]]))

            terms.append(Term(signal.index, LinearMap(magnitude, signal.shape)))
        return signals[0].graph.add(Sum(tuple(pick(out).shape), tuple(terms), disjoint))

    out = results(zeros)
    if isinstance(out, Tensor):
        return node_of(lambda whole: whole)
    return tuple(node_of(operator.itemgetter(i)) for i in range(len(out)))


def _per_channel(factors: Tensor, shape: torch.Size, axis: int) -> Tensor | None:
    """`(channels,)` factors, if they vary along no other axis than this one."""
    full = factors.reshape(*(1,) * (len(shape) - factors.dim()), *factors.shape)
    others = [size for dim, size in enumerate(full.shape) if dim != axis % len(shape)]
    if any(size != 1 for size in others):
        return None
    return full.flatten().expand(shape[axis])


def _signals(arguments: Any) -> Iterator[Signal]:
    """The signals in nested arguments, in order."""
    if isinstance(arguments, Signal):
        yield arguments
    elif isinstance(arguments, dict):
        yield from _signals(tuple(arguments.values()))
    elif isinstance(arguments, list | tuple):
        for each in arguments:
            yield from _signals(each)


def _filled(arguments: Any, values: Iterator[Tensor]) -> Any:
    """Nested arguments with each signal replaced by the next value, and constants by zeros.

    A dtype that is asked for is that of the bounds.
    """
    if isinstance(arguments, Signal):
        return next(values)
    if isinstance(arguments, dict):
        return {key: _filled(each, values) for key, each in arguments.items()}
    if isinstance(arguments, list | tuple) and not isinstance(arguments, torch.Size):
        return type(arguments)([_filled(each, values) for each in arguments])
    if isinstance(arguments, Tensor):
        plain = arguments.detach().to("cpu")
        return torch.zeros_like(plain, dtype=torch.float64) if plain.is_floating_point() else plain
    return torch.float64 if isinstance(arguments, torch.dtype) else arguments
