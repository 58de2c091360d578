"""What stands for other activations of a low-curvature network than ReLU.

A leaky rectifier made of centered softplus, averages in the place of max-pooling, and what says
for a unit whether it overwrites its input. Centered softplus itself is in `smooth.py`.

[LCNN] is Low-Curvature Networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexure.contracts import FlexureError
from flexure.units.catalogue import over_axis_one
from flexure.units.functional import centered_softplus
from flexure.units.smooth import CenteredSoftplus

__all__ = ["AveragePooling", "LeakySoftplus", "Overwriting"]


class LeakySoftplus(CenteredSoftplus):
    """`slope·x + (1 − slope)·s0(x; beta)`: what a leaky rectifier is to ReLU (eq. 4 of [LCNN]).

    At beta -> inf it is LeakyReLU or PReLU exactly, and its slope lies between theirs, whatever
    beta. A slope that is a parameter stays the network's own, under the name `weight`.

    Args:
        slope: left of 0: a number, or `(1,)` or `(C,)` along axis 1 of the input, as PReLU's.
        beta: where it starts, positive and finite.
        device: of `raw_beta`.
        dtype: of `raw_beta`.

    Raises:
        FlexureError: beta is not a positive finite number.

    Example:
        >>> LeakySoftplus(0.5)(torch.zeros(2)).detach()
        tensor([0., 0.])
    """

    def __init__(
        self,
        slope: float | Tensor,
        beta: float = 5.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(beta, device=device, dtype=dtype)
        if isinstance(slope, nn.Parameter):
            self.weight = slope
        else:
            self.slope = float(slope)

    def forward(self, x: Tensor, *, inplace: bool = False, **params: Any) -> Tensor:
        """The leaky softplus of `x`, of its shape and dtype; `x` itself where in place.

        Args:
            x: any shape, floating point.
            inplace: write the result into `x`.
            params: of the activation whose call was routed here: `slope` overrides its own.
        """
        slope: Any = self.weight if "weight" in self._parameters else self.slope
        slope = params.get("slope", slope)
        if isinstance(slope, Tensor):
            slope = over_axis_one(slope, x)
        y = (slope * x + (1 - slope) * centered_softplus(x, self.beta)).to(x.dtype)
        return x.copy_(y) if inplace else y

    def extra_repr(self) -> str:
        """Slope and beta as they are now."""
        slope = self.__dict__.get("slope", "weight")
        return f"slope={slope}, {super().extra_repr()}"


class AveragePooling(nn.Module):
    """The mean of every window of which a max-pooling takes the largest value.

    Args:
        spatial: dimensions of space: 1, 2 or 3.
        params: `kernel_size`, `stride`, `padding` and `ceil_mode`, as torch's.

    Raises:
        FlexureError: another number of dimensions.

    Example:
        >>> AveragePooling(1, {"kernel_size": 2})(torch.tensor([[[1.0, 3.0]]]))
        tensor([[[2.]]])
    """

    def __init__(self, spatial: int, params: Mapping[str, Any]) -> None:
        super().__init__()
        if spatial not in _POOLS:
            raise FlexureError(f"expected 1, 2 or 3 dimensions of space, got {spatial}; correct it")
        self.spatial = spatial
        self.params = dict(params)

    def forward(self, x: Tensor, *, inplace: bool = False, **params: Any) -> Tensor:
        """The means, of the shape that the max-pooling gives.

        Args:
            x: `(B, C, ...)`.
            inplace: pooling never is.
            params: of the max-pooling whose call was routed here.
        """
        y: Tensor = _POOLS[self.spatial](x, **(params or self.params))
        return y

    def extra_repr(self) -> str:
        """Its windows."""
        return ", ".join(f"{key}={value}" for key, value in self.params.items())


class Overwriting(nn.Module):
    """A unit that overwrites its input, or never does, whatever the call that it stands for.

    Args:
        unit: such as `CenteredSoftplus`.
        inplace: whether it overwrites its input.

    Example:
        >>> x = torch.ones(1)
        >>> Overwriting(CenteredSoftplus(), inplace=False)(x, inplace=True) is x
        False
    """

    def __init__(self, unit: nn.Module, *, inplace: bool) -> None:
        super().__init__()
        self.unit = unit
        self.inplace = inplace

    def forward(self, x: Tensor, *, inplace: bool = False, **params: Any) -> Tensor:
        """The unit's output.

        Args:
            x: any shape, floating point.
            inplace: of the activation whose call was routed here; not used.
            params: of that activation.
        """
        y: Tensor = self.unit(x, inplace=self.inplace, **params)
        return y


_POOLS: Mapping[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
