"""BatchNorm whose scale is clipped per channel: gamma-Lipschitz in both modes.

The layer, its constant, and its fast training pass. Norms of other layers are in `norms.py`; how
strongly gamma is penalised is not decided here.

[LCNN] is Low-Curvature Networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import unwrap
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from flexure.contracts import FlexureError, is_number
from flexure.wide import kept_wide

__all__ = ["LipschitzBatchNorm"]

# Its exponential is below float64's rounding of 1: gamma = 1.
LOWEST_RAW = math.log(torch.finfo(torch.float64).eps / 8)
# What a float32 holds with room for its product with a scale.
LARGEST_GAMMA = 1e30
# Stand for 1/sigma where it takes no part: their cubes are the smallest normal numbers, so that
# they vanish beside other terms; and powers of 2 do not round.
NO_INVERSE = {torch.float32: 2.0**-42, torch.float64: 2.0**-340}

_aten = torch.ops.aten


class LipschitzBatchNorm(_BatchNorm):
    """`y = (x - mu)·a + b`, `a = clip(w/sigma, -gamma, gamma)`, section 3.4.2 of [LCNN].

    `sigma = sqrt(var + eps)`, of the batch in train mode and of the running statistics in eval
    mode: gamma bounds the slope in both. Every channel is clipped by itself, so that a dead one,
    whose variance is 0, leaves the others alone. Where no channel is clipped it is torch's
    BatchNorm, values and gradients; running statistics always are, in half precision to rounding.

    `gamma = 1 + exp(raw_gamma)`, that is `log(gamma) = softplus(raw_gamma)`: at least 1 whatever
    an optimiser does, and [LCNN]'s penalty on log(gamma) is nearly linear in the parameter while
    gamma is large. At gamma = 1 exactly its slope in the parameter is of the order of 1e-17,
    and it stays there; start at 1.0001 to let it grow. `raw_gamma` stays in float32 or wider
    whatever the layer is cast to: float16 holds no gamma above 65504. [LCNN] has no affine
    parameters; `affine=False` is its layer.

    Do not convert it by `SyncBatchNorm.convert_sync_batchnorm`, which would drop gamma silently.
    `torch.jit.script` does not support it; `torch.jit.trace` and `torch.compile` do.

    Args:
        num_features: channels C, axis 1 of the input.
        eps: as in torch, but above 0.
        momentum: as in torch; None: the cumulative average.
        affine: whether there are w and b; without them w = 1 and b = 0.
        track_running_stats: without them batch statistics are used in both modes.
        gamma: where it starts, in [1, 1e30]. Default 10, as in the code of [LCNN].
        device: of parameters and statistics.
        dtype: of parameters and statistics.

    Raises:
        FlexureError: gamma outside [1, 1e30], eps not above 0, or one is no number.

    Example:
        >>> norm = LipschitzBatchNorm(2, affine=False)
        >>> norm.gamma.item(), round(norm.lipschitz.item(), 4)
        (10.0, 1.0)
    """

    raw_gamma: nn.Parameter

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        gamma: float = 10.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        raw = _raw_gamma(gamma)
        _check_eps(eps)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.raw_gamma = nn.Parameter(torch.tensor(raw, device=device, dtype=wide))

    @classmethod
    def from_batch_norm(cls, bn: nn.Module, *, gamma: float = 10.0) -> LipschitzBatchNorm:
        """The layer in the place of one of torch's: its affine parameters, statistics and mode.

        The parameters and statistics are the same objects, not copies. Hooks stay behind;
        `flexure.to_lcnn` takes them along.

        Args:
            bn: `nn.BatchNorm1d`, `2d` or `3d`.
            gamma: where it starts.

        Raises:
            FlexureError: another module, also one that inherits from BatchNorm and does something
                else, `nn.SyncBatchNorm` and a lazy layer that has not run; an eps of 0; or a
                wrong gamma.
        """
        _check_batch_norm(bn)
        given = cast(_BatchNorm, bn)
        home = next((t for t in (given.weight, given.running_mean) if t is not None), None)
        norm = cls(
            given.num_features,
            given.eps,
            given.momentum,
            given.affine,
            given.track_running_stats,
            gamma=gamma,
            device=None if home is None else home.device,
            dtype=None if home is None else home.dtype,
        )
        norm.register_parameter("weight", given.weight)
        norm.register_parameter("bias", given.bias)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            norm.register_buffer(name, getattr(given, name))
        return norm.train(given.training)

    @property
    def gamma(self) -> Tensor:
        """The largest slope allowed, at least 1, `()`, with its graph to `raw_gamma`."""
        return 1.0 + torch.exp(self.raw_gamma)

    @property
    def lipschitz(self) -> Tensor:
        """The Lipschitz constant in eval mode, `()`: `min(gamma, max |w|/sigma)`.

        Differentiable in gamma where that is the least, else in w. Where both are equal the
        gradient is gamma's, and channels that share the maximum share its gradient equally: each
        a subgradient. Without running statistics it is gamma, which bounds every batch.
        """
        gamma, var = self.gamma, self.running_var
        if var is None:
            return gamma
        var = var.to(torch.promote_types(var.dtype, gamma.dtype))
        slopes = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            slopes = slopes * self.weight.abs()
        return torch.where(slopes.amax() < gamma, slopes.amax(), gamma)

    @property
    def clipped_weight(self) -> Tensor | None:
        """`(C,)`, the weight with which torch's BatchNorm is this layer in eval mode.

        None without running statistics.
        """
        if self.running_var is None:
            return None
        return self._clipped(self.running_var)

    def forward(self, input: Tensor) -> Tensor:
        """The normalised input, of its shape and dtype.

        Args:
            input: `(B, C)`, `(B, C, L)`, `(B, C, H, W)` or `(B, C, D, H, W)`, floating point.

        Raises:
            FlexureError: no tensor, or one of integers; another number of dimensions or channels;
                or one value a channel where batch statistics are needed.
        """
        x = input
        self._check_input_dim(x)
        mean, var = self.running_mean, self.running_var
        if not self.training and mean is not None and var is not None:
            weight = self._clipped(var)
            return F.batch_norm(x, mean, var, weight, self.bias, False, 0.0, self.eps)
        _check_count(x)
        if isinstance(x, Tensor) and type(x) is not Tensor and type(x) is not nn.Parameter:
            # A measure's: it refuses batch statistics in its own words.
            return F.batch_norm(x, mean, var, self.weight, self.bias, True, 0.0, self.eps)
        momentum = self._next_momentum()
        if not self.training or not self.track_running_stats:
            mean = var = None
        run = _by_formula if _is_watched(x, self.weight, mean) else _fast
        return run(x, self.weight, self.bias, self.gamma, mean, var, momentum, self.eps)

    def extra_repr(self) -> str:
        """As of torch's, with gamma as it is now."""
        own = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{own}, gamma={float(self.gamma.detach()):.4g}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LipschitzBatchNorm:
        with kept_wide(self, ["raw_gamma"]):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _check_input_dim(self, input: Any) -> None:
        if not isinstance(input, Tensor):
            raise FlexureError(
                f"expected an input that is a tensor, got {type(input).__name__}; pass a tensor of "
                f"floating-point numbers"
            )
        if not input.dtype.is_floating_point:
            raise FlexureError(
                f"expected an input of floating-point numbers, got {input.dtype}; pass x.float()"
            )
        if input.dim() not in (2, 3, 4, 5) or input.shape[1] != self.num_features:
            raise FlexureError(
                f"expected an input (B, {self.num_features}), with up to three dimensions of space "
                f"behind, got shape {tuple(input.shape)}; make the layer with num_features equal "
                f"to the size of axis 1"
            )

    def _clipped(self, var: Tensor) -> Tensor:
        dtype = torch.promote_types(var.dtype, torch.float32)
        sigma = torch.sqrt(var.to(dtype) + self.eps)
        weight = torch.ones_like(sigma) if self.weight is None else self.weight.to(dtype)
        gamma = self.gamma.to(dtype)
        clipped = weight.detach().abs() > gamma.detach() * sigma.detach()
        return torch.where(clipped, gamma * weight.detach().sign() * sigma, weight).to(var.dtype)

    def _next_momentum(self) -> float:
        """Counts a batch in train mode, and returns the weight of its statistics, as torch does."""
        if not self.training or not self.track_running_stats or self.num_batches_tracked is None:
            return 0.0 if self.momentum is None else self.momentum
        self.num_batches_tracked.add_(1)
        if self.momentum is not None:
            return self.momentum
        return 1.0 / float(self.num_batches_tracked)


def _is_watched(x: Tensor, weight: Tensor | None, mean: Tensor | None) -> bool:
    """Whether something must see the arithmetic, or torch's kernel would take coarse statistics."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or x.device.type == "meta"
        or any(t is not None and t.dtype not in NO_INVERSE for t in (weight, mean))
        or (mean is None and x.dtype not in NO_INVERSE)
    )


def _fast(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """As `_by_formula`, by torch's own passes over x: as many as its BatchNorm takes."""
    with torch.no_grad():
        mean, var = _aten.batch_norm_update_stats(x, running_mean, running_var, momentum)
    if weight is None:
        weight = torch.ones_like(mean)
    y = _Normalized.apply(x, weight, bias, gamma.to(weight.dtype), mean, var, eps)  # type: ignore[no-untyped-call]
    return cast(Tensor, y)


class _Normalized(torch.autograd.Function):
    """The layer, given the statistics of x: derivatives are those of torch's BatchNorm.

    That is exact for channels that are not clipped. The others are `(x - mu)·gamma·sign(w)`: for
    them 1/sigma is replaced by a number s so small that what it contributes vanishes, and w by
    gamma·sign(w)/s. So one pass of torch's serves all channels, and its own derivative serves for
    derivatives of derivatives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
    ) -> Tensor:
        # After a pass over x every small operation starts cold: few of them, then.
        sigma = torch.sqrt(var + eps)
        limit = gamma * sigma
        ctx.eps = eps
        ctx.save_for_backward(x, weight, gamma, mean, sigma, limit)
        weight = torch.clamp(weight, -limit, limit)
        with torch._C.DisableTorchFunction():
            y: Tensor = _aten.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, gamma, mean, sigma, limit = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wanted = (needs[0], needs[1] or needs[3], needs[2])
        clipped, inverse = weight.detach().abs() > limit, sigma.reciprocal()
        if x.device.type == "cpu" and not torch.is_grad_enabled() and not bool(clipped.any()):
            by_x, by_weight, by_bias = _aten.native_batch_norm_backward(
                grads[0], x, weight, None, None, mean, inverse, True, ctx.eps, wanted
            )
            by_gamma = torch.zeros_like(gamma) if needs[3] else None
            return by_x, by_weight if needs[1] else None, by_bias, by_gamma, None, None, None
        inverse = torch.where(clipped, NO_INVERSE[mean.dtype], inverse)
        sides = weight.detach().sign() / NO_INVERSE[mean.dtype]
        scale = torch.where(clipped, gamma * sides, weight)
        by_x, by_scale, by_bias = _aten.native_batch_norm_backward(
            grads[0], x, scale, None, None, mean, inverse, True, ctx.eps, wanted
        )
        by_weight = torch.where(clipped, 0.0, by_scale) if needs[1] else None
        by_gamma = torch.where(clipped, by_scale * sides, 0.0).sum() if needs[3] else None
        return by_x, by_weight, by_bias, by_gamma, None, None, None


def _by_formula(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """The layer by batch statistics, as a formula that anything can differentiate and trace."""
    dims = (0, *range(2, x.dim()))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, dims, correction=0)
    if running_mean is not None and running_var is not None:
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
            unbiased = var.detach() * (count / (count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    slope = torch.rsqrt(var + eps)
    slope = slope if weight is None else slope * weight
    clipped = slope.detach().abs() > gamma.detach()
    slope = torch.where(clipped, gamma * slope.detach().sign(), slope)
    shape = (-1, *(1,) * (x.dim() - 2))
    y = (wide - mean.view(shape)) * slope.view(shape)
    y = y if bias is None else y + bias.view(shape)
    return y.to(x.dtype)


def _check_batch_norm(bn: nn.Module) -> None:
    name = type(bn).__name__
    if isinstance(bn, nn.SyncBatchNorm):
        why = "its statistics are those of all processes; use nn.BatchNorm2d"
    elif not isinstance(bn, _BatchNorm):
        why = "pass a BatchNorm layer of torch"
    elif unwrap(type(bn).forward) is not unwrap(_BatchNorm.forward):
        why = "it does something else than BatchNorm in its forward; replace it by nn.BatchNorm2d"
    elif isinstance(bn.weight, nn.parameter.UninitializedParameter) or not bn.num_features:
        why = "it does not know its channels yet; run a batch through the model first"
    else:
        return
    raise FlexureError(
        f"expected nn.BatchNorm1d, nn.BatchNorm2d or nn.BatchNorm3d, got {name}: {why}"
    )


def _check_count(x: Tensor) -> None:
    if x.numel() <= x.shape[1]:
        raise FlexureError(
            f"expected more than one value a channel to take statistics of, got an input of shape "
            f"{tuple(x.shape)}; give a larger batch (drop a last batch of 1), or call .eval()"
        )


def _check_eps(eps: Any) -> None:
    if not is_number(eps) or not 0.0 < float(eps) < math.inf:
        raise FlexureError(
            f"expected eps above 0, which bounds 1/sigma of a channel that is constant, got "
            f"{eps!r}; take torch's 1e-5"
        )


def _raw_gamma(gamma: Any) -> float:
    if isinstance(gamma, Tensor) and gamma.numel() == 1:
        gamma = gamma.item()
    if not is_number(gamma) or not 1.0 <= float(gamma) <= LARGEST_GAMMA:  # nan fails both
        raise FlexureError(
            f"expected gamma in [1, {LARGEST_GAMMA:g}], got {gamma!r}; pass for example 10.0"
        )
    excess = float(gamma) - 1.0
    return max(math.log(excess), LOWEST_RAW) if excess > 0 else LOWEST_RAW
