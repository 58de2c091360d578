"""CURE, the penalty on how much the input gradient changes a step along its signs.

The gradients themselves are the step's (`flexure.contracts.Step.input_gradient`).

[CURE] is Moosavi-Dezfooli, Fawzi, Uesato, Frossard: Robustness via curvature regularization, and
vice versa, 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flexure.contracts import FlexureError, Step, is_number
from flexure.measure.fields import point_of

__all__ = ["CURE"]


@dataclass(frozen=True)
class CURE:
    """mean_i |g_i(x + h·z) - g_i(x)|², z_i = sign(g_i)/|sign(g_i)|, [CURE].

    g_i is the gradient of sample i's loss in its input, norms are l2, and z_i is held constant; it
    is 0 where g_i is. Costs a second forward pass, through the same dropout masks and with nothing
    kept of it (BatchNorm statistics); in train mode BatchNorm takes the statistics of the shifted
    batch in it. In the units of the inputs as the network gets them.

    Attributes:
        h: the length of the step; default of [CURE].
        rise_epochs: in epoch e, counted from 0, the step is h·min(1, (e + 1)/rise_epochs): it
            rises linearly and is h from epoch `rise_epochs - 1` on. Default of [CURE]. 0: it is h
            from the start.
        default_weight: of [CURE].

    Raises:
        FlexureError: `h` is no positive finite number, or `rise_epochs` is no number of epochs.
    """

    h: float = 1.5
    rise_epochs: int = 5

    needs_input_gradient: ClassVar[bool] = True
    default_weight: ClassVar[float] = 4.0

    def __post_init__(self) -> None:
        if not (is_number(self.h) and 0 < self.h < math.inf):
            raise FlexureError(f"expected h above 0, a finite length, got {self.h!r}; take 1.5")
        if type(self.rise_epochs) is not int or self.rise_epochs < 0:
            raise FlexureError(
                f"expected rise_epochs to be a number of epochs, got {self.rise_epochs!r}; 0 takes "
                f"the whole step from the start"
            )

    def length(self, epoch: int) -> float:
        """How far the gradients are apart in an epoch, counted from 0."""
        return self.h * min(1.0, (epoch + 1) / max(self.rise_epochs, 1))

    def __call__(self, step: Step) -> Tensor:
        """The penalty, a scalar."""
        gradient = step.input_gradient()
        sign = gradient.detach().sign()
        norm = sign.flatten(1).norm(dim=1).clamp(min=1)  # at least 1 but where it is 0
        z = sign / norm.view(-1, *[1] * (sign.dim() - 1))
        moved = step.input_gradient(point_of(step.x).detach() + self.length(step.epoch) * z)
        return (moved - gradient).flatten(1).square().sum(1).mean()
