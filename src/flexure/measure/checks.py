"""What must hold before second derivatives can be trusted, and the refusals where it does not.

A Lanczos residual cannot see a wrong product: layers without double backward give none, or a wrong
one, silently; BatchNorm that uses batch statistics couples samples; noise changes the field between
two products. All of it is found here, on a few samples in float64. Fields and their inputs and
labels are those of `measure/fields.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Generator, Tensor, nn

from flexure.contracts import FlexureError
from flexure.measure.fields import scalar_field
from flexure.measure.pairs import Pair
from flexure.measure.products import PRODUCTS
from flexure.measure.wide import in_float64
from flexure.measuring import unchanged_randomness

__all__ = ["Checked", "ScalarField", "check_field", "refuse_not_finite"]

ScalarField: TypeAlias = Callable[[Tensor], Tensor]
"""(n, *shape) inputs -> (n,) values, for any n."""

FEW, SAMPLES = 2, 8
"""Samples that are checked first, and the most that are checked where these do not settle it.

A wrong derivative rule is wrong at most samples, so that more would say nothing new.
"""

STEP = 1e-6
"""Length of the step, relative to the standard deviation within a sample's input.

Larger ones cross ReLU kinks, and accuse correct networks.
"""

FLATTEST = 1e-3
"""The least standard deviation, relative to the root mean square: rounding needs some room."""

SHORTER = 4.0
"""By how much the second step is shorter. Noise and kinks change a difference by this factor."""

ROUNDING = 100 * torch.finfo(torch.float64).eps
"""Relative rounding error of a gradient that is never held against a product."""

UNSTABLE = 1e-9, 1e-5
"""A value's change with its batch that counts, relative to the values, and to spread·‖gradient‖."""


@dataclass(frozen=True)
class Checked:
    """Derivatives in float64 that were checked, of n samples.

    Attributes:
        rows: (n,) int64, which samples.
        along: (n, *shape) unit vectors v, to rounding.
        gradient: (n, d).
        product: (n, d) Hv.
    """

    rows: Tensor
    along: Tensor
    gradient: Tensor
    product: Tensor


def check_field(
    bind: Callable[[Tensor], ScalarField],
    x: Tensor,
    *,
    model: nn.Module | None = None,
    generator: Generator | None = None,
    products: str = "double-backward",
    samples: int = SAMPLES,
) -> Checked:
    """Refuses a field whose derivatives cannot be trusted; a field that passes is left as it was.

    On at most `samples` of the inputs, in float64, the Hessian-vector product Hv of a random v is
    compared with (∇f(x+hv) − ∇f(x−hv))/2h, ∇f·v with (f(x+hv) − f(x−hv))/2h, and f(x) with its
    values in other batches. A difference quotient counts only if a four times shorter step
    confirms it, so that neither rounding nor the kinks of ReLU networks accuse correct ones.

    The float64 copy is made by handing `model` other parameters and buffers for the time of the
    call, which reaches fields that are closures over it; float32 constants, factories and casts
    inside become float64 as well. The global random generators are put back.

    Call it inside `measuring`.

    Args:
        bind: (n,) int64 indices of samples, possibly repeated -> the field of just these samples
            (with their labels). A field without labels is the same for all.
        x: (B, *shape) floating-point inputs.
        model: the module whose parameters the field uses, in the mode that it is measured in.
        generator: of the CPU, for v; None: always the same v.
        products: how the products that are checked are computed, a name in `PRODUCTS`.
        samples: how many are checked at most; fewer if two of them settle it.

    Raises:
        FlexureError: second derivatives are missing or wrong; gradients are not those of the
            field; the field is random; a sample's value depends on the other samples; the field
            is not one value a sample, or nowhere finite; it cannot be computed in float64; an
            input is not finite. Samples with other values or gradients than finite ones are left
            to the measure.
    """
    refuse_not_finite(x)
    drawn_by = torch.Generator().manual_seed(0) if generator is None else generator
    found: list[Checked] = []
    with unchanged_randomness(x.device):
        check = _Checks(bind, x.detach(), drawn_by, products)
        in_float64(model, lambda: found.append(check.run(samples)))
    return found[0]


def refuse_not_finite(x: Tensor) -> None:
    """Refuses inputs (B, *shape) with nan or infinity in any sample.

    Raises:
        FlexureError: there is one; it is told how many there are, and which come first.
    """
    bad = (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        named = ", ".join(map(str, bad[:SAMPLES])) + (", ..." if len(bad) > SAMPLES else "")
        raise FlexureError(
            f"expected finite inputs, got nan or infinity in {len(bad)} of {len(x)} samples "
            f"(numbers {named}); leave them out"
        )


@dataclass(frozen=True)
class _Quotients:
    """Difference quotients of a field along one direction for each of n samples.

    Attributes:
        along: (n, *shape) the directions as rounding left them.
        middle: (n,) means of the values on both sides.
        level: (n, d) means of the gradients on both sides.
        slope: (n, 1) of the values.
        change: (n, d) of the gradients.
    """

    along: Tensor
    middle: Tensor
    level: Tensor
    slope: Tensor
    change: Tensor


@dataclass(frozen=True)
class _Checks:
    """A field and its inputs, and the checks.

    Attributes:
        bind: rows -> field.
        x: (B, *shape) the inputs, in their own dtype.
        generator: for the directions.
        products: how products are computed.
    """

    bind: Callable[[Tensor], ScalarField]
    x: Tensor
    generator: Generator
    products: str

    def run(self, samples: int) -> Checked:
        """All checks; parameters are in float64 by now."""
        for count in dict.fromkeys(min(n, samples, len(self.x)) for n in (FEW, SAMPLES)):
            rows = torch.linspace(0, len(self.x) - 1, count).long()
            x, v, step = self._directions(rows)
            first = self._quotients(rows, x, v, step)
            values, gradient, product = self._products(rows, x, first.along)
            steepness = gradient.norm(dim=1, keepdim=True)
            drift = (values - first.middle).abs()
            if (drift > _allowed(values) + UNSTABLE[1] / STEP * (step * steepness)[:, 0]).any():
                self._refuse_unstable(rows, x, v * step.view(_each(x)) / STEP)
            slope = (gradient * first.along.flatten(1)).sum(1, keepdim=True)
            bend = (values - first.middle)[:, None] / step, (gradient - first.level) / step
            rounding = ROUNDING * values.abs()[:, None] / step
            gradients = Pair(first.slope, slope, rounding, bend[0])
            products = Pair(first.change, product, ROUNDING * steepness / step, bend[1])
            checked = Checked(rows, first.along, gradient, product)
            if products.agree.all() and not gradients.wrong.any():
                return checked
        if not values.isfinite().any():
            raise FlexureError(
                f"expected finite values of the field, got none for the samples {rows.tolist()}; "
                f"mend the model, or leave such samples out"
            )
        if gradients.wrong.any() or products.wrong.any():
            # What a batch does to identical samples is no change, but a wrong derivative.
            self._refuse_unstable(rows, x, v * step.view(_each(x)) / STEP)
            shorter = self._quotients(rows, x, v, step / SHORTER)
            gradients.refuse_most(shorter.slope, _NOT_ITS_GRADIENT)
            products.refuse_most(shorter.change, _NOT_ITS_PRODUCT)
        return checked

    def _directions(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, *shape) inputs in float64, random unit vectors, and (n, 1) lengths of steps."""
        x = self.x[rows.to(self.x.device)].double()
        v = torch.randn(x.flatten(1).shape, generator=self.generator, dtype=torch.float64)
        v = (v / v.norm(dim=1, keepdim=True)).view_as(x).to(x.device)
        flat = x.flatten(1)
        size = flat.square().mean(1, keepdim=True).sqrt()
        spread = (flat - flat.mean(1, keepdim=True)).square().mean(1, keepdim=True).sqrt()
        size = torch.maximum(spread, FLATTEST * size)
        return x, v, STEP * torch.where(size > 0, size, 1.0)

    def _quotients(self, rows: Tensor, x: Tensor, v: Tensor, step: Tensor) -> _Quotients:
        """Central differences, one batch for each half of the samples.

        Other batches than those of the products show whether samples depend on each other.
        """
        each = _each(x)
        up, down = x + step.view(each) * v, x - step.view(each) * v
        parts = []
        for half in torch.arange(len(x)).chunk(2):
            both = torch.cat([up[half], down[half]])
            values, gradients = self._gradients(rows[half].repeat(2), both)
            parts.append((*values.chunk(2), *gradients.chunk(2)))
        high, low, high_gradient, low_gradient = map(torch.cat, zip(*parts, strict=True))
        return _Quotients(
            along=(up - down) / (2 * step.view(each)),
            middle=(high + low) / 2,
            level=(high_gradient + low_gradient) / 2,
            slope=(high - low)[:, None] / (2 * step),
            change=(high_gradient - low_gradient) / (2 * step),
        )

    def _gradients(self, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(k,) values and (k, d) gradients at float64 inputs that belong to the samples `rows`."""
        x = x.detach().requires_grad_()
        values = self._values(rows, x)
        if not values.requires_grad:
            return values, torch.zeros_like(x).flatten(1)
        try:
            (gradient,) = torch.autograd.grad(values.sum(), x, materialize_grads=True)
        except Exception as error:
            raise FlexureError(
                f"expected a field that can be differentiated, got {_told(error)}; use operations "
                f"that have derivatives"
            ) from error
        return values.detach(), gradient.flatten(1)

    def _products(self, rows: Tensor, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n,) values, (n, d) gradients and products of all samples, in one batch."""
        field = self.bind(rows)
        try:
            hessian = PRODUCTS[self.products](scalar_field(field, x, field=field))
            product = hessian(v, torch.arange(len(x), device=x.device))
        except Exception as error:
            self._refuse_company(rows, x, error)
            raise FlexureError(
                f"expected a field with second derivatives ({self.products}), got {_told(error)}; "
                f"{_REMEDY}; or compute products in another way ({', '.join(PRODUCTS)})"
            ) from error
        return hessian.values, hessian.gradient.flatten(1), product.detach().flatten(1)

    def _values(self, rows: Tensor, x: Tensor) -> Tensor:
        """(k,) the field; errors of the float64 copy alone are told from the field's own."""
        field = self.bind(rows)
        try:
            values = field(x.clone())  # models may overwrite their input
        except FlexureError:
            raise
        except Exception as error:
            self._refuse_company(rows, x, error)
            raise FlexureError(
                f"expected a field of any number of samples that can be computed in float64 with "
                f"its model in float64 (the check of second derivatives needs both), got "
                f"{_told(error)}; take sizes and dtypes from the input, close over nothing "
                f"that belongs to single samples, close over tensors that samples share though "
                f"they have a row for each, and pass the model that the field uses"
            ) from error
        if not isinstance(values, Tensor) or values.shape != x.shape[:1]:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise FlexureError(
                f"expected a field that gives one value for each of {len(x)} samples, "
                f"({len(x)},), got {got}; reduce over everything but the samples"
            )
        return values

    def _refuse_company(self, rows: Tensor, x: Tensor, error: Exception) -> None:
        """Raises where a sample fails alone, but not in company, as batch statistics do."""
        if len(x) > 1:
            return
        try:
            with torch.no_grad():
                self.bind(rows.repeat(2))(torch.cat([x, x + 1]))
        except Exception:
            return
        else:
            raise FlexureError(
                f"{_COUPLED}, got {_told(error)} for one alone; {_UNCOUPLE}"
            ) from error

    def _refuse_unstable(self, rows: Tensor, x: Tensor, away: Tensor) -> None:
        """Raises where values change by chance, or with the batch that they are computed in.

        `away` (n, *shape) leads from the samples to other company.
        """
        with torch.no_grad():
            values, same = self._values(rows, x), self._values(rows, x)
            pieces = zip(rows.chunk(2), x.chunk(2), strict=True)
            halves = torch.cat([self._values(*piece) for piece in pieces])
            mates = self._values(rows.repeat(2), torch.cat([x, x + away]))[: len(x)]
        if ((values - same).abs() > _allowed(values)).any():
            raise FlexureError(
                f"expected the same values in every evaluation, got a difference of up to "
                f"{(values - same).abs().max():.3g} between two; switch off what is still random "
                f"in eval mode (functional dropout needs training=self.training, noise, random "
                f"augmentation)"
            )
        change = torch.maximum((values - halves).abs(), (values - mates).abs())
        if (change > _allowed(values)).any():
            raise FlexureError(
                f"{_COUPLED}, got values that change by up to {change.max():.3g} with the rest of "
                f"the batch; {_UNCOUPLE}"
            )


_COUPLED = "expected a field where no sample depends on another"

_UNCOUPLE = (
    "normalise with running statistics in eval mode, and let nothing else act across samples"
)

_REMEDY = (
    "replace what has no double backward (an autograd.Function whose backward is not itself "
    "differentiable, .detach() or .data inside, a compiled model, cuDNN's recurrent layers)"
)

_NOT_ITS_PRODUCT = (
    "expected Hessian-vector products within 1 % of a difference quotient of the gradient, got a "
    "disagreement of {worst:.3g} (relative) in {count} of {total} samples: the second derivative "
    f"is missing or wrong; {_REMEDY}"
)

_NOT_ITS_GRADIENT = (
    "expected gradients within 1 % of a difference quotient of the field, got a disagreement of "
    "{worst:.3g} (relative) in {count} of {total} samples: the backward pass is not the derivative "
    "of the forward pass; remove straight-through estimators, .detach(), .data and no_grad"
)


def _each(x: Tensor) -> tuple[int, ...]:
    """The shape in which (n,) factors multiply the samples of x."""
    return (-1, *[1] * (x.dim() - 1))


def _allowed(values: Tensor) -> Tensor:
    """How much a value may change by rounding alone."""
    allowed: Tensor = values.nan_to_num(0, 0, 0).abs().max() * UNSTABLE[0]
    return allowed


def _told(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
