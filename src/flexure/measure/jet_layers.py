"""The catalogue of jets, third part: layers, attention, units, and what has kinks.

Losses are in `jet_losses.py`, arithmetic and shapes in `jet_rules.py`, the arithmetic of series in
`series.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flexure.measure.jet_rules import by_expression, carry, linear, multilinear, series_of
from flexure.measure.propagate import (
    Carrying,
    Rule,
    Unsupported,
    by_body,
    carriers_in,
    primal_of,
    refused,
)
from flexure.measure.series import Series, by_rows, compose, softmax_series
from flexure.units.taylor import centered_softplus_coefficients, ctu_coefficients

__all__ = ["KINKS", "LAYERS", "UNITS"]


def affine(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Bilinear in input and weight, plus a bias: the first three arguments."""
    named = dict(kwargs)
    given: list[Any] = [*args, *[None] * (3 - len(args))]
    x, weight, bias, *rest = given
    weight, bias = named.pop("weight", weight), named.pop("bias", bias)
    if not isinstance(x, Carrying) or isinstance(weight, Carrying) or isinstance(bias, Carrying):
        bilinear = isinstance(x, Carrying) or isinstance(weight, Carrying)
        call: Rule = multilinear(0, 1) if bilinear else _called
        y = call(function, (x, weight, None, *rest), named)
        return y if bias is None else y + _over_channels(bias, y, function)
    parts = (None if c is None else function(c, weight, None, *rest, **named) for c in x.carried)
    return carry(x, (function(x.primal, weight, bias, *rest, **named), *parts))


def _called(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return function(*args, **kwargs)


def _over_channels(bias: Any, y: Any, function: Any) -> Any:
    """A bias shaped to be added: channels are last after a linear layer, else before space."""
    spatial = _SPATIAL.get(function, 0)
    return bias.reshape(-1, *(1,) * spatial)


_SPATIAL = {getattr(torch, f"conv{kind}{n}d"): n for kind in ("", "_transpose") for n in (1, 2, 3)}


def _batch_norm(
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = False,
) -> Any:
    if training:
        raise Unsupported(_COUPLED)
    return _rescaled(x, weight, bias, running_mean, running_var, eps)


def _instance_norm(
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = False,
) -> Any:
    """Each sample by itself."""
    if use_input_stats and running_mean is not None:
        raise Unsupported("it is in training mode and would change its statistics; call .eval()")
    if not use_input_stats:
        return _rescaled(x, weight, bias, running_mean, running_var, eps)
    y = _standardized(x, tuple(range(2, x.dim())), eps)
    return _scaled_and_shifted(y, weight, bias, (-1, *(1,) * (x.dim() - 2)))


def _rescaled(x: Carrying, weight: Any, bias: Any, mean: Any, var: Any, eps: float) -> Any:
    shape = (-1, *(1,) * (x.dim() - 2))
    scale = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
    shift = -mean * scale if bias is None else bias - mean * scale
    return x * scale.reshape(shape) + shift.reshape(shape)


def _scaled_and_shifted(y: Any, weight: Any, bias: Any, shape: Sequence[int]) -> Any:
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def _layer_norm(
    x: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    sizes = _sizes(normalized_shape)
    y = _standardized(x, tuple(range(-len(sizes), 0)), eps)
    return _scaled_and_shifted(y, weight, bias, sizes)


def _sizes(shape: Any) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)


def _rms_norm(x: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    sizes = _sizes(normalized_shape)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = _over_root_mean_square(x, tuple(range(-len(sizes), 0)), eps)
    return _scaled_and_shifted(y, weight, None, sizes)


def _group_norm(
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    grouped = x.reshape(x.shape[0], num_groups, -1)
    y = _standardized(grouped, (2,), eps).reshape(x.shape)
    return _scaled_and_shifted(y, weight, bias, (-1, *(1,) * (x.dim() - 2)))


def _standardized(x: Any, dims: tuple[int, ...], eps: float) -> Any:
    return _over_root_mean_square(x - x.mean(dims, keepdim=True), dims, eps)


def _over_root_mean_square(x: Any, dims: tuple[int, ...], eps: float) -> Any:
    return x * torch.rsqrt((x * x).mean(dims, keepdim=True) + eps)


def _softmax(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, dim = _softmax_arguments(*args, **kwargs)
    return carry(x, softmax_series(series_of(x, x), dim, torch.softmax(x.primal, dim))[0])


def _log_softmax(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, dim = _softmax_arguments(*args, **kwargs)
    logarithm = _relative_log_sum(x, dim, torch.softmax(x.primal, dim))
    parts = (_minus(a, b) for a, b in zip(x.carried, logarithm[1:], strict=True))
    return carry(x, (torch.log_softmax(x.primal, dim), *parts))


def _minus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if b is None:
        return a
    return -b if a is None else a - b


def _softmax_arguments(
    x: Any, dim: Any = None, *rest: Any, dtype: Any = None, _stacklevel: int = 3
) -> tuple[Any, int]:
    dtype = next((r for r in rest if isinstance(r, torch.dtype)), dtype)
    if dim is None:
        dim = 0 if x.dim() in (0, 1, 3) else 1  # what torch.nn.functional takes
    return (x if dtype is None else x.to(dtype)), dim


def _relative_log_sum(x: Carrying, dim: Any, p0: Tensor) -> Series:
    """The series of `log Σ exp(x)`, minus its value."""
    total = softmax_series(series_of(x, x), dim, p0)[1]
    one = total[0]
    if one is None:
        raise ValueError("expected a series with a value")
    coefficients = [torch.zeros_like(one), *(one * ((-1.0) ** (k + 1) / k) for k in _orders(x))]
    return compose(coefficients, total)


def _orders(x: Carrying) -> range:
    return range(1, len(x.carried) + 1)


def _logsumexp(x: Any, dim: Any, keepdim: bool = False) -> Any:
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    value = torch.logsumexp(x.primal, dims, keepdim=True)
    p0 = torch.exp(x.primal - value)
    y = carry(x, (value, *_relative_log_sum(x, dims, p0)[1:]))
    return y if keepdim else y.squeeze(dims)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if dropout_p:
        raise Unsupported(_RANDOM)
    if is_causal and attn_mask is not None:
        raise Unsupported("it has a mask besides is_causal; give one of them")
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (kv.repeat_interleave(groups, -3) for kv in (key, value))
    root = math.sqrt(1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = (query * root) @ (key * root).transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return _safe_softmax(scores) @ value


def _safe_softmax(scores: Any) -> Any:
    """Softmax over the last axis, 0 where all of it is masked, as torch's attention has it."""
    if not isinstance(scores, Carrying):
        return torch.ops.aten._safe_softmax(scores, -1)
    p0 = torch.ops.aten._safe_softmax(scores.primal, -1)
    return carry(scores, softmax_series(series_of(scores, scores), -1, p0)[0])


def _dropout(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    x, p, training = _dropout_arguments(*args, **kwargs)
    if training and p:
        raise Unsupported(_RANDOM)
    return x


def _dropout_arguments(
    x: Any, p: Any = 0.5, training: bool = True, train: bool | None = None
) -> tuple[Any, Any, bool]:
    return x, p, training if train is None else train


def _glu(x: Any, dim: int = -1) -> Any:
    a, b = x.chunk(2, dim)
    return a * torch.sigmoid(b)


def _normalize(x: Any, p: float = 2.0, dim: Any = 1, eps: float = 1e-12) -> Any:
    norm = torch.linalg.vector_norm(x, p, dim, keepdim=True)
    # The lower limit is a constant for the derivatives; where it acts is not the input's to say.
    return x / torch.where(primal_of(norm) > eps, norm, eps)


def _cosine_similarity(x: Any, other: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    return (_normalize(x, 2.0, dim, eps) * _normalize(other, 2.0, dim, eps)).sum(dim)


def _bilinear(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
    y = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
    return y if bias is None else y + bias


def _ctu(x: Carrying, beta: Any, c: Any) -> Carrying:
    _constant_dials(beta, c)
    _smooth(beta, 1.0, "beta = 1, where the unit is a rectifier")
    return _through(ctu_coefficients, x, beta, c)


def _centered_softplus(x: Carrying, beta: Any) -> Carrying:
    _constant_dials(beta)
    _smooth(beta, math.inf, "beta = inf, where the unit is a rectifier")
    return _through(centered_softplus_coefficients, x, beta)


def _through(coefficients: Any, x: Carrying, *dials: Any) -> Carrying:
    def applied(block: Series) -> Series:
        return compose(coefficients(block[0], *dials, len(block) - 1), block)

    return carry(x, by_rows(applied, series_of(x, x), *dials))


def _soft_maximum(pieces: Carrying, beta: Any, c: Any) -> Any:
    """As in `flexure.units.pooling`, with the maximum at the point as the constant to refer to."""
    _constant_dials(beta, c)
    _smooth(beta, 1.0, "beta = 1, where the unit is a maximum")
    top = pieces.primal.detach().amax(-1, keepdim=True)
    width = 1 - beta
    there = pieces.primal > -torch.inf
    gap = pieces - top
    weights = torch.softmax(torch.where(there, gap * (beta / width), -torch.inf), -1)
    average = (weights * torch.where(there, gap, 0.0)).sum(-1, keepdim=True)
    smooth = width * torch.logsumexp(gap / width, -1, keepdim=True)
    return (top + (c * average + (1 - c) * smooth)).squeeze(-1)


def _constant_dials(*dials: Any) -> None:
    if any(True for _ in carriers_in(dials)):
        raise Unsupported("its dial depends on the input; keep beta and c constant")


def _smooth(beta: Any, kink: float, what: str) -> None:
    if bool((beta == kink).any()) if isinstance(beta, Tensor) else beta == kink:
        raise Unsupported(f"{what}: {_KINK}")


UNITS: Mapping[str, Callable[..., Any]] = {
    "ctu": _ctu,
    "centered_softplus": _centered_softplus,
    "soft_maximum": _soft_maximum,
}
"""The units of `flexure.units`, by the names of `Carrying.unit_rule`."""

_KINK = (
    "not smooth. Where f is piecewise affine, Dⁿf is 0 almost everywhere for n >= 2, and the "
    "derivatives of other kinks jump. Use flexure.steer with beta below 1 (and pooling=True where "
    "there is max-pooling), or flexure.units.centered_softplus"
)
_COUPLED = (
    "it normalises by the statistics of the batch, which couples the samples; call .eval() on the "
    "model, and give the layer running statistics"
)
_RANDOM = "it is random in training mode; call .eval() on the model"

KINKS: Mapping[str, Rule] = {
    "relu relu6 threshold leaky_relu prelu rrelu elu selu celu hardtanh hardsigmoid hardswish "
    "hardshrink softshrink softsign abs absolute sign sgn clamp clip clamp_min clamp_max max min "
    "maximum minimum fmax fmin amax amin aminmax max_pool1d max_pool2d max_pool3d "
    "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d "
    "adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d l1_loss smooth_l1_loss "
    "huber_loss hinge_embedding_loss margin_ranking_loss multi_margin_loss cummax cummin sort "
    "topk kthvalue median nanmedian mode quantile floor ceil round trunc frac fmod remainder "
    "floor_divide heaviside relu_ nan_to_num": refused(f"it is {_KINK}"),
}
"""What is refused with the advice for networks that are piecewise polynomial."""

LAYERS: Mapping[Any, Rule] = {
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d": affine,
    F.batch_norm: by_body,
    F.instance_norm: by_body,
    torch.batch_norm: by_expression(_batch_norm),
    torch.instance_norm: by_expression(_instance_norm),
    "layer_norm": by_expression(_layer_norm),
    "group_norm": by_expression(_group_norm),
    "rms_norm": by_expression(_rms_norm),
    "local_response_norm": by_body,
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "interpolate upsample grid_sample fold": linear,
    "softmax": _softmax,
    "softmin": by_body,
    "log_softmax": _log_softmax,
    "logsumexp": by_expression(_logsumexp),
    "glu": by_expression(_glu),
    "normalize": by_expression(_normalize),
    "cosine_similarity": by_expression(_cosine_similarity),
    "bilinear": by_expression(_bilinear),
    "scaled_dot_product_attention": by_expression(_attention),
    F.multi_head_attention_forward: by_body,
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout": (
        _dropout
    ),
}
"""Names, or functions where a name has two meanings -> rule, as `rule_table` takes them."""
