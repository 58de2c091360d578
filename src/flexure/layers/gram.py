"""Gram iteration: an upper bound of the largest singular value of many matrices at once.

Nothing here knows a layer; `spectral.py` says which matrices a layer has.

[D] is Delattre, Barthélemy, Araujo and Allauzen, "Efficient bound of Lipschitz constant for
convolutional layers by Gram iteration", ICML 2023.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["ITERATIONS", "TOLERANCE", "gram_norm_bound", "rounded_up"]

ITERATIONS = 16
"""Squarings after the first Gram matrix: r equal singular values, the slowest case, leave a factor
r^(2^-17), below 1 + 1e-4 for r < 490,000."""

TOLERANCE = 2e-5
"""Relative distance between the upper and a lower bound at which iterating stops."""

EPS = torch.finfo(torch.float64).eps


def gram_norm_bound(
    chunks: Iterable[Tensor], *, iterations: int = ITERATIONS, tolerance: float = TOLERANCE
) -> float:
    """An upper bound of the largest singular value among batches of matrices, as in [D].

    With G the smaller of AᴴA and AAᴴ, `‖G^(2^k)‖_F^(1/2^(k+1))` is never below the norm of A and
    decreases to it as k grows; `(‖G^(2^k)‖_F² / tr G^(2^k))^(1/2^(k+1))` is never above it and
    increases. A matrix whose upper bound is below another's lower one is left out of further
    iterations. Each power is rescaled to Frobenius norm 1, and the scales kept as logarithms.

    Rounding: a product of r columns of length m has an error of at most `c·m·eps·‖A‖_F²`, c = 4
    for complex numbers, which is `c·m·r·eps` relative to ‖A‖²; an error of the k-th power is
    divided by 2^k in the root. The result is multiplied by 1 + 4·r·(m + r + 64)·eps.

    Args:
        chunks: `(B, m, n)` float64 or complex128 each, with entries that neither overflow nor
            vanish when squared.
        iterations: squarings at most; 0 gives the root of the Frobenius norm of G.
        tolerance: relative distance to the lower bound at which iterating stops.

    Returns:
        The bound; 0 for zero matrices. More iterations give a bound that is not larger by more
        than `tolerance`.
    """
    upper = lower = 0.0
    slack = 0.0
    for chunk in chunks:
        if min(chunk.shape) == 0:
            continue
        small, large = sorted(chunk.shape[1:])
        slack = max(slack, 4.0 * small * (large + small + 64) * EPS)
        above, lower = _bounds(chunk, lower, iterations, tolerance)
        upper = max(upper, above, lower)
    return upper * (1.0 + slack)


def rounded_up(value: float, operations: int = 4) -> float:
    """`value`, a non-negative sum of `operations` roundings, as an upper bound."""
    return value * (1.0 + (operations + 4) * EPS)


def _bounds(a: Tensor, lower: float, iterations: int, tolerance: float) -> tuple[float, float]:
    """The largest upper bound of the matrices that may exceed `lower`, and the new `lower`."""
    power = a @ a.mH if a.shape[1] < a.shape[2] else a.mH @ a
    log_scale = torch.zeros((), dtype=torch.float64, device=a.device)
    upper = torch.full((), math.inf, dtype=torch.float64, device=a.device)
    for k in range(iterations + 1):
        size = torch.linalg.matrix_norm(power)
        alive = size > 0
        if not bool(alive.any()):
            return 0.0, lower
        log_scale = log_scale + size.log()
        power = power / torch.where(alive, size, 1.0)[:, None, None]
        trace = power.diagonal(dim1=1, dim2=2).sum(-1).real
        root = 0.5 ** (k + 1)
        upper = torch.minimum(upper, (log_scale * root).exp())
        below = ((log_scale - trace.log()) * root).exp()
        lower = max(lower, float(below[alive].max()))
        alive &= upper > lower
        highest = float(upper[alive].max()) if bool(alive.any()) else 0.0
        if highest <= lower * (1.0 + tolerance) or k == iterations:
            return highest, lower
        power, log_scale, upper = power[alive], log_scale[alive], upper[alive]
        power = power.mH @ power
        log_scale = 2.0 * log_scale
    return highest, lower
