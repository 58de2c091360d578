"""Linear algebra on a batch of independent samples: dots, norms, the largest eigenvalue of each.

Knows operators only by their products with vectors: what they are the operators of is `measure`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flexure.contracts import FlexureError

__all__ = ["Product", "Spectrum", "dots", "lanczos", "norms", "power_iteration", "scaled"]

Product = Callable[[Tensor, Tensor], Tensor]
"""`(V, rows) -> HV`: sample i's symmetric operator applied to sample i's vector, for the samples
numbered in `rows` ((B',) int64, ascending); `V` and `HV` are (B', *shape)."""


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalue of largest magnitude of each of B symmetric operators.

    Attributes:
        norm: (B,) the spectral norm, as ‖Hu‖: at most the true one, up to rounding.
        eigenvalue: (B,) θ = uᵀHu, with its sign.
        vector: (B, *shape) u, ‖u‖ = 1.
        residual: (B,) ‖Hu − θu‖; within this distance of θ there is an eigenvalue, not
            necessarily the largest.
        converged: (B,) bool.
        products: (B,) int64, products that each sample took.
    """

    norm: Tensor
    eigenvalue: Tensor
    vector: Tensor
    residual: Tensor
    converged: Tensor
    products: Tensor


def dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the samples of two (B, *shape) tensors, (B,)."""
    products: Tensor = torch.linalg.vecdot(a.flatten(1), b.flatten(1))
    return products


def norms(a: Tensor) -> Tensor:
    """Euclidean norms of the samples of a (B, *shape) tensor, (B,).

    No square underflows or overflows on the way.
    """
    flat = a.flatten(1)
    largest = flat.abs().amax(1)
    scale = torch.where(largest > 0, largest, 1.0)
    relative: Tensor = torch.linalg.vector_norm(flat / scale[:, None], dim=1)
    return relative * largest


def scaled(factor: Tensor, a: Tensor) -> Tensor:
    """Each sample of a (B, *shape) tensor times its own factor, (B,)."""
    return a * factor.to(a.dtype).view(-1, *[1] * (a.dim() - 1))


def lanczos(
    product: Product,
    start: Tensor,
    *,
    tol: float,
    max_products: int,
    random_share: float = 0.1,
    doubt: float = 1e-3,
) -> Spectrum:
    """The eigenvalue of largest magnitude of each sample's operator, by the Lanczos method.

    Full reorthogonalisation (twice). A sample is done when two things hold. First, the residual
    ‖Hu − θu‖ <= tol·|θ|. That alone can be true of a wrong eigenpair: of one near the start vector,
    while the largest hides in what the start vector barely contains. So, second, nothing larger
    than (1 + 2·tol)·|θ| may hide. With v_1, ..., v_k the Lanczos vectors and p_j their polynomials,
    v_{j+1} = p_j(H) v_1, an eigenvector of eigenvalue λ has the part p_j(λ)γ in v_{j+1}, γ being
    its part in the start vector; together these parts are at most 1, hence |λ| is below any t
    beyond all Ritz values with Σ_j p_j(±t)² >= 1/γ². The random share of the start vector makes
    |γ| small only by bad luck (van Dorsselaer, Hochstenbach and van der Vorst 2000, "Computing
    probabilistic bounds for extreme eigenvalues of symmetric matrices with the Lanczos method").
    Where nothing but rounding is left of a next vector, an invariant subspace may have been found,
    or rounding may have covered the little that leads out of it. The method then goes on from a
    fresh random vector; probabilities that both random parts were too small multiply. A sample is
    done as well when its vectors span the whole space.

    Args:
        product: see `Product`; called with the samples that are not done.
        start: (B, *shape), nonzero, floating point; need not be normalised.
        tol: the relative residual asked for.
        max_products: at most so many products a sample.
        random_share: norm of the uniformly random part of `start` divided by that of the rest
            (default: that of `flexure.curvature`); 0 waives the second condition.
        doubt: probability, at most, that the random part is too small along a given vector for the
            second condition to mean what it says.

    Raises:
        FlexureError: `tol`, `max_products` or `start` is out of its range.
    """
    _check(start, tol, max_products)
    flat = start.flatten(1)
    size = flat.shape[1]
    krylov = _Krylov(flat, random_share / (1 + random_share))
    done = _unfinished(start)
    rows = torch.arange(len(flat))
    while len(rows):
        newest = krylov.vectors[:, -1].view(-1, *start.shape[1:])
        krylov.extend(product(newest, rows.to(start.device)).reshape(len(rows), size))
        ritz = krylov.largest()
        known = ritz.residual <= tol * ritz.value.abs()
        if known.any():  # the second condition takes longer to tell
            known &= krylov.spans | krylov.excludes((1 + 2 * tol) * ritz.value.abs(), doubt)
        known &= krylov.finite
        over = known | krylov.spans | ~krylov.finite
        if krylov.length >= max_products:
            over[:] = True
        _write(done, rows, krylov, ritz, known, over)
        rows = rows[~over]
        krylov.keep(~over)
    return done


def power_iteration(product: Product, start: Tensor, *, tol: float, max_products: int) -> Spectrum:
    """The spectral norm of each sample's operator, by power iteration: the plain alternative.

    Reports ‖Hu‖, which is right for ± pairs of eigenvalues too, where uᵀHu is not. A sample is done
    when ‖Hu‖ has changed by at most tol·‖Hu‖; that is no bound on its error, nor on the residual.

    Args:
        product: see `Product`; called with the samples that are not done.
        start: (B, *shape), nonzero.
        tol: the relative change asked for.
        max_products: at most so many products a sample.

    Raises:
        FlexureError: `tol`, `max_products` or `start` is out of its range.
    """
    _check(start, tol, max_products)
    done = _unfinished(start)
    rows = torch.arange(len(start), device=start.device)
    u = scaled(1 / norms(start), start)
    previous = torch.full_like(done.norm, math.inf)
    for count in range(1, max_products + 1):
        image = product(u, rows)
        norm, eigenvalue = norms(image), dots(u, image)
        known = (norm - previous[rows]).abs() <= tol * norm
        over = known | ~norm.isfinite() | (norm == 0) | (count == max_products)
        at = rows[over]
        done.norm[at], done.eigenvalue[at] = norm[over], eigenvalue[over]
        done.vector[at] = u[over]
        done.residual[at] = norms(image - scaled(eigenvalue, u))[over]
        done.converged[at] = (known | (norm == 0))[over]
        done.products[at] = count
        previous[rows] = norm
        rows, u = rows[~over], scaled(1 / norm, image)[~over]
        if not len(rows):
            break
    return done


def _check(start: Tensor, tol: float, max_products: int) -> None:
    if not 0 < tol < 1 or max_products < 1:
        raise FlexureError(
            f"expected 0 < tol < 1 and at least one product, got tol {tol} and max_products "
            f"{max_products}; give for example tol=1e-2 and max_products=20"
        )
    if start.dim() < 2 or not start.is_floating_point() or not start[0:1].numel():
        raise FlexureError(
            f"expected a floating-point start vector for each sample, (B, *shape), got "
            f"{start.dtype} of shape {tuple(start.shape)}; give one row for each sample"
        )


def _unfinished(start: Tensor) -> Spectrum:
    nan = start.new_full((len(start),), math.nan)
    return Spectrum(
        norm=nan,
        eigenvalue=nan.clone(),
        vector=torch.full_like(start, math.nan),
        residual=nan.clone(),
        converged=torch.zeros_like(nan, dtype=torch.bool),
        products=torch.zeros_like(nan, dtype=torch.int64),
    )


@dataclass(frozen=True)
class _Ritz:
    """The Ritz pair of largest magnitude of each sample: value, coordinates, residual norm."""

    value: Tensor
    coordinates: Tensor
    residual: Tensor


_GROWTH = 32
"""Room for one vector more is made for as many: below that, none that is not needed."""


class _Krylov:
    """Orthonormal bases of the Krylov spaces of some samples, grown by one vector at a time.

    H V = V S + next ⊗ e_k holds to rounding, whatever the product's own errors: S keeps all
    coefficients (Arnoldi), not only the three of a symmetric operator in exact arithmetic. The
    small matrices are float64 on the CPU. `share` is the norm of the random part of unit starts.
    """

    def __init__(self, start: Tensor, share: float) -> None:
        self._room = (start / norms(start)[:, None]).unsqueeze(1)
        self._held = 1
        self.matrix = torch.zeros(len(start), 0, 0, dtype=torch.float64)
        self.next = torch.ones(len(start), dtype=torch.float64)
        self.spans = torch.zeros(len(start), dtype=torch.bool)
        self.finite = torch.ones(len(start), dtype=torch.bool)
        self.fresh = torch.zeros(len(start), 1, dtype=torch.bool)
        self._share = share
        # What is left of a vector within the space by rounding alone, after two projections.
        self._rounding = 4 * torch.finfo(start.dtype).eps

    @property
    def length(self) -> int:
        """Products so far."""
        return self.matrix.shape[1]

    @property
    def vectors(self) -> Tensor:
        """The bases, (B, length + 1, size)."""
        return self._room[:, : self._held]

    def _append(self, unit: Tensor) -> None:
        if self._held == self._room.shape[1]:  # few are copied in vain, and little is held unused
            more = max(1, self._held // _GROWTH)
            self._room = torch.cat([self._room, torch.empty_like(self._room[:, :more])], 1)
        self._room[:, self._held] = unit
        self._held += 1

    def extend(self, image: Tensor) -> None:
        """Takes in the product with the newest vector, and finds the next vector."""
        done, largest = self.length, norms(image)
        rest, column = image, torch.zeros(len(image), done + 1, dtype=torch.float64)
        for _ in range(2):
            part = (self.vectors @ rest.unsqueeze(2)).squeeze(2)
            rest = rest - (part.unsqueeze(1) @ self.vectors).squeeze(1)
            column += part.cpu().double()
        length = norms(rest)
        self.matrix = torch.nn.functional.pad(self.matrix, (0, 1, 0, 1))
        self.matrix[:, :, done] = column
        self.matrix[:, done, done - 1 : done] = self.next[:, None]
        self.finite = (largest + length).isfinite().cpu()
        self.matrix[~self.finite] = 0.0
        self.next = length.cpu().double()
        covered = self.next <= self._rounding * self._scale
        zero = covered & (self._scale == 0)
        self.spans = zero | (done + 1 == image.shape[1])
        fresh = covered & ~self.spans & self.finite
        self.fresh = torch.cat([self.fresh, fresh[:, None]], 1)
        unit = rest / torch.where(length > 0, length, 1.0)[:, None]
        if fresh.any():
            unit[fresh.to(unit.device)] = self._outside(fresh)
        self._append(unit)
        self.next[self.spans | ~self.finite] = 0.0

    @property
    def _scale(self) -> Tensor:
        """The size of each operator within its space."""
        return self.matrix.abs().amax((1, 2))

    def _outside(self, rows: Tensor) -> Tensor:
        """Unit vectors orthogonal to the spaces, random; the same draw for every sample."""
        basis = self.vectors[rows.to(self.vectors.device)]
        drawn_by = torch.Generator().manual_seed(self.length)
        drawn = torch.randn(basis.shape[2], generator=drawn_by, dtype=torch.float64)
        rest = drawn.to(basis).expand(len(basis), -1)
        for _ in range(2):
            part = basis @ rest.unsqueeze(2)
            rest = rest - (part.mT @ basis).squeeze(1)
        return rest / norms(rest)[:, None]

    def largest(self) -> _Ritz:
        """The Ritz pair of largest magnitude."""
        values, bases = torch.linalg.eigh((self.matrix + self.matrix.mT) / 2)
        best = values.abs().argmax(1)
        value = values.gather(1, best[:, None]).squeeze(1)
        pick = best[:, None, None].expand(-1, bases.shape[1], 1)
        coordinates = bases.gather(2, pick).squeeze(2)
        inside = (self.matrix @ coordinates.unsqueeze(2)).squeeze(2)
        inside = inside - value[:, None] * coordinates
        outside = self.next * coordinates[:, -1]
        residual = torch.linalg.vector_norm(torch.cat([inside, outside[:, None]], 1), dim=1)
        return _Ritz(value, coordinates, residual)

    def excludes(self, bound: Tensor, doubt: float) -> Tensor:
        """Whether an eigenvalue beyond ±bound would have to hide by bad luck of less than `doubt`.

        Its eigenvector has parts in the vectors of the space, of known ratios and at most 1, so
        that it had too small a part in the start, and in every fresh vector.
        """
        if not self._share:
            return torch.ones_like(self.finite)
        points = torch.stack([bound, -bound], 1)
        before, now = torch.zeros_like(points), torch.ones_like(points)
        total, last = now.square(), torch.zeros(len(points), 1, dtype=torch.float64)
        luck, share = torch.ones_like(points), torch.full_like(last, self._share)
        floor = self._rounding * self._scale
        for step in range(self.length):
            below = self.next if step + 1 == self.length else self.matrix[:, step + 1, step]
            below = torch.maximum(below, floor)[:, None]
            centre = self.matrix[:, step, step, None]
            after = ((points - centre) * now - last * before) / below
            before, now, last = now, after, below
            total = total + now.square()
            fresh = self.fresh[:, step + 1, None]
            luck = torch.where(fresh, luck * self._luck(total, share), luck)
            before, last = torch.where(fresh, 0.0, before), torch.where(fresh, 0.0, last)
            now, total = torch.where(fresh, 1.0, now), torch.where(fresh, 1.0, total)
            share = torch.where(fresh, 1.0, share)
        return (luck * self._luck(total, share) <= doubt).all(1)

    def _luck(self, total: Tensor, share: Tensor) -> Tensor:
        """The probability, at most, of a part below total^(−1/2) in a start of this random share.

        For a uniformly random unit vector r, P(|r·u| < δ) <= δ·sqrt(2·size/π). A total that has
        overflown is enormous.
        """
        size = self.vectors.shape[2]
        part = torch.where(total.isfinite(), total.rsqrt(), 0.0) / share
        return (part * math.sqrt(2 * size / math.pi)).clamp(max=1.0)

    def keep(self, rows: Tensor) -> None:
        """Forgets the other samples."""
        if rows.all():
            return
        self._room = self.vectors[rows.to(self.vectors.device)]
        self.matrix, self.next = self.matrix[rows], self.next[rows]
        self.spans, self.finite = self.spans[rows], self.finite[rows]
        self.fresh = self.fresh[rows]


def _write(
    done: Spectrum, rows: Tensor, krylov: _Krylov, ritz: _Ritz, known: Tensor, over: Tensor
) -> None:
    """Stores the results of the samples that are over."""
    where = done.norm.device
    at, over_there = rows[over].to(where), over.to(where)
    coordinates = ritz.coordinates[over].to(done.vector)
    basis = krylov.vectors[over_there, : krylov.length]
    vector = (coordinates.unsqueeze(1) @ basis).squeeze(1)
    vector = vector / norms(vector)[:, None]
    value = torch.where(krylov.finite, ritz.value, math.nan)[over]
    residual = torch.where(krylov.finite, ritz.residual, math.nan)[over]
    done.norm[at] = torch.hypot(value, residual).to(done.norm)
    done.eigenvalue[at] = value.to(done.norm)
    done.residual[at] = residual.to(done.norm)
    done.vector[at] = vector.view(-1, *done.vector.shape[1:])
    done.converged[at] = known[over].to(where)
    done.products[at] = krylov.length
