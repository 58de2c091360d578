"""The sum of a residual block as a module: with a factor that keeps its Lipschitz constant.

Sums of other people's networks are found and scaled by `flexure.surgery.sums`.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["ResidualSum"]


class ResidualSum(nn.Module):
    """factor·(a + b), of the outputs of two branches.

    Where the branches have the Lipschitz constants A and B, so has this factor·(A + B): with a
    factor of 1/2, a block of 1-Lipschitz branches (of identities) is 1-Lipschitz. Of independent
    branches of equal variance, 1/√2 keeps the variance.

    Example:
        >>> import torch
        >>> ResidualSum(0.5)(torch.tensor([1.0]), torch.tensor([3.0]))
        tensor([2.])
    """

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two tensors whose shapes broadcast -> one of their common shape."""
        total = a + b
        return total if self.factor == 1.0 else self.factor * total

    def extra_repr(self) -> str:
        """The factor."""
        return f"factor={self.factor:g}"
