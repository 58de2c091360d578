"""The operator norms of linear modules, PyTorch's and flexure's: which arguments say what.

The norms are computed in `norms.py`. Activations and other layers that are not linear are not
here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from flexure.contracts import FlexureError
from flexure.layers.lipschitz_norm import LipschitzBatchNorm
from flexure.layers.norms import (
    NormBounds,
    adaptive_avg_pool_norm_bounds,
    avg_pool_norm_bounds,
    batch_norm_norm_bounds,
    conv_norm_bounds,
    linear_norm_bounds,
)

__all__ = ["LINEAR_MODULES", "module_norm_bounds"]


def module_norm_bounds(module: nn.Module, input_shape: Sequence[int]) -> NormBounds:
    """Upper bounds of all norms of a linear module, its bias left out, in eval mode.

    Args:
        module: one of the classes of `LINEAR_MODULES`, or a subclass that keeps its `forward`.
        input_shape: of one sample, without the batch dimension: `(C, H, W)` for images.

    Raises:
        FlexureError: a module that is not known to be linear.
    """
    for cls, bounds in LINEAR_MODULES.items():
        if isinstance(module, cls) and type(module).forward is cls.forward:
            return bounds(module, tuple(input_shape))
    known = ", ".join(sorted(cls.__name__ for cls in LINEAR_MODULES))
    raise FlexureError(
        f"expected a linear module ({known}), got {type(module).__name__}; bound it by its own "
        "functions in flexure.layers"
    )


def _linear(module: Any, shape: tuple[int, ...]) -> NormBounds:
    return linear_norm_bounds(module.weight)


def _conv(module: Any, shape: tuple[int, ...]) -> NormBounds:
    return conv_norm_bounds(
        module.weight,
        input_size=shape[1:],
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
        transposed=module.transposed,
        output_padding=module.output_padding,
    )


def _batch_norm(module: Any, shape: tuple[int, ...]) -> NormBounds:
    return batch_norm_norm_bounds(module.running_var, module.weight, eps=module.eps)


def _lipschitz_batch_norm(module: Any, shape: tuple[int, ...]) -> NormBounds:
    return batch_norm_norm_bounds(module.running_var, module.clipped_weight, eps=module.eps)


def _avg_pool(module: Any, shape: tuple[int, ...]) -> NormBounds:
    return avg_pool_norm_bounds(
        shape[1:],
        module.kernel_size,
        stride=module.stride,
        padding=module.padding,
        ceil_mode=module.ceil_mode,
        count_include_pad=module.count_include_pad,
        divisor_override=getattr(module, "divisor_override", None),
    )


def _adaptive_avg_pool(module: Any, shape: tuple[int, ...]) -> NormBounds:
    return adaptive_avg_pool_norm_bounds(shape[1:], module.output_size)


LINEAR_MODULES: Mapping[type[nn.Module], Callable[[Any, tuple[int, ...]], NormBounds]] = {
    nn.Linear: _linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _conv),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    LipschitzBatchNorm: _lipschitz_batch_norm,
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _avg_pool),
    **dict.fromkeys(
        (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), _adaptive_avg_pool
    ),
}
"""Module class -> its norms, given the module and the shape of one input."""
