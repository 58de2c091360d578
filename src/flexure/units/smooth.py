"""Softplus as modules: centered with a learnable beta, and plain with a fixed one.

The mathematics of centered softplus is in `functional.py`; plain softplus is torch's own. How
strongly a learnt beta is penalised is not decided here.

[LCNN] is Low-Curvature Networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexure.contracts import FlexureError, is_number
from flexure.units.functional import centered_softplus, follows
from flexure.wide import kept_wide

__all__ = ["CenteredSoftplus", "Softplus"]

_aten = torch.ops.aten


class CenteredSoftplus(nn.Module):
    """`log((1 + exp(beta·x))/2)/beta` with one learnable beta, eq. 4 of [LCNN].

    The parameter is `raw_beta`, `beta = log(1 + exp(raw_beta))`: positive whatever an optimiser
    does. For beta above 1 that is nearly the identity, so that a learning rate, and the weight of
    a penalty on beta, mean what they mean for beta itself, as in [LCNN]; below, steps become
    relative and beta tends to 0 without reaching it, where it ends at the dtype's smallest normal
    number. With `exp` in its place a step on beta would grow with beta². The parameter stays in
    float32 or wider whatever the module is cast to.

    Args:
        beta: where it starts, a normal number of the parameter's dtype. Default 5, as in [LCNN].
        device: of the parameter.
        dtype: of the parameter, float32 or float64.

    Raises:
        FlexureError: beta is no positive finite number that the dtype holds.

    Example:
        >>> CenteredSoftplus()(torch.zeros(2))
        tensor([0., 0.], grad_fn=<_CenteredSoftplusBackward>)
    """

    raw_beta: nn.Parameter

    def __init__(
        self,
        beta: float = 5.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        beta = _positive(beta, dtype)
        raw = beta + math.log(-math.expm1(-beta))  # log(exp(beta) - 1), without overflow
        self.raw_beta = nn.Parameter(torch.tensor(raw, device=device, dtype=dtype))

    @property
    def beta(self) -> Tensor:
        """The inverse temperature, positive, `()`, with its graph to `raw_beta`."""
        # Not as softplus: no census may take it for an activation of the network.
        beta = -cast(Tensor, _aten.log_sigmoid(-self.raw_beta))
        return cast(Tensor, _aten.clamp_min(beta, torch.finfo(beta.dtype).tiny))

    def forward(self, x: Tensor, *, inplace: bool = False, **params: Any) -> Tensor:
        """Centered softplus of `x`, of its shape and dtype; `x` itself where in place.

        Args:
            x: any shape, floating point.
            inplace: write the result into `x`.
            params: of the activation whose call was routed here; not used.
        """
        y = centered_softplus(x.clone() if inplace else x, self.beta)
        return x.copy_(y) if inplace else y

    def extra_repr(self) -> str:
        """Beta as it is now."""
        return f"beta={float(self.beta.detach()):.4g}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CenteredSoftplus:
        with kept_wide(self, ["raw_beta"]):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class Softplus(nn.Softplus):
    """`log(1 + exp(beta·x))/beta` with a fixed beta: the baselines of [LCNN], 1000 and 10.

    torch's own `softplus` with its threshold of 20. It can stand for an activation call, and is
    itself a site of the network that it is built into.

    Args:
        beta: a normal number of float32. Default 1000, the standard network of [LCNN].

    Raises:
        FlexureError: beta is no positive finite number that float32 holds.

    Example:
        >>> Softplus(10.0)(torch.tensor([0.0, 4.0]))
        tensor([0.0693, 4.0000])
    """

    def __init__(self, beta: float = 1000.0) -> None:
        super().__init__(beta=_positive(beta, torch.float32))

    @wraps(nn.Softplus.forward)  # by which the catalogue knows the activation
    def forward(  # type: ignore[override]
        self, x: Tensor, *, inplace: bool = False, **params: Any
    ) -> Tensor:
        """Softplus of `x`, of its shape and dtype; `x` itself where in place.

        Args:
            x: any shape, floating point.
            inplace: write the result into `x`.
            params: of the activation whose call was routed here; not used.
        """
        if follows(x):  # a measure, which knows the function by this name
            y = F.softplus(x, self.beta, self.threshold)
        else:  # in a routed call's place it must not be taken for another call
            source = x.clone() if inplace else x
            y = cast(Tensor, _aten.softplus(source, self.beta, self.threshold))
        return x.copy_(y) if inplace else y


def _positive(beta: Any, dtype: torch.dtype) -> float:
    if isinstance(beta, Tensor) and beta.numel() == 1:
        beta = beta.item()
    held = torch.finfo(dtype)
    if not is_number(beta) or not held.tiny <= float(beta) <= held.max:  # nan fails both
        raise FlexureError(
            f"expected beta to be a positive finite number of {dtype}, {held.tiny:.3g} to "
            f"{held.max:.3g}, got {beta!r}; pass for example 5.0 (the limits beta = 0, x/2, and "
            f"beta = inf, ReLU, are no start for a parameter)"
        )
    return float(beta)
