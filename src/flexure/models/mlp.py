"""A fully connected network with one activation module per call.

The network of the demo and of the small recipes; convolutional networks are in `resnet`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from flexure.contracts import FlexureError
from flexure.models.builder import check_whole

__all__ = ["MLP"]


class MLP(nn.Module):
    """Linear layers with an activation between each two of them.

    Example:
        >>> import torch
        >>> MLP((2, 20, 20, 3))(torch.zeros(5, 2)).shape
        torch.Size([5, 3])

    Attributes:
        body: everything but the last layer.
        head: the last `nn.Linear`.
    """

    def __init__(self, sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        """Initialised as `nn.Linear` does.

        Args:
            sizes: features of the input, of each hidden layer, and of the output.
            activation: makes one activation module; called once for each hidden layer.

        Raises:
            FlexureError: fewer than two sizes, or one below 1.
        """
        super().__init__()
        check_whole(**{f"sizes[{i}]": size for i, size in enumerate(sizes)})
        if len(sizes) < 2 or min(sizes) < 1:
            raise FlexureError(
                f"expected at least an input and an output size, all positive, got {list(sizes)}; "
                f"for example (2, 20, 2)"
            )
        hidden = [
            module
            for fan_in, fan_out in pairwise(sizes[:-1])
            for module in (nn.Linear(fan_in, fan_out), activation())
        ]
        self.body = nn.Sequential(*hidden)
        self.head = nn.Linear(sizes[-2], sizes[-1])

    def forward(self, x: Tensor) -> Tensor:
        """`(B, *shape)` or one `(D,)` vector -> `(B, classes)` or `(classes,)` logits."""
        out: Tensor = self.head(self.body(x.flatten(1) if x.ndim > 2 else x))
        return out
