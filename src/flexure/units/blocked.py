"""The units evaluated fast: values and hand-written first derivatives, block by block.

A tensor is cut into blocks that stay in cache while a dozen in-place passes run over them; nothing
of the size of the tensor is allocated except the result. Values come from the even form

    phi = relu(x) - c|x|·sigmoid(-beta·t) + (1-c)(1-beta)·log1p(e^-t),  t = |x|/(1-beta),

which cannot overflow. Nothing here is seen by autograd: `functional.py` wraps it. Where a compiled
kernel is loaded (`kernels/`), it does the same to `ctu` on float32 CPU tensors, in one pass.

How a tensor and its dials are laid out in blocks lives in `layout.py`, formulas that autograd can
differentiate in `plain.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from flexure.units import bends
from flexure.units.bends import Bend
from flexure.units.kernels import calls
from flexure.units.layout import Layout, Totals, dense, widest
from flexure.units.plain import LN2, SOFTPLUS_THRESHOLD, Dial, at_least, at_most, working_dtype

__all__ = ["centered_softplus", "centered_softplus_gradients", "ctu", "ctu_gradients"]

# Stands for 1-beta where that is 0; those elements are overwritten with exact ReLU.
NO_WIDTH = 1e-30
# |x| counts as at most this much in the derivatives in the dials, so that |x|² stays finite.
LARGEST_SQUARED = 1e18
# An argument of a gate counts as at most this much: 0·inf would be nan.
LARGEST_ARGUMENT = 1e30
# Below this, centered softplus is x/2 in float32 for every |x| < 1e18.
NO_BEND = 1e-25

_aten = torch.ops.aten
_softplus = _aten.softplus.out
_softplus_backward = _aten.softplus_backward.grad_input
_silu_backward = _aten.silu_backward.grad_input
_sigmoid_backward = _aten.sigmoid_backward.grad_input


def ctu(x: Tensor, beta: Dial, c: Dial, *, inplace: bool = False) -> Tensor:
    """The values of the curvature-tuning unit.

    Args:
        x: any shape and layout, floating point.
        beta: a number, or a tensor that broadcasts to the shape of `x`.
        c: likewise.
        inplace: write the result into `x` and return `x`.

    Returns:
        Shape and dtype of `x`; memory format as an elementwise operation of torch gives it.
    """
    source = dense(x)
    layout = Layout.of(source, _tensors(beta, c))
    k = _coefficients(layout, beta, c, working_dtype(x))
    return _map(_ctu_values, x, source, layout, k, inplace)


def ctu_gradients(
    grad: Tensor, x: Tensor, beta: Dial, c: Dial, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`grad` times the derivatives in x, in beta and in c; the latter two summed to their shapes.

    Args:
        grad: shape of `x`.
        x: the input of `ctu`.
        beta: its dial; a tensor where its derivative is needed.
        c: likewise.
        needs: which of the three are needed; None is returned for the others.
    """
    x = dense(x)
    layout = Layout.of(x, _tensors(beta, c))
    k = _coefficients(layout, beta, c, working_dtype(x))
    totals: Totals | calls.Sums
    if calls.serves(x, grad):
        by_x, totals = calls.backward(grad, x, layout, k, needs)
    else:
        totals = Totals(layout, 4, working_dtype(x))
        by_x = _sweep(_ctu_backward, _ctu_sums, grad, x, layout, k, totals, needs)
    # In the notation of _ctu_sums, with sums taken over everything that shares a dial's value.
    b, mix = _wide(layout, beta), _wide(layout, c)
    width = 1.0 - b
    gamma = 1.0 / at_least(width, NO_WIDTH)
    by_beta = by_c = None
    if needs[1] and isinstance(beta, Tensor):
        entropy = totals.result(1) + gamma * totals.result(2)
        total = mix * gamma * (gamma * totals.result(0)) - (1.0 - mix) * entropy
        by_beta = layout.gather(total, beta).to(beta.dtype)
    if needs[2] and isinstance(c, Tensor):
        by_c = layout.gather(-totals.result(3) - width * totals.result(1), c).to(c.dtype)
    return by_x, by_beta, by_c


def centered_softplus(x: Tensor, beta: Dial) -> tuple[Tensor, float]:
    """The values `relu(x) + log1p(expm1(-beta·|x|)/2)/beta`, and `bends.root_mean_square`."""
    source = dense(x)
    layout = Layout.of(source, _tensors(beta))
    k = _bend(layout, beta, working_dtype(x))
    number = _number(k, layout)
    size = bends.root_mean_square(source, number)
    if number is not None and bends.fused_suffices(size):
        return _centered_fused(source, number, layout), size
    return _map(_centered_values, x, source, layout, k, False), size


def centered_softplus_gradients(
    grad: Tensor, x: Tensor, beta: Dial, needs: tuple[bool, bool], y: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """`grad` times the derivatives in x and in beta, the latter summed to its shape.

    With the values `y` only where `bends.difference_suffices`.
    """
    x = dense(x)
    layout = Layout.of(x, _tensors(beta))
    totals = Totals(layout, 1, widest(x.new_empty(0)).dtype)
    k = _bend(layout, beta, working_dtype(x))
    number = _number(k, layout)
    if number is not None and needs == (True, False) and x.dtype == working_dtype(x):
        return _aten.softplus_backward(grad, x, number, SOFTPLUS_THRESHOLD), None
    if number is not None and y is not None and isinstance(beta, Tensor) and needs[1]:
        sloped, change = bends.difference(grad, x, y, number, layout)
        return sloped if needs[0] else None, change.reshape(beta.shape).to(beta.dtype)
    single = needs[1] and bends.single_suffices(bends.root_mean_square(x, number))
    sums = bends.single_sums if single else bends.double_sums
    by_x = _sweep(_centered_backward, sums, grad, x, layout, k, totals, needs)
    by_beta = None
    if needs[1] and isinstance(beta, Tensor):
        total = totals.result(0) if not single else totals.result(0) * k.inverse * k.inverse
        by_beta = layout.gather(total, beta).to(beta.dtype)
    return by_x, by_beta


class _Coefficients(NamedTuple):
    """The constants of eq. 8: numbers, or tensors that broadcast against a block."""

    eta: Dial
    gamma: Dial
    c: Dial
    fall: Dial
    """-eta"""
    decay: Dial
    """-gamma/log 2"""
    gate: Dial
    """-c"""
    soft: Dial
    """(1-c)·(1-beta)"""
    relu: Tensor | None
    """where beta = 1"""


_K = TypeVar("_K", _Coefficients, Bend)


def _map(
    kernel: Callable[[Tensor, Tensor, Tensor, Tensor, _K], None],
    x: Tensor,
    source: Tensor,
    layout: Layout,
    k: _K,
    inplace: bool,
) -> Tensor:
    """Runs `kernel` over the blocks of `source`, a dense `x`; in the working dtype."""
    target = source if inplace else torch.empty_like(source)
    if isinstance(k, _Coefficients) and calls.serves(source):
        calls.values(source, target, layout, k)
    elif source.numel():
        dtype = working_dtype(x)
        cast = x.dtype != dtype
        buffers = layout.buffers(2 + cast + (cast or inplace), dtype)
        pairs = zip(layout.blocks(source), layout.blocks(target), strict=True)
        for (xb, yb), kb in zip(pairs, _per_block(k, layout), strict=False):
            a, s, *more = _fitting(buffers, xb)
            wide = more[0].copy_(xb) if cast else xb
            room = more[-1] if more else yb
            kernel(wide, room, a, s, kb)
            if room is not yb:
                yb.copy_(room)
    return x.copy_(target) if inplace and target is not x else target


def _sweep(
    slope: Callable[[Tensor, Tensor, Tensor, Tensor, _K], None],
    sums: Callable[..., None],
    grad: Tensor,
    x: Tensor,
    layout: Layout,
    k: _K,
    totals: Totals,
    needs: tuple[bool, ...],
) -> Tensor | None:
    """The backward pass over blocks: returns `grad` times the slope in x, fills `totals`."""
    if grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    dtype = working_dtype(x)
    cast = x.dtype != dtype
    target = torch.empty_like(x) if needs[0] else None
    xs, gs = layout.blocks(x), layout.blocks(grad)
    ys = xs if target is None else layout.blocks(target)
    buffers = layout.buffers((5 if any(needs[1:]) else 1) + 3 * cast, dtype)
    for (xb, gb, yb), kb in zip(zip(xs, gs, ys, strict=True), _per_block(k, layout), strict=False):
        s, *more = _fitting(buffers, xb)
        if cast:
            xb, gb = more[-1].copy_(xb), more[-2].copy_(gb)
        if target is not None:
            room = more[-3] if cast else yb
            slope(xb, gb, room, s, kb)
            if cast:
                yb.copy_(room)
        if any(needs[1:]):
            sums(xb, gb, (s, *more[:4]), kb, totals, needs)
    return target


def _ctu_values(x: Tensor, y: Tensor, a: Tensor, s: Tensor, k: _Coefficients) -> None:
    torch.abs(x, out=a).clamp_max_(torch.finfo(a.dtype).max)
    torch.clamp_min(x, 0.0, out=y)
    if _counts(k.soft):
        torch.mul(a, k.decay, out=s).exp2_().log1p_()
        _add_(y, s, k.soft)
    if _counts(k.gate):
        _sigmoid_times(a, a, k.fall, s)
        _add_(y, s, k.gate)
    if k.relu is not None:
        y.copy_(torch.where(k.relu, torch.clamp_min(x, 0.0), y))


def _ctu_backward(x: Tensor, g: Tensor, y: Tensor, s: Tensor, k: _Coefficients) -> None:
    """`y = g·[c·(σ + u·σ·(1-σ))(u) + (1-c)·σ(gamma·x)]`, `u = eta·x`."""
    if _counts(k.soft):
        _sigmoid_times(g, x, k.gamma, y)
    if _counts(k.c):
        torch.mul(x, k.eta, out=s).clamp_(-LARGEST_ARGUMENT, LARGEST_ARGUMENT)
        _silu_backward(g, s, grad_input=s if _counts(k.soft) else y)
        if _counts(k.soft):
            y.lerp_(s, k.c)
    if k.relu is not None:
        y.copy_(torch.where(k.relu, torch.where(x > 0, g, 0.0), y))


def _ctu_sums(
    x: Tensor,
    g: Tensor,
    room: tuple[Tensor, ...],
    k: _Coefficients,
    totals: Totals,
    needs: tuple[bool, ...],
) -> None:
    """The sums that make the derivatives in the dials, all of even, cancellation-free terms.

    With a = |x|, p = sigmoid(-eta·a), z = e^(-gamma·a): 0: g·a²·p(1-p); 1: g·log(1+z);
    2: g·a·z/(1+z); 3: g·a·p. Then d/dbeta = c·gamma²·[0] - (1-c)·([1] + gamma·[2]) and
    d/dc = -[3] - (1-beta)·[1].
    """
    a, ga, p, q, spare = room
    torch.abs(x, out=a).clamp_max_(LARGEST_SQUARED)
    if k.relu is not None:  # there every x but 0 is infinitely far from the bend
        a.copy_(torch.where(k.relu & (a > 0), LARGEST_SQUARED, a))
    torch.mul(g, a, out=ga)
    torch.mul(a, k.fall, out=p).sigmoid_()
    if needs[2]:
        totals.add(3, ga, p, spare)
    if needs[1]:
        _sigmoid_backward(a, p, grad_input=q)
        totals.add(0, ga, q, spare)
    torch.mul(a, k.decay, out=p).exp2_()
    torch.log1p(p, out=q)
    totals.add(1, g, q, spare)
    if needs[1]:
        torch.add(p, 1.0, out=q)
        totals.add(2, ga, p.div_(q), spare)


def _centered_values(x: Tensor, y: Tensor, a: Tensor, s: Tensor, k: Bend) -> None:
    torch.abs(x, out=a)
    torch.mul(a, k.fall, out=s).clamp_min_(-SOFTPLUS_THRESHOLD).expm1_().mul_(0.5).log1p_()
    torch.clamp_min(x, 0.0, out=y)
    _add_(y, s, k.inverse)
    if k.half is not None:
        y.copy_(torch.where(k.half, 0.5 * x, y))
    if k.relu is not None:
        y.copy_(torch.where(k.relu, torch.clamp_min(x, 0.0), y))


def _centered_fused(x: Tensor, beta: float, layout: Layout) -> Tensor:
    y = torch.empty_like(x)
    for xb, yb in zip(layout.blocks(x, 2), layout.blocks(y, 2), strict=True):
        _softplus(xb, beta, SOFTPLUS_THRESHOLD, out=yb)
        yb.sub_(LN2 / beta)
    return y


def _centered_backward(x: Tensor, g: Tensor, y: Tensor, s: Tensor, k: Bend) -> None:
    _sigmoid_times(g, x, k.beta, y)
    if k.half is not None:
        y.copy_(torch.where(k.half, 0.5 * g, y))
    if k.relu is not None:
        y.copy_(torch.where(k.relu, torch.where(x > 0, g, 0.0), y))


def _coefficients(layout: Layout, beta: Dial, c: Dial, dtype: torch.dtype) -> _Coefficients:
    """Computed in double precision on the dials' own few values, then cast."""
    b, mix = _wide(layout, beta), _wide(layout, c)
    width = 1.0 - b
    gamma = 1.0 / at_least(width, NO_WIDTH)
    eta = b * gamma
    k = (eta, gamma, mix, -eta, -gamma / LN2, -mix, (1.0 - mix) * width)
    return _Coefficients._make([*(_narrow(v, dtype) for v in k), _mask(width == 0, layout)])


def _bend(layout: Layout, beta: Dial, dtype: torch.dtype) -> Bend:
    b = _wide(layout, beta)
    finite = at_most(at_least(b, NO_BEND), LARGEST_ARGUMENT)
    k = (finite, -finite, 1.0 / finite)
    masks = _mask(b < NO_BEND, layout), _mask(b == math.inf, layout)
    return Bend._make([*(_narrow(v, dtype) for v in k), *masks])


def _number(k: Bend, layout: Layout) -> float | None:
    """The beta of all elements, where that is one number, neither 0 nor inf."""
    ends = k.half is not None or k.relu is not None
    return None if isinstance(k.beta, Tensor) or layout.varies or ends else k.beta


def _tensors(*dials: Dial) -> tuple[Tensor, ...]:
    return tuple(p for p in dials if isinstance(p, Tensor))


def _wide(layout: Layout, dial: Dial) -> Dial:
    """A dial in double precision, spread; a number where reading it does not stall a device."""
    if not isinstance(dial, Tensor):
        return dial
    if dial.numel() == 1 and dial.device.type == "cpu":
        return float(dial)
    return widest(layout.spread(dial.detach()).to(layout.device))


def _narrow(value: Dial, dtype: torch.dtype) -> Dial:
    return value.to(dtype) if isinstance(value, Tensor) else value


def _mask(true: Tensor | bool, layout: Layout) -> Tensor | None:
    """None where nothing is masked, so that the usual case pays nothing for the ends."""
    if not isinstance(true, Tensor):
        return torch.ones((), dtype=torch.bool, device=layout.device) if true else None
    return true if true.device.type != "cpu" or bool(true.any()) else None


def _per_block(k: _K, layout: Layout) -> Iterator[_K]:
    """The constants of each block in turn."""
    cut = [layout.parts(v) if isinstance(v, Tensor) else None for v in k]
    if all(parts is None for parts in cut):
        return repeat(k)
    columns = (repeat(v) if parts is None else parts for v, parts in zip(k, cut, strict=True))
    make = type(k)
    return (make(*values) for values in zip(*columns, strict=False))


def _fitting(buffers: tuple[Tensor, ...], block: Tensor) -> Sequence[Tensor]:
    whole = len(buffers[0]) == len(block)
    return buffers if whole else [buffer[: len(block)] for buffer in buffers]


def _counts(k: Dial) -> bool:
    return isinstance(k, Tensor) or k != 0.0


def _add_(y: Tensor, s: Tensor, k: Dial) -> None:
    """`y += k·s`."""
    _ = y.addcmul_(s, k) if isinstance(k, Tensor) else y.add_(s, alpha=k)


def _sigmoid_times(g: Tensor, u: Tensor, k: Dial, out: Tensor) -> None:
    """`out = g·sigmoid(k·u)` in one pass: it is softplus's backward. Exactly `g` for large k·u."""
    if isinstance(k, Tensor):
        u, k = torch.mul(u, k, out=out), 1.0
    _softplus_backward(g, u, k, SOFTPLUS_THRESHOLD, grad_input=out)
