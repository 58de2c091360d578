"""The curvature rate: how fast the derivatives of a function grow with their order.

A finite-order slope of log norms against the order, with everything that it depends on. The
derivatives themselves come from `jets`, and a model's scalar from `probability`.

[CR] is The Curvature Rate λ (Poschl, 2025, arXiv:2511.01438).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from flexure.contracts import FlexureError
from flexure.measure.fields import point_of
from flexure.measure.jets import taylor_coefficients
from flexure.measure.probability import (
    ScaledField,
    at_rows,
    check_positive,
    pieces,
    probability_field,
    undisturbed,
)
from flexure.per_sample import PerSample

__all__ = ["CurvatureRate", "curvature_rate"]


@dataclass(frozen=True)
class CurvatureRate(PerSample):
    """Squares of directional derivatives for each of B samples, and the rate that they pool to.

    Attributes:
        converged: (B,) bool, whether all derivatives of the sample are finite, and none is zero
            because so small a number does not exist in the dtype of f: where the last derivatives
            are computed and come out as zero, and the growth of those before leads there. The
            others do not count in what is pooled.
        log_squares: (B, orders) float64, log of D^n f(x)[v, ..., v]^2 with unit v, its mean over
            directions (or its maximum, with `reduction="sup"`); -inf where it is zero. Neither
            normalised nor calibrated: the properties are. Logarithms, since squares leave the
            range of float64 long before the derivatives do.
        orders: the n of the columns.
        normalization: `"raw"` (norms of D^n f) or `"factorial"` (of D^n f / n!).
        calibrate: whether norms are multiplied by kappa_n.
        dimension: d, the number of elements of one input.
        directions: per sample.
        reduction: `"rms"` or `"sup"`, over directions and samples alike.
    """

    log_squares: Tensor
    orders: tuple[int, ...]
    normalization: str
    calibrate: bool
    dimension: int
    directions: int
    reduction: str

    @property
    def squares(self) -> Tensor:
        """(B, orders) float64: the exponentials of `log_squares`; they may under- and overflow."""
        return self.log_squares.exp()

    @property
    def log_norms(self) -> Tensor:
        """(orders,) float64: log v_n, normalised and calibrated.

        -inf where an order vanishes at every sample; nan where no sample has finite derivatives.
        """
        used = self._used
        if not len(used):
            return torch.full_like(self._factors, torch.nan)
        return _REDUCTIONS[self.reduction](used, 0) / 2 + self._factors

    @property
    def vanishing(self) -> tuple[int, ...]:
        """The orders whose derivatives are exactly zero in all directions at all samples."""
        zero = self.log_norms.isneginf().tolist()
        return tuple(order for order, is_zero in zip(self.orders, zero, strict=True) if is_zero)

    @property
    def rate(self) -> float:
        """The least-squares slope of log v_n against n, [CR]: a slope over *these* orders.

        -inf where all derivatives from some order on vanish, as a polynomial's do; nan where no
        sample has finite derivatives.

        Raises:
            FlexureError: an order vanishes and a higher one does not.
        """
        gone = self.vanishing
        if not gone:
            return float(self._weights @ self.log_norms)
        if gone == self.orders[-len(gone) :]:
            return -math.inf
        raise FlexureError(
            f"expected derivatives that do not vanish at all samples, got zero at the orders "
            f"{list(gone)} of {list(self.orders)} but not above; a slope is not defined: give more "
            f"samples, or orders without them"
        )

    @property
    def effective_samples(self) -> Tensor:
        """(orders,) how many equal samples would carry a norm, (sum s)^2 / (sum s^2); 0: none.

        Squares of high derivatives have long tails. Where this is a handful, few samples decide
        the norm, and `error` is too small more often than not: more samples and directions help.
        """
        used = self._used
        carried = used.logsumexp(0) > -math.inf
        return torch.where(carried, 1 / used.softmax(0).square().sum(0), 0.0)

    @property
    def error(self) -> float:
        """Standard error of `rate`, delete-one jackknife over samples.

        What it covers: other samples, and other directions (every sample has its own), as far as
        `effective_samples` are many. What not: that a slope over a few orders is not the limit.
        nan for fewer than two samples, for `sup` (a maximum has no such error) and where the rate
        is not finite.
        """
        used = self._used
        if len(used) < 2 or self.reduction != "rms" or self.vanishing:
            return math.nan
        rest = _log_sums_without_each(used) - used.logsumexp(0)
        rates = (rest / 2) @ self._weights
        spread = (rates - rates.mean()).square().sum() * (len(used) - 1) / len(used)
        return float(spread.sqrt())

    @property
    def fitted(self) -> Tensor:
        """(orders,) float64: the line through `log_norms` at the orders."""
        orders = self._orders
        return self.log_norms.mean() + self.rate * (orders - orders.mean())

    @property
    def fit_residual(self) -> float:
        """Root mean square distance of `log_norms` from the line; nan where a rate is infinite."""
        return float((self.log_norms - self.fitted).square().mean().sqrt())

    def with_normalization(self, normalization: str) -> CurvatureRate:
        """The same derivatives, normalised otherwise: rates differ by a constant of the orders.

        Raises:
            FlexureError: an unknown normalisation.
        """
        _check_named("normalization", normalization, _NORMALIZATIONS)
        return replace(self, normalization=normalization)

    def __str__(self) -> str:
        settings = [
            f"over orders {', '.join(map(str, self.orders))}",
            self.normalization,
            self.reduction,
            f"calibrated for dimension {self.dimension}" if self.calibrate else "not calibrated",
            f"{len(self._used)} of {len(self)} samples "
            f"({self.effective_samples.min():.1f} effective)",
            f"{self.directions} directions",
        ]
        if self.vanishing:
            found = f"vanishing at the orders {', '.join(map(str, self.vanishing))}"
        elif not len(self._used):
            found = "not defined: derivatives overflow or underflow, which float64 may mend"
        else:
            found = f"{self.rate:.4f} ± {self.error:.4f} (fit residual {self.fit_residual:.3f})"
        return f"curvature rate {found}: {'; '.join(settings)}"

    @property
    def _used(self) -> Tensor:
        return self.log_squares[self.converged]

    @property
    def _orders(self) -> Tensor:
        return torch.tensor(self.orders, dtype=torch.float64, device=self.log_squares.device)

    @property
    def _weights(self) -> Tensor:
        """(orders,) such that the slope is their product with the log norms."""
        centred = self._orders - self._orders.mean()
        return centred / centred.square().sum()

    @property
    def _factors(self) -> Tensor:
        """(orders,) logs of what the norms are multiplied by."""
        log_factor = _NORMALIZATIONS[self.normalization]
        return torch.tensor(
            [
                log_factor(n) + (_log_calibration(n, self.dimension) if self.calibrate else 0.0)
                for n in self.orders
            ],
            dtype=torch.float64,
            device=self.log_squares.device,
        )


def curvature_rate(
    f: Callable[..., Any],
    x: Any,
    *,
    orders: Sequence[int] = (1, 2, 3, 4),
    directions: int = 16,
    normalization: str = "raw",
    calibrate: bool = True,
    generator: Generator | None = None,
    reduction: str = "rms",
    chunk: int | None = None,
) -> CurvatureRate:
    """The curvature rate of `f` at `x`: the slope of log v_n against n, [CR].

    v_n is the root mean square of D^n f(x)[v, ..., v] over samples x and random unit directions v
    (the mean before the logarithm). The limit of large n that the paper writes is infinite for
    tanh, softplus and CTU networks; this is a slope over finite orders, and depends on them.

    Random directions see less of a derivative the higher the dimension d. Calibration multiplies
    v_n by kappa_n = sqrt(prod_{i<n} (d + 2i) / (2n - 1)!!), exact for derivatives of rank one and
    the root mean square; without it rates of different dimensions are not comparable.

    Example:
        >>> x = torch.rand(64, 3, dtype=torch.float64)
        >>> found = curvature_rate(lambda x: torch.exp(2 * x).sum(1), x)
        >>> found.orders, found.dimension
        ((1, 2, 3, 4), 3)

    Args:
        f: (B, *shape) -> (B,), each sample by itself; or a model: the probability of the class
            that is largest at `x`, held fixed, and for a model with one output that output.
        x: (B, *shape) float32 or float64; or an `Example` with one such tensor, the others held.
        orders: at least two, increasing, from 1 to 170; default of [CR]. In float32, coefficients
            of high orders (derivatives over n!) underflow, which `converged` tells.
        directions: unit directions for each sample; every one costs a jet of the highest order.
        normalization: `"raw"`: log of the cut-off frequency for band-limited functions;
            `"factorial"`: v_n / n!, minus the log of the radius of convergence.
        calibrate: multiply by kappa_n.
        generator: of the CPU, draws the directions of all samples before they are cut into chunks;
            None: a fresh one with seed 0.
        reduction: `"rms"`, or `"sup"`: the largest over the drawn directions and samples, a lower
            bound of the supremum that grows with their number. Calibration removes most, not
            all, of the dimension from it.
        chunk: samples at a time; None: all. Directions are taken one at a time. Memory grows with
            it, results do not change.

    Returns:
        Logs of squares per sample; `rate`, `error` and `log_norms` pool them. Exact but for the
        directions: the derivatives are Taylor coefficients, not differences.

    Raises:
        FlexureError: bad settings or inputs; `f` returns something else than (B,); or `f` has an
            operation that has no derivatives of these orders (ReLU, max-pooling), which is named.
    """
    ordered = _checked_orders(orders)
    check_positive(directions=directions, chunk=chunk)
    _check_named("normalization", normalization, _NORMALIZATIONS)
    _check_named("reduction", reduction, _REDUCTIONS)
    drawn_from = torch.Generator().manual_seed(0) if generator is None else generator
    point = point_of(x).detach()
    with undisturbed(f, x):
        parts = [
            (rows, probability_field(f, at_rows(x, rows))) for rows in pieces(len(point), chunk)
        ]
        logs, lost = zip(
            *(
                _log_squares(parts, point, _unit(point, drawn_from), ordered)
                for _ in range(directions)
            ),
            strict=True,
        )
    log_squares = _REDUCTIONS[reduction](torch.stack(logs), 0)
    return CurvatureRate(
        converged=(log_squares < math.inf).all(1) & ~torch.stack(lost).any(0),
        log_squares=log_squares,
        orders=ordered,
        normalization=normalization,
        calibrate=calibrate,
        dimension=point[0].numel(),
        directions=directions,
        reduction=reduction,
    )


_NORMALIZATIONS: dict[str, Callable[[int], float]] = {
    "raw": lambda order: 0.0,
    "factorial": lambda order: -math.lgamma(order + 1),
}
"""Logs of what derivatives of an order are multiplied by."""

_REDUCTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "rms": lambda logs, dim: logs.logsumexp(dim) - math.log(logs.shape[dim]),
    "sup": torch.amax,
}
"""What logs of squares are pooled by, over a dimension; both keep nan."""


def _checked_orders(orders: Sequence[int]) -> tuple[int, ...]:
    ordered = tuple(orders)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in ordered)
    if not whole or len(ordered) < 2 or ordered[0] < 1 or sorted(set(ordered)) != list(ordered):
        raise FlexureError(
            f"expected at least two orders of derivatives, whole numbers from 1 that increase, got "
            f"{list(ordered)}; for example orders=(1, 2, 3, 4)"
        )
    return ordered


def _check_named(setting: str, value: str, known: dict[str, Any]) -> None:
    if value not in known:
        raise FlexureError(
            f"expected {setting} to be one of {', '.join(map(repr, known))}, got {value!r}"
        )


def _unit(x: Tensor, generator: Generator) -> Tensor:
    """One unit direction a sample, the same ones whatever the dtype and the device."""
    v = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    v /= v.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
    return v.to(x)


def _log_squares(
    parts: Sequence[tuple[slice, ScaledField]], x: Tensor, v: Tensor, orders: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """(B, orders) float64 along one direction a sample, and (B,) bool: some have underflowed."""
    logs, lost = [], []
    for rows, field in parts:
        found, computed = taylor_coefficients(field.function, x[rows], v[rows], order=orders[-1])
        factorials = torch.arange(1, len(found) + 1, device=x.device).double().lgamma()
        logs.append(2 * (found.double().abs().log() + factorials[:, None] + field.log_scale))
        lost.append(_underflown(found, computed))
    return torch.cat(logs, dim=1)[list(orders)].T, torch.cat(lost)


def _underflown(coefficients: Tensor, computed: tuple[bool, ...]) -> Tensor:
    """(B,) whether the last of (N + 1, B) coefficients are zero for want of smaller numbers.

    That is so where the first of these zeros was computed, and what the two last nonzero ones
    (value included; with one alone, that) lead to is below the dtype's normal numbers.
    """
    sizes = coefficients.double().abs()
    places = torch.arange(len(sizes), device=sizes.device)[:, None].expand_as(sizes)
    last = torch.where(sizes > 0, places, -1).amax(0)
    before = torch.where((sizes > 0) & (places < last), places, -1).amax(0)
    end = sizes.gather(0, last.clamp(min=0)[None])[0]
    growth = torch.where(before < 0, 1.0, end / sizes.gather(0, before.clamp(min=0)[None])[0])
    is_computed = torch.tensor((*computed, False), device=sizes.device)[last.clamp(min=0) + 1]
    return is_computed & (end * growth < torch.finfo(coefficients.dtype).tiny)


def _log_calibration(order: int, dimension: int) -> float:
    """log kappa_n: -1/2 log E[(a . v)^(2n)] for unit a and uniformly distributed unit v."""
    return sum(math.log((dimension + 2 * i) / (1 + 2 * i)) for i in range(order)) / 2


def _log_sums_without_each(logs: Tensor) -> Tensor:
    """Row i: log of the sum of all other rows' exponentials, without a difference that cancels."""
    above = _shifted(logs.logcumsumexp(0))
    below = _shifted(logs.flip(0).logcumsumexp(0)).flip(0)
    return torch.logaddexp(above, below)


def _shifted(sums: Tensor) -> Tensor:
    return torch.cat([torch.full_like(sums[:1], -math.inf), sums[:-1]])
