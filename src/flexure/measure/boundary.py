"""How far a network is from zero along the boundary that it should have.

[CT], Curvature Tuning, Fig. 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexure.calling import logits_of
from flexure.contracts import FlexureError
from flexure.measure.fields import point_of
from flexure.measure.probability import check_positive, pieces, undisturbed
from flexure.per_sample import PerSample

__all__ = ["BoundaryError", "boundary_error"]


@dataclass(frozen=True)
class BoundaryError(PerSample):
    """A network's values at P points of a curve.

    Attributes:
        converged: (P,) bool, whether the value is finite. The others count as nan, not as zero.
        values: (P,) float64, f at each point, with its sign.
        lengths: (P,) float64, the part of the curve's length that each point stands for.
    """

    values: Tensor
    lengths: Tensor

    @property
    def error(self) -> float:
        """e, the integral of |f| along the curve: [CT] section 3."""
        return float((self.values.abs() * self.lengths).sum())

    @property
    def length(self) -> float:
        """Of the curve through the points."""
        return float(self.lengths.sum())

    @property
    def mean(self) -> float:
        """e divided by the length: the mean of |f| along the curve."""
        return self.error / self.length


def boundary_error(
    f: Callable[[Tensor], Any], points: Tensor, *, closed: bool = True, chunk: int | None = None
) -> BoundaryError:
    """The approximation error of a binary classifier along its true boundary, [CT] section 3.

    e = integral of |f(gamma(t))| ||gamma'(t)|| dt, where f is the log-odds of the two classes, zero
    on the classifier's own boundary. Computed by the trapezoidal rule over chords: exact for f
    affine and of one sign on a polygon's sides, with an error of order 1 / P^2 on a smooth curve. f
    is a logit: twice the logits give twice the error and the same boundary.

    Example:
        >>> t = torch.linspace(0, 2 * torch.pi, 1001, dtype=torch.float64)[:-1]
        >>> circle = torch.stack([t.cos(), t.sin()], dim=1)
        >>> e = boundary_error(lambda x: x[:, 0], circle).error  # 4 on the whole circle
        >>> abs(e - 4) < 1e-4
        True

    Args:
        f: a function (P, *shape) -> (P,); or a model with outputs (P,) or (P, 1), the log-odds of
            the second class, or logits (P, 2), whose difference they are.
        points: (P, *shape) float32 or float64, in order along the true boundary.
        closed: whether the last point is followed by the first.
        chunk: points at a time; None: all.

    Raises:
        FlexureError: too few points, points without a finite length, or an output that is not of a
            binary classifier.
    """
    point_of(points)
    check_positive(chunk=chunk)
    fewest = 3 if closed else 2
    if len(points) < fewest:
        raise FlexureError(
            f"expected at least {fewest} points along the boundary, got {len(points)}; give some "
            f"hundred"
        )
    lengths = _lengths(points.detach(), closed)
    if not lengths.sum() > 0:
        raise FlexureError(
            f"expected points along a curve, got one of length {float(lengths.sum())}; give points "
            f"that differ and are finite"
        )
    with undisturbed(f, points):
        values = torch.cat([_log_odds(f, points[rows]) for rows in pieces(len(points), chunk)])
    return BoundaryError(values.isfinite(), values, lengths)


def _log_odds(f: Callable[[Tensor], Any], points: Tensor) -> Tensor:
    out: Tensor = logits_of(f(points)).double()
    if out.shape == (len(points),):
        return out
    if isinstance(f, nn.Module) and out.dim() == 2 and out.shape[1] <= 2:
        return out[:, 1] - out[:, 0] if out.shape[1] == 2 else out[:, 0]
    wanted = "(P,), (P, 1) or (P, 2) from the model" if isinstance(f, nn.Module) else "(P,) from f"
    raise FlexureError(
        f"expected {wanted} for P = {len(points)} points, got {tuple(out.shape)}; for two of more "
        f"classes give a function of x, the difference of their logits"
    )


def _lengths(points: Tensor, closed: bool) -> Tensor:
    """(P,) half the length of the two chords that meet at each point."""
    flat = points.double().flatten(1)
    chords = (flat.roll(-1, 0) - flat).norm(dim=1)
    if not closed:
        chords[-1] = 0.0
    lengths: Tensor = (chords + chords.roll(1)) / 2
    return lengths
