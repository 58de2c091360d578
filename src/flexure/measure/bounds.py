"""Data-free bounds of a network's input Hessian: over all inputs of R^d, without looking at one.

The formula and its derivation are in `hessian_bound`. How bounds pass through the graph of a
network is in `bound_graph.py`; how the graph is found, in `bound_rules.py`; what each operation
does to them, in `bound_catalogue.py`. What the curvature is at given inputs, `curvature.py` says.

[LCNN] is Low-Curvature Networks (Srinivas et al., 2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexure.columns import aligned
from flexure.contracts import FlexureError
from flexure.measure.bound_catalogue import Bounding
from flexure.measure.bound_graph import (
    WIDE,
    Bend,
    Bent,
    Reach,
    backward,
    norm_of,
    reaches,
    rounding,
)
from flexure.measure.bound_rules import Graph, Signal
from flexure.measure.bound_trace import bounded

__all__ = ["Contribution", "HessianBound", "hessian_bound"]

_ROW_ELEMENTS = 2**24
"""Elements of one node's sensitivities held at once, 128 MiB: logits beyond wait their turn."""


@dataclass(frozen=True)
class Contribution:
    """What one call of an activation adds to the bound of the logits' Hessian.

    Attributes:
        name: the site, or the path of the module that called it.
        curvature: max |φ''| over R, and over units where they differ.
        sensitivity: bound of |∂(wᵀz)/∂a| over its units, ‖w‖₂ = 1.
        lipschitz: bound of the Lipschitz constant from the input to its pre-activation.
        bound: what it adds to `HessianBound.vector`; at most
            curvature · sensitivity · lipschitz².
        share: of the sum over all activations; nan where that is inf, 0 where it is 0.
    """

    name: str
    curvature: float
    sensitivity: float
    lipschitz: float
    bound: float
    share: float


@dataclass(frozen=True)
class HessianBound:
    """Upper bounds over all inputs; 2-norms everywhere. Made by `hessian_bound`.

    A bound may be inf: one that overflowed says nothing.

    Attributes:
        logits: (K,) float64, of each logit's Hessian.
        vector: of the Hessian of any wᵀz, z the logits, ‖w‖₂ = 1.
        lipschitz: of the Jacobian of the logits, their Lipschitz constant.
        contributions: one for each call of an activation, in the order of calls.
    """

    logits: Tensor
    vector: float
    lipschitz: float
    contributions: tuple[Contribution, ...]

    @property
    def cross_entropy(self) -> float:
        """Of the Hessian of the cross-entropy, for any label: √2·vector + lipschitz²/2.

        With p the probabilities and J the logits' Jacobian it is
        Jᵀ(diag p − ppᵀ)J + Σ_k (p − e_y)_k H_k; the middle factor's norm is at most 1/2, and
        ‖p − e_y‖₂ <= √2.
        """
        return math.sqrt(2.0) * self.vector + 0.5 * self.lipschitz * self.lipschitz

    @property
    def gradient(self) -> float:
        """Of the gradient of the cross-entropy: √2·lipschitz."""
        return math.sqrt(2.0) * self.lipschitz

    def looseness(self, measured: Any) -> float:
        """The cross-entropy's bound over the largest Hessian norm of it that was measured.

        Args:
            measured: the result of `flexure.curvature` on labelled samples, or the largest norm.

        Raises:
            FlexureError: nothing finite, or nothing positive, was measured.
        """
        norms = torch.as_tensor(getattr(measured, "hessian_norm", measured)).detach()
        known = norms[torch.isfinite(norms)]
        largest = float(known.max()) if known.numel() else math.nan
        return self.cross_entropy / _positive("a measured Hessian norm", largest)

    def normalized(self, gradient_lower_bound: float) -> float:
        """A bound of the normalised curvature C = ‖H‖₂/‖∇f‖₂ of the cross-entropy f.

        It holds where ‖∇f‖₂ is at least what is given: no such bound exists over all inputs.

        Raises:
            FlexureError: the lower bound is not positive.
        """
        return self.cross_entropy / _positive("gradient_lower_bound", gradient_lower_bound)

    def rows(self) -> list[dict[str, str]]:
        """The contributions as a table: one dict a row, by column."""
        return [
            {
                "activation": each.name,
                "max |φ''|": f"{each.curvature:.4g}",
                "sensitivity": f"{each.sensitivity:.4g}",
                "Lipschitz": f"{each.lipschitz:.4g}",
                "bound": f"{each.bound:.4g}",
                "share": f"{each.share:.1%}",
            }
            for each in self.contributions
        ]

    @property
    def summary(self) -> str:
        """One line."""
        text = (
            f"Hessian bounds: logits {self.vector:.4g} (Lipschitz {self.lipschitz:.4g}), "
            f"cross-entropy {self.cross_entropy:.4g}"
        )
        overflow = "" if math.isfinite(self.cross_entropy) else "; inf: a product overflowed"
        return text + overflow

    def __str__(self) -> str:
        rows = aligned(self.rows(), ruled=True) or ["no activation: the logits are affine"]
        return "\n".join([*rows, self.summary])


def hessian_bound(model: nn.Module, input_shape: Sequence[int]) -> HessianBound:
    """Bounds ‖∇²_x‖₂ of a smooth network over all inputs, from its weights alone ([LCNN], 3).

    Let a network consist of linear maps and activations a_l = φ_l(z_l). For f = wᵀz,

        ∇²f = Σ_l Z_lᵀ diag(φ_l''(z_l) ⊙ ∂f/∂a_l) Z_l,   Z_l = ∂z_l/∂x,

    since the second derivative of a composition with φ_l is the sum of that which bends φ_l and
    that which bends what is before it, and linear maps bend nothing; in a graph, ∂f/∂a_l sums over
    all paths from a_l to f. With d the diagonal, ‖Zᵀ diag(d) Z‖₂ is at most both
    max_i |d_i| · ‖Z‖₂² and Σ_i |d_i| · ‖row i of Z‖₂², and the smaller of them is taken. So

        ‖∇²f‖₂ <= Σ_l max|φ_l''| · ‖∂f/∂a_l‖_∞ · ‖Z_l‖₂².

    A forward pass bounds ‖Z_l‖₂ and its rows, a backward pass ‖∂f/∂a_l‖ unit by unit (the
    activations' slopes by their maxima), each through operator norms as well as element by
    element, whichever is smaller (`bound_graph.py`). Layers' norms are the certified ones of
    `flexure.layers`. A normalisation's factors are merged into the layer before it.

    The bound holds for the network of real numbers with these weights. It is computed in float64 on
    the CPU and enlarged by what rounding may have taken; a product that overflows gives inf. It is
    for one sample alone in eval mode: BatchNorm with its running statistics, no dropout; a model in
    training mode is evaluated in eval mode, and its modes are put back.

    Args:
        model: smooth; logits, as a tensor or as `.logits`. It is run once, on zeros.
        input_shape: of one input, without the batch dimension.

    Raises:
        FlexureError: an operation whose slope or curvature has no bound (ReLU, max-pooling,
            LayerNorm, softmax, products of two signals), or none known here; the message names
            it and its module. Or the model does not take the input, or its output is not (1, K).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1))
        >>> with torch.no_grad():
        ...     for layer in (model[0], model[2]):
        ...         _ = layer.weight.fill_(2.0)
        >>> round(float(hessian_bound(model, (1,)).logits), 6)  # 2 · max|tanh''| · 2²
        6.158403
    """
    return bounded(model, input_shape, Bounding, _bounded)


def _bounded(output: Signal) -> HessianBound:
    graph, classes = output.graph, output.shape[1]
    needed = graph.needed(output.index)
    reach = reaches(graph.nodes, needed)
    largest = max(math.prod(graph.nodes[index].shape) for index in needed)
    up = rounding(graph.nodes, needed)
    each = up * torch.cat(
        [
            _stacked(backward(graph.nodes, needed, reach, seed)[0], len(seed))
            for seed in _unit_seeds(classes, max(1, _ROW_ELEMENTS // largest))
        ],
        dim=1,
    )
    bent, to_input = backward(graph.nodes, needed, reach, torch.ones(1, 1, classes, **WIDE))
    rows = tuple(_contributions(graph, bent, each, reach, up))
    vector = sum((row.bound for row in rows), start=0.0)
    return HessianBound(
        logits=each.sum(0),
        vector=vector,
        lipschitz=up * min(reach[output.index].norm, float(to_input)),
        contributions=rows,
    )


def _unit_seeds(classes: int, rows: int) -> Iterator[Tensor]:
    """Each logit alone, (up to `rows`, 1, classes) at a time."""
    identity = torch.eye(classes, **WIDE)[:, None]
    return (identity[start : start + rows] for start in range(0, classes, rows))


def _stacked(bent: list[Bent], rows: int) -> Tensor:
    """(activations, rows) bounds."""
    return torch.cat([torch.zeros(0, rows, **WIDE), *(b.bound[None] for b in bent)])


def _contributions(
    graph: Graph, bent: list[Bent], each: Tensor, reach: dict[int, Reach], up: float
) -> Iterator[Contribution]:
    """One row an activation; its bound for any wᵀz is at most the norm of those for the logits."""
    bounds = [
        min(up * float(b.bound), float(norm_of(logits)))
        for b, logits in zip(bent, each, strict=True)
    ]
    total = sum(bounds)
    for found, bound in zip(bent, bounds, strict=True):
        node = graph.nodes[found.node]
        if isinstance(node, Bend):
            yield Contribution(
                name=node.name,
                curvature=float(node.curvature.max()),
                sensitivity=up * float(found.sensitivity),
                lipschitz=up * reach[node.parent].norm,
                bound=bound,
                share=math.nan if math.isinf(total) else bound / total if total > 0 else 0.0,
            )


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise FlexureError(
            f"expected {name} to be positive and finite, got {value}; the bound has no ratio to it"
        )
    return value
