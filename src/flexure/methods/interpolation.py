"""Polynomial interpolation in beta: where to evaluate, and how to combine what was found.

For fixed inputs the features of a network depend smoothly on the shared beta, up to and including
beta = 1 (each unit's bump of width 1−beta is averaged over many inputs of units).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["held_out", "interpolate", "nodes"]


def nodes(betas: Sequence[float], count: int) -> tuple[float, ...]:
    """The members of `betas` nearest to the Chebyshev points of their range, ends included.

    Args:
        betas: distinct values, ascending.
        count: points wanted, at least 2; coarse grids give fewer where two share a member.
    """
    first, last = _coordinate(betas[0]), _coordinate(betas[-1])
    found = set()
    for j in range(count):
        wanted = 0.5 * (first + last) + 0.5 * (first - last) * math.cos(math.pi * j / (count - 1))
        found.add(min(betas, key=lambda beta: abs(_coordinate(beta) - wanted)))
    return tuple(sorted(found))


def held_out(betas: Sequence[float], known: Sequence[float], count: int) -> tuple[float, ...]:
    """Members of `betas` to check the interpolation at: where its error is the largest.

    The error of the interpolating polynomial is a derivative times Π(u − u_node); the largest
    products are taken, no two between the same nodes.
    """
    gaps = []
    for low, high in pairwise(known):
        inside = [beta for beta in betas if low < beta < high]
        if inside:
            worst = max(inside, key=lambda beta: _product(beta, known))
            gaps.append((_product(worst, known), worst))
    return tuple(sorted(beta for _, beta in sorted(gaps, reverse=True)[:count]))


def interpolate(known: Mapping[float, Tensor], beta: float) -> Tensor:
    """The polynomial through `known` (beta -> tensor) at `beta`, in barycentric form.

    Source: Berrut and Trefethen (2004), equation 4.2.
    """
    if beta in known:
        return known[beta]
    points = {node: _coordinate(node) for node in known}
    weights = {}
    for node, point in points.items():
        others = math.prod(point - other for key, other in points.items() if key != node)
        weights[node] = 1.0 / (others * (_coordinate(beta) - point))
    total = sum(weights.values())
    result = torch.zeros_like(next(iter(known.values())))
    for node, weight in weights.items():
        result.add_(known[node], alpha=weight / total)
    return result


def _coordinate(beta: float) -> float:
    """u = (1−beta)^1.5: between the units' width, 1−beta, and their mean shift, ~ (1−beta)².

    Chosen by measurement: on a pretrained CIFAR ResNet-20 five nodes in u leave at most two thirds
    of the error that five nodes in beta leave, for digits and for MNIST.
    """
    return float((1.0 - beta) ** 1.5)


def _product(beta: float, known: Sequence[float]) -> float:
    return math.prod(abs(_coordinate(beta) - _coordinate(node)) for node in known)
