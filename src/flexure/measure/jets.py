"""`flexure.jet`: directional derivatives of all orders at once, by Taylor-mode propagation.

A polynomial in t, x + t·v, goes through the function's own code, operation by operation; the
coefficients of what comes out are the derivatives over factorials. Which operations it passes is
the catalogue's: `jet_rules.py`, `jet_reductions.py`, `jet_layers.py`, `jet_losses.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from flexure.calling import logits_of, unwritten
from flexure.contracts import FlexureError
from flexure.measure.jet_layers import KINKS, LAYERS, UNITS
from flexure.measure.jet_losses import LOSSES
from flexure.measure.jet_reductions import REDUCTIONS
from flexure.measure.jet_rules import ARITHMETIC
from flexure.measure.propagate import GENERAL, Carrying, Unsupported, carriers_in, rule_table
from flexure.measuring import uncompiled

__all__ = ["Jet", "jet", "taylor_coefficients"]


class Jet(Carrying):
    """A tensor with the coefficients of t, t², ..., tⁿ; `primal` is that of t⁰, None a zero."""

    subject = "jet"
    rules = rule_table({**GENERAL, **KINKS, **ARITHMETIC, **REDUCTIONS, **LAYERS, **LOSSES})

    def constant(self, primal: Tensor) -> Jet:
        """A jet of this order of a constant."""
        return Jet.of(primal, (None,) * len(self.carried))

    @classmethod
    def unit_rule(cls, name: str, x: Any, *dials: Any) -> Any:
        """The unit's Taylor coefficients at x, exact also at x = 0."""
        if name not in UNITS or not isinstance(x, Jet):
            raise Unsupported("it has no rule for a jet; use flexure.units.ctu")
        return UNITS[name](x, *dials)

    @classmethod
    def passed(cls, out: Any, inputs: Any) -> None:
        """Refuses to lose gradients that were asked for where f was called."""
        off = _RECORDING.get() and not torch.is_grad_enabled()
        if off and any(True for _ in carriers_in(out)) and any(_with_gradient(inputs)):
            raise Unsupported(
                "gradients were on where jet was called and are off here (torch.no_grad, "
                "checkpoint(use_reentrant=True), an autograd.Function): they would be lost; leave "
                "it out, take use_reentrant=False, or call jet inside torch.no_grad()"
            )


def jet(f: Callable[[Tensor], Any], x: Tensor, v: Tensor, *, order: int) -> Tensor:
    """The derivatives `Dⁿf(x)[v, ..., v]` for n = 0..order, in one pass.

    Truncated Taylor polynomials of x + t·v are propagated through every operation (Taylor mode,
    Griewank and Walther, Evaluating Derivatives, chapter 13). Differentiable like the value of f,
    with respect to its parameters, x and v; code in f that switches gradients off where one could
    flow is refused, unless they are off where jet is called. Autocast is off inside.

    Args:
        f: `(B, *shape)` -> `(B,)` or `(B, 1)`, each sample by itself: a smooth function written
            with torch, or a model in eval mode, which is not changed. Its own code is run.
        x: (B, *shape), float32 or float64, the points.
        v: like x, the directions; of any length.
        order: the highest n, from 0 to 170, where n! leaves float64.

    Returns:
        `(order + 1, B)`, in the dtype of f's value; row n is the n-th derivative.

    Raises:
        FlexureError: an operation that jets cannot pass, by its name and that of the module that
            calls it: one with kinks (ReLU, max-pooling: Dⁿf is 0 almost everywhere for n >= 2),
            a branch on values, or one without a rule. Or x, v, order or f's value are not as
            above, or a factor in the coefficients of this order leaves float64.

    Example:
        >>> import torch
        >>> x, v = torch.zeros(2, 3).double(), torch.ones(2, 3).double()
        >>> jet(lambda x: torch.exp(x).sum(1), x, v, order=3)[:, 0]
        tensor([3., 3., 3., 3.], dtype=torch.float64)
    """
    coefficients, _ = taylor_coefficients(f, x, v, order=order)
    factorials = [float(math.factorial(n)) for n in range(order + 1)]
    # In float32, factorials overflow before the derivatives do.
    wide = coefficients.double()
    return (wide * wide.new_tensor(factorials)[:, None]).to(coefficients.dtype)


def taylor_coefficients(
    f: Callable[[Tensor], Any], x: Tensor, v: Tensor, *, order: int
) -> tuple[Tensor, tuple[bool, ...]]:
    """The coefficients of t⁰, ..., tⁿ in f(x + t·v): the derivatives of `jet` over n!.

    Args:
        f: as for `jet`.
        x: likewise.
        v: likewise.
        order: likewise.

    Returns:
        `(order + 1, B)`, in the dtype of f's value; and for each order whether it was computed:
        where not, it is zero by the form of f (a polynomial's), and not by rounding.

    Raises:
        FlexureError: as for `jet`.
    """
    _check(x, v, order)
    seed = Jet.of(x, (v, *(None,) * (order - 1)) if order else ())
    kept = unwritten(f) if isinstance(f, nn.Module) else nullcontext()
    with torch.autocast(x.device.type, enabled=False), uncompiled(), _recording(), kept:
        try:
            y = f(seed)
        except OverflowError as error:  # of Python's numbers: beta ** order
            raise FlexureError(
                f"expected factors within float64 in the Taylor coefficients of order {order}, "
                f"got one that is not ({error}); give a lower order"
            ) from error
    y = _as_column(logits_of(y), len(x))
    y = y if isinstance(y, Jet) else seed.constant(y)
    rows = [torch.zeros_like(y.primal) if c is None else c for c in y.carried]
    return torch.stack([y.primal, *rows]), (True, *(c is not None for c in y.carried))


_RECORDING: ContextVar[bool] = ContextVar("recording", default=False)


@contextmanager
def _recording() -> Iterator[None]:
    """Notes whether gradients are on."""
    token = _RECORDING.set(torch.is_grad_enabled())
    try:
        yield
    finally:
        _RECORDING.reset(token)


def _with_gradient(args: Any) -> Iterator[bool]:
    """For each tensor in nested arguments, whether a gradient can flow through it."""
    if isinstance(args, Jet):
        yield from _with_gradient((args.primal, args.carried))
    elif isinstance(args, Tensor):
        yield args.requires_grad
    elif isinstance(args, (tuple, list)):
        for item in args:
            yield from _with_gradient(item)
    elif isinstance(args, dict):
        yield from _with_gradient(tuple(args.values()))


def _as_column(y: Tensor, batch: int) -> Tensor:
    if tuple(y.shape) == (batch, 1):
        return y[:, 0]
    if tuple(y.shape) != (batch,):
        raise FlexureError(
            f"expected f to give one number a sample, shape ({batch},), got {tuple(y.shape)}; "
            "choose one of its outputs, for example lambda x: model(x)[:, 0]"
        )
    return y


def _check(x: Any, v: Any, order: Any) -> None:
    if not isinstance(x, Tensor) or x.dtype not in _DTYPES or x.dim() == 0:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise FlexureError(
            f"expected x of shape (B, *shape), float32 or float64, got {got}; convert it with "
            ".double(), and the model too"
        )
    if not isinstance(v, Tensor) or v.shape != x.shape or v.dtype != x.dtype:
        got = f"{v.dtype} {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__
        raise FlexureError(
            f"expected directions v like x, {x.dtype} {tuple(x.shape)}, got {got}; "
            "torch.randn_like(x) makes some"
        )
    if not isinstance(order, int) or isinstance(order, bool) or order < 0:
        raise FlexureError(
            f"expected an order of derivatives 0, 1, 2, ..., got {order!r}; 4 is a common choice"
        )
    if order > _HIGHEST:
        raise FlexureError(
            f"expected derivatives of orders up to {_HIGHEST}, got {order}: the factorials of "
            f"higher ones leave float64; give lower orders"
        )


_DTYPES = (torch.float32, torch.float64)

_HIGHEST = 170
"""171! is above the largest number of float64."""
