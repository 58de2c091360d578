"""How far a network's own rounding moves its derivatives, told as a warning.

A network that cancels in float32 has, to every measure in float32, other derivatives than in
float64. No residual shows it. The derivatives in float64 are those of `measure/checks.py`.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from flexure.batched import dots, norms
from flexure.measure.checks import Checked
from flexure.measure.fields import Field
from flexure.measure.products import PRODUCTS

__all__ = ["RoundingWarning", "warn_of_rounding"]

TOLERANCE = 0.01
"""Relative difference that is told: that of the default residual."""


class RoundingWarning(UserWarning):
    """Derivatives in a network's own precision are far from those in float64."""


def warn_of_rounding(field: Field, checked: Checked, products: str) -> None:
    """Warns where derivatives in the dtype of `field.x` are not those in float64.

    Args:
        field: of the samples that `checked.rows` counts.
        checked: what they should be.
        products: how products are computed, a name in `PRODUCTS`.
    """
    if field.x.dtype == torch.float64:
        return
    part = field.taken(checked.rows.to(field.x.device))
    hessian = PRODUCTS[products](part)
    along = checked.along.flatten(1)
    image = hessian(checked.along.to(field.x), torch.arange(len(part), device=field.x.device))
    slope = norms(checked.gradient)
    off = norms(hessian.gradient.flatten(1).double() - checked.gradient) / slope
    # Of a margin the Hessian is not all there is to curvature: the gradient's part counts, too.
    size = norms(checked.product)
    if field.is_margin:
        size = (
            size + hessian.values.double().sigmoid() * dots(checked.gradient, along).abs() * slope
        )
    worst = torch.maximum(off, norms(image.flatten(1).double() - checked.product) / size)
    _told(worst.nan_to_num(0.0, 0.0, 0.0), checked.rows, field.x.dtype)


def _told(worst: Tensor, rows: Tensor, dtype: torch.dtype) -> None:
    """Warns of (n,) relative differences that are too large."""
    bad = worst > TOLERANCE
    if bad.any():
        warnings.warn(
            f"expected derivatives in {dtype} within {TOLERANCE:.0%} of those in float64, got "
            f"differences of up to {worst.max():.2g} (relative) in {int(bad.sum())} of "
            f"{len(rows)} samples that were compared: the network's own rounding, which neither "
            f"the residual nor `converged` knows of; measure model.double() at x.double()",
            RoundingWarning,
            stacklevel=2,
        )
