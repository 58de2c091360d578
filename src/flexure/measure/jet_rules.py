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
        given = {**dict(enumerate(args)), **kwargs}
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


def _rsub(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return _combined(torch.sub, -1.0, args[1], args[0], **kwargs)


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


def _mul(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    a, b = (*args, *kwargs.values())
    like = one_of((a, b))
    if isinstance(a, Carrying) and isinstance(b, Carrying):
        x = series_of(a, like)
        return carry(like, product(x, x if b is a else series_of(b, like)))
    x, factor = (a, b) if isinstance(a, Carrying) else (b, a)
    return carry(like, [None if c is None else c * factor for c in series_of(x, like)])


def _div(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    named = {**kwargs}
    if named.pop("rounding_mode", None) is not None:
        raise Unsupported("it rounds, which has no derivative; divide without rounding_mode")
    a, b = (*args, *named.values())
    like = one_of((a, b))
    if not isinstance(b, Carrying):
        return carry(like, [None if c is None else c / b for c in series_of(a, like)])
    return carry(like, quotient(series_of(a, like), series_of(b, like)))


def _pow(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, p = (*args, *kwargs.values())
    like = one_of((x, p))
    if isinstance(p, Carrying):
        # x^p = exp(p·log(x)), but for its value, which needs no logarithm.
        logarithm = torch.log(x if isinstance(x, Tensor) else torch.tensor(x, dtype=p.dtype))
        value = torch.pow(primal_of(x), p.primal)
        return carry(like, exponential(value, series_of(p * logarithm, like)))
    if not isinstance(p, Tensor) and p == 2:
        return x * x
    return carry(like, compose(power(x.primal, p, len(x.carried)), series_of(x, like)))


def _getitem(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, index = args
    if any(True for _ in carriers_in(index)):
        raise Unsupported("its index depends on the input; keep it constant")
    return linear(operator.getitem, (x, index), {})


def _setitem(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, index, value = args

    def written(k: int) -> Tensor:
        target: Tensor = _part(x, k).clone()
        target[index] = _part(value, k)
        return target

    present = {k for held in carriers_in((x, value)) for k in _present(held)}
    orders = range(1, len(x.carried) + 1)
    return carry(x, (written(0), *(written(k) if k in present else None for k in orders)))


def _copied(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    target, source = args[0], args[1]
    like = one_of(args)
    parts = (None if c is None else c.to(target.dtype) for c in series_of(source, like))
    return carry(like, [None if c is None else c.expand(target.shape) for c in parts])


def _filled(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`masked_fill` with a constant."""
    x, mask, value = args[0], *args[1:], *kwargs.values()
    _only([x], args, kwargs)
    parts = (None if c is None else c.masked_fill(mask, 0.0) for c in x.carried)
    return carry(x, (x.primal.masked_fill(mask, value), *parts))


def _padded(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, pad, *rest = args
    options = {**dict(zip(("mode", "value"), rest, strict=False)), **kwargs}
    pad = options.pop("pad", pad)
    constant = {**options, "value": None}
    parts = (None if c is None else function(c, pad, **constant) for c in x.carried)
    return carry(x, (function(x.primal, pad, **options), *parts))


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
    "view reshape flatten unflatten ravel squeeze unsqueeze transpose swapaxes swapdims permute "
    "movedim moveaxis t T mT adjoint expand contiguous "
    "clone float double half bfloat16 type cpu cuda narrow select index_select gather "
    "take_along_dim take masked_select split split_with_sizes chunk tensor_split unbind unfold "
    "diagonal diag tril triu trace diag_embed flip fliplr flipud roll rot90 tile repeat "
    "repeat_interleave sum mean cumsum diff neg negative positive pos sum_to_size "
    "pixel_shuffle pixel_unshuffle channel_shuffle deg2rad rad2deg broadcast_to"
)

ARITHMETIC: dict[Any, Rule] = {
    _KEEP: linear,
    "expand_as view_as reshape_as type_as to": _like,
    "add": _add,
    "sub subtract": _sub,
    "rsub": _rsub,
    "mul multiply": _mul,
    "div divide true_divide truediv": _div,
    "pow": _pow,
    "getitem": _getitem,
    "setitem": _setitem,
    "copy": _copied,
    "masked_fill": _filled,
    "pad": _padded,
    "where": jointly(1, 2, "input", "other"),
    "cat concat concatenate stack hstack vstack dstack column_stack row_stack": jointly(
        0, "tensors"
    ),
    "index_add index_copy scatter scatter_add": jointly(0, 3, "source", "src", "value"),
    "masked_scatter index_put": jointly(0, 2, "source", "values"),
    "matmul mm bmm mv dot vdot inner outer kron": multilinear(0, 1, "other", "mat2", "vec", "vec2"),
    "einsum": _einsum,
    "lerp": by_expression(lambda a, end, weight: a + weight * (end - a)),
    "addcmul": by_expression(lambda x, a, b, value=1: x + value * (a * b)),
    "addcdiv": by_expression(lambda x, a, b, value=1: x + value * (a / b)),
    "addmm addmv baddbmm": by_expression(
        lambda x, a, b, beta=1, alpha=1: beta * x + alpha * (a @ b)
    ),
    "tanhshrink": by_body,
    **{names: elementwise(coefficients) for names, coefficients in FUNCTIONS.items()},
}
"""Names -> rule, as `rule_table` takes them."""
