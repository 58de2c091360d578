"""How much a loss's gradient turns and grows under small random noise, beside what C predicts.

[LCNN] (Low-Curvature Networks, Srinivas et al., 2022) Fig. 2 and Proposition 1. The bound's
equation is in `theorems.py`, the measurement of C in `curvature.py`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from flexure.batched import norms, scaled
from flexure.calling import map_tensors, take
from flexure.contracts import BudgetError, FlexureError
from flexure.measure.chunks import chunk_within
from flexure.measure.curvature import Curvature, curvature
from flexure.measure.fields import Field, measuring, point_of, scalar_field
from flexure.measure.probability import check_positive, pieces
from flexure.measure.theorems import relative_gradient_bound
from flexure.per_sample import PerSample

__all__ = ["RADII", "GradientChange", "gradient_change"]

RADII = (1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1)
"""Half decades of the range of [LCNN] Fig. 2, in units of the model's input."""

_LOST = 0.01
"""Share of a radius that may be lost by rounding x + ε; there, changes are off by about as much."""

_ROUNDING = 100
"""Roundings of the input's dtype by which a change may exceed the bound: gradients have as many."""


@dataclass(frozen=True)
class GradientChange(PerSample):
    """Relative gradient change of B samples under noise of R radii, means over directions.

    Attributes:
        converged: (B,) bool, whether the gradients are finite and every C was found to `tol`.
        change: (B, R) float64, ‖∇f(x+ε) − ∇f(x)‖₂ / ‖∇f(x)‖₂; nan where ∇f(x) is exactly zero.
        estimated_bound: (B, R) float64, e^a − 1 with a = ‖ε‖·(largest C found on the segment).
            **An estimate, not a certificate**: C is known at some points of the segment only, and
            from below. inf where the gradient vanishes at one of them; nan without points, and
            where `change` is.
        violations: (B, R) float64, share of directions in which the change exceeds that by more
            than `tol` and rounding; nan where there is none.
        normalized: (B,) C at x itself, of which ‖ε‖·C is the paper's quadratic approximation of
            the bound; nan without points.
        zero_gradient: (B,) bool, whether ∇f(x) is exactly zero.
        radii: ‖ε‖₂ of the columns, in units of the input.
        directions: over which a sample's values are means.
        points: see `gradient_change`.
        tol: of C.
    """

    change: Tensor
    estimated_bound: Tensor
    violations: Tensor
    normalized: Tensor
    zero_gradient: Tensor
    radii: tuple[float, ...]
    directions: int
    points: int
    tol: float


def gradient_change(
    model: nn.Module | Callable[..., Any],
    x: Any,
    y: Tensor | None = None,
    *,
    field: Callable[[Tensor], Tensor] | None = None,
    radii: Sequence[float] = RADII,
    directions: int = 2,
    points: int = 2,
    tol: float = 1e-2,
    max_products: int = 20,
    chunk: int | None = None,
    generator: Generator | None = None,
    memory: int | None = None,
    check: bool = True,
) -> GradientChange:
    """Relative gradient change under random noise of given l2 norms, with a bound beside it.

    Noise is r·u with u uniform on the unit sphere; a direction u serves all radii. Of a classifier
    f is the cross-entropy softplus(−m), m the margin of `fields.py`, whose gradient is −σ(−m)·∇m:

        change = ‖ρ·∇m(x+ε) − ∇m(x)‖ / ‖∇m(x)‖,   ρ = σ(−m(x+ε)) / σ(−m(x)),

    ρ from the difference of logarithms in float64, so that nothing underflows where the classifier
    is sure. The label is the same at x and x + ε. In float32 a small change carries the rounding of
    two gradients.

    Proposition 1 of [LCNN] (tightened) bounds the change by e^a − 1 with a = ‖ε‖·max C over the
    segment. C is measured at x and at `points` points spread evenly from there to the largest
    radius; for a radius the largest C up to the first point that is not below it counts. A maximum
    over points can miss a peak between them, and a change can then exceed the estimate: see
    `violations`. A bound for all ε would need the largest C of a ball.

    **ReLU networks**: the bound holds between kinks only. C does not see the jumps of the gradient
    across them, so that changes may exceed e^a − 1 by any amount, with any number of points.

    Args:
        model: as for `flexure.curvature`; used in eval mode, and not changed.
        x: an `Example` with one floating-point tensor (B, *shape).
        y: (B,) labels; without, the predicted class at x. Floats: targets of a squared error.
        field: another f, (B, *shape) -> (B,).
        radii: increasing.
        directions: for each sample.
        points: see above; 0 leaves out the bound, and the time that it takes:
            1 + directions · points measurements of C.
        tol: of C, see `flexure.curvature`.
        max_products: of each C.
        chunk: samples at a time; None: all, or as many as fit `memory`. Noise does not depend on
            it; C changes within `tol`, since its start vectors are drawn chunk by chunk.
        generator: of the CPU; None: always the same noise.
        memory: bytes to aim at beyond the model and x, the noise of all samples included: the chunk
            is chosen for it, and the measurements of C choose their own. Not a limit: results and
            copies of buffers are not counted, and small samples can exceed it somewhat.
        check: whether to check derivatives at x first, see `flexure.curvature`; not done without
            points.

    Raises:
        FlexureError: radii that do not increase from above 0 or are lost in the rounding of x + ε;
            counts that are no whole numbers or out of range; `memory` is too little for one
            sample; what `flexure.curvature` refuses.
    """
    radii = _checked(radii, points)
    check_positive(directions=directions, max_products=max_products, chunk=chunk, memory=memory)
    point = point_of(x)
    if y is not None and len(y) != len(point):
        raise FlexureError(
            f"expected one target for each of {len(point)} samples, got {len(y)}; give y of the "
            f"same batch"
        )
    drawn_by = torch.Generator().manual_seed(0) if generator is None else generator
    with measuring(model):
        noise = _directions(point, directions, drawn_by)
        of_curvature = {"tol": tol, "max_products": max_products, "generator": drawn_by}
        run = _Run(model, x, y, field, noise, radii, points, of_curvature)
        if chunk is not None or memory is None:
            return run.all(chunk or len(point), memory, check)
        return run.fitting(memory, check)


@dataclass(frozen=True)
class _Run:
    """One call of `gradient_change`: its arguments, and what it does with some of the samples.

    Attributes:
        model: as given.
        x: the `Example` as given.
        y: labels, or targets.
        given: another field.
        noise: (D, B, *shape) unit vectors.
        radii: of the columns.
        points: on each direction at which C is measured, besides x.
        of_curvature: what `curvature` is told.
    """

    model: nn.Module | Callable[..., Any]
    x: Any
    y: Tensor | None
    given: Callable[[Tensor], Tensor] | None
    noise: Tensor
    radii: tuple[float, ...]
    points: int
    of_curvature: dict[str, Any]

    def all(self, chunk: int, memory: int | None, check: bool) -> GradientChange:
        """The gradient change of all samples, so many at a time."""
        parts = [
            self.measured(rows, check=check and rows.start == 0, memory=memory)
            for rows in pieces(self.noise.shape[1], chunk)
        ]
        return GradientChange.joined(parts)

    def fitting(self, memory: int, check: bool) -> GradientChange:
        """The same, as many at a time as fit."""
        chunk = self.chunk(memory)
        while True:
            try:
                return self.all(chunk, memory, check)
            except BudgetError:
                if chunk == 1:
                    raise
            # What the samples of a chunk hold leaves C too little, which one sample may not.
            chunk //= 2

    def chunk(self, memory: int) -> int:
        """How many samples fit a budget."""
        without_bounds = replace(self, points=0)
        return chunk_within(
            memory,
            lambda samples: without_bounds.measured(slice(0, samples)),
            batch=self.noise.shape[1],
            held=2 * self.noise.nbytes,  # drawn in one dtype, and wanted in another
            device=self.noise.device,
        )

    def measured(
        self, rows: slice, *, check: bool = False, memory: int | None = None
    ) -> GradientChange:
        """The gradient change of some of the samples."""
        x = take(self.x, rows, self.noise.shape[1])
        noise, y = self.noise[:, rows], None if self.y is None else self.y[rows]
        # A prediction is the label at x, also where noise changes it.
        field = scalar_field(self.model, x, y, field=self.given)
        label = y if field.target is None else field.target
        point, settings = point_of(x), dict(self.of_curvature)
        held = self.noise.nbytes + 2 * point.nbytes

        def curvature_at(at: Tensor) -> Curvature:
            moved = map_tensors(x, lambda leaf: at if leaf is point else leaf)
            checked = check and at is point
            measure = partial(
                curvature, self.model, moved, label, field=self.given, check=checked, **settings
            )
            return measure() if memory is None else _within(measure, memory, held)

        changes, zero = _changes(field, noise, self.radii)
        bounds, normalized, converged = _bounds(curvature_at, point, noise, self.radii, self.points)
        slack = settings["tol"] * bounds + _ROUNDING * torch.finfo(point.dtype).eps
        exceeded = (changes > bounds + slack).double().where(~bounds.isnan(), torch.nan)
        change, bound, violations = (
            values.mean(0).masked_fill(zero[:, None], torch.nan)
            for values in (changes, bounds, exceeded)
        )
        return GradientChange(
            converged=converged & (change.isfinite().all(1) | zero),
            change=change,
            estimated_bound=bound,
            violations=violations,
            normalized=normalized,
            zero_gradient=zero,
            radii=self.radii,
            directions=len(noise),
            points=self.points,
            tol=settings["tol"],
        )


def _within(measure: Callable[..., Curvature], memory: int, held: int) -> Curvature:
    """C in what a budget leaves; errors name the whole budget."""
    try:
        return measure(memory=max(1, memory - held))
    except BudgetError as error:
        needed = error.needed + held
        raise BudgetError(
            f"expected a memory budget of at least {needed:,} bytes, of which {error.needed:,} for "
            f"a measurement of C and {held:,} for noise and samples beside it, got {memory:,}; "
            f"raise it, or give fewer samples or directions at once, or points=0",
            needed,
        ) from error


def _changes(field: Field, noise: Tensor, radii: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(D, B, R) relative changes of the loss's gradient, and (B,) whether it is exactly zero."""
    values, start = _value_and_gradient(field, field.x)
    length = norms(start.double())

    def changed(u: Tensor, radius: float) -> Tensor:
        there, moved = _value_and_gradient(field, _moved(field.x, u, radius))
        if field.is_margin:
            growth = F.logsigmoid(-there.double()) - F.logsigmoid(-values.double())
            moved = scaled(growth.exp(), moved.double())
        return norms(moved.double() - start.double()) / length

    columns = [torch.stack([changed(u, radius) for radius in radii], 1) for u in noise]
    return torch.stack(columns), norms(start) == 0


def _bounds(
    measured: Callable[[Tensor], Curvature],
    point: Tensor,
    noise: Tensor,
    radii: Sequence[float],
    points: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(D, B, R) estimated bounds, (B,) C at x, and (B,) whether all C have converged."""
    bounds = torch.full(
        (*noise.shape[:2], len(radii)), torch.nan, dtype=torch.float64, device=point.device
    )
    if not points:
        known = torch.ones(len(point), dtype=torch.bool, device=point.device)
        return bounds, torch.full_like(bounds[0, :, 0], torch.nan), known
    first = measured(point)
    converged = first.converged.clone()
    steps = [radii[-1] * step / points for step in range(1, points)] + [radii[-1]]
    for u, bound in zip(noise, bounds, strict=True):
        largest = [first.normalized.double()]
        for step in steps:
            at = measured(_moved(point, u, step))
            # Where the gradient vanishes C is not bounded nearby.
            here = at.normalized.double().nan_to_num(nan=torch.inf, posinf=torch.inf)
            largest.append(torch.maximum(largest[-1], here))
            converged &= at.converged
        for column, radius in enumerate(radii):
            top = largest[1 + bisect_left(steps, radius)]
            found = relative_gradient_bound(radius, top.nan_to_num(nan=0.0, posinf=torch.inf))
            bound[:, column] = torch.as_tensor(found).masked_fill(top.isnan(), torch.nan)
    return bounds, first.normalized.double(), converged


def _directions(point: Tensor, count: int, generator: Generator) -> Tensor:
    """(D, B, *shape) unit vectors, drawn on the CPU."""
    drawn = torch.randn((count, *point.shape), generator=generator, dtype=torch.float32).to(point)
    for u in drawn:
        u.copy_(scaled(1 / norms(u), u))
    return drawn


def _moved(point: Tensor, u: Tensor, radius: float) -> Tensor:
    """x + r·u.

    Raises:
        FlexureError: rounding has changed the length of the step.
    """
    point = point.detach()
    moved = point + radius * u
    length = norms(moved.double() - point.double()) / radius
    if bool(((length - 1).abs() > _LOST).any()):
        raise FlexureError(
            f"expected radii that {point.dtype} inputs can be moved by, got {radius:.3g}, which is "
            f"lost in their rounding; use float64 or larger radii"
        )
    return moved


def _value_and_gradient(field: Field, at: Tensor) -> tuple[Tensor, Tensor]:
    at = at.detach().requires_grad_()
    values = field(at)
    if not values.requires_grad:
        return values, torch.zeros_like(at)
    (gradient,) = torch.autograd.grad(values.sum(), at, materialize_grads=True)
    return values.detach(), gradient


def _checked(radii: Sequence[float], points: int) -> tuple[float, ...]:
    try:
        given = tuple(math.nan if isinstance(r, str) else float(r) for r in radii)
    except (TypeError, ValueError):
        given = ()
    increasing = all(inner < outer < torch.inf for inner, outer in pairwise((0.0, *given)))
    if not given or not increasing:
        raise FlexureError(
            f"expected radii that increase from above 0, got {radii!r}; give for example {RADII}"
        )
    if not isinstance(points, int) or isinstance(points, bool) or points < 0:
        raise FlexureError(
            f"expected points to be a whole number from 0, got {points!r}; 2 is the default"
        )
    return given
