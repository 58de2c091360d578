"""What is known of linear layers: bounds on their norms, and layers that keep to one."""

from flexure.layers.lipschitz_norm import LipschitzBatchNorm
from flexure.layers.norms import (
    NormBounds,
    adaptive_avg_pool_norm_bounds,
    avg_pool_norm_bounds,
    batch_norm_norm_bounds,
    conv_norm_bounds,
    linear_norm_bounds,
    scale_norm_bounds,
)
from flexure.layers.of_module import module_norm_bounds
from flexure.layers.residual import ResidualSum
from flexure.layers.spectral import conv_norm_bound, linear_norm_bound, operator_norm
from flexure.layers.spectral_norm import SpectralNorm, spectral_norm, spectral_norms

__all__ = [
    "LipschitzBatchNorm",
    "NormBounds",
    "ResidualSum",
    "SpectralNorm",
    "adaptive_avg_pool_norm_bounds",
    "avg_pool_norm_bounds",
    "batch_norm_norm_bounds",
    "conv_norm_bound",
    "conv_norm_bounds",
    "linear_norm_bound",
    "linear_norm_bounds",
    "module_norm_bounds",
    "operator_norm",
    "scale_norm_bounds",
    "spectral_norm",
    "spectral_norms",
]
