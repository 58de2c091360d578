"""The penalty of low-curvature networks: on the betas and gammas that bound their curvature.

The layers are `flexure.units.smooth`'s and `flexure.layers.lipschitz_norm`'s; putting them into a
network is not done here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from flexure.contracts import FlexureError, Step, is_number
from flexure.layers.lipschitz_norm import LipschitzBatchNorm
from flexure.penalties.scripted import refuse_scripted
from flexure.units.smooth import CenteredSoftplus

__all__ = ["LowCurvature"]


@dataclass(frozen=True)
class LowCurvature:
    """beta_weight·sum of beta + gamma_weight·sum of max(log gamma_eff, 0), Low-Curvature Networks.

    Its eq. 5, with the constant that a layer has, gamma_eff = min(gamma, max |w|/sigma), in the
    place of the gamma that bounds it: with gamma alone, no gradient reaches the scale of a layer
    that is not clipped. A constant below 1 is no reward. The betas are those of all
    `CenteredSoftplus`: a parameter that several share counts once. The constants are those of all
    `LipschitzBatchNorm`: layers with one gamma have their own w and sigma and count each, a layer
    that is called several times counts once. Depends on no sample.

    Attributes:
        beta_weight: of the betas; default of the code of Low-Curvature Networks.
        gamma_weight: of the constants; likewise.
        default_weight: of the sum.

    Raises:
        FlexureError: a weight is negative or no finite number; when called, a network without
            such layers, or one made by torch.jit, whose layers are no longer there.
    """

    beta_weight: float = 1e-2
    gamma_weight: float = 1e-2

    default_weight: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        for name in ("beta_weight", "gamma_weight"):
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value < math.inf):
                raise FlexureError(
                    f"expected {name} to be a finite number from 0, got {value!r}; 0 leaves its "
                    f"sum out"
                )

    def __call__(self, step: Step) -> Tensor:
        """The penalty, a scalar."""
        refuse_scripted(step.model, "LowCurvature")
        modules = list(step.model.modules())
        units = {_raw_beta(m): m for m in modules if isinstance(m, CenteredSoftplus)}
        betas = [unit.beta for unit in units.values()]
        # Limited before the logarithm, whose slope at 0 is infinite.
        norms = [m for m in modules if isinstance(m, LipschitzBatchNorm)]
        constants = [norm.lipschitz.clamp(min=1).log() for norm in norms]
        if not betas and not constants:
            raise FlexureError(
                "expected a network with CenteredSoftplus or LipschitzBatchNorm layers, got none "
                "for LowCurvature to act on; convert it by flexure.to_lcnn, or leave the penalty "
                "out"
            )
        terms = [*(self.beta_weight * beta for beta in betas)]
        terms += [self.gamma_weight * constant for constant in constants]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total


def _raw_beta(unit: CenteredSoftplus) -> int:
    """By which to tell parameters apart: what a parametrization gives is new at each access."""
    held = unit._parameters.get("raw_beta")
    if held is None and is_parametrized(unit, "raw_beta"):
        steps: Any = unit.parametrizations
        held = getattr(steps.raw_beta, "original", None)
    return id(unit if held is None else held)
