"""The units as functions of autograd, which save nothing but the input and the dials.

Centered softplus with a learnt beta keeps its values, too, as long as nothing overwrites them: a
convolution that follows keeps them anyway.

Reverse mode: `blocked.py` computes first derivatives, `plain.py` those that will be differentiated.
Forward mode, of the backward pass too: with x and its tangent ẋ, and φ the unit,

    φ(x) has the tangent φ'(x)·ẋ,    g·φ'(x) has the tangent ġ·φ'(x) + g·φ''(x)·ẋ,

so that a forward derivative of a backward pass saves x and ẋ. The dials' own tangents are not
known here: `functional.py` takes the plain formulas where there are any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flexure.units import bends, blocked, plain
from flexure.units.layout import DEVICE_BLOCK
from flexure.units.plain import Dial

__all__ = ["centered_softplus", "ctu", "only_input_moves"]

PIECE = 1 << 15
"""Elements at a time of a tangent's formula, which makes a dozen temporaries of their size.

On the CPU; elsewhere as many as the units' own blocks have, where launching them is what costs.
"""


def ctu(x: Tensor, beta: Dial, c: Dial, target: Tensor | None = None) -> Tensor:
    """The curvature-tuning unit.

    Args:
        x: any shape, floating point.
        beta: a number, or a tensor that broadcasts to the shape of `x`.
        c: likewise.
        target: what `x` is a copy of; it is overwritten by the result. Not in forward mode.
    """
    return cast(Tensor, _CTU.apply(x, beta, c, target))  # type: ignore[no-untyped-call]


def centered_softplus(x: Tensor, beta: Dial) -> Tensor:
    """Centered softplus; arguments as in `ctu`."""
    if isinstance(beta, Tensor) and beta.requires_grad and beta.is_leaf:
        beta = beta.view_as(beta)  # autograd does not say of leaves whether they are asked for
    return cast(Tensor, _CenteredSoftplus.apply(x, beta))  # type: ignore[no-untyped-call]


def only_input_moves(*dials: Dial) -> bool:
    """Whether dials have no derivatives, in neither mode."""
    return not any(
        isinstance(dial, Tensor) and (dial.requires_grad or _tangent(dial) is not None)
        for dial in dials
    )


class _CTU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Dial, c: Dial, target: Tensor | None) -> Tensor:
        ctx.dials = _Dials(ctx, x, beta, c)
        with torch._C.DisableTorchFunction():
            y = blocked.ctu(x if target is None else target, beta, c, inplace=target is not None)
        if target is not None:
            ctx.mark_dirty(target)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, beta, c = ctx.dials.read(ctx)
        grad, needs = grads[0], tuple(ctx.needs_input_grad[:3])
        if _in_forward_mode() and not any(needs[1:]):
            return _sloped(_CTU_SLOPE, grad, x, beta, c), None, None, None
        if _differentiable(grad):
            return (*_plain_gradients(grad, x, beta, c, needs), None)
        with torch._C.DisableTorchFunction():
            return (*blocked.ctu_gradients(grad, x, beta, c, needs), None)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _sloped(_CTU_SLOPE, tangent, *ctx.dials.read(ctx))


class _CenteredSoftplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Dial) -> Tensor:
        with torch._C.DisableTorchFunction():
            y, size = blocked.centered_softplus(x, beta)
        ctx.dials = _Dials(ctx, x, beta)
        # Not by save_for_backward, which would forbid that what follows overwrites them.
        keeps = ctx.needs_input_grad[1] and bends.difference_suffices(size) and not _is_hooked()
        ctx.values = (y.detach(), y._version) if keeps else None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, beta = ctx.dials.read(ctx)
        grad, needs = grads[0], (ctx.needs_input_grad[0], _asks_for_beta(ctx))
        if not _differentiable(grad):
            kept = _unchanged(ctx.values)
            if needs[1]:  # freed as saved tensors are; another pass does without
                ctx.values = None
            with torch._C.DisableTorchFunction():
                return blocked.centered_softplus_gradients(grad, x, beta, needs, *kept)
        by_x = by_beta = None
        if needs[0] and _in_forward_mode():
            by_x = _sloped(_CENTERED_SLOPE, grad, x, beta)
        elif needs[0]:
            by_x = _centered_sloped(grad, x, beta)
        if needs[1]:
            by_beta = _summed(grad, plain.centered_softplus_slopes(x, beta)[1], beta)
        return by_x, by_beta

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _sloped(_CENTERED_SLOPE, tangent, *ctx.dials.read(ctx))


def _is_hooked() -> bool:
    """Whether saved tensors go through hooks (checkpoints, offloading): all must."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def _unchanged(values: tuple[Tensor, int] | None) -> tuple[Tensor, ...]:
    """The values of a forward pass, unless they were overwritten since or not kept."""
    return (values[0],) if values is not None and values[0]._version == values[1] else ()


def _asks_for_beta(ctx: Any) -> bool:
    """Whether this pass goes on to beta: a penalty on gradients asks for that in x alone.

    `needs_input_grad` says only whether beta has a gradient; the sums cost more than the rest.
    """
    if not ctx.needs_input_grad[1]:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(ctx.next_functions[1][0]))
    except RuntimeError:  # called by something else than autograd's engine
        return True


def _centered_sloped(g: Tensor, x: Tensor, beta: Dial) -> Tensor:
    """`g·sigmoid(beta·x)`, differentiable to any order in all three in reverse mode."""
    single = not isinstance(beta, Tensor) or beta.numel() == 1
    if _vectorized(g, x) or not single or x.dtype not in (torch.float32, torch.float64):
        return g * plain.centered_softplus_slope(x, beta)
    return cast(Tensor, _CenteredSloped.apply(g, x, beta))  # type: ignore[no-untyped-call]


class _CenteredSloped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, beta: Dial) -> Tensor:
        ctx.dials = _Dials(ctx, x, beta, g)
        with torch._C.DisableTorchFunction():
            return _centered_times(g, x, beta)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, beta, g = ctx.dials.read(ctx)
        v, needs = grads[0], ctx.needs_input_grad
        if _differentiable(v):
            return _plain_sloped_gradients(v, g, x, beta, needs)
        with torch._C.DisableTorchFunction():
            by_g = _centered_times(v, x, beta) if needs[0] else None
            if not needs[1] and not needs[2]:
                return by_g, None, None
            by_x, by_beta = bends.slope_changes(v, g, x, beta)
        if isinstance(beta, Tensor):
            by_beta = by_beta.reshape(beta.shape).to(beta.dtype)
        return by_g, by_x, by_beta if needs[2] else None


def _plain_sloped_gradients(
    v: Tensor, g: Tensor, x: Tensor, beta: Dial, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """`v` times the derivatives of `g·sigmoid(beta·x)`, with graphs of their own."""
    with torch.enable_grad():
        # Aliases: where g depends on x further up, only what the slope itself does with x counts.
        g, x = g.view_as(g), x.view_as(x)
        beta = beta.view_as(beta) if isinstance(beta, Tensor) else beta
        inputs = [t for t, need in zip((g, x, beta), needs, strict=True) if need]
        y = g * plain.centered_softplus_slope(x, beta)
        found = iter(torch.autograd.grad(y, inputs, v, create_graph=True))  # type: ignore[arg-type]
    return tuple(next(found) if need else None for need in needs)


class _Slope(NamedTuple):
    """A unit's derivatives.

    Attributes:
        times: (g, x, *dials) -> g·φ'(x), which nothing watches.
        slope: (x, *dials) -> φ'(x), differentiable.
        curvature: (x, *dials) -> φ''(x), differentiable.
    """

    times: Callable[..., Tensor]
    slope: Callable[..., Tensor]
    curvature: Callable[..., Tensor]


def _ctu_times(g: Tensor, x: Tensor, beta: Dial, c: Dial) -> Tensor:
    return cast(Tensor, blocked.ctu_gradients(g, x, beta, c, (True, False, False))[0])


def _centered_times(g: Tensor, x: Tensor, beta: Dial) -> Tensor:
    return cast(Tensor, blocked.centered_softplus_gradients(g, x, beta, (True, False))[0])


_CTU_SLOPE = _Slope(_ctu_times, plain.ctu_slope, plain.ctu_curvature)
_CENTERED_SLOPE = _Slope(
    _centered_times, plain.centered_softplus_slope, plain.centered_softplus_curvature
)


def _sloped(of: _Slope, g: Tensor, x: Tensor, *dials: Dial) -> Tensor:
    """g·φ'(x), differentiable in g and x to any order in reverse mode, and once in forward mode."""
    if _vectorized(g, x) or not only_input_moves(*dials):
        return g * of.slope(x, *dials)
    return cast(Tensor, _Sloped.apply(g, x, of, *dials))  # type: ignore[no-untyped-call]


class _Sloped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, of: _Slope, *dials: Dial) -> Tensor:
        ctx.of, ctx.dials = of, dials  # constants, which need no graph
        ctx.save_for_backward(g, x)
        ctx.save_for_forward(g, x)
        ctx.set_materialize_grads(False)
        with torch._C.DisableTorchFunction():
            return of.times(g, x, *dials)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        g, x = ctx.saved_tensors
        by_g = by_x = None
        if ctx.needs_input_grad[0]:
            by_g = _sloped(ctx.of, grads[0], x, *ctx.dials)
        if ctx.needs_input_grad[1]:
            by_x = grads[0] * g * ctx.of.curvature(x, *ctx.dials)
        return by_g, by_x, None, *(None for _ in ctx.dials)

    @staticmethod
    def jvp(ctx: Any, g_tangent: Tensor | None, x_tangent: Tensor | None, *_: Any) -> Tensor:
        g, x = (_primal(t) for t in ctx.saved_tensors)
        total = None if g_tangent is None else _sloped(ctx.of, g_tangent, x, *ctx.dials)
        if x_tangent is None:
            return torch.zeros_like(x) if total is None else total
        return _bent(ctx.of, total, g, x, x_tangent, ctx.dials)


def _bent(
    of: _Slope, total: Tensor | None, g: Tensor, x: Tensor, tangent: Tensor, dials: tuple[Dial, ...]
) -> Tensor:
    """`total` + g·φ''(x)·ẋ."""
    if torch.is_grad_enabled() or not x.dim():
        bent = g * of.curvature(x, *dials) * tangent
        return bent if total is None else total + bent
    total = torch.zeros_like(x) if total is None else total
    piece = PIECE if x.device.type == "cpu" else DEVICE_BLOCK
    rows = max(1, piece * len(x) // max(x.numel(), 1))
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        own = (_part(dial, x, part) for dial in dials)
        total[part] += of.curvature(x[part], *own).mul_(g[part]).mul_(tangent[part])
    return total


def _part(dial: Dial, x: Tensor, rows: slice) -> Dial:
    if isinstance(dial, Tensor) and dial.dim() == x.dim() and len(dial) == len(x):
        return dial[rows]
    return dial


class _Dials:
    """What derivatives need: tensors saved through autograd, numbers as they are."""

    def __init__(self, ctx: Any, x: Tensor, *dials: Dial) -> None:
        self._numbers = tuple(None if isinstance(p, Tensor) else p for p in dials)
        tensors = (x, *(p for p in dials if isinstance(p, Tensor)))
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    def read(self, ctx: Any) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        left = iter(tensors)
        return (x, *(next(left) if p is None else p for p in self._numbers))


def _plain_gradients(
    grad: Tensor, x: Tensor, beta: Dial, c: Dial, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    by_x = grad * plain.ctu_slope(x, beta, c) if needs[0] else None
    if not any(needs[1:]):
        return by_x, None, None
    slopes = plain.ctu_dial_slopes(x, beta, c)
    by_dial = (
        _summed(grad, slope, dial) if need else None
        for need, slope, dial in zip(needs[1:], slopes, (beta, c), strict=True)
    )
    return (by_x, *by_dial)


def _summed(grad: Tensor, slope: Tensor, dial: Dial) -> Tensor | None:
    """`grad·slope`, summed over what shares a value of the dial."""
    if not isinstance(dial, Tensor):
        return None
    product = grad.to(slope.dtype) * slope
    if dial.numel() == 1:
        return product.sum().reshape(dial.shape).to(dial.dtype)
    return product.sum_to_size(dial.shape).to(dial.dtype)


def _differentiable(grad: Tensor) -> bool:
    """Whether a backward pass is itself differentiated (`create_graph`) or vectorized."""
    return torch.is_grad_enabled() or _in_forward_mode() or _vectorized(grad)


def _vectorized(*tensors: Tensor) -> bool:
    """Whether arithmetic is watched by `vmap`, or by that of `is_grads_batched`."""
    return torch._C._are_functorch_transforms_active() or any(
        torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors
    )


def _in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def _primal(x: Tensor) -> Tensor:
    if not _in_forward_mode():
        return x
    return cast(Tensor, forward_ad.unpack_dual(x).primal)  # type: ignore[no-untyped-call]


def _tangent(x: Tensor) -> Tensor | None:
    if not _in_forward_mode():
        return None
    return cast("Tensor | None", forward_ad.unpack_dual(x).tangent)  # type: ignore[no-untyped-call]
