"""The units as functions: CTU, centered softplus, their derivatives and bounds.

Which formula runs where: `blocked.py` in ordinary eager use, behind the autograd functions of
`autograd.py`, which keep little but the input, in forward mode too; the formulas of `plain.py`
while compiling, exporting, tracing, inside `torch.func` transforms, in forward mode where dials
have derivatives, and for derivatives of derivatives.

Modules with parameters are in `unit.py`; what each known activation is, in `catalogue.py`.

[CT] is Curvature Tuning, [LCNN] is Low-Curvature Networks.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flexure.contracts import FlexureError
from flexure.units import autograd, blocked, plain
from flexure.units.layout import padded
from flexure.units.plain import Dial

__all__ = [
    "BALANCED",
    "MAX_SLOPE_EXCESS",
    "balanced_c",
    "centered_softplus",
    "check_dial",
    "ctu",
    "ctu_curvature",
    "ctu_curvature_bound",
    "ctu_slope",
    "ctu_slope_range",
    "follows",
]

BALANCED = "balanced"
"""As `c`: `beta²/(1+beta²)`, for which the unit has the mean of ReLU (`balanced_c`)."""

MAX_SLOPE_EXCESS = 0.099839320128866917
"""The largest slope of SiLU, minus 1; the smallest slope is its negative."""


def ctu(
    x: Tensor, beta: float | Tensor, c: float | Tensor | str = 0.5, *, inplace: bool = False
) -> Tensor:
    """The curvature-tuning unit, eq. 8 of [CT], exact at the ends of its dials.

    `phi(x) = c·x·sigmoid(eta·x) + (1-c)·softplus(gamma·x)/gamma`, `eta = beta/(1-beta)`,
    `gamma = 1/(1-beta)`. beta = 1 is ReLU; beta = 0 with c = 1 is x/2; beta = 0.5 with c = 1 is
    SiLU; c = 0 is softplus with inverse temperature gamma.

    Differentiable to any order in `x`, `beta` and `c`. Arithmetic is float32 (float64 for float64
    inputs) whatever the dtype of `x`. Numbers are checked at every call; the values of tensors
    are not, because reading them would stall a device: check them once with `check_dial`.

    Args:
        x: any shape, floating point.
        beta: in [0, 1]; a number, or a tensor that broadcasts to the shape of `x`: shape `(C, 1,
            1)` for channels on axis 1 of `(N, C, H, W)`.
        c: in [0, 1], likewise; or `"balanced"`, see `balanced_c`. Default 0.5, as in [CT].
        inplace: write the result into `x` and return `x`, as `torch.relu_` does.

    Returns:
        Shape, dtype and memory format of `x`.

    Raises:
        FlexureError: `x` is not floating point, a dial's shape does not fit, or a number is out
            of range.

    Example:
        >>> import torch
        >>> ctu(torch.tensor([-1.0, 0.0, 1.0]), 0.5, 1.0)  # SiLU
        tensor([-0.2689,  0.0000,  0.7311])
    """
    beta, c = _as_dials(beta, c)
    _check_input(x)
    if follows(x):
        _check_shapes(x, beta, c)
        return cast(Tensor, cast(Any, x).unit("ctu", x, beta, c, inplace=inplace))
    if _use_plain(x, beta, c):
        _check_shapes(x, beta, c)
        y = plain.ctu(x.clone() if inplace else x, beta, c)
        return x.copy_(y) if inplace else y
    if forward_ad._current_level >= 0:
        y = autograd.ctu(x.clone() if inplace else x, beta, c)
        return x.copy_(y) if inplace else y
    if _records(x, beta, c):
        # The copy is made outside, where autograd sees it: derivatives of derivatives need it.
        source, target = (x.clone(), x) if inplace else (x, None)
        return autograd.ctu(source, beta, c, target)
    with torch._C.DisableTorchFunction():
        return blocked.ctu(x, beta, c, inplace=inplace)


def centered_softplus(x: Tensor, beta: float | Tensor) -> Tensor:
    """Softplus shifted to pass through 0, section 3 of [LCNN]: `log((1 + exp(beta·x))/2)/beta`.

    beta = 0 is x/2 and beta = inf is ReLU, both exact. No cancellation for small beta (below 1e-25
    it counts as 0), in the value or in the derivatives. Differentiable to any order in `x` and
    `beta`.

    Args:
        x: any shape, floating point.
        beta: in [0, inf]; a number, or a tensor that broadcasts to the shape of `x`.

    Returns:
        Shape and dtype of `x`.

    Raises:
        FlexureError: `x` is not floating point, beta's shape does not fit, or a number is
            negative or nan.
    """
    if not isinstance(beta, Tensor):
        beta = _number("beta", beta, math.inf)
    _check_input(x)
    if follows(x):
        _check_shapes(x, beta)
        return cast(Tensor, cast(Any, x).unit("centered_softplus", x, beta))
    if _use_plain(x, beta):
        _check_shapes(x, beta)
        return plain.centered_softplus(x, beta)
    if forward_ad._current_level >= 0 or _records(x, beta):
        return autograd.centered_softplus(x, beta)
    with torch._C.DisableTorchFunction():
        return blocked.centered_softplus(x, beta)[0]


def ctu_slope(x: Tensor, beta: float | Tensor, c: float | Tensor | str = 0.5) -> Tensor:
    """First derivative of `ctu` in x; arguments, result and errors as there.

    `phi' = c·(s + u·s·(1-s)) + (1-c)·sigmoid(gamma·x)`, `u = eta·x`, `s = sigmoid(u)`.
    """
    return plain.ctu_slope(*_checked(x, beta, c))


def ctu_curvature(x: Tensor, beta: float | Tensor, c: float | Tensor | str = 0.5) -> Tensor:
    """Second derivative of `ctu` in x; 0 where beta = 1. Arguments and errors as in `ctu`."""
    return plain.ctu_curvature(*_checked(x, beta, c))


def balanced_c(beta: float | Tensor) -> float | Tensor:
    """The c at which the areas between the unit's two parts and ReLU cancel: `beta²/(1+beta²)`.

    The SiLU part lies `pi²(1-beta)²/(6·beta²)` below ReLU, the softplus part `pi²(1-beta)²/6`
    above it (integrals over x), so that this c leaves the mean of a wide input distribution as
    ReLU has it. The 0.5 of [CT] does not.
    """
    square = beta * beta
    return square / (1.0 + square)


def ctu_slope_range(c: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Bounds on `ctu_slope` for every x and beta: `(-0.0998·c, 1 + 0.0998·c)`.

    Attained at c = 1. They replace Lemma C.2 of [CT], whose constant 0.2239 is loose. The exact
    range for a given beta is in `bounds.ctu_bounds`.
    """
    c = _as_dial("c", c)
    return -MAX_SLOPE_EXCESS * c, 1.0 + MAX_SLOPE_EXCESS * c


def ctu_curvature_bound(beta: float | Tensor, c: float | Tensor | str = 0.5) -> float | Tensor:
    """`max |ctu_curvature|` over x, attained at 0: `(c·beta/2 + (1-c)/4)/(1-beta)`.

    inf at beta = 1, where the slope jumps.
    """
    beta, c = _as_dials(beta, c)
    top = 0.5 * c * beta + 0.25 * (1.0 - c)
    if isinstance(top, Tensor) or isinstance(beta, Tensor):
        return top / (1.0 - beta)
    return math.inf if beta == 1.0 else top / (1.0 - beta)


def check_dial(beta: float | Tensor, c: float | Tensor | str = 0.5) -> None:
    """Checks the values of dials, tensors included: this reads them, so it may stall a device.

    Raises:
        FlexureError: beta or c is not a number or a floating-point tensor, or holds a value
            outside [0, 1] or nan.
    """
    for name, dial in (("beta", beta), ("c", c)):
        if name == "c" and isinstance(dial, str) and dial == BALANCED:
            continue
        dial = _as_dial(name, dial)
        if isinstance(dial, Tensor):
            inside = (dial >= 0) & (dial <= 1)
            if not bool(inside.all()):
                worst = dial.detach()[~inside].flatten()[0].item()
                raise _out_of_range(name, worst, 1.0)


def follows(x: Tensor) -> bool:
    """Whether `x` is of a tensor class with rules of its own for units: a method `unit`.

    It is called as `unit(name, x, *dials)`, once for the whole unit, so that the class need not
    see through the formulas; `"ctu"` has the keyword `inplace` besides.
    """
    return type(x) is not Tensor and hasattr(type(x), "unit")


def _use_plain(x: Tensor, *dials: Dial) -> bool:
    """Whether something watches the arithmetic that the autograd function would hide from it."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or (forward_ad._current_level >= 0 and not autograd.only_input_moves(*dials))
        or torch._C._are_functorch_transforms_active()
        or x.device.type == "meta"
        or any(
            isinstance(t, Tensor) and type(t) not in (Tensor, torch.nn.Parameter)
            for t in (x, *dials)
        )
    )


def _records(*tensors: Any) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in tensors
    )


def _checked(x: Tensor, beta: float | Tensor, c: float | Tensor | str) -> tuple[Tensor, Dial, Dial]:
    beta, c = _as_dials(beta, c)
    _check_input(x)
    _check_shapes(x, beta, c)
    return x, beta, c


def _check_input(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise FlexureError(
            f"expected a floating-point tensor, got {got}; convert the input with .float()"
        )


def _check_shapes(x: Tensor, *dials: Dial) -> None:
    for dial in dials:
        if isinstance(dial, Tensor):
            padded(dial, x)


def _as_dials(beta: Any, c: Any) -> tuple[Dial, Dial]:
    beta = _as_dial("beta", beta)
    balanced = isinstance(c, str) and c == BALANCED
    return beta, balanced_c(beta) if balanced else _as_dial("c", c)


def _as_dial(name: str, value: Any) -> Dial:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise FlexureError(
                f"expected {name} to be a floating-point tensor, got {value.dtype}; convert it "
                f"with .float()"
            )
        return value
    return _number(name, value, 1.0)


def _number(name: str, value: Any, high: float) -> float:
    if not isinstance(value, Real):
        allowed = "a number or a tensor" + (f' or "{BALANCED}"' if name == "c" else "")
        raise FlexureError(f"expected {name} to be {allowed}, got {value!r}; pass for example 0.5")
    number = float(value)
    if not 0.0 <= number <= high:  # nan fails both
        raise _out_of_range(name, number, high)
    return number


def _out_of_range(name: str, value: float, high: float) -> FlexureError:
    return FlexureError(
        f"expected {name} in [0, {high:g}], got {value!r}; {name} outside it has no meaning"
    )
