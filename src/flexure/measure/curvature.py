"""Gradient norm, Hessian spectral norm and normalised curvature of each sample.

The equations and the choice of settings; fields, products and Lanczos are their own files'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from flexure.batched import dots, lanczos, norms, scaled
from flexure.calling import rewritten_weights, take
from flexure.contracts import BudgetError, FlexureError
from flexure.measure.checks import check_field, refuse_not_finite
from flexure.measure.chunks import chunk_within
from flexure.measure.fields import Field, check_target, measuring, point_of, scalar_field
from flexure.measure.products import PRODUCTS
from flexure.measure.rounding import warn_of_rounding
from flexure.measuring import unchanged_randomness
from flexure.memory import peak_bytes
from flexure.per_sample import PerSample

__all__ = ["Curvature", "curvature"]

_RANDOM_SHARE = 0.1
"""Norm of the random part of the start vector, that of the gradient's direction being 1."""


CHECKED = 8
"""Samples that are checked at most; a wrong derivative rule is wrong at most samples."""


@dataclass(frozen=True)
class Curvature(PerSample):
    """Curvature of a scalar field (a classifier's cross-entropy, or another) at B inputs.

    Attributes:
        gradient_norm: (B,) g = ‖∇f‖₂, in units of f per unit of input. In float32 it becomes 0
            where a label's cross-entropy is below about 1e-38 (margins above 88), as ‖∇²f‖ does;
            means lose nothing by it, and C is not made of the two.
        hessian_norm: (B,) ‖∇²f‖₂, spectral, estimated from below.
        normalized: (B,) C = ‖∇²f‖₂ / ‖∇f‖₂, in 1 / unit of input; exact where g or ‖∇²f‖
            underflows; nan where the gradient is exactly zero.
        zero_gradient: (B,) bool, where that is so.
        residual: (B,) ‖Hu − θu‖ / |θ| for the vector u found, ‖u‖ = 1, θ = uᵀHu.
        products: (B,) int64, Hessian-vector products taken.
        value: (B,) f: of a classifier the cross-entropy, softplus(−m).
        probability: (B,) that a classifier gives to the label, σ(m); nan for other fields.
        tol: what `converged` refers to.
        max_products: what a sample could take.
    """

    gradient_norm: Tensor
    hessian_norm: Tensor
    normalized: Tensor
    zero_gradient: Tensor
    residual: Tensor
    products: Tensor
    value: Tensor
    probability: Tensor
    tol: float
    max_products: int


def curvature(
    model: nn.Module | Callable[..., Any],
    x: Any,
    y: Tensor | None = None,
    *,
    field: Callable[[Tensor], Tensor] | None = None,
    tol: float = 1e-2,
    max_products: int = 20,
    chunk: int | None = None,
    generator: Generator | None = None,
    products: str = "double-backward",
    memory: int | None = None,
    check: bool = True,
) -> Curvature:
    """Gradient norm, Hessian spectral norm and normalised curvature of each sample.

    For a classifier, f is the cross-entropy at the label. With z the logits, y the label, k the
    strongest wrong class and the margin m = z_y − z_k − log1p(Σ_{j≠y,k} exp(z_j − z_k)), it is
    f = softplus(−m), so with σ the sigmoid

        g = ‖∇f‖ = σ(−m)·‖∇m‖,    ‖∇²f‖ = σ(−m)·‖σ(m)∇m∇mᵀ − ∇²m‖,
        C = ‖∇²f‖ / ‖∇f‖ = ‖σ(m)∇m∇mᵀ − ∇²m‖ / ‖∇m‖:

    σ(−m) cancels, so that C stays exact for confidently right and wrong samples, where f, g and
    ‖∇²f‖ vanish or saturate. C is that of Srinivas et al. 2022 (Efficient training of low-curvature
    neural networks, arXiv:2206.07144) without its ε. For any other field (see `y` and `field`)
    g = ‖∇f‖ and C = ‖∇²f‖/‖∇f‖.

    The spectral norm is found by the Lanczos method, all samples at once, started at ∇m/‖∇m‖ plus
    0.1 of a random unit vector, and reported as ‖Hu‖, which never exceeds it. A sample has
    converged when ‖Hu − θu‖ <= tol·|θ| and nothing more than 2·tol larger can hide from the random
    part of its start: for a given operator, that is wrong in one of a thousand starts at most (see
    `batched.lanczos`). Samples that have converged take no more products.

    All that is true of the network in its own dtype, whose rounding is the network's business: one
    that cancels in float32 has other derivatives there than in float64, and `converged` does not
    know. Where that shows at the samples that are checked, a `RoundingWarning` tells it.

    The model is evaluated in eval mode, without autocast or TF32, and left as it was. One thread of
    the process measures at a time.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(5, 8), torch.nn.Softplus(), torch.nn.Linear(8, 3)
        ... )
        >>> found = curvature(model, torch.randn(4, 5), torch.tensor([0, 2, 1, 0]))
        >>> found.normalized.shape, bool(found.converged.all())
        (torch.Size([4]), True)
        >>> sphere = curvature(model, torch.eye(5), field=lambda x: x.square().sum(1))
        >>> sphere.gradient_norm.tolist(), sphere.hessian_norm.tolist()
        ([2.0, 2.0, 2.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0, 2.0])

    Args:
        model: a network or any callable; its output is a tensor or has `.logits`.
        x: an `Example` of B samples with exactly one floating-point tensor, float32 or float64,
            which is what derivatives are with respect to. Every tensor in it with B rows counts
            as one row a sample: close over what samples share, such as positions.
        y: (B,) integer labels; or floating-point targets of the output's shape, for which f is half
            the squared error. None: the predicted class; of a model with one output a sample, f is
            that output.
        field: f itself, (B, *shape) -> (B,), twice differentiable, each value depending on its own
            sample alone; replaces all that. `model` is still put in eval mode and checked.
        tol: relative residual asked for. The error of the norm is of second
            order in it, where eigenvalues are apart.
        max_products: Hessian-vector products that a sample may take; those that need more are
            returned with `converged` False.
        chunk: samples at a time; None: all, or as many as fit `memory`.
        generator: of the CPU, for the start vectors; None: a new one, seeded 0. A sample's start
            depends on its place in the batch, so that another order changes what has not converged,
            and what has by less than its tolerance.
        products: how Hessian-vector products are computed, a name in `products.PRODUCTS`:
            "double-backward" keeps the graph of the gradient; "forward-over-reverse" keeps no graph
            between products and holds less at its peak (with ReLU, smooth activations and all
            flexure units, not with leaky ReLU), is slower, and asks for forward-mode derivatives of
            every operator's backward pass.
        memory: bytes that may be held beyond the model and x; the chunk is chosen to fit.
        check: whether to hold the derivatives of at most 8 samples against finite differences in
            float64 first, as a Lanczos residual cannot see a wrong product; and to refuse inputs
            that are not finite, of which False makes nan, their own values alone.

    Returns:
        Curvature, with the values of each sample; chunks change them by rounding only.

    Raises:
        FlexureError: an argument is out of its range; or an input is not finite, derivatives are
            missing or wrong, samples depend on each other, or values are random (see
            `checks.check_field`); or `memory` is too little for one sample.
    """
    _check_settings(y, tol, max_products, chunk, generator, products)
    run = _Run(model, x, y, field, tol, max_products, products)
    batch = len(run.point)
    with measuring(model), unchanged_randomness(run.point.device), run.dtypes_told():
        if check:
            refuse_not_finite(run.point)
            run.check(min(chunk or batch, CHECKED), memory)
        noise = _noise(run.point, generator)
        if chunk is None:
            chunk = batch if memory is None else run.chunk(noise, memory)
        starts = range(0, batch, chunk)
        return Curvature.joined([run.measured(slice(i, i + chunk), noise) for i in starts])


@dataclass(frozen=True)
class _Run:
    """One call of `curvature`: its arguments, and what it does with some of the samples."""

    model: Any
    x: Any
    y: Tensor | None
    given: Callable[[Tensor], Tensor] | None
    tol: float
    max_products: int
    products: str

    @property
    def point(self) -> Tensor:
        """(B, *shape), what is differentiated with respect to."""
        return point_of(self.x)

    @property
    def put_back(self) -> int:
        """Bytes of copies of what a model may write into itself, which `measuring` keeps."""
        if not isinstance(self.model, nn.Module):
            return 0
        return sum(
            tensor.nbytes
            for tensor in (*self.model.buffers(), *rewritten_weights(self.model).values())
        )

    def field(self, rows: slice | Tensor) -> Field:
        """The field of some of the samples."""
        batch = len(self.point)
        check_target(self.y, batch)
        y = None if self.y is None else self.y[rows]
        x = take(self.x, cast(slice, rows), batch)
        return scalar_field(self.model, x, y, field=self.given)

    @contextmanager
    def dtypes_told(self) -> Iterator[None]:
        """Errors of a model that was given another dtype than its own say so."""
        try:
            yield
        except RuntimeError as error:
            own = self.model.parameters() if isinstance(self.model, nn.Module) else ()
            kinds = {p.dtype for p in own if p.is_floating_point()}
            if isinstance(error, FlexureError) or not kinds or self.point.dtype in kinds:
                raise
            named = ", ".join(sorted(map(str, kinds)))
            raise FlexureError(
                f"expected x in the dtype of the model, {named}, got {self.point.dtype}; convert "
                f"one of the two"
            ) from error

    def check(self, samples: int, memory: int | None) -> None:
        """Refuses fields whose derivatives cannot be trusted."""
        model = self.model if isinstance(self.model, nn.Module) else None

        def run() -> None:
            # Spread over the batch, which may be sorted.
            field = self.field(torch.linspace(0, len(self.point) - 1, samples).long())
            checked = check_field(field.taken, field.x, model=model, products=self.products)
            warn_of_rounding(field, checked, self.products)

        if memory is None:
            run()
        elif (needed := peak_bytes(run, device=self.point.device) + self.put_back) > memory:
            raise BudgetError(
                f"expected a memory budget of at least {needed:,} bytes for the check of second "
                f"derivatives in float64, got {memory:,}; raise it, or check once with another "
                f"budget and give check=False",
                needed,
            )

    def chunk(self, noise: Tensor, memory: int) -> int:
        """How many samples fit a budget."""
        point = self.point
        length = 2 * (min(self.max_products, point[0].numel()) + 1)

        def run(samples: int) -> None:
            # A basis that is grown exists twice. Two products show all else that there is at once.
            basis = point.new_empty(samples, length, *point.shape[1:])
            replace(self, max_products=2).measured(slice(0, samples), noise)
            del basis

        return chunk_within(
            memory,
            run,
            batch=len(point),
            held=2 * noise.nbytes + self.put_back,
            device=point.device,
        )

    def measured(self, rows: slice, noise: Tensor) -> Curvature:
        """The curvature of some of the samples."""
        field = self.field(rows)
        return _measured(field, noise[rows], self.tol, self.max_products, self.products)


def _check_settings(
    y: Any, tol: Any, max_products: Any, chunk: Any, generator: Any, products: Any
) -> None:
    """Refuses arguments of other kinds, whatever they would do later."""
    fits = {
        "y": (y is None or isinstance(y, Tensor), y, "a tensor; use torch.as_tensor(y)"),
        "tol": (_real(tol), tol, "a number between 0 and 1; use for example 1e-2"),
        "max_products": (_count(max_products), max_products, "a count from 1; use for example 20"),
        "chunk": (chunk is None or _count(chunk), chunk, "a count from 1; leave it out for all"),
        "generator": (
            generator is None or isinstance(generator, Generator),
            generator,
            "a torch.Generator; use torch.Generator().manual_seed(0)",
        ),
        "products": (products in PRODUCTS, products, f"one of {', '.join(PRODUCTS)}; choose one"),
    }
    for name, (fit, got, wanted) in fits.items():
        if not fit:
            what, remedy = wanted.split(";", 1)
            raise FlexureError(f"expected {name} to be {what}, got {got!r};{remedy}")


def _real(number: Any) -> bool:
    return isinstance(number, Real) and 0 < float(number) < 1


def _count(number: Any) -> bool:
    return isinstance(number, Integral) and int(number) >= 1


def _noise(point: Tensor, generator: Generator | None) -> Tensor:
    """Uniformly random unit vectors for the whole batch, so that chunks do not change them."""
    drawn_by = torch.Generator().manual_seed(0) if generator is None else generator
    drawn = torch.randn(point.shape, generator=drawn_by, dtype=torch.float32)
    return scaled(1 / norms(drawn), drawn)


def _measured(field: Field, noise: Tensor, tol: float, max_products: int, how: str) -> Curvature:
    """The curvature of one chunk.

    With f = softplus(−m): ∇f = −σ(−m)∇m and ∇²f = σ(−m)·(σ(m)∇m∇mᵀ − ∇²m); Lanczos sees the
    operator in brackets, which does not underflow.
    """
    hessian = PRODUCTS[how](field)
    values, gradient = hessian.values, hessian.gradient
    length = norms(gradient)
    sign, outer, factor = _factors(field, values)

    def product(v: Tensor, rows: Tensor) -> Tensor:
        along = dots(gradient[rows], v) * outer[rows]
        return scaled(along, gradient[rows]) + sign * hessian(v, rows)

    direction = scaled(1 / torch.where(length > 0, length, 1.0), gradient)
    start = direction + _RANDOM_SHARE * noise.to(gradient)
    found = lanczos(product, start, tol=tol, max_products=max_products, random_share=_RANDOM_SHARE)
    theta = found.eigenvalue.abs()
    nan = torch.full_like(values, torch.nan)
    return Curvature(
        converged=found.converged & length.isfinite(),
        gradient_norm=factor * length,
        hessian_norm=factor * found.norm,
        normalized=torch.where(length > 0, found.norm / length, nan),
        zero_gradient=length == 0,
        residual=torch.where(theta > 0, found.residual / theta, found.residual),
        products=found.products,
        value=F.softplus(-values) if field.is_margin else values,
        probability=values.sigmoid() if field.is_margin else nan,
        tol=tol,
        max_products=max_products,
    )


def _factors(field: Field, values: Tensor) -> tuple[int, Tensor, Tensor]:
    """Sign of ∇², weight of ∇∇ᵀ, and what takes gradient and Hessian to those of the loss."""
    if field.is_margin:
        return -1, values.sigmoid(), (-values).sigmoid()
    return 1, torch.zeros_like(values), torch.ones_like(values)
