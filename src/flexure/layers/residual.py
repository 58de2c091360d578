"""The sum of a residual block as a module: with a factor that keeps its Lipschitz constant.

Sums of other people's networks are found and scaled by `flexure.surgery.sums`.
"""

from __future__ import annotations

import math
from numbers import Real

from torch import Tensor, nn

from flexure.contracts import FlexureError

__all__ = ["ResidualSum", "check_factor"]


class ResidualSum(nn.Module):
    """factor·(a + b), of the outputs of two branches.

    With Lipschitz constants A and B of the branches, that of the sum is at most
    |factor|·(A + B): with a factor of 1/2, branches of constant 1 (identities, say) keep it at 1.
    A factor of 1/√2 keeps the variance of independent branches of equal variance.

    Raises:
        FlexureError: a factor that is 0 or not finite.

    Example:
        >>> import torch
        >>> ResidualSum(0.5)(torch.tensor([1.0]), torch.tensor([3.0]))
        tensor([2.])
    """

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        check_factor(factor)
        self.factor = factor

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two tensors whose shapes broadcast -> one of their common shape."""
        total = a + b
        if self.factor == 1.0:
            return total
        return total.mul_(self.factor) if type(total) is Tensor else self.factor * total

    def extra_repr(self) -> str:
        """The factor."""
        return f"factor={self.factor:g}"


def check_factor(factor: float) -> None:
    """Makes sure that a sum can be multiplied by `factor`.

    Raises:
        FlexureError: it is 0 or not finite.
    """
    number = isinstance(factor, Real) and not isinstance(factor, bool)
    if not number or not math.isfinite(factor) or factor == 0:
        raise FlexureError(
            f"expected a factor other than 0, a finite number, got {factor!r}; give 0.5, for "
            f"example"
        )
