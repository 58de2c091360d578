"""Which operations of a network have bounds of slope and curvature, and by which rule.

`Bounding` carries a node of a graph along through a network's own code; its table is here. How
rules make nodes is in `bound_rules.py`, `bound_layers.py` and `bound_maxima.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from flexure.contracts import FlexureError
from flexure.measure.bound_layers import (
    JUMP,
    KINK,
    PRODUCT,
    RANDOM,
    TRAINING,
    UNBOUNDED,
    avg_pool,
    batch_norm,
    conv,
    conv_transpose,
    interpolate,
    linear,
    masked_fill,
    matmul,
    pad,
)
from flexure.measure.bound_maxima import (
    MAXIMUM,
    adaptive_max_pool,
    larger,
    largest,
    largest_along,
    max_pool,
)
from flexure.measure.bound_rules import (
    BoundRule,
    Graph,
    Signal,
    bent,
    concatenated,
    constant,
    moved,
    scaled,
    shifted,
    summed,
)
from flexure.measure.propagate import (
    GENERAL,
    Carrying,
    Rule,
    Unsupported,
    carriers_in,
    refused,
    rule_table,
    running_module,
    with_primals,
)
from flexure.units.bounds import (
    UnitBounds,
    centered_softplus_bounds,
    ctu_bounds,
    unit_bounds,
)
from flexure.units.functional import centered_softplus, ctu

__all__ = ["Bounding", "place"]


class Bounding(Carrying):
    """A tensor that carries the node of a graph of bounds, a `Signal`."""

    subject = "bound of the Hessian"
    graph: ClassVar[type[Graph]] = Graph
    carried: Signal

    @classmethod
    def at(cls, x: Tensor) -> Self:
        """The input of a network, in a graph of its own."""
        return cls.of(x, Signal(cls.graph(x.shape), 0))

    def constant(self, primal: Tensor) -> Bounding:
        """A value that does not depend on the input: a sum of nothing."""
        return type(self).of(primal, scaled(self.carried, constant(0.0)))

    @classmethod
    def unit_rule(cls, name: str, x: Any, *dials: Any) -> Any:
        """The units: an activation each, by its largest slope and curvature."""
        if name not in _UNITS:
            raise Unsupported(f"there is no bound for it here; {MAXIMUM}")
        # A function mode must not take what is called here for the network's own activations.
        with torch.no_grad(), torch._C.DisableTorchFunction():
            function, bounds = _UNITS[name]
            values = [d.detach() if isinstance(d, Tensor) else d for d in dials]
            signal = _bend(x.carried, bounds(*values))
            return cls.of(function(x.primal, *values), signal)

    @classmethod
    def advice(cls, func: Any) -> str:
        """What a user can do about an operation without a rule."""
        return "write it with operations that have one, or use flexure.curvature on data instead"


def _spelled(rule: BoundRule) -> Rule:
    """A rule of signals as a rule of carriers; it returns None where the value is a constant."""

    def run(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        carrier = next(carriers_in((args, kwargs)), None)
        if carrier is None:
            return function(*args, **kwargs)
        # Before the value: what is refused must not draw random numbers.
        try:
            signals = rule(function, *_signals_in(args), **_signals_in(kwargs))
        except TypeError as error:
            raise Unsupported(f"it is called in a way that is not known here ({error})") from error
        value = function(*with_primals(args), **with_primals(kwargs))
        if signals is None:
            return value
        if isinstance(value, Tensor):
            return _carried(type(carrier), value, signals)
        return type(value)(
            _carried(type(carrier), v, s) for v, s in zip(value, signals, strict=True)
        )

    return run


def _carried(carrier: type[Carrying], value: Tensor, signal: Signal) -> Carrying:
    if not value.is_floating_point() or value.shape != signal.shape:
        raise Unsupported(
            f"its result ({value.dtype}, {tuple(value.shape)}) is not what a linear map or an "
            f"activation gives; write it with ordinary operations"
        )
    return carrier.of(value, signal)


def _signals_in(args: Any) -> Any:
    if isinstance(args, Bounding):
        return args.carried
    if isinstance(args, (tuple, list)) and not isinstance(args, torch.Size):
        return type(args)([_signals_in(item) for item in args])
    if isinstance(args, dict):
        return {key: _signals_in(item) for key, item in args.items()}
    return args


def _same(function: Any, x: Any, *args: Any, **kwargs: Any) -> Signal | None:
    """The signal itself; a constant that takes the dtype of one is a constant."""
    return x if isinstance(x, Signal) else None


def _add(function: Any, x: Any, y: Any, *, alpha: float = 1) -> Signal:
    return summed(x, y, alpha)


def _sub(function: Any, x: Any, y: Any, *, alpha: float = 1) -> Signal:
    return summed(x, y, -alpha)


def _mul(function: Any, x: Any, y: Any) -> Signal:
    if isinstance(x, Signal) and isinstance(y, Signal):
        raise Unsupported(PRODUCT)
    return scaled(x, constant(y)) if isinstance(x, Signal) else scaled(y, constant(x))


def _div(function: Any, x: Any, y: Any, *, rounding_mode: str | None = None) -> Signal:
    if isinstance(y, Signal):
        raise Unsupported(PRODUCT if isinstance(x, Signal) else UNBOUNDED)
    if rounding_mode is not None:
        raise Unsupported(KINK)
    return scaled(x, 1.0 / constant(y))


def _addcmul(function: Any, x: Any, y: Any, z: Any, *, value: float = 1) -> Signal:
    return summed(x, _mul(function, y, z), value)


def _lerp(function: Any, x: Any, y: Any, weight: Any) -> Signal:
    if isinstance(weight, Signal):
        raise Unsupported(PRODUCT)
    share = constant(weight)
    parts = zip((x, y), (1.0 - share, share), strict=True)
    a, b = (scaled(v, by) if isinstance(v, Signal) else constant(v) * by for v, by in parts)
    return summed(a, b)


def _addmm(
    function: Any, x: Any, left: Any, right: Any, *, beta: float = 1, alpha: float = 1
) -> Signal:
    """beta·x + alpha·(left @ right), of which one of the factors is constant."""
    if isinstance(left, Signal) or isinstance(right, Signal):
        product: Any = matmul(torch.matmul, left, right)
    else:
        product = left @ right
    return summed(scaled(x, constant(beta)) if isinstance(x, Signal) else x, product, alpha)


def _diff(function: Any, x: Any, n: int = 1, dim: int = -1, **kwargs: Any) -> Signal:
    if any(value is not None for value in kwargs.values()):
        raise Unsupported("it has values before or after; join them by torch.cat")
    for _ in range(n):
        rest = x.shape[dim] - 1
        later, earlier = (moved(torch.narrow, x, dim, start, rest) for start in (1, 0))
        x = summed(later, earlier, -1.0)
    found: Signal = x
    return found


def _copy(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The value that `x.copy_(y)` gives x, written into nothing."""
    x, y = args[0], args[1]
    if not isinstance(y, Bounding):
        return y.to(x.dtype).expand(x.shape)
    return type(y).of(y.primal.to(x.dtype).expand(x.shape), _expanded(y.carried, x.shape))


def _expanded(x: Signal, shape: torch.Size) -> Signal:
    return shifted(x, torch.empty(shape, device="meta"))


def _dropout(function: Any, x: Signal, p: float = 0.5, training: bool = True) -> Signal:
    if training and p > 0:
        raise Unsupported(TRAINING)
    return x


def _elementwise(bounds: Callable[..., UnitBounds]) -> BoundRule:
    """The rule of an activation, from its parameters to its largest slope and curvature."""

    def rule(function: Any, x: Any, *args: Any, **kwargs: Any) -> Signal:
        others = (*args, *kwargs.values())
        if not isinstance(x, Signal) or any(isinstance(each, Signal) for each in others):
            raise Unsupported("its parameters depend on the input; let its input alone do")
        try:
            found = bounds(*args, **kwargs)
        except FlexureError as error:  # of parameters without bounds
            raise Unsupported(str(error)) from error
        return _bend(x, found)

    return rule


def _bend(x: Signal, bounds: UnitBounds) -> Signal:
    if not x.graph.kinks and not bool(torch.isfinite(constant(bounds.curvature)).all()):
        raise Unsupported(KINK)
    return bent(x, bounds.lipschitz, bounds.curvature, place())


def _prelu(function: Any, x: Signal, weight: Any) -> Signal:
    """Its slopes are one for all, or one a channel, which are axis 1."""
    weight = constant(weight)
    slopes = weight.reshape(() if weight.numel() == 1 else (-1, *(1,) * (len(x.shape) - 2)))
    return _bend(x, unit_bounds("prelu", slope=slopes))


def _rrelu(
    function: Any, x: Signal, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False
) -> Signal:
    """In eval mode its slope is the mean of the two."""
    if training:
        raise Unsupported(TRAINING)
    return _bend(x, unit_bounds("leaky_relu", slope=(lower + upper) / 2))


def _threshold(threshold: float, value: float) -> UnitBounds:
    if threshold != value:
        raise Unsupported(JUMP)
    return unit_bounds("relu")


def place() -> str:
    """The site that a unit stands for, or the path of the module that runs."""
    found = running_module()
    if found is None:
        return "(function)"
    path, module = found
    return _site(module) or path or type(module).__name__


def _site(module: nn.Module) -> str:
    name = getattr(module, "name", "")
    return name if isinstance(name, str) else ""


_UNITS: Mapping[str, tuple[Callable[..., Tensor], Callable[..., UnitBounds]]] = {
    "ctu": (ctu, ctu_bounds),
    "centered_softplus": (centered_softplus, centered_softplus_bounds),
}
"""The units of `flexure.units`: the function, and what bounds its derivatives."""

_ACTIVATIONS: Mapping[str, Callable[..., UnitBounds]] = {
    "relu": partial(unit_bounds, "relu"),
    "leaky_relu": lambda negative_slope=0.01: unit_bounds("leaky_relu", slope=negative_slope),
    "relu6 hardtanh clamp clip clamp_min clamp_max": lambda *_, **__: unit_bounds("hardtanh"),
    "softshrink": lambda lambd=0.5: unit_bounds("softshrink"),
    "threshold": _threshold,
    "hardswish": partial(unit_bounds, "hardswish"),
    "hardsigmoid": partial(unit_bounds, "hardsigmoid"),
    "selu": partial(unit_bounds, "selu"),
    "abs absolute": lambda: UnitBounds(-1.0, 1.0, math.inf),
    "tanh": partial(unit_bounds, "tanh"),
    "sigmoid expit": partial(unit_bounds, "sigmoid"),
    "silu": partial(unit_bounds, "silu"),
    "mish": partial(unit_bounds, "mish"),
    "erf": partial(unit_bounds, "erf"),
    "logsigmoid": partial(unit_bounds, "logsigmoid"),
    "softsign": partial(unit_bounds, "softsign"),
    "tanhshrink": partial(unit_bounds, "tanhshrink"),
    "gelu": lambda *, approximate="none": unit_bounds("gelu", approximate=approximate),
    "softplus": lambda beta=1.0, threshold=20.0: unit_bounds(
        "softplus", beta=beta, threshold=threshold
    ),
    "elu": lambda alpha=1.0: unit_bounds("elu", alpha=alpha),
    "celu": lambda alpha=1.0: unit_bounds("celu", alpha=alpha),
    "atan arctan": lambda: UnitBounds(0.0, 1.0, 3 * math.sqrt(3) / 8, 1.0),
    "sin cos": lambda: UnitBounds(-1.0, 1.0, 1.0),
}
"""Activations by their names in PyTorch. Those whose slope jumps for these parameters are refused
where the graph has no kinks."""

_MOVES = (
    "view view_as reshape reshape_as flatten unflatten ravel permute transpose swapaxes swapdims "
    "movedim moveaxis t T mT squeeze unsqueeze expand expand_as broadcast_to getitem narrow select "
    "index_select gather take_along_dim chunk split tensor_split unbind unfold fold diagonal tril "
    "triu flip fliplr flipud roll rot90 tile repeat repeat_interleave pixel_shuffle "
    "pixel_unshuffle channel_shuffle atleast_1d atleast_2d atleast_3d sum mean cumsum avg_pool1d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
)
_JOINS = "cat concat concatenate stack hstack vstack dstack column_stack where"
_SAME = "neg negative positive clone contiguous to double half bfloat16 type_as cpu cuda"
_DROPOUTS = "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout"
_JUMPS = "hardshrink sign round floor ceil trunc frac"
_CHOICES = (
    "aminmax max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
    "fractional_max_pool2d sort topk median kthvalue"
)
_NO_BOUND = (
    "layer_norm group_norm instance_norm rms_norm local_response_norm normalize softmax "
    "log_softmax softmin logsumexp scaled_dot_product_attention multi_head_attention_forward norm "
    "var std sqrt rsqrt reciprocal exp expm1 log log1p log2 pow square prod cumprod glu "
    "cosine_similarity sinh cosh tan asin acos lp_pool2d"
)

_RULES: Mapping[Any, Rule] = {
    **GENERAL,
    _JUMPS: refused(JUMP),
    _CHOICES: refused(f"it gives what depends on which element is the largest; {MAXIMUM}"),
    _NO_BOUND: refused(UNBOUNDED),
    "rand_like randn_like": refused(RANDOM),
    _MOVES: _spelled(moved),
    _JOINS: _spelled(concatenated),
    _SAME: _spelled(_same),
    torch.Tensor.float: _spelled(_same),
    "add": _spelled(_add),
    "sub subtract": _spelled(_sub),
    "rsub": _spelled(lambda function, x, y, *, alpha=1: _sub(function, y, x, alpha=alpha)),
    "mul multiply": _spelled(_mul),
    "div divide truediv true_divide": _spelled(_div),
    "addcmul": _spelled(_addcmul),
    "lerp": _spelled(_lerp),
    "addmm baddbmm addmv": _spelled(_addmm),
    "diff": _spelled(_diff),
    "copy": _copy,
    "linear": _spelled(linear),
    "conv1d conv2d conv3d": _spelled(conv),
    "conv_transpose1d conv_transpose2d conv_transpose3d": _spelled(conv_transpose),
    "matmul mm bmm mv einsum": _spelled(matmul),
    F.batch_norm: _spelled(batch_norm),
    _DROPOUTS: _spelled(_dropout),
    "interpolate": _spelled(interpolate),
    "avg_pool2d avg_pool3d": _spelled(avg_pool),
    "pad": _spelled(pad),
    "masked_fill": _spelled(masked_fill),
    "prelu": _spelled(_prelu),
    "rrelu": _spelled(_rrelu),
    **{f"max_pool{n}d": _spelled(partial(max_pool, n)) for n in (1, 2, 3)},
    **{f"adaptive_max_pool{n}d": _spelled(partial(adaptive_max_pool, n)) for n in (1, 2, 3)},
    "max min": _spelled(largest),
    "amax amin": _spelled(largest_along),
    "maximum minimum fmax fmin": _spelled(larger),
    **{name: _spelled(_elementwise(bounds)) for name, bounds in _ACTIVATIONS.items()},
}

Bounding.rules = rule_table(_RULES)
