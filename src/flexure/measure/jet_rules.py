"""The catalogue of jets, first part: arithmetic, functions, shapes, linear reductions.

A row gives the rule by which operations of torch pass on the coefficients of a Taylor polynomial.
Reductions that are not linear are in `jet_reductions.py`, layers and losses in `jet_layers.py`, the
arithmetic of series in `series.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flexure.measure.propagate import (
    Carrying,
    Rule,
    Unsupported,
    by_body,
    carriers_in,
    primal_of,
    with_primals,
)
from flexure.measure.series import (
    FUNCTIONS,
    Series,
    by_rows,
    compose,
    exponential,
    power,
    product,
    quotient,
)

__all__ = [
    "ARITHMETIC",
    "by_expression",
    "carry",
    "elementwise",
    "linear",
    "multilinear",
    "series_of",
]


def series_of(x: Any, like: Carrying) -> Series:
    """The coefficients of a carrier; of a constant, its value and zeros."""
    if isinstance(x, Carrying):
        return (x.primal, *x.carried)
    if not isinstance(x, Tensor):
        x = torch.as_tensor(x, dtype=like.primal.dtype, device=like.primal.device)
    return (x, *(None for _ in like.carried))


def carry(like: Carrying, series: Sequence[Tensor | None]) -> Carrying:
    """A carrier of this series; every coefficient gets the shape and dtype of the first."""
    first, *rest = series
    if first is None:
        raise ValueError("expected a series with a value")
    return type(like).of(first, tuple(None if c is None else _fitted(c, first) for c in rest))


def _fitted(c: Tensor, first: Tensor) -> Tensor:
    c = c if c.dtype == first.dtype else c.to(first.dtype)
    return c if c.shape == first.shape else c.expand(first.shape)


def one_of(args: Any, kwargs: Any = None) -> Carrying:
    """Some carrier among arguments."""
    return next(carriers_in((args, kwargs)))


def linear(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Linear in the first argument, the others constant."""
    _only([args[0]], args, kwargs)
    return _like(function, args, kwargs)


def _like(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Linear in the first argument; of the others only shape and dtype count."""
    x = args[0]
    rest, kwargs = with_primals(tuple(args[1:])), with_primals(kwargs)
    primal = function(primal_of(x), *rest, **kwargs)
    if not isinstance(x, Carrying) or not isinstance(primal, (Tensor, tuple, list)):
        return primal
    if primal is x.primal:
        return x
    if isinstance(primal, Tensor) and not primal.is_floating_point():
        raise Unsupported("the result is not floating point; leave the conversion out")
    parts = [None if c is None else function(c, *rest, **kwargs) for c in x.carried]
    if isinstance(primal, Tensor):
        return carry(x, (primal, *parts))
    return type(primal)(
        carry(x, (p, *(None if c is None else c[i] for c in parts))) for i, p in enumerate(primal)
    )


def jointly(*places: int | str) -> Rule:
    """Linear in the arguments at these places together: a number, a tensor or a list of tensors."""

    def rule(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        like = one_of(args, kwargs)
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        _only(list(carriers_in([given.get(key) for key in places])), args, kwargs)

        def at(k: int) -> Any:
            there = [_part(a, k) if i in places else a for i, a in enumerate(args)]
            named = {n: _part(a, k) if n in places else a for n, a in kwargs.items()}
            return function(*with_primals(there), **with_primals(named))

        present = {k for x in carriers_in((args, kwargs)) for k in _present(x)}
        orders = range(1, len(like.carried) + 1)
        return carry(like, (at(0), *(at(k) if k in present else None for k in orders)))

    return rule


def _present(x: Carrying) -> list[int]:
    return [k for k, c in enumerate(x.carried, start=1) if c is not None]


def _part(value: Any, k: int) -> Any:
    """The k-th coefficient of an argument."""
    if isinstance(value, (tuple, list)):
        return [_part(item, k) for item in value]
    if k == 0:
        return primal_of(value)
    if isinstance(value, Carrying) and (c := value.carried[k - 1]) is not None:
        return c
    return torch.zeros_like(primal_of(value)) if isinstance(value, Tensor) else 0.0


def multilinear(*places: int | str) -> Rule:
    """Linear in each of the arguments at these places."""

    def rule(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        held = [key for key in places if isinstance(given.get(key), Carrying)]
        like = one_of(args, kwargs)
        _only([given[key] for key in held], args, kwargs)

        def at(parts: Sequence[Tensor]) -> Any:
            filled = {**given, **dict(zip(held, parts, strict=True))}
            position = [filled[i] for i in range(len(args))]
            return function(*position, **{key: filled[key] for key in kwargs})

        return carry(like, _expanded(at, [series_of(given[key], like) for key in held]))

    return rule


def _only(held: Sequence[Any], args: Any, kwargs: Any) -> None:
    """Raises unless these arguments are all the carriers that there are."""
    known = sum(isinstance(x, Carrying) for x in held)
    if known < sum(1 for _ in carriers_in((args, kwargs))):
        raise Unsupported("one of its other arguments depends on the input; keep it constant")


def _expanded(function: Callable[..., Tensor], factors: Sequence[Series]) -> Series:
    """Coefficients of a multilinear function of series."""
    order = len(factors[0]) - 1
    total: list[Tensor | None] = [None] * (order + 1)

    def visit(chosen: list[Tensor], degree: int) -> None:
        if len(chosen) == len(factors):
            term, held = function(chosen), total[degree]
            total[degree] = term if held is None else held + term
            return
        for k, c in enumerate(factors[len(chosen)][: order - degree + 1]):
            if c is not None:
                visit([*chosen, c], degree + k)

    visit([], 0)
    return tuple(total)


def elementwise(coefficients: Callable[..., Any]) -> Rule:
    """A smooth function of the first argument, by its Taylor coefficients."""

    def rule(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        x = args[0]
        _only([x], args, kwargs)

        def applied(block: Series) -> Series:
            return compose(coefficients(block[0], len(block) - 1, *args[1:], **kwargs), block)

        return carry(x, by_rows(applied, series_of(x, x)))

    return rule


def _add(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return _combined(function, 1.0, *args, **kwargs)


def _sub(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return _combined(function, -1.0, *args, **kwargs)


def _rsub(x: Any, other: Any, alpha: Any = 1) -> Any:
    return _combined(torch.sub, -1.0, other, x, alpha=alpha)


def _combined(function: Any, sign: float, a: Any, other: Any, *, alpha: Any = 1) -> Any:
    like = one_of((a, other))
    sign = sign * alpha
    named = {} if alpha == 1 else {"alpha": alpha}
    primal = function(primal_of(a), primal_of(other), **named)
    parts: list[Tensor | None] = []
    for p, q in zip(series_of(a, like)[1:], series_of(other, like)[1:], strict=True):
        if p is None or q is None:
            single = q if sign == 1 or q is None else sign * q
            parts.append(p if q is None else single)
        else:
            parts.append(torch.add(p, q, alpha=sign))
    return carry(like, (primal, *parts))


def _mul(a: Any, other: Any) -> Any:
    like = one_of((a, other))
    if isinstance(a, Carrying) and isinstance(other, Carrying):
        first = series_of(a, like)
        return carry(like, product(first, first if other is a else series_of(other, like)))
    x, factor = (a, other) if isinstance(a, Carrying) else (other, a)
    return carry(like, [None if c is None else c * factor for c in series_of(x, like)])


def _div(a: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        raise Unsupported("it rounds, which has no derivative; divide without rounding_mode")
    like = one_of((a, other))
    if not isinstance(other, Carrying):
        return carry(like, [None if c is None else c / other for c in series_of(a, like)])
    return carry(like, quotient(series_of(a, like), series_of(other, like)))


def _pow(x: Any, exponent: Any) -> Any:
    if isinstance(exponent, Carrying):
        return _exponential(x, exponent)
    if not isinstance(exponent, Tensor) and exponent == 2:
        return x * x
    return carry(x, compose(power(x.primal, exponent, len(x.carried)), series_of(x, x)))


def _exponential(base: Any, p: Carrying) -> Carrying:
    """base^p = exp(p·log(base)), but for its value, which needs no logarithm."""
    value = torch.pow(primal_of(base), p.primal)
    if isinstance(base, Tensor):
        base = base.to(value.dtype)
    else:
        base = torch.as_tensor(base, dtype=value.dtype, device=value.device)
    if not isinstance(base, Carrying):
        base = torch.where((base == 0) & (p.primal > 0), 1.0, base)  # 0^p is 0 around p > 0
    return carry(p, exponential(value, series_of(p * torch.log(base), p)))


def _getitem(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, index = args
    if any(True for _ in carriers_in(index)):
        raise Unsupported("its index depends on the input; keep it constant")
    return linear(operator.getitem, (x, index), {})


def _setitem(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, index, value = args
    _only(list(carriers_in((x, value))), args, kwargs)

    def written(k: int) -> Tensor:
        target: Tensor = _part(x, k).clone()
        target[index] = _part(value, k)
        return target

    present = {k for held in carriers_in((x, value)) for k in _present(held)}
    orders = range(1, len(x.carried) + 1)
    return carry(x, (written(0), *(written(k) if k in present else None for k in orders)))


def _copied(target: Any, src: Any, non_blocking: bool = False) -> Any:
    like = one_of((target, src))
    parts = (None if c is None else c.to(target.dtype) for c in series_of(src, like))
    return carry(like, [None if c is None else c.expand(target.shape) for c in parts])


def _filled(x: Any, mask: Any, value: Any) -> Any:
    """`masked_fill` with a constant."""
    _only([x], (x, mask, value), {})
    parts = (None if c is None else c.masked_fill(mask, 0.0) for c in x.carried)
    return carry(x, (x.primal.masked_fill(mask, value), *parts))


def _padded(x: Any, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    _only([x], (x, pad, value), {})
    parts = (None if c is None else F.pad(c, pad, mode) for c in x.carried)
    return carry(x, (F.pad(x.primal, pad, mode, value), *parts))


def _viewed(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
        raise Unsupported("it reads the bits as numbers of another dtype; use .to(dtype)")
    return linear(function, args, kwargs)


def _diff(x: Any, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Any:
    parts = [part for part in (prepend, x, append) if part is not None]
    return linear(torch.diff, (x if len(parts) == 1 else torch.cat(parts, dim), n, dim), {})


def _scattered(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if kwargs.get("reduce", "add") != "add":
        raise Unsupported('it multiplies; use reduce="add", or products of tensors')
    return jointly(0, 3, "src", "value")(function, args, kwargs)


def _where(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    named = {"input": kwargs["self"], **kwargs} if "self" in kwargs else {**kwargs}
    named.pop("self", None)
    order = ("input", "condition", "other")
    order = order if function is Tensor.where else ("condition", "input", "other")
    given = {**dict(zip(order, args, strict=False)), **named}
    if len(args) + len(named) != 3 or given.keys() != set(order):
        raise Unsupported("it is not called with a condition and two values; give these")
    return jointly(1, 2)(torch.where, (given["condition"], given["input"], given["other"]), {})


def _einsum(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    places = range(1, len(operands) + 1)
    return multilinear(*places)(torch.einsum, (equation, *operands), {})


def by_expression(expression: Callable[..., Any]) -> Rule:
    """A rule written with operations that have one."""
    return lambda function, args, kwargs: expression(*args, **kwargs)


_KEEP = (
    "reshape flatten unflatten ravel squeeze unsqueeze transpose swapaxes swapdims permute "
    "movedim moveaxis t T mT adjoint expand contiguous "
    "clone float double half bfloat16 type cpu cuda narrow select index_select gather "
    "take_along_dim take masked_select split split_with_sizes chunk tensor_split unbind unfold "
    "diagonal diag tril triu trace diag_embed flip fliplr flipud roll rot90 tile repeat "
    "repeat_interleave sum mean cumsum neg negative positive pos sum_to_size "
    "pixel_shuffle pixel_unshuffle channel_shuffle deg2rad rad2deg broadcast_to"
)

ARITHMETIC: dict[Any, Rule] = {
    _KEEP: linear,
    "expand_as view_as reshape_as type_as to": _like,
    "add": _add,
    "sub subtract": _sub,
    "rsub": by_expression(_rsub),
    "mul multiply": by_expression(_mul),
    "div divide true_divide truediv": by_expression(_div),
    "pow": by_expression(_pow),
    "getitem": _getitem,
    "setitem": _setitem,
    "copy": by_expression(_copied),
    "masked_fill": by_expression(_filled),
    "pad": by_expression(_padded),
    "view": _viewed,
    "diff": by_expression(_diff),
    "where": _where,
    "cat concat concatenate stack hstack vstack dstack column_stack row_stack": jointly(
        0, "tensors"
    ),
    "index_add index_copy scatter_add": jointly(0, 3, "source", "src"),
    "scatter": _scattered,
    "masked_scatter index_put": jointly(0, 2, "source", "values"),
    "matmul mm bmm mv dot vdot inner outer kron": multilinear(
        0, 1, "other", "mat2", "vec", "vec2", "tensor"
    ),
    "einsum": _einsum,
    "lerp": by_expression(lambda a, end, weight: a + weight * (end - a)),
    "addcmul": by_expression(
        lambda x, tensor1, tensor2, *, value=1: x + value * (tensor1 * tensor2)
    ),
    "addcdiv": by_expression(
        lambda x, tensor1, tensor2, *, value=1: x + value * (tensor1 / tensor2)
    ),
    "addmm": by_expression(
        lambda x, mat1, mat2, *, beta=1, alpha=1: beta * x + alpha * (mat1 @ mat2)
    ),
    "addmv": by_expression(lambda x, mat, vec, *, beta=1, alpha=1: beta * x + alpha * (mat @ vec)),
    "baddbmm": by_expression(
        lambda x, batch1, batch2, *, beta=1, alpha=1: beta * x + alpha * (batch1 @ batch2)
    ),
    "tanhshrink": by_body,
    **{names: elementwise(coefficients) for names, coefficients in FUNCTIONS.items()},
}
"""Names -> rule, as `rule_table` takes them."""
