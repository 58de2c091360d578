"""The shape of a catalogue row, and the readers of activation calls.

`UnitSpec` is the contract of an activation: `catalogue.py` holds the rows. Nothing here knows a
particular activation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

__all__ = [
    "ActivationCall",
    "Form",
    "Params",
    "Point",
    "Reader",
    "UnitSpec",
    "from_zero",
    "pool_params",
    "read",
    "read_clamp",
    "read_first",
    "read_hardtanh",
    "read_leaky",
    "read_pool",
    "read_threshold",
    "read_zero_bound",
]

Form: TypeAlias = Literal["relu", "leaky", "capped", "pool"]
Params: TypeAlias = "Mapping[str, Any]"
Reader: TypeAlias = "Callable[..., ActivationCall | None]"


@dataclass(frozen=True)
class ActivationCall:
    """One call of an activation, read from its arguments.

    Attributes:
        x: the input, any shape.
        params: what else shapes the activation (`slope`, `cap`, `beta`, `approximate`).
        inplace: whether the call overwrites `x`.
    """

    x: Tensor
    params: Params
    inplace: bool


@dataclass(frozen=True)
class Point:
    """The CTU nearest to an activation.

    Attributes:
        beta: its dial.
        c: its mixture; None where any c does.
        error: largest |CTU − activation| over the real line; 0 where the CTU is exact.
    """

    beta: float
    c: float | None = None
    error: float = 0.0

    def __str__(self) -> str:
        where = f"beta={self.beta:.4g}" + ("" if self.c is None else f", c={self.c:.4g}")
        return f"exact at {where}" if self.error == 0 else f"within {self.error:.2g} at {where}"


@dataclass(frozen=True)
class UnitSpec:
    """One row of the catalogue: an activation, and what flexure does with it.

    Attributes:
        name: the field's name for it.
        reference: `(x, **params) -> y`, the activation itself; None for a refused one.
        classes: module classes, or their dotted names where importing them would be heavy.
        functions: callables, each with the reader of its arguments. A reader returns None for a
            call that is something else, such as `clamp(min=-1)`.
        of_module: a module's `params`, or None for a module that is something else.
        form: how CTU generalises it, by equations 5–7 of the Curvature Tuning paper with the
            activation's own two pieces: `relu` CTU(x); `leaky` slope·x + CTU((1−slope)·x);
            `capped` CTU(x) − CTU(x−cap); `pool` the same equations with a window's many pieces.
        point: the nearest CTU, given `params`.
        refusal: why no CTU stands for it; None where one does.
        optional: a spline that is no activation (max-pooling): steered only where asked for.
        blocking: refused, yet a rectifier: to leave it would leave the kinks that the caller
            asked to change, so steering stops with an error that names it.
    """

    name: str
    reference: Callable[..., Tensor] | None = None
    classes: tuple[type[nn.Module] | str, ...] = ()
    functions: Mapping[Any, Reader] = field(default_factory=dict, repr=False)
    of_module: Callable[[Any], dict[str, Any] | None] = lambda module: {}
    form: Form = "relu"
    point: Callable[[Params], Point] = lambda params: Point(1.0)
    refusal: str | None = None
    blocking: bool = False
    optional: bool = False


def read(
    params: Callable[..., dict[str, Any] | None] = lambda **named: named,
    overwrite: bool = False,
    **signature: Any,
) -> Reader:
    """A reader of calls `func(input, *signature, inplace)`.

    Args:
        params: from the named arguments to the activation's parameters, or None.
        overwrite: what a function without an `inplace` argument does to its input.
        signature: the other arguments in order, with their defaults.
    """

    def reader(*args: Any, **kwargs: Any) -> ActivationCall | None:
        given = dict(zip(("input", *signature, "inplace"), args, strict=False)) | kwargs
        named = {name: given.get(name, default) for name, default in signature.items()}
        found = None if given.get("out") is not None else params(**named)
        if found is None:
            return None
        return ActivationCall(given["input"], found, bool(given.get("inplace", overwrite)))

    return reader


def from_zero(low: Any, high: Any) -> dict[str, Any] | None:
    """A clamp is an activation if it starts at the constant 0 and ends above it or nowhere."""
    if any(isinstance(end, Tensor) for end in (low, high)) or low is None or low != 0:
        return None
    if high is None:
        return {"cap": None}
    return {"cap": float(high)} if high > 0 else None


def read_clamp(overwrite: bool = False) -> Reader:
    """A reader of `clamp(input, min, max)`, an activation only where it starts at 0."""
    return read(lambda min, max: from_zero(min, max), overwrite, min=None, max=None)


def read_hardtanh(overwrite: bool = False) -> Reader:
    """A reader of `hardtanh(input, min_val, max_val)`, likewise."""
    return read(
        lambda min_val, max_val: from_zero(min_val, max_val), overwrite, min_val=-1.0, max_val=1.0
    )


def read_threshold(overwrite: bool = False) -> Reader:
    """A reader of `threshold(input, threshold, value)`, ReLU where both are 0."""
    return read(
        lambda threshold, value: {"cap": None} if threshold == 0 == value else None,
        overwrite,
        threshold=None,
        value=None,
    )


def read_leaky(overwrite: bool = False) -> Reader:
    """A reader of `leaky_relu(input, negative_slope)`."""
    return read(lambda negative_slope: {"slope": negative_slope}, overwrite, negative_slope=0.01)


def read_zero_bound(*args: Any, **kwargs: Any) -> ActivationCall | None:
    """Reads `maximum(x, 0)` and its kin where the zero is a tensor, or the result goes to `out=`.

    Looks at values, so it serves the census alone.
    """
    bounds = [*args[1:2], *(kwargs[name] for name in ("other", "min") if name in kwargs)]
    for bound in bounds:
        for x, zero in ((args[0] if args else kwargs["input"], bound), (bound, args and args[0])):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                continue
            if isinstance(zero, Tensor) and zero.is_floating_point():
                if not zero.requires_grad and not bool(zero.any()) and bool(x.any()):
                    return ActivationCall(x, {}, inplace=False)
            elif kwargs.get("out") is not None and not isinstance(zero, Tensor) and zero == 0:
                return ActivationCall(x, {}, inplace=False)
    return None


def read_pool(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> ActivationCall | None:
    """Reads a max-pooling; one with gaps in its windows, or with indices, is something else."""
    params = pool_params(kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    return None if params is None else ActivationCall(input, params, inplace=False)


def pool_params(
    kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, indices: bool
) -> dict[str, Any] | None:
    """The parameters of a max-pooling that is a plain maximum over windows."""
    if indices or any(d != 1 for d in _as_tuple(dilation)):
        return None
    stride = kernel_size if stride is None or stride == () or stride == [] else stride
    return {
        "kernel_size": kernel_size,
        "stride": stride,
        "padding": padding,
        "ceil_mode": bool(ceil_mode),
    }


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def read_first(*args: Any, **kwargs: Any) -> ActivationCall:
    """The input of a refused activation, under whatever name; nothing else is needed of it."""
    return ActivationCall(args[0] if args else next(iter(kwargs.values())), {}, inplace=False)
