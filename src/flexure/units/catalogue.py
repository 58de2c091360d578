"""What each known activation is: one row an activation.

A row says under which functions and module classes an activation is found, how a call of it is
read, which CTU stands for it, and, where none does exactly, how far the nearest one is or why
there is none. Nothing here looks at a network, and nothing here computes a CTU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from inspect import unwrap
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexure.units.pooling import light_max_pool2d
from flexure.units.spec import (
    ActivationCall,
    Params,
    Point,
    Reader,
    UnitSpec,
    from_zero,
    pool_params,
    read,
    read_clamp,
    read_first,
    read_hardtanh,
    read_leaky,
    read_pool,
    read_threshold,
    read_zero_bound,
)

__all__ = ["CATALOGUE", "SPECS", "over_axis_one", "read_call", "read_module"]


def read_call(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, refused: bool = True
) -> tuple[UnitSpec, ActivationCall] | None:
    """The row and the arguments of a function call, or None if it is no known activation.

    Args:
        func: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        refused: whether rows that are not steered count; their readers may look at values.
    """
    for spec, reader in _BY_FUNCTION.get(func, ()):
        if refused or spec.refusal is None:
            call = reader(*args, **kwargs)
            if call is not None and call.x.is_floating_point():
                return spec, call
    return None


def read_module(module: nn.Module) -> tuple[UnitSpec, dict[str, Any]] | None:
    """The row and the parameters of a module, or None if it is no known activation.

    A subclass counts as its parent only where it inherits the parent's `forward`, or wraps it
    (`functools.wraps`): what another `forward` calls is found there, call by call. So is what a
    parametrised module calls, whose parameters are computed anew each time.
    """
    if hasattr(module, "parametrizations"):
        return None
    for cls in type(module).__mro__:
        if not issubclass(cls, nn.Module):
            continue
        dotted = f"{cls.__module__}.{cls.__qualname__}"
        for spec in (*_BY_CLASS.get(cls, ()), *_BY_CLASS.get(dotted, ())):
            params = spec.of_module(module)
            if params is not None and unwrap(type(module).forward) is unwrap(cls.forward):
                return spec, params
    return None


def over_axis_one(weight: Tensor, x: Tensor) -> Tensor:
    """PReLU's `(C,)` weight shaped to broadcast over `x`: its channels are axis 1 of the input.

    Without a batch axis (`x` of one dimension) the channels are the last axis, as in PyTorch.
    """
    if weight.numel() == 1:
        return weight.reshape(())
    return weight.reshape(-1, *(1,) * (x.ndim - 2))


# Minimised numerically over (beta, c) on a dense grid; tests recompute the errors.
_GELU_ERF = Point(0.6394, 1.0, error=0.0140)
_GELU_TANH = Point(0.6395, 1.0, error=0.0143)


def _gelu_point(params: Params) -> Point:
    return _GELU_TANH if params["approximate"] == "tanh" else _GELU_ERF


def _softplus_point(params: Params) -> Point:
    sharpness = float(params["beta"])
    if sharpness >= 1:
        return Point(1 - 1 / sharpness, 0.0)
    # The flattest softplus of the family has sharpness 1; the two differ most at 0.
    return Point(0.0, 0.0, error=math.log(2) * (1 / sharpness - 1))


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x > 0, x, over_axis_one(slope, x) * x)


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return x.clamp(0, cap)


def _refused(
    name: str,
    why: str,
    *functions: Any,
    classes: tuple[type[nn.Module] | str, ...] = (),
    blocking: bool = False,
) -> UnitSpec:
    return UnitSpec(
        name,
        classes=classes,
        functions=dict.fromkeys(functions, read_first),
        refusal=why,
        blocking=blocking,
    )


def _pool(name: str, cls: type[nn.Module], *functions: Any) -> UnitSpec:
    return UnitSpec(
        name,
        reference=lambda x, **params: functions[0](x, **params),
        classes=(cls,),
        of_module=lambda module: pool_params(
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.ceil_mode,
            module.return_indices,
        ),
        functions=dict.fromkeys(functions, read_pool),
        form="pool",
        optional=True,
    )


_HF = "transformers.activations."
_TIMM = "timm.layers.activations."
_BOUNDED = "bounded on both sides: a CTU grows on one"
_SATURATES = "saturates at a negative value: a CTU vanishes there"
_SMOOTH = "smooth already, with a beta of its own; set or train that one"
_UNFAMILIAR = "no CTU comes near it"
_POOLS = "pools by maximum over a window that depends on the input's size: left as it is"

CATALOGUE: tuple[UnitSpec, ...] = (
    UnitSpec(
        "relu",
        reference=torch.relu,
        classes=(nn.ReLU,),
        functions={
            F.relu: read(),
            torch.relu: read(),
            torch.Tensor.relu: read(),
            torch.relu_: read(overwrite=True),
            torch.Tensor.relu_: read(overwrite=True),
        },
    ),
    UnitSpec(
        "clamp",
        reference=_capped,
        classes=(nn.ReLU6, nn.Hardtanh),
        of_module=lambda module: from_zero(module.min_val, module.max_val),
        form="capped",
        functions={
            **dict.fromkeys((torch.clamp, torch.Tensor.clamp), read_clamp()),
            **dict.fromkeys((torch.clip, torch.Tensor.clip), read_clamp()),
            **dict.fromkeys((torch.clamp_min, torch.Tensor.clamp_min), read_clamp()),
            **dict.fromkeys((torch.clamp_, torch.Tensor.clamp_), read_clamp(overwrite=True)),
            **dict.fromkeys((torch.clip_, torch.Tensor.clip_), read_clamp(overwrite=True)),
            torch.clamp_min_: read_clamp(overwrite=True),
            torch.Tensor.clamp_min_: read_clamp(overwrite=True),
            F.relu6: read(lambda: {"cap": 6.0}),
            F.hardtanh: read_hardtanh(),
            F.hardtanh_: read_hardtanh(overwrite=True),
        },
    ),
    UnitSpec(
        "threshold",
        reference=_capped,
        classes=(nn.Threshold,),
        of_module=lambda module: {"cap": None} if module.threshold == 0 == module.value else None,
        form="capped",
        functions={
            F._threshold: read_threshold(),  # type: ignore[attr-defined]
            torch.threshold: read_threshold(),
            torch.threshold_: read_threshold(overwrite=True),
        },
    ),
    UnitSpec(
        "leaky_relu",
        reference=lambda x, slope: torch.where(x > 0, x, slope * x),
        classes=(nn.LeakyReLU,),
        of_module=lambda module: {"slope": module.negative_slope},
        form="leaky",
        functions={F.leaky_relu: read_leaky(), F.leaky_relu_: read_leaky(overwrite=True)},
    ),
    UnitSpec(
        "prelu",
        reference=_prelu,
        classes=(nn.PReLU, _TIMM + "PReLU"),
        of_module=lambda module: {"slope": module.weight},
        form="leaky",
        functions=dict.fromkeys(
            (torch.prelu, torch.Tensor.prelu),
            read(lambda weight: {"slope": weight}, weight=None),
        ),
    ),
    UnitSpec(
        "silu",
        reference=F.silu,
        classes=(nn.SiLU, _HF + "SiLUActivation", _TIMM + "Swish"),
        functions={
            F.silu: read(),
            torch._C._nn.silu: read(),
            torch._C._nn.silu_: read(overwrite=True),
        },
        point=lambda params: Point(0.5, 1.0),
    ),
    UnitSpec(
        "gelu",
        reference=lambda x, approximate: F.gelu(x, approximate=approximate),
        classes=(nn.GELU,),
        of_module=lambda module: {"approximate": module.approximate},
        functions={F.gelu: read(approximate="none")},
        point=_gelu_point,
    ),
    UnitSpec(
        "gelu_tanh",
        reference=lambda x: F.gelu(x, approximate="tanh"),
        classes=tuple(
            _HF + name
            for name in (
                "NewGELUActivation",
                "FastGELUActivation",
                "AccurateGELUActivation",
                "GELUTanh",
                "PytorchGELUTanh",
            )
        ),
        point=lambda params: _GELU_TANH,
    ),
    UnitSpec(
        "gelu_erf",
        reference=F.gelu,
        classes=(_HF + "GELUActivation",),
        point=lambda params: _GELU_ERF,
    ),
    UnitSpec(
        "quick_gelu",
        reference=lambda x: x * torch.sigmoid(1.702 * x),
        classes=(_HF + "QuickGELUActivation", _TIMM + "QuickGELU"),
        point=lambda params: Point(1.702 / 2.702, 1.0),
    ),
    UnitSpec(
        "softplus",
        reference=lambda x, beta: F.softplus(x, beta=beta),
        classes=(nn.Softplus,),
        of_module=lambda module: {"beta": module.beta},
        functions={
            F.softplus: read(lambda beta, threshold: {"beta": beta}, beta=1.0, threshold=20.0)
        },
        point=_softplus_point,
    ),
    UnitSpec(
        "hardswish",
        reference=F.hardswish,
        classes=(nn.Hardswish, _TIMM + "HardSwish"),
        functions={
            F.hardswish: read(),
            torch._C._nn.hardswish: read(),
            torch._C._nn.hardswish_: read(overwrite=True),
        },
        point=lambda params: Point(0.5119, 1.0, error=0.1240),
    ),
    UnitSpec(
        "mish",
        reference=F.mish,
        classes=(nn.Mish, _HF + "MishActivation"),
        functions={F.mish: read(), torch._C._nn.mish: read()},
        point=lambda params: Point(0.5482, 0.9463, error=0.1018),
    ),
    _refused(
        "rrelu",
        "its slopes are random while training",
        F.rrelu,
        torch.rrelu,
        F.rrelu_,
        classes=(nn.RReLU,),
        blocking=True,
    ),
    UnitSpec(
        "zero_bound",
        functions=dict.fromkeys(
            (
                *(torch.max, torch.Tensor.max, torch.maximum, torch.Tensor.maximum),
                *(torch.fmax, torch.Tensor.fmax, torch.logaddexp, torch.Tensor.logaddexp),
                *(torch.clamp, torch.Tensor.clamp, torch.clip, torch.Tensor.clip),
                *(torch.clamp_min, torch.Tensor.clamp_min),
            ),
            read_zero_bound,
        ),
        refusal="a rectifier by way of a zero tensor or out=; write torch.relu(x) or F.softplus(x)",
        blocking=True,
    ),
    _refused(
        "rnn_relu",
        "fused into the recurrence; write the recurrence out with nn.Linear and nn.ReLU",
        torch.rnn_relu,
        torch.rnn_relu_cell,
        blocking=True,
    ),
    _refused(
        "jump",
        "a threshold that is not ReLU jumps: no CTU does",
        F._threshold,  # type: ignore[attr-defined]
        torch.threshold,
        torch.threshold_,
        classes=(nn.Threshold,),
    ),
    _refused("centered_softplus", _SMOOTH, classes=("flexure.units.smooth.CenteredSoftplus",)),
    _refused("elu", _SATURATES, F.elu, F.elu_, classes=(nn.ELU,)),
    _refused("selu", _SATURATES, F.selu, torch.selu, torch.selu_, classes=(nn.SELU,)),
    _refused("celu", _SATURATES, F.celu, torch.celu, torch.celu_, classes=(nn.CELU,)),
    _refused("hardtanh", _BOUNDED, F.hardtanh, F.hardtanh_, classes=(nn.Hardtanh,)),
    _refused("hardsigmoid", _BOUNDED, F.hardsigmoid, classes=(nn.Hardsigmoid,)),
    _refused("logsigmoid", "bounded above: a CTU is not", F.logsigmoid, classes=(nn.LogSigmoid,)),
    _refused("softshrink", _UNFAMILIAR, F.softshrink, classes=(nn.Softshrink,)),
    _refused("hardshrink", _UNFAMILIAR, F.hardshrink, torch.hardshrink, classes=(nn.Hardshrink,)),
    _refused("tanhshrink", _UNFAMILIAR, F.tanhshrink, classes=(nn.Tanhshrink,)),
    _refused("softsign", _BOUNDED, F.softsign, classes=(nn.Softsign,)),
    _refused(
        "tanh",
        _BOUNDED,
        torch.tanh,
        torch.tanh_,
        torch.Tensor.tanh,
        torch.Tensor.tanh_,
        F.tanh,
        torch.rnn_tanh,
        torch.rnn_tanh_cell,
        classes=(nn.Tanh, _HF + "TanhActivation"),
    ),
    _refused(
        "sigmoid",
        _BOUNDED,
        torch.sigmoid,
        torch.sigmoid_,
        torch.Tensor.sigmoid,
        torch.Tensor.sigmoid_,
        F.sigmoid,
        torch.special.expit,
        classes=(nn.Sigmoid,),
    ),
    _refused("erf", "perhaps a GELU by hand: nn.GELU can be steered", torch.erf, torch.Tensor.erf),
    _refused("glu", "gated by a sigmoid, which is bounded", F.glu, classes=(nn.GLU,)),
    _refused("lstm", "gated by sigmoid and tanh, which are bounded", torch.lstm, torch.lstm_cell),
    _refused("gru", "gated by sigmoid and tanh, which are bounded", torch.gru, torch.gru_cell),
    _refused("clipped_gelu", _UNFAMILIAR, classes=(_HF + "ClippedGELUActivation",)),
    _refused("laplace", _BOUNDED, classes=(_HF + "LaplaceActivation",)),
    _refused("xielu", _UNFAMILIAR, classes=(_HF + "XIELUActivation",)),
    _refused("sqrt_softplus", _UNFAMILIAR, classes=(_HF + "SqrtSoftplusActivation",)),
    _pool("max_pool1d", nn.MaxPool1d, F.max_pool1d, torch.max_pool1d),
    _pool("max_pool2d", nn.MaxPool2d, F.max_pool2d, torch.max_pool2d, light_max_pool2d),
    _pool("max_pool3d", nn.MaxPool3d, F.max_pool3d, torch.max_pool3d),
    _refused(
        "gapped_max_pool",
        "pools by maximum, with gaps or with indices: left as it is",
        *(F.max_pool1d, torch.max_pool1d, F.max_pool1d_with_indices),
        *(F.max_pool2d, torch.max_pool2d, F.max_pool2d_with_indices),
        *(F.max_pool3d, torch.max_pool3d, F.max_pool3d_with_indices),
        classes=(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    ),
    _refused("adaptive_max_pool1d", _POOLS, F.adaptive_max_pool1d),
    _refused("adaptive_max_pool2d", _POOLS, F.adaptive_max_pool2d),
    _refused("adaptive_max_pool3d", _POOLS, F.adaptive_max_pool3d),
)

SPECS: Mapping[str, UnitSpec] = {spec.name: spec for spec in CATALOGUE}

_BY_FUNCTION: dict[Any, list[tuple[UnitSpec, Reader]]] = {}
_BY_CLASS: dict[type[nn.Module] | str, list[UnitSpec]] = {}
for _spec in CATALOGUE:
    for _function, _reader in _spec.functions.items():
        _BY_FUNCTION.setdefault(_function, []).append((_spec, _reader))
    for _class in _spec.classes:
        _BY_CLASS.setdefault(_class, []).append(_spec)
