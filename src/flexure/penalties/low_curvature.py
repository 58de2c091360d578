"""The penalty of low-curvature networks: on the betas and gammas that bound their curvature.

The layers are `flexure.units.smooth`'s and `flexure.layers.lipschitz_norm`'s; putting them into a
network is not done here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from flexure.contracts import FlexureError, Step
from flexure.layers.lipschitz_norm import LipschitzBatchNorm
from flexure.units.smooth import CenteredSoftplus

__all__ = ["LowCurvature"]

_Layer = TypeVar("_Layer", bound=nn.Module)


@dataclass(frozen=True)
class LowCurvature:
    """beta_weight·sum of beta + gamma_weight·sum of max(log gamma_eff, 0), Low-Curvature Networks.

    Its eq. 5, with the constant that a layer has, gamma_eff = min(gamma, max |w|/sigma), in the
    place of the gamma that bounds it: with gamma alone, no gradient reaches the scale of a layer
    that is not clipped. A constant below 1 is no reward. The betas are those of all
    `CenteredSoftplus`, the constants those of all `LipschitzBatchNorm`, and a parameter that
    several layers or calls share counts once. Depends on no sample.

    Attributes:
        beta_weight: of the betas; default of the code of Low-Curvature Networks.
        gamma_weight: of the constants; likewise.
        default_weight: of the sum.

    Raises:
        FlexureError: a weight is negative or not finite; when called, a network without such
            layers.
    """

    beta_weight: float = 1e-2
    gamma_weight: float = 1e-2

    default_weight: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        for name in ("beta_weight", "gamma_weight"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise FlexureError(
                    f"expected {name} to be at least 0 and finite, got {value!r}; 0 leaves its sum "
                    f"out"
                )

    def __call__(self, step: Step) -> Tensor:
        """The penalty, a scalar."""
        modules = list(step.model.modules())
        betas = [m.beta for m in _distinct(modules, CenteredSoftplus, "raw_beta")]
        # Limited before the logarithm, whose slope at 0 is infinite.
        constants = [
            m.lipschitz.clamp(min=1).log()
            for m in _distinct(modules, LipschitzBatchNorm, "raw_gamma")
        ]
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


def _distinct(modules: Iterable[nn.Module], kind: type[_Layer], name: str) -> list[_Layer]:
    """The layers of a kind, the first of those that share the parameter `name`."""
    found: dict[int, _Layer] = {}
    for module in modules:
        if isinstance(module, kind):
            found.setdefault(id(getattr(module, name)), module)
    return list(found.values())
