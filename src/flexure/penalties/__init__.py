"""Penalties: what training keeps small besides the loss, each a plug-in of `flexure.fit`.

Each is `(step) -> scalar`, unweighted; `default_weight` is the one of its source.
"""

from flexure.penalties.cure import CURE
from flexure.penalties.curvature_rate import CurvatureRate
from flexure.penalties.gradient_norm import GradientNorm
from flexure.penalties.low_curvature import LowCurvature

__all__ = ["CURE", "CurvatureRate", "GradientNorm", "LowCurvature"]
