"""How steep and how bent each activation can be: exact ranges of the first two derivatives.

One table by catalogue name, one function for flexure's own units, one for modules. Where a row of
the catalogue has no bounds, `UNBOUNDED` says why. The searches for what has no closed form are in
`extremes.py`. Bounds of whole networks are the business of `measure/bounds.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flexure.contracts import FlexureError
from flexure.units.catalogue import SPECS, read_module
from flexure.units.extremes import capped_extremes, ctu_slope_excess
from flexure.units.functional import balanced_c, check_dial, ctu_curvature_bound
from flexure.units.unit import CTU

__all__ = [
    "UNBOUNDED",
    "UNIT_BOUNDS",
    "UnitBounds",
    "centered_softplus_bounds",
    "ctu_bounds",
    "module_unit_bounds",
    "unit_bounds",
]

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class UnitBounds:
    """Bounds of a function s of one variable: floats, or float64 tensors with one value a channel.

    Attributes:
        slope_min: the greatest lower bound of s', over both sides of a kink.
        slope_max: the least upper bound of s'.
        curvature: the Lipschitz constant of s': max |s''|, inf where s' jumps.
        relative_curvature: sup |s''/s'|; inf where the slope passes or jumps from 0.
    """

    slope_min: float | Tensor
    slope_max: float | Tensor
    curvature: float | Tensor
    relative_curvature: float | Tensor = math.inf

    @property
    def lipschitz(self) -> float | Tensor:
        """The Lipschitz constant of s: the largest |s'|."""
        if isinstance(self.slope_min, Tensor) or isinstance(self.slope_max, Tensor):
            low, high = (torch.as_tensor(v).abs() for v in (self.slope_min, self.slope_max))
            return torch.maximum(low, high)
        return max(abs(self.slope_min), abs(self.slope_max))


def unit_bounds(name: str, **params: Any) -> UnitBounds:
    """The bounds of an activation of the catalogue, itself (not the CTU in its place).

    Args:
        name: the catalogue's.
        params: its parameters, all of them, under the catalogue's or PyTorch's names: `slope`
            (a number or a tensor), `cap`, `beta`, `approximate`, `alpha`.

    Raises:
        FlexureError: no bounds, with the reason; or parameters that it does not have.

    Example:
        >>> unit_bounds("tanh").slope_max
        1.0
    """
    if name not in UNIT_BOUNDS:
        why = UNBOUNDED.get(name, "it is not in the catalogue")
        raise FlexureError(
            f"expected an activation with bounds, got {name!r}: {why}; take one of "
            f"{', '.join(sorted(UNIT_BOUNDS))}"
        )
    try:
        return UNIT_BOUNDS[name](**params)
    except TypeError as error:
        raise FlexureError(
            f"expected the parameters of {name}, got {sorted(params)}: {error}; give each of them"
        ) from error


def centered_softplus_bounds(beta: float | Tensor) -> UnitBounds:
    """Of `centered_softplus(x, beta)`: slopes 0 to 1, curvature beta/4, relative curvature beta.

    beta = 0 is x/2: slopes 1/2.

    Raises:
        FlexureError: beta is negative or nan.
    """
    _check(beta, "beta of at least 0", lambda value: value >= 0)
    if isinstance(beta, Tensor):
        beta = beta.detach().double()
        low, high = torch.where(beta == 0, 0.5, 0.0), torch.where(beta == 0, 0.5, 1.0)
        return UnitBounds(low, high, beta / 4, beta)
    if beta == 0:
        return UnitBounds(0.5, 0.5, 0.0, 0.0)
    return UnitBounds(0.0, 1.0, beta / 4, beta)


def ctu_bounds(
    beta: float | Tensor,
    c: float | Tensor | str = 0.5,
    *,
    activation: str = "relu",
    params: Mapping[str, Any] | None = None,
) -> UnitBounds:
    """Of the CTU that stands for an activation, by its form in the catalogue.

    `relu`: slopes `1 + e` and `-e`, e of `ctu_slope_excess`, at most 0.0998·c, attained at c = 1;
    curvature `(c·beta/2 + (1-c)/4)/(1-beta)`, attained at 0. `leaky`: `s + (1-s)·` these slopes,
    `(1-s)²·` this curvature, exact as well. `capped`: certified by search, see `capped_extremes`.

    Args:
        beta: in [0, 1]: a number, or `(channels,)`.
        c: likewise, or `"balanced"`.
        activation: its catalogue name.
        params: `slope` (a number or `(channels,)`) or `cap`, as in `CTU`.

    Returns:
        Floats where all is a number, else float64 tensors.

    Raises:
        FlexureError: a dial outside [0, 1], shapes that do not fit together, an unknown activation
            or parameter, or a pooling, which is no function of one variable.
    """
    check_dial(beta, c)
    form = SPECS[activation].form if activation in SPECS else None
    if form is None or form not in _FORMS:
        why = UNBOUNDED.get(activation, "it is not in the catalogue")
        raise FlexureError(f"expected a unit of one variable, got {activation!r}; {why}")
    c = balanced_c(beta) if isinstance(c, str) else c
    given = dict(params or {})
    parts = (beta, c, *given.values())
    _check_shapes(parts)
    device = next((p.device for p in parts if isinstance(p, Tensor)), None)
    wide_beta, wide_c = _wide(beta, device), _wide(c, device)
    wide_beta, wide_c = wide_beta + 0 * wide_c, wide_c + 0 * wide_beta
    try:
        bounds = _FORMS[form](wide_beta, wide_c, **given)
    except TypeError as error:
        raise FlexureError(
            f"expected the parameters of {activation}, got {sorted(given)}: {error}; give each"
        ) from error
    if any(isinstance(part, Tensor) for part in parts):
        return bounds
    return UnitBounds(*(float(getattr(bounds, name)) for name in _FIELDS))


def module_unit_bounds(module: nn.Module) -> UnitBounds:
    """The bounds of an activation module: one of flexure's units, or one of the catalogue.

    Raises:
        FlexureError: a module that is no known activation, or one without bounds.
    """
    if isinstance(module, CTU):
        params = dict(module.params)
        if "weight" in module._parameters:
            params["slope"] = module.weight.detach()
        bounds = ctu_bounds(module.beta, module.c, activation=module.activation, params=params)
        return bounds if module.scale is None else _times(bounds, module.scale.detach().double())
    found = read_module(module)
    if found is None:
        raise FlexureError(
            f"expected a known activation, got {type(module).__name__}; give its bounds yourself "
            "as a UnitBounds"
        )
    spec, params = found
    extra = {name: getattr(module, name) for name in _ATTRIBUTES.get(spec.name, ())}
    return unit_bounds(spec.name, **params, **extra)


_FIELDS = ("slope_min", "slope_max", "curvature", "relative_curvature")


def _check(value: Any, expected: str, right: Callable[[Any], Any]) -> None:
    """Refuses a parameter, or a tensor of them, that is not `right`; nan never is."""
    if not bool(torch.as_tensor(right(value)).all()):
        raise FlexureError(f"expected {expected}, got {value}; other values have no bounds here")


def _check_cap(cap: float | None) -> None:
    _check(cap, "a positive cap", lambda value: value is None or value > 0)


def _check_finite(**values: Any) -> None:
    for name, value in values.items():
        _check(value, f"a finite {name}", lambda v: abs(v) < math.inf)


def _check_shapes(parts: tuple[Any, ...]) -> None:
    shapes = [tuple(part.shape) for part in parts if isinstance(part, Tensor)]
    try:
        torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise FlexureError(
            f"expected dials of one shape (channels,), got {shapes}; give one value a channel"
        ) from error


def _wide(value: float | Tensor, device: torch.device | None) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().double()
    return torch.tensor(value, dtype=torch.float64, device=device)


def _rectified(beta: Tensor, c: Tensor) -> UnitBounds:
    excess = ctu_slope_excess(beta, c)
    highest = 1.0 + excess
    # Above 1 the sum is rounded; at most 1 it is exact.
    highest = torch.where(excess > 0, highest * (1.0 + EPS), highest)
    curvature = torch.as_tensor(ctu_curvature_bound(beta, c)) * (1.0 + 4 * EPS)
    curvature = torch.where(beta == 1, math.inf, curvature)
    relative = torch.where((c == 0) & (beta < 1), (1.0 + EPS) / (1.0 - beta), math.inf)
    affine = (beta == 0) & (c == 1)
    return UnitBounds(
        -excess,
        highest,
        torch.where(affine, 0.0, curvature),
        torch.where(affine, 0.0, relative),
    )


def _leaky(beta: Tensor, c: Tensor, slope: float | Tensor) -> UnitBounds:
    _check_finite(slope=slope)
    alpha = _wide(slope, beta.device)
    unit = _rectified(beta, c)
    # end + alpha·(1 - end), which keeps 0 and 1 exact.
    ends = [end + alpha * (1.0 - end) for end in (unit.slope_min, unit.slope_max)]
    ends = [torch.minimum(*ends), torch.maximum(*ends)]
    room = torch.where(torch.as_tensor(unit.slope_min) == 0, 0.0, 4 * EPS * (1.0 + alpha.abs()))
    bent = (1.0 - alpha) ** 2 * unit.curvature * (1.0 + 4 * EPS)
    # alpha = 1 is the identity, whatever the dial.
    bent = torch.where(alpha == 1, 0.0, bent)
    return UnitBounds(ends[0] - room, ends[1] + room, bent, torch.where(alpha == 1, 0.0, torch.inf))


def _inf_unless(identity: Tensor) -> Tensor:
    return torch.where(identity, 0.0, torch.full_like(identity, torch.inf, dtype=torch.float64))


def _capped(beta: Tensor, c: Tensor, cap: float | None) -> UnitBounds:
    _check_cap(cap)
    if cap is None or cap == math.inf:
        return _rectified(beta, c)
    seen: dict[tuple[float, float], tuple[float, float, float]] = {}
    for pair in zip(beta.flatten().tolist(), c.flatten().tolist(), strict=True):
        if pair not in seen:
            kinked = (0.0, 1.0, math.inf)
            seen[pair] = kinked if pair[0] == 1 else capped_extremes(*pair, cap)
    rows = [seen[p] for p in zip(beta.flatten().tolist(), c.flatten().tolist(), strict=True)]
    table = torch.tensor(rows, dtype=torch.float64, device=beta.device)
    return UnitBounds(*(column.reshape(beta.shape) for column in table.unbind(1)))


_FORMS: Mapping[str, Callable[..., UnitBounds]] = {
    "relu": lambda beta, c, **params: _rectified(beta, c),
    "leaky": _leaky,
    "capped": _capped,
}


def _times(bounds: UnitBounds, scale: Tensor) -> UnitBounds:
    """Of `scale·s`, for a scale of either sign."""
    ends = [scale * end for end in (bounds.slope_min, bounds.slope_max)]
    return replace(
        bounds,
        slope_min=torch.minimum(*ends),
        slope_max=torch.maximum(*ends),
        curvature=scale.abs() * bounds.curvature,
    )


def _kinked(cap: float | None = None) -> UnitBounds:
    _check_cap(cap)
    return UnitBounds(0.0, 1.0, math.inf)


def _leaky_relu(slope: float | Tensor) -> UnitBounds:
    _check_finite(slope=slope)
    if isinstance(slope, Tensor):
        alpha = slope.detach().double()
        bent = _inf_unless(alpha == 1)
        return UnitBounds(alpha.clamp_max(1.0), alpha.clamp_min(1.0), bent, bent)
    jump = 0.0 if slope == 1 else math.inf
    return UnitBounds(min(slope, 1.0), max(slope, 1.0), jump, jump)


def _softplus(beta: float, threshold: float = 20.0) -> UnitBounds:
    # The jump where PyTorch goes on as x is below float32's rounding from its default on.
    _check(threshold, "softplus with a threshold of at least 20", lambda value: value >= 20.0)
    _check(beta, "a finite beta other than 0", lambda value: 0 < abs(value) < math.inf)
    # A negative beta turns the function by half a turn about 0.
    return UnitBounds(0.0, 1.0, abs(beta) / 4, abs(beta))


def _gelu(approximate: str) -> UnitBounds:
    _check(approximate, "approximate 'none' or 'tanh'", lambda value: value in ("none", "tanh"))
    return _GELU_TANH if approximate == "tanh" else _GELU_ERF


def _elu(alpha: float) -> UnitBounds:
    _check_finite(alpha=alpha)
    smooth = alpha == 1
    return UnitBounds(
        min(alpha, 0.0),
        max(alpha, 1.0),
        1.0 if smooth else math.inf,
        1.0 if smooth else math.inf,
    )


def _celu(alpha: float) -> UnitBounds:
    # exp(x/alpha) grows without bound for a negative alpha.
    _check(alpha, "a finite positive alpha", lambda value: 0 < value < math.inf)
    return UnitBounds(0.0, 1.0, 1.0 / alpha, 1.0 / alpha)


def _rrelu(lower: float, upper: float) -> UnitBounds:
    _check_finite(lower=lower, upper=upper)
    return UnitBounds(min(lower, 1.0), max(upper, 1.0), math.inf)


# Attained extremes, rounded outward in the last digit; the tests recompute each.
_SILU = UnitBounds(-0.09983932012886692, 1.0998393201288672, 0.5)
_GELU_ERF = UnitBounds(-0.12890414518515482, 1.128904145185155, 0.7978845608028655)
_GELU_TANH = UnitBounds(-0.12899306865877180, 1.1289930686587719, 0.7978845608028655)
_MISH = UnitBounds(-0.11252612238946259, 1.088498161251728, 0.6442046372369726)
_TANH = UnitBounds(0.0, 1.0, 0.7698003589195011, 2.0)
_SIGMOID = UnitBounds(0.0, 0.25, 0.09622504486493765, 1.0)
_ERF = UnitBounds(0.0, 1.1283791670955128, 0.9678828980765736)
# transformers' erf with mean 0.707107 and deviation 0.282095.
_LAPLACE = UnitBounds(0.0, 1.4142125184828967, 3.0406893132075936)

UNIT_BOUNDS: Mapping[str, Callable[..., UnitBounds]] = {
    "relu": lambda: _kinked(),
    "clamp": lambda cap: _kinked(cap),
    "threshold": lambda cap: _kinked(cap),
    "zero_bound": lambda: _kinked(),
    "leaky_relu": _leaky_relu,
    "prelu": _leaky_relu,
    "rrelu": _rrelu,
    "silu": lambda: _SILU,
    "gelu": _gelu,
    "gelu_tanh": lambda: _GELU_TANH,
    "gelu_erf": lambda: _GELU_ERF,
    "quick_gelu": lambda: replace(_SILU, curvature=0.851),
    "softplus": _softplus,
    "centered_softplus": centered_softplus_bounds,
    "hardswish": lambda: UnitBounds(-0.5, 1.5, math.inf),
    "mish": lambda: _MISH,
    "elu": _elu,
    "selu": lambda: UnitBounds(0.0, 1.7580993408473769, math.inf),
    "celu": _celu,
    "hardtanh": lambda: _kinked(),
    "hardsigmoid": lambda: UnitBounds(0.0, math.nextafter(1 / 6, 1), math.inf),
    "logsigmoid": lambda: UnitBounds(0.0, 1.0, 0.25, 1.0),
    "softshrink": lambda: _kinked(),
    "tanhshrink": lambda: UnitBounds(0.0, 1.0, _TANH.curvature),
    "softsign": lambda: UnitBounds(0.0, 1.0, 2.0, 2.0),
    "tanh": lambda: _TANH,
    "sigmoid": lambda: _SIGMOID,
    "erf": lambda: _ERF,
    "laplace": lambda: _LAPLACE,
    "clipped_gelu": lambda: replace(_GELU_ERF, curvature=math.inf),
    "sqrt_softplus": lambda: UnitBounds(0.0, 0.31908634316947577, 0.0745204886612201, 0.5),
}
"""Catalogue name -> the bounds, given the parameters."""

_ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "elu": ("alpha",),
    "celu": ("alpha",),
    "rrelu": ("lower", "upper"),
    "softplus": ("threshold",),
    "centered_softplus": ("beta",),
}
"""What a module's row does not read of it, because no CTU needs it."""

_GATED = "it multiplies two inputs: its slope grows with them"
_RECURRENT = "it is a recurrence, not a function of one variable"
_WINDOW = "it takes a maximum over a window: not a function of one variable"
_JUMPS = "it jumps: no slope bounds it"

UNBOUNDED: Mapping[str, str] = {
    **dict.fromkeys(("rnn_relu", "lstm", "gru"), _RECURRENT),
    "glu": _GATED,
    "jump": _JUMPS,
    "hardshrink": _JUMPS,
    "xielu": "its slope grows with its input without bound",
    **{name: _WINDOW for name, spec in SPECS.items() if "max_pool" in name},
}
"""Catalogue name -> why there are no bounds."""
