"""Arithmetic of truncated power series of tensors, and the series of smooth functions at a point.

A series is a tuple of coefficients of t⁰, t¹, ..., tⁿ; None is a zero that costs nothing. Which
operation of torch does what with series is in `jet_rules.py` and `jet_layers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flexure.units.taylor import accumulate, sigmoid_coefficients

__all__ = [
    "FUNCTIONS",
    "Coefficients",
    "Series",
    "by_rows",
    "compose",
    "cross",
    "exponential",
    "power",
    "product",
    "quotient",
    "scaled",
    "softmax_series",
]

Series: TypeAlias = "tuple[Tensor | None, ...]"
Coefficients: TypeAlias = "Sequence[Tensor | None]"


def product(a: Series, b: Series) -> Series:
    """Coefficients of `a·b`: the convolution of theirs."""
    if a is b:
        return _square(a)
    return tuple(cross(a, b, k) for k in range(len(a)))


def cross(a: Coefficients, b: Coefficients, k: int, start: int = 0) -> Tensor | None:
    """`Σ a_i·b_{k-i}` over i >= start; None where every term is."""
    total = None
    for i in range(start, k + 1):
        total = _add_product(total, a[i], b[k - i])
    return total


def quotient(a: Series, b: Series) -> Series:
    """Coefficients of `a/b`: `q_k = (a_k - Σ_{j>0} b_j·q_{k-j})/b_0`."""
    q: list[Tensor | None] = []
    b0 = _first(b)
    for k in range(len(a)):
        taken = cross(b, q, k, start=1)
        rest = a[k] if taken is None else (-taken if (top := a[k]) is None else top - taken)
        q.append(None if rest is None else rest / b0)
    return tuple(q)


def exponential(e0: Tensor, x: Series) -> Series:
    """`exp(x)`, given `e0 = exp(x_0)` or a multiple: `k·e_k = Σ_{j>0} j·x_j·e_{k-j}`."""
    e: list[Tensor | None] = [e0]
    weighted = [None if c is None else j * c for j, c in enumerate(x)]
    for k in range(1, len(x)):
        total = cross(weighted, e, k, start=1)
        e.append(None if total is None else total / k)
    return tuple(e)


def compose(g: Coefficients, x: Series) -> Series:
    """`g(x)`, given the Taylor coefficients of g at `x_0`: `Σ_m g_m·(x - x_0)^m`."""
    order = len(x) - 1
    y: list[Tensor | None] = [None, *(_times(g[1], c) for c in x[1:])] if order else [None]
    power_m: Series = (None, *x[1:])
    base = power_m
    for m in range(2, order + 1):
        power_m = _square(base) if m == 2 else product(power_m, base)
        for k in range(m, order + 1):
            y[k] = _add_product(y[k], g[m], power_m[k])
    y[0] = g[0]
    return tuple(y)


def by_rows(function: Callable[[Series], Series], x: Series, *others: Any) -> Series:
    """`function(x)`, elementwise along dimension 0, in blocks of rows that fit a cache.

    All at once where autograd keeps everything anyway, and where a block needs other arguments (the
    dials of a unit) that vary along that dimension.
    """
    first = _first(x)
    tensors = [t for t in (*x, *others) if isinstance(t, Tensor)]
    whole = (
        first.device.type != "cpu"
        or first.numel() <= BLOCK
        or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        or torch._C._are_functorch_transforms_active()
        or any(isinstance(t, Tensor) and t.dim() >= first.dim() for t in others)
    )
    if whole:
        return function(x)
    rows = max(1, BLOCK * len(first) // first.numel())
    blocks = [
        function(tuple(None if c is None else c[start : start + rows] for c in x))
        for start in range(0, len(first), rows)
    ]
    columns = zip(*blocks, strict=True)
    return tuple(None if parts[0] is None else torch.cat(parts) for parts in columns)


# Elements: the temporaries of an activation at order 4 stay in a cache, and are small enough for
# the allocator to use their memory again. The best of the powers of 2 for ResNet-20.
BLOCK = 1 << 16


def softmax_series(x: Series, dim: int, p0: Tensor) -> tuple[Series, Series]:
    """Softmax of x given that of x_0, and the sum it divides by, relative to that at x_0."""
    e = exponential(p0, x)
    total: Series = tuple(None if c is None else c.sum(dim, keepdim=True) for c in e)
    # Exactly 1 in exact arithmetic, and no constant: its derivatives are 0.
    total = (torch.ones_like(_first(total)), *total[1:])
    y: list[Tensor | None] = []
    for k in range(len(x)):
        taken = cross(total, y, k, start=1)
        top = e[k]
        y.append(top if taken is None or top is None else top - taken)
    return tuple(y), total


def power(x: Tensor, p: float | Tensor, order: int) -> list[Tensor | None]:
    """Coefficients of x^p at x: `binom(p, k)·x^(p-k)`; those that are 0 are not computed."""
    if isinstance(p, Tensor):
        return _power_of_tensor(x, p, order)
    found: list[Tensor | None] = [torch.pow(x, p)]
    binomial = 1.0
    for k in range(1, order + 1):
        binomial *= (p - k + 1) / k
        found.append(None if binomial == 0.0 else binomial * torch.pow(x, p - k))
    return found


def _power_of_tensor(x: Tensor, p: Tensor, order: int) -> list[Tensor | None]:
    p = p.to(torch.promote_types(p.dtype, x.dtype))
    found: list[Tensor | None] = [torch.pow(x, p)]
    binomial = torch.ones_like(p)
    for k in range(1, order + 1):
        binomial = binomial * (p - k + 1) / k
        there = binomial != 0
        # Masks the input: x^(p-k) may be inf where its factor is 0.
        safe = torch.where(there, x, 1.0)
        found.append(torch.where(there, binomial * torch.pow(safe, p - k), 0.0))
    return found


def scaled(g: Coefficients, factor: float) -> list[Tensor | None]:
    """Coefficients of `g(factor·x)`, given those of g at `factor·x`."""
    return [None if c is None else c * factor**k for k, c in enumerate(g)]


def _first(a: Coefficients) -> Tensor:
    value = a[0]
    if value is None:
        raise ValueError("expected a series with a value")
    return value


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a * b


def _add_product(total: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return total
    return a * b if total is None else accumulate(total, a, b)


def _square(a: Series) -> Series:
    found: list[Tensor | None] = []
    for k in range(len(a)):
        total = None
        for i in range((k + 1) // 2):
            total = _add_product(total, a[i], a[k - i])
        total = None if total is None else total.mul_(2)
        found.append(total if k % 2 else _add_product(total, a[k // 2], a[k // 2]))
    return tuple(found)


def _derivative_of(
    value: Callable[[Tensor], Tensor], slope: Callable[[Tensor, int], Coefficients]
) -> Callable[..., list[Tensor | None]]:
    """Coefficients of a function with its values and the coefficients of its derivative."""

    def coefficients(x: Tensor, order: int) -> list[Tensor | None]:
        slopes = slope(x, order - 1) if order else []
        rest = (None if s is None else s / k for k, s in enumerate(slopes, start=1))
        return [value(x), *rest]

    return coefficients


def _by_series(function: Callable[[Series], Series]) -> Callable[..., Coefficients]:
    """Coefficients of a function that is written with series."""

    def coefficients(x: Tensor, order: int) -> Coefficients:
        seed: Series = (x, torch.ones_like(x), *(None,) * (order - 1)) if order else (x,)
        return function(seed)

    return coefficients


def _exp(x: Tensor, order: int) -> Coefficients:
    value = torch.exp(x)
    return [value / float(math.factorial(k)) for k in range(order + 1)]


def _sin(x: Tensor, order: int, shift: int = 0) -> Coefficients:
    cycle = (torch.sin(x), torch.cos(x))
    signs = (1, 1, -1, -1)
    return [
        cycle[(k + shift) % 2] * (signs[(k + shift) % 4] / math.factorial(k))
        for k in range(order + 1)
    ]


def _sinh(x: Tensor, order: int, shift: int = 0) -> Coefficients:
    cycle = (torch.sinh(x), torch.cosh(x))
    return [cycle[(k + shift) % 2] / float(math.factorial(k)) for k in range(order + 1)]


def _tanh(x: Tensor, order: int) -> Coefficients:
    s = sigmoid_coefficients(2.0 * x, order)
    return [torch.tanh(x), *(2.0 * c for c in scaled(s, 2.0)[1:] if c is not None)]


def _bell(x: Tensor, order: int, rate: float, height: float) -> list[Tensor]:
    """Of `height·exp(-rate·x²/2)`: `(k+1)·g_{k+1} = -rate·(x·g_k + g_{k-1})`."""
    g = [height * torch.exp(-0.5 * rate * x * x)]
    for k in range(order):
        inner = x * g[k] + (g[k - 1] if k else 0.0)
        g.append(inner * (-rate / (k + 1)))
    return g


def _normal_density(x: Tensor, order: int) -> list[Tensor]:
    return _bell(x, order, 1.0, 1.0 / math.sqrt(2.0 * math.pi))


def _gelu(x: Tensor, order: int, approximate: str = "none") -> Coefficients:
    if approximate == "tanh":
        return _by_series(_tanh_gelu)(x, order)
    found: list[Tensor | None] = [torch.ops.aten.gelu(x)]
    distribution: list[Tensor] = [0.5 * torch.erfc(x * -math.sqrt(0.5))]
    density = _normal_density(x, order)
    for k in range(1, order + 1):
        distribution.append(density[k - 1] / k)
        found.append(x * distribution[k] + distribution[k - 1])
    return found


def _tanh_gelu(x: Series) -> Series:
    cube = product(product(x, x), x)
    inner = tuple(
        None if c is None and x[k] is None else _sum((x[k], 1.0), (c, 0.044715))
        for k, c in enumerate(cube)
    )
    inner = tuple(None if c is None else math.sqrt(2.0 / math.pi) * c for c in inner)
    bent = compose(_tanh(_first(inner), len(x) - 1), inner)
    return product(tuple(None if c is None else 0.5 * c for c in x), _plus(bent, 1.0))


def _mish(x: Series) -> Series:
    order = len(x) - 1
    soft = compose(_softplus(_first(x), order), x)
    return product(x, compose(_tanh(_first(soft), order), soft))


def _plus(x: Series, number: float) -> Series:
    return (_first(x) + number, *x[1:])


def _sum(*terms: tuple[Tensor | None, float]) -> Tensor:
    total: Any = 0.0
    for value, factor in terms:
        if value is not None:
            total = total + factor * value
    return total  # type: ignore[no-any-return]


def _softplus(x: Tensor, order: int, beta: float = 1.0, threshold: float = 20.0) -> Coefficients:
    found: list[Tensor] = [torch.ops.aten.softplus(x, beta, threshold)]
    linear = beta * x > threshold
    slopes = sigmoid_coefficients(beta * x, order - 1) if order else []
    for k, slope in enumerate(slopes, start=1):
        found.append(torch.where(linear, float(k == 1), slope * (beta ** (k - 1) / k)))
    return found


def _log_sigmoid(x: Tensor, order: int) -> Coefficients:
    found = [torch.nn.functional.logsigmoid(x)]
    slopes = sigmoid_coefficients(-x, order - 1) if order else []
    return [*found, *(c * ((-1.0) ** k / (k + 1)) for k, c in enumerate(slopes))]


def _silu(x: Tensor, order: int) -> Coefficients:
    s = sigmoid_coefficients(x, order)
    return [torch.ops.aten.silu(x), *(x * s[k] + s[k - 1] for k in range(1, order + 1))]


def _log(x: Tensor, order: int, factor: float = 1.0) -> Coefficients:
    """Of `factor·log(x)`."""
    inverse = 1.0 / x
    return [
        factor * torch.log(x),
        *(inverse**k * (-factor * (-1.0) ** k / k) for k in range(1, order + 1)),
    ]


def _reciprocal_of(square: Callable[[Tensor], Tensor], sign: float, p: float) -> Any:
    """Coefficients of `(square(x) + sign·(2x·t + t²))^p` in t: slopes of inverse functions."""

    def slope(x: Tensor, order: int) -> Coefficients:
        inner: Series = (square(x), 2.0 * sign * x, torch.full_like(x, sign))
        inner = (inner + (None,) * order)[: order + 1]
        return compose(power(square(x), p, order), inner)

    return slope


FUNCTIONS: dict[str, Callable[..., Coefficients]] = {
    "exp": _exp,
    "expm1": lambda x, n: [torch.expm1(x), *_exp(x, n)[1:]],
    "exp2": lambda x, n: [torch.exp2(x), *scaled(_exp(x * math.log(2.0), n), math.log(2.0))[1:]],
    "log": _log,
    "log1p": lambda x, n: [torch.log1p(x), *_log(1.0 + x, n)[1:]],
    "log2": lambda x, n: _log(x, n, 1.0 / math.log(2.0)),
    "log10": lambda x, n: _log(x, n, 1.0 / math.log(10.0)),
    "sin": _sin,
    "cos": lambda x, n: _sin(x, n, shift=1),
    "tan": _by_series(
        lambda x: quotient(
            compose(_sin(_first(x), len(x) - 1), x), compose(_sin(_first(x), len(x) - 1, 1), x)
        )
    ),
    "sinh": _sinh,
    "cosh": lambda x, n: _sinh(x, n, shift=1),
    "tanh": _tanh,
    "atan arctan": _derivative_of(torch.atan, _reciprocal_of(lambda x: 1.0 + x * x, 1.0, -1.0)),
    "asin arcsin": _derivative_of(torch.asin, _reciprocal_of(lambda x: 1.0 - x * x, -1.0, -0.5)),
    "asinh arcsinh": _derivative_of(torch.asinh, _reciprocal_of(lambda x: 1.0 + x * x, 1.0, -0.5)),
    "atanh arctanh": _derivative_of(torch.atanh, _reciprocal_of(lambda x: 1.0 - x * x, -1.0, -1.0)),
    "sqrt": lambda x, n: power(x, 0.5, n),
    "rsqrt": lambda x, n: power(x, -0.5, n),
    "reciprocal": lambda x, n: power(x, -1.0, n),
    "square": lambda x, n: power(x, 2.0, n),
    "erf": _derivative_of(torch.erf, lambda x, n: _bell(x, n, 2.0, 2.0 / math.sqrt(math.pi))),
    "erfc": _derivative_of(torch.erfc, lambda x, n: _bell(x, n, 2.0, -2.0 / math.sqrt(math.pi))),
    "ndtr": _derivative_of(torch.special.ndtr, _normal_density),
    "sigmoid expit": sigmoid_coefficients,
    "logsigmoid log_sigmoid": _log_sigmoid,
    "softplus": _softplus,
    "silu": _silu,
    "gelu": _gelu,
    "mish": _by_series(_mish),
}
"""Smooth functions of one argument: names -> `(x, order, *args)` -> Taylor coefficients at x."""
