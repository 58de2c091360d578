"""Every row of the catalogue of jets against nested forward mode: a new row needs a case here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexure import units
from flexure.measure.jet_layers import LAYERS, UNITS
from flexure.measure.jet_losses import LOSSES
from flexure.measure.jet_reductions import REDUCTIONS
from flexure.measure.jet_rules import ARITHMETIC
from tests.reference.jets import assert_close_to_nested

ORDER = 3
Map = Callable[[Tensor], Tensor]


def constant(*shape: int, seed: int = 7, low: float = -1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    high = 1.0
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


C = constant(3, 4)
POSITIVE = constant(3, 4, low=0.2)
SQUARE = constant(4, 4)
ATTENTION = nn.MultiheadAttention(4, 2, batch_first=True).double().eval()
BILINEAR = nn.Bilinear(4, 4, 2).double()
INDEX = torch.tensor([2, 0, 1, 1])
MASK = C > 0


def per_sample(g: Map) -> Map:
    """`(B, ...) -> (B,)`: a map of one sample's values, weighted so that nothing cancels."""

    def f(x: Tensor) -> Tensor:
        y = g(x)
        y = y.unsqueeze(1).flatten(1)
        return (y * constant(y.shape[1], seed=3)).sum(1)

    return f


def written(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1] = x[:, 0] * x[:, 2]
    y[:, 0, 2] = 3.0
    return y


def in_place(*names: str) -> Map:
    def g(x: Tensor) -> Tensor:
        y = x * 1.5
        for name in names:
            getattr(y, name)()
        return y

    return g


# One row for each row of the catalogue: its first name -> calls, on (B, 3, 4) unless said.
CASES: dict[str, list[Map]] = {
    "view": [lambda x: x.view(-1, 12) * x.view(size=(-1, 12))],
    "diff": [
        lambda x: torch.diff(x * x, dim=1),
        lambda x: torch.diff(x * x, prepend=x[..., :1], append=C[:, :1].expand(len(x), 3, 1)),
        lambda x: C.expand(len(x), 3, 4).diff(2, 1, append=x * x),
    ],
    "reshape": [
        lambda x: x.view(-1, 12) * x.reshape(-1, 2, 6).flatten(1),
        lambda x: (x.transpose(1, 2) @ x).permute(0, 2, 1).contiguous().float().double(),
        lambda x: torch.stack([a * a for a in x.unbind(1)], 1),
        lambda x: x.split([1, 2], 1)[1] * x[:, :2].flip(1).roll(1, 2),
        lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1).cumsum(1) * x.mean((1, 2), True)[:, None],
        lambda x: torch.gather(x, 2, INDEX.expand(len(x), 3, 4)) * x.index_select(2, INDEX),
        lambda x: (-x).tril() + x.mT.triu().mT + x.repeat_interleave(2, 1)[:, ::2] + x.to(x.dtype),
        lambda x: torch.narrow(x, 1, 0, 2).square(),
    ],
    "expand_as": [lambda x: x[:, :1].expand_as(x) * x.to(C).view_as(x)],
    "add": [
        lambda x: x + x * x + 2,
        lambda x: torch.add(x, x * x, alpha=3),
        lambda x: 1 + x * x,
        lambda x: (x * x).add_(x).add_(C),
        lambda x: C.unsqueeze(0).expand(2, 3, 4) + x * x,
    ],
    "sub": [
        lambda x: x * x - x,
        lambda x: 1 - x * x,
        lambda x: C - x * x,
        lambda x: x * x - C,
        lambda x: torch.sub(x, x * x, alpha=2),
    ],
    "rsub": [lambda x: torch.rsub(x * x, 2), lambda x: torch.rsub(x * x, x, alpha=3)],
    "mul": [lambda x: x * x * x * 2 * C, lambda x: 3 * x.mul(x.sum(1, keepdim=True))],
    "div": [
        lambda x: x / (3 + x),
        lambda x: 1 / (3 + x * x),
        lambda x: x * x / 3,
        lambda x: C / (x + 4),
    ],
    "pow": [
        lambda x: x**3,
        lambda x: x**0 + x**1,
        lambda x: (x + 3) ** -2,
        lambda x: (x + 3) ** 2.5,
        lambda x: 2.0**x,
        lambda x: (x + 3) ** x,
        lambda x: torch.pow(x + 3, POSITIVE),
        lambda x: POSITIVE**x,
        lambda x: torch.pow(x, torch.full((4,), 2.0, dtype=x.dtype)),
        lambda x: torch.pow(exponent=x, self=2.0),
        lambda x: torch.pow(exponent=2.5, input=x + 3),
        lambda x: torch.pow(torch.tensor([1, 2, 3, 4]), x),
        lambda x: torch.pow(torch.tensor([1.1, 2.2, 3.3, 4.4]), x),
        lambda x: torch.tensor([0, 1, 2, 3]) ** (x * x + 1),
    ],
    "getitem": [
        lambda x: x[:, 1:, [0, 2]] * x[:, :2, :2, None].squeeze(-1),
        lambda x: x[:, MASK] ** 2,
    ],
    "setitem": [written],
    "copy": [lambda x: torch.Tensor.copy_(x * 2, x * x)],
    "masked_fill": [
        lambda x: (x * x).masked_fill(MASK, 3.0),
        lambda x: (x * x).masked_fill(value=3.0, mask=MASK),
    ],
    "pad": [
        lambda x: F.pad(x * x, (1, 2), value=2.0),
        lambda x: F.pad(x * x, (1, 2), mode="reflect"),
    ],
    "where": [
        lambda x: torch.where(MASK, x * x, 0.5),
        lambda x: torch.where(MASK, x.sin(), x * x),
        lambda x: x.sin().where(MASK, 0.0),
        lambda x: x.sin().where(MASK, x * x),
        lambda x: x.sin().where(other=x * x, condition=MASK),
        lambda x: C.where(MASK, x * x),
        lambda x: torch.where(MASK, input=x.sin(), other=x * x),
        lambda x: torch.where(other=x.sin(), input=x * x, condition=MASK),
    ],
    "cat": [
        lambda x: torch.cat([x * x, C.expand(len(x), 3, 4), x], 1),
        lambda x: torch.stack([x * x, x], 2),
    ],
    "index_add": [
        lambda x: C.expand(len(x), 3, 4).index_add(2, INDEX, x * x),
        lambda x: x.scatter_add(2, INDEX.expand(len(x), 3, 4), x * x),
    ],
    "scatter": [
        lambda x: x.scatter(2, INDEX.expand(len(x), 3, 4), x.sin()),
        lambda x: x.sin().scatter(2, INDEX[:3].expand(len(x), 3, 3), 0.5),
    ],
    "masked_scatter": [lambda x: x.masked_scatter(MASK, (x * x).flatten())],
    "matmul": [
        lambda x: x @ SQUARE @ x.mT,
        lambda x: torch.bmm(x, x.mT),
        lambda x: C @ (x.mT * x.mT),
    ],
    "einsum": [
        lambda x: torch.einsum("bij,bkj,jl->bikl", x, x, SQUARE),
        lambda x: torch.einsum("bij,bij,bij->bj", x, x, x),
    ],
    "lerp": [lambda x: torch.lerp(x, x * x, 0.3)],
    "addcmul": [
        lambda x: torch.addcmul(x, x, C, value=2),
        lambda x: torch.addcmul(x, tensor1=x, tensor2=x.sin()),
    ],
    "addcdiv": [
        lambda x: torch.addcdiv(x, x, x + 4, value=2),
        lambda x: x.addcdiv(tensor2=x + 4, tensor1=x),
    ],
    "addmm": [
        lambda x: torch.stack([torch.addmm(C, mat1=a @ a.mT, mat2=a, beta=0.5) for a in x]),
        lambda x: torch.stack([torch.addmm(a, SQUARE[:3, :3], a, alpha=2) for a in x]),
    ],
    "addmv": [lambda x: torch.stack([torch.addmv(a[:, 0], a, vec=a[1], beta=2) for a in x])],
    "baddbmm": [
        lambda x: torch.baddbmm(x @ x.mT, x, x.mT, beta=0.5, alpha=2),
        lambda x: torch.baddbmm(x @ x.mT, batch1=x, batch2=x.mT),
    ],
    "var": [lambda x: x.var(2), lambda x: torch.var(x, (1, 2), correction=0, keepdim=True)],
    "std": [lambda x: x.std(-1, unbiased=False)],
    "prod": [lambda x: x.prod(-1), lambda x: torch.prod(x, 1, True), lambda x: x[0].prod() * x],
    "norm": [lambda x: x.norm(dim=2), lambda x: torch.norm(x, 2, 1)],
    "linalg_vector_norm": [lambda x: torch.linalg.vector_norm(x, dim=(1, 2))],
    "tanhshrink": [F.tanhshrink],
    "exp": [torch.exp],
    "expm1": [torch.expm1],
    "exp2": [torch.exp2],
    "log": [lambda x: torch.log(x + 3)],
    "log1p": [lambda x: torch.log1p(x + 2)],
    "log2": [lambda x: torch.log2(x + 3)],
    "log10": [lambda x: torch.log10(x + 3)],
    "sin": [torch.sin, in_place("sin_", "cos_")],
    "cos": [torch.cos],
    "tan": [lambda x: torch.tan(x / 2)],
    "sinh": [torch.sinh],
    "cosh": [torch.cosh],
    "tanh": [torch.tanh],
    "atan": [torch.atan],
    "asin": [lambda x: torch.asin(x / 3)],
    "asinh": [torch.asinh],
    "atanh": [lambda x: torch.atanh(x / 3)],
    "sqrt": [lambda x: torch.sqrt(x + 3)],
    "rsqrt": [lambda x: torch.rsqrt(x + 3)],
    "reciprocal": [lambda x: torch.reciprocal(x + 3)],
    "square": [torch.square],
    "erf": [torch.erf],
    "erfc": [torch.erfc],
    "ndtr": [torch.special.ndtr],
    "sigmoid": [torch.sigmoid, in_place("sigmoid_")],
    "logsigmoid": [F.logsigmoid],
    "softplus": [F.softplus, lambda x: F.softplus(x, 3.0, 2.0)],
    "silu": [F.silu, lambda x: F.silu(x * 2, inplace=True)],
    "gelu": [F.gelu, lambda x: F.gelu(x, approximate="tanh")],
    "mish": [F.mish],
    "linear": [
        nn.Linear(4, 5).double(),
        nn.Conv1d(3, 4, 2).double(),
        lambda x: F.linear(x, C, C[:, 0]) * F.linear(x, C),
        nn.ConvTranspose1d(3, 2, 2).double(),
    ],
    "batch_norm": [
        nn.BatchNorm1d(3).double().eval(),
        nn.BatchNorm1d(3, affine=False).double().eval(),
    ],
    "instance_norm": [
        nn.InstanceNorm1d(3, affine=True).double().eval(),
        nn.InstanceNorm1d(3, track_running_stats=True).double().eval(),
    ],
    "layer_norm": [
        nn.LayerNorm(4).double(),
        nn.LayerNorm((3, 4)).double(),
        nn.LayerNorm(4, elementwise_affine=False),
    ],
    "group_norm": [nn.GroupNorm(3, 3).double(), nn.GroupNorm(1, 3).double()],
    "rms_norm": [nn.RMSNorm(4).double()],
    "local_response_norm": [nn.LocalResponseNorm(2)],
    "avg_pool1d": [
        nn.AvgPool1d(2),
        nn.AdaptiveAvgPool1d(2),
        lambda x: F.interpolate(x, scale_factor=2, mode="linear"),
    ],
    "softmax": [lambda x: x.softmax(-1), lambda x: F.softmax(3 * x, 1, dtype=torch.float64)],
    "softmin": [lambda x: F.softmin(x, 1)],
    "log_softmax": [lambda x: F.log_softmax(x, 1)],
    "logsumexp": [lambda x: torch.logsumexp(x, 1), lambda x: x.logsumexp((1, 2), True)],
    "glu": [F.glu],
    "cosine_similarity": [
        lambda x: F.cosine_similarity(x, x.sin(), 2),
        lambda x: F.cosine_similarity(C, x, -1),
    ],
    "bilinear": [lambda x: BILINEAR(x, x * x)],
    "normalize": [lambda x: F.normalize(x, dim=2)],
    "scaled_dot_product_attention": [
        lambda x: F.scaled_dot_product_attention(x, x * 2, x.sin()),
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.7),
        lambda x: F.scaled_dot_product_attention(x, x, x, C @ C.mT),
        lambda x: F.scaled_dot_product_attention(x, x, x, (C @ C.mT > 0) | torch.eye(3).bool()),
    ],
    "multi_head_attention_forward": [
        lambda x: ATTENTION(x, x, x)[0],
        lambda x: ATTENTION(x, x.sin(), x, need_weights=False)[0],
    ],
    "cross_entropy": [
        lambda x: F.cross_entropy(x[:, 0], INDEX[: len(x)], reduction="none"),
        lambda x: F.cross_entropy(x, C.softmax(0).expand(len(x), 3, 4), reduction="none"),
    ],
    "nll_loss": [
        lambda x: F.nll_loss(x.sin(), INDEX.expand(3, 4)[: len(x)] % 3, reduction="none"),
    ],
    "mse_loss": [lambda x: F.mse_loss(x, C.expand_as(x), reduction="none")],
    "binary_cross_entropy_with_logits": [
        lambda x: F.binary_cross_entropy_with_logits(x, POSITIVE.expand_as(x), reduction="none")
    ],
    "dropout": [nn.Dropout(0.5).eval(), lambda x: F.dropout(x * x, 0.5, False, True)],
    "ctu": [
        lambda x: units.ctu(x, 0.7),
        lambda x: units.ctu(x, POSITIVE * 0.9, POSITIVE),
        lambda x: units.ctu(x * 2, 0.5, 1.0, inplace=True),
        lambda x: units.ctu(x, 0.0, 0.3),
    ],
    "centered_softplus": [
        lambda x: units.centered_softplus(x, 5.0),
        lambda x: units.centered_softplus(x, POSITIVE * 3),
        lambda x: units.centered_softplus(x, 0.0),
    ],
    "soft_maximum": [lambda x: units.pooling.soft_maximum(x, 0.6, 0.4)],
}


def rows() -> list[str]:
    keys = [*ARITHMETIC, *REDUCTIONS, *LAYERS, *LOSSES, *UNITS]
    return [key.split()[0] if isinstance(key, str) else key.__name__ for key in keys]


def test_every_row_of_the_catalogue_has_a_case() -> None:
    assert set(rows()) == set(CASES)


@pytest.mark.parametrize(
    ("name", "index"), [(name, i) for name, calls in CASES.items() for i in range(len(calls))]
)
def test_catalogue_agrees_with_nested_forward_mode(name: str, index: int) -> None:
    f = per_sample(CASES[name][index])
    x, v = constant(2, 3, 4, seed=1), constant(2, 3, 4, seed=2)
    assert_close_to_nested(f, x, v, ORDER)
