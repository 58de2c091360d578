"""The units as plain formulas that autograd, `torch.func` and `torch.compile` can differentiate.

Every formula here is right to all orders of derivative, at x = 0 and at the ends of the dials too.
Masks select *inputs* (an element outside is replaced by 0 before it is used) as well as outputs,
so that nothing which overflows can reach a derivative as `inf * 0`.

Activations are called through `torch.ops.aten`: a `TorchFunctionMode` that looks for a model's
activations must not take these for some.

Checks, dispatch and the fast path live elsewhere (`functional.py`, `blocked.py`).
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Dial",
    "at_least",
    "at_most",
    "centered_softplus",
    "centered_softplus_curvature",
    "centered_softplus_slope",
    "centered_softplus_slopes",
    "ctu",
    "ctu_curvature",
    "ctu_dial_slopes",
    "ctu_slope",
    "working_dtype",
]

Dial: TypeAlias = "float | Tensor"
"""One parameter of a unit: a number, or a tensor that broadcasts against the input."""

LN2 = math.log(2.0)
# Beyond this many units of its own width a sigmoid is 0 or 1 in float64 as in float32.
SATURATED = 800.0
# exp(-40) is below float64's rounding of 1, so softplus(v) = v from there on.
SOFTPLUS_THRESHOLD = 40.0
# log(cosh(y))/y near 0: the series below replaces the closed form, which cancels.
SERIES_UP_TO = 0.125
LOG_COSH_SERIES = (
    1 / 2,
    -1 / 12,
    1 / 45,
    -17 / 2520,
    31 / 14175,
    -691 / 935550,
    10922 / 42567525,
    -929569 / 10216206000,
)
# Beyond it log(cosh(y)) = |y| - log(2) exactly.
LOG_COSH_LINEAR_FROM = 1e4

_aten = torch.ops.aten


def working_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for every other: what the arithmetic runs in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def at_least(value: Dial, low: float) -> Dial:
    """The larger of the two, elementwise."""
    return value.clamp_min(low) if isinstance(value, Tensor) else max(value, low)


def at_most(value: Dial, high: float) -> Dial:
    """The smaller of the two, elementwise."""
    return value.clamp_max(high) if isinstance(value, Tensor) else min(value, high)


def ctu(x: Tensor, beta: Dial, c: Dial) -> Tensor:
    """`c·x·sigmoid(eta·x) + (1-c)·softplus(gamma·x)/gamma`, eq. 8 of [CT]; dtype of `x`."""
    t = _terms(x, beta, c)
    if t is None:
        return _out(_aten.relu(x), x)
    gated = torch.where(t.far_u, t.relu, t.xu * _aten.sigmoid(t.u))
    # At beta = 1 and x = 0 the value is 0, but its slope in beta is that of (1-beta)·log 2.
    relu = t.relu + LN2 * t.w * (t.x == 0)
    soft = torch.where(t.far_v, relu, t.width * _aten.softplus(t.v, 1.0, SOFTPLUS_THRESHOLD))
    return _out(_mix(t.c, gated, soft), x)


def ctu_slope(x: Tensor, beta: Dial, c: Dial) -> Tensor:
    """First derivative in x: `c·(s + u·s·(1-s)) + (1-c)·sigmoid(gamma·x)`."""
    t = _terms(x, beta, c)
    if t is None:
        return _out(_aten.threshold_backward(torch.ones_like(x), x, 0.0), x)
    step = (t.x > 0).to(t.x.dtype)
    s = _aten.sigmoid(t.u)
    gated = torch.where(t.far_u, step, s * (1.0 + t.u * _aten.sigmoid(-t.u)))
    return _out(_mix(t.c, gated, torch.where(t.far_v, step, _aten.sigmoid(t.v))), x)


def ctu_curvature(x: Tensor, beta: Dial, c: Dial) -> Tensor:
    """Second derivative in x, 0 where beta = 1 (the kink at 0 has none)."""
    t = _terms(x, beta, c)
    if t is None:
        return torch.zeros_like(x)
    s, not_s = _aten.sigmoid(t.u), _aten.sigmoid(-t.u)
    gated = t.eta * s * not_s * (2.0 + t.u * (not_s - s))
    soft = t.gamma * _aten.sigmoid(t.v) * _aten.sigmoid(-t.v)
    return _out(_mix(t.c, torch.where(t.far_u, 0.0, gated), torch.where(t.far_v, 0.0, soft)), x)


def ctu_dial_slopes(x: Tensor, beta: Dial, c: Dial) -> tuple[Tensor, Tensor]:
    """Derivatives in beta and in c, of the shape of `x` and in the working dtype.

    `d/dbeta = c·v²·s(1-s) + (1-c)·(v·sigmoid(v) - softplus(v))` with `v = x/(1-beta)`, and
    `d/dc = x·s - softplus(v)/gamma`.
    """
    t = _terms(x, beta, c)
    if t is None:
        x = x.to(working_dtype(x))
        at_zero = LN2 * (x == 0).to(x.dtype)
        return (c - 1.0) * at_zero, torch.zeros_like(x)
    s, not_s = _aten.sigmoid(t.u), _aten.sigmoid(-t.u)
    softplus = _aten.softplus(t.v, 1.0, SOFTPLUS_THRESHOLD)
    squeezed = torch.where(t.far_u, 0.0, (t.xu * t.gamma) ** 2 * s * not_s)
    entropy = softplus - t.v * _aten.sigmoid(t.v)
    at_zero = LN2 * (t.x == 0).to(t.x.dtype)
    by_beta = _mix(t.c, squeezed, torch.where(t.far_v, -at_zero, -entropy))
    gated = torch.where(t.far_u, 0.0, t.xu * s - _aten.relu(t.xu))
    soft = torch.where(t.far_v, 0.0, t.width * softplus - _aten.relu(t.xv))
    return by_beta, gated - soft


def centered_softplus(x: Tensor, beta: Dial) -> Tensor:
    """`log((1 + exp(beta·x))/2)/beta = x/2 + (x/2)·h(beta·x/2)`, `h(y) = log(cosh(y))/y`."""
    t = _centered_terms(x, beta)
    bent = 0.5 * t.near_x * (1.0 + _log_cosh_ratio(0.5 * t.b * t.near_x))
    return _out(torch.where(t.linear, _aten.relu(t.x) - LN2 / t.divisor, bent), x)


def centered_softplus_slopes(x: Tensor, beta: Dial) -> tuple[Tensor, Tensor]:
    """Derivatives in x, `sigmoid(beta·x)`, and in beta, `(x²/4)·h'(beta·x/2)`."""
    t = _centered_terms(x, beta)
    step = (t.x > 0).to(t.x.dtype)
    by_x = torch.where(t.linear, step, _aten.sigmoid(t.b * t.near_x))
    bent = 0.25 * t.near_x * t.near_x * _log_cosh_ratio_slope(0.5 * t.b * t.near_x)
    return by_x, torch.where(t.linear, LN2 / (t.divisor * t.divisor), bent)


def centered_softplus_slope(x: Tensor, beta: Dial) -> Tensor:
    """First derivative in x, `sigmoid(beta·x)`; dtype of `x`."""
    t = _centered_terms(x, beta)
    step = (t.x > 0).to(t.x.dtype)
    return _out(torch.where(t.linear, step, _aten.sigmoid(t.b * t.near_x)), x)


def centered_softplus_curvature(x: Tensor, beta: Dial) -> Tensor:
    """Second derivative in x, `beta·s·(1-s)`, `s = sigmoid(beta·x)`; 0 where beta = inf."""
    t = _centered_terms(x, beta)
    u = t.b * t.near_x
    return _out(torch.where(t.linear, 0.0, t.b * _aten.sigmoid(u) * _aten.sigmoid(-u)), x)


class _Terms(NamedTuple):
    """The pieces of eq. 8. `xu`, `u`, `xv`, `v` are 0 where `far_u`, `far_v` are true."""

    x: Tensor
    relu: Tensor
    c: Dial
    w: Dial
    width: Dial
    gamma: Dial
    eta: Dial
    far_u: Tensor
    xu: Tensor
    u: Tensor
    far_v: Tensor
    xv: Tensor
    v: Tensor


def _terms(x: Tensor, beta: Dial, c: Dial) -> _Terms | None:
    """The pieces of eq. 8, or None where the unit is ReLU whatever a gradient asks for."""
    dtype = working_dtype(x)
    if isinstance(c, Tensor) and not isinstance(beta, Tensor):
        beta = torch.full((), beta, dtype=torch.float64, device=x.device)
    x = x.to(dtype)
    if isinstance(beta, Tensor):
        beta = beta.to(torch.promote_types(beta.dtype, torch.float32))
        apart = 1.0 - beta
        relu_there = apart == 0
        w: Dial = apart
        width: Dial = torch.where(relu_there, 1.0, apart)
    elif beta == 1.0:
        return None
    else:
        w = width = 1.0 - beta
        relu_there = torch.zeros((), dtype=torch.bool, device=x.device)
    gamma, eta = 1.0 / width, beta / width
    w, width, gamma, eta, c = (_cast(p, dtype) for p in (w, width, gamma, eta, c))
    # A nan is not far, and so stays one.
    far_u = (torch.abs(x * eta) > SATURATED) | relu_there
    far_v = (torch.abs(x * gamma) > SATURATED) | relu_there
    xu, xv = torch.where(far_u, 0.0, x), torch.where(far_v, 0.0, x)
    relu = _aten.relu(x)
    return _Terms(x, relu, c, w, width, gamma, eta, far_u, xu, xu * eta, far_v, xv, xv * gamma)


def _cast(p: Dial, dtype: torch.dtype) -> Dial:
    return p.to(dtype) if isinstance(p, Tensor) else p


def _mix(c: Dial, gated: Tensor, soft: Tensor) -> Tensor:
    """`c·gated + (1-c)·soft`; a number at an end leaves the other part out (it may be inf)."""
    if isinstance(c, Tensor) or 0.0 < c < 1.0:
        return c * gated + (1.0 - c) * soft
    return gated if c == 1.0 else soft


def _out(y: Tensor, x: Tensor) -> Tensor:
    return y.to(x.dtype)


class _Centered(NamedTuple):
    """`near_x` is 0 where `linear` is true; `b` is finite; `divisor` is beta, never 0."""

    x: Tensor
    linear: Tensor
    near_x: Tensor
    b: Dial
    divisor: Dial


def _centered_terms(x: Tensor, beta: Dial) -> _Centered:
    x = x.to(working_dtype(x))
    if isinstance(beta, Tensor):
        beta = beta.to(x.dtype)
        endless: Tensor | bool = torch.isinf(beta)
        b: Dial = torch.where(torch.isinf(beta), 1.0, beta)
    else:
        endless = math.isinf(beta)
        b = 1.0 if endless else beta
    linear = (torch.abs(0.5 * b * x) > LOG_COSH_LINEAR_FROM) | endless
    divisor: Dial = torch.where(linear, beta, 1.0) if isinstance(beta, Tensor) else beta or 1.0
    return _Centered(x, linear, torch.where(linear, 0.0, x), b, divisor)


def _log_cosh_ratio(y: Tensor) -> Tensor:
    """`log(cosh(y))/y`, odd, between -1 and 1."""
    near = torch.abs(y) < SERIES_UP_TO
    small, large = torch.where(near, y, 0.0), torch.where(near, 1.0, y)
    series = torch.zeros_like(y)
    for coefficient in reversed(LOG_COSH_SERIES):
        series = series * small * small + coefficient
    size = torch.abs(large)
    log_cosh = size + torch.log1p(torch.exp(-2.0 * size)) - LN2
    return torch.where(near, small * series, log_cosh / large)


def _log_cosh_ratio_slope(y: Tensor) -> Tensor:
    """Derivative of `log(cosh(y))/y`: even, 1/2 at 0."""
    near = torch.abs(y) < SERIES_UP_TO
    small, large = torch.where(near, y, 0.0), torch.where(near, 1.0, torch.abs(y))
    series = torch.zeros_like(y)
    for power in reversed(range(len(LOG_COSH_SERIES))):
        series = series * small * small + (2 * power + 1) * LOG_COSH_SERIES[power]
    decay = torch.exp(-2.0 * large)
    # y·tanh(y) - log(cosh(y)), with tanh(y) = 1 - 2·decay/(1+decay)
    rest = LN2 - torch.log1p(decay) - 2.0 * large * decay / (1.0 + decay)
    return torch.where(near, series, rest / (large * large))
