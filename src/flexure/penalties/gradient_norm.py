"""The penalty on the norm of the loss's gradient in the input: double backpropagation.

The gradients themselves are the step's (`flexure.contracts.Step.input_gradient`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flexure.contracts import Step

__all__ = ["GradientNorm"]


@dataclass(frozen=True)
class GradientNorm:
    """Mean over samples of the squared l2 norm of the gradient of each sample's loss in its input.

    Drucker and Le Cun, Improving generalization performance using double backpropagation, 1992;
    the baseline GradReg of Low-Curvature Networks. Samples that the loss ignores count with a
    gradient of 0. In the units of the inputs as the network gets them: normalised pixels give
    other values than raw ones.

    Attributes:
        default_weight: of the code of Low-Curvature Networks at its batch size of 128. There it
            shrinks with the square of the batch size, here it does not depend on it.
    """

    needs_input_gradient: ClassVar[bool] = True
    default_weight: ClassVar[float] = 6.1e-3

    def __call__(self, step: Step) -> Tensor:
        """mean_i |g_i|², a scalar."""
        return step.input_gradient().flatten(1).square().sum(1).mean()
