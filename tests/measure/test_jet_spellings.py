"""Jets of operations in the ways that torch lets them be written: right, or refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flexure import FlexureError, jet
from tests.reference.jets import assert_close_to_nested

Map = Callable[[Tensor], Tensor]


def constant(*shape: int, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1


C = constant(2, 3, 4)
D = constant(3, 4, seed=8)
WEIGHT = constant(5, 4, seed=9)
KERNEL = constant(2, 3, 2, seed=10)
MASK = D > 0
INDEX = torch.tensor([2, 0, 1, 1]).expand(2, 3, 4)
LABELS = torch.tensor([[0, 1, 2, 0], [1, 1, 0, 2]])
POSITIVE = C.abs() + 0.1
OWN = torch.tensor([0, 2])
EYE = torch.eye(3, dtype=torch.float64)

CALLS: dict[str, Map] = {
    # PyTorch's own names of parameters, and NumPy's.
    "sum axis": lambda x: torch.sum(x**2, axis=1, keepdims=True),
    "mean names": lambda x: torch.mean(input=x**2, dim=(1, 2)),
    "cumsum axis": lambda x: (x**2).cumsum(axis=1),
    "var dim": lambda x: torch.var(x, dim=2, unbiased=False, keepdim=True),
    "var positions": lambda x: torch.var(x, 2, False, True),
    "var all of it": lambda x: x.var(True) * x,
    "var correction": lambda x: x.var(correction=0.5, dim=(1, 2)),
    "std axis": lambda x: torch.std(x, axis=-1, keepdims=True),
    "std no correction": lambda x: torch.std(x, 1, correction=None),
    "prod names": lambda x: torch.prod(x, axis=1, keepdim=True, dtype=torch.float64),
    "norm names": lambda x: torch.norm(x, p=2, dim=(1, 2), keepdim=True),
    "norm axis": lambda x: x.norm(dim=2, keepdim=True),
    "norm of all": lambda x: x.norm() * x,
    "vector_norm names": lambda x: torch.linalg.vector_norm(x, ord=2.0, dim=2, keepdim=True),
    "vector_norm of all": lambda x: torch.linalg.vector_norm(x) * x,
    "softmax axis": lambda x: torch.softmax(x, axis=1),
    "softmax names": lambda x: F.softmax(input=x, dim=2, _stacklevel=5),
    "special softmax": lambda x: torch.special.softmax(x, dim=1, dtype=torch.float64),
    "log_softmax positions": lambda x: F.log_softmax(x, 1, 3, torch.float64),
    "log_softmax axis": lambda x: x.log_softmax(axis=1),
    "logsumexp axis": lambda x: torch.logsumexp(x, axis=1, keepdims=True),
    "add names": lambda x: torch.add(input=x, other=x * x, alpha=2),
    "sub names": lambda x: torch.sub(x1=x, x2=x * x, alpha=2),
    "rsub positions": lambda x: torch.rsub(x * x, 2, 3),
    "rsub names": lambda x: torch.rsub(other=x, input=x * x, alpha=0.5),
    "mul names": lambda x: torch.mul(other=x.sin(), input=x),
    "div names": lambda x: torch.div(other=x + 4, input=x, rounding_mode=None),
    "pow names": lambda x: torch.pow(exponent=3, input=x),
    "pow function": lambda x: x.pow(exponent=2),
    "rpow": lambda x: torch.tensor(2) ** x,
    "matmul names": lambda x: torch.matmul(input=x, other=x.mT),
    "bmm names": lambda x: torch.bmm(mat2=x.mT, input=x),
    "mm names": lambda x: torch.stack([torch.mm(a, mat2=a.T) for a in x]),
    "mv names": lambda x: torch.stack([torch.mv(a, vec=a[0]) for a in x]),
    "dot names": lambda x: torch.stack([torch.dot(a[0], tensor=a[1]) for a in x]),
    "outer names": lambda x: torch.stack([torch.outer(a[0], vec2=a[1]) for a in x]),
    "kron": lambda x: torch.stack([torch.kron(a, other=a) for a in x]),
    "inner": lambda x: torch.stack([torch.inner(a, a) for a in x]),
    "lerp names": lambda x: torch.lerp(x, end=x * x, weight=D),
    "lerp constant": lambda x: torch.lerp(C, x, x.sin()),
    "clone": lambda x: x.clone(memory_format=torch.preserve_format) ** 2,
    "gather names": lambda x: torch.gather(input=x**2, dim=2, index=INDEX),
    "index_select names": lambda x: torch.index_select(x**2, dim=2, index=OWN),
    "index_add names": lambda x: torch.index_add(x, dim=2, index=OWN, source=x[..., :2] ** 2,
                                                 alpha=3),
    "index_copy names": lambda x: x.index_copy(2, OWN, source=x[..., :2] ** 2),
    "index_add in place": lambda x: (x * 2).index_add_(2, OWN, x[..., :2] ** 2, alpha=3),
    "index_put names": lambda x: x.index_put((OWN[:1],), values=x[:1] ** 2, accumulate=True),
    "scatter_add names": lambda x: x.scatter_add(dim=2, index=INDEX, src=x**2),
    "scatter in place": lambda x: (x * 2).scatter_(2, INDEX[..., :1], value=3.0),
    "cat axis": lambda x: torch.cat(tensors=(x, x**2), axis=1),
    "stack names": lambda x: torch.stack(tensors=[x, x**2], dim=1),
    "concatenate": lambda x: torch.concatenate((x, C), axis=1) ** 2,
    "hstack": lambda x: torch.hstack([x, x**2]),
    "dstack": lambda x: torch.dstack([x, C]) ** 2,
    "masked_scatter names": lambda x: x.masked_scatter(mask=MASK, source=x**2),
    "masked_select": lambda x: x.masked_select(torch.ones_like(C).bool()).reshape(2, 12) ** 2,
    "pad names": lambda x: F.pad(input=x**2, pad=(1, 1), mode="constant", value=3.0),
    "pad circular": lambda x: F.pad(x**2, (1, 1), "circular"),
    "einsum list": lambda x: torch.einsum("bij,bij->bi", [x, x]),
    "layer_norm F": lambda x: F.layer_norm(input=x, normalized_shape=(3, 4), bias=D),
    "group_norm names": lambda x: F.group_norm(x, num_groups=3, eps=0.1),
    "group_norm torch": lambda x: torch.group_norm(x, 3, None, None, 0.1, False),
    "rms_norm names": lambda x: F.rms_norm(x, normalized_shape=(4,), weight=D[0], eps=0.1),
    "batch_norm names": lambda x: torch.batch_norm(
        x, weight=None, bias=None, running_mean=D[:, 0], running_var=D[:, 1].abs(), training=False,
        momentum=0.1, eps=0.1, cudnn_enabled=False) ** 2,
    "batch_norm F": lambda x: F.batch_norm(x, D[:, 0], running_var=D[:, 1].abs()) ** 2,
    "linear names": lambda x: F.linear(input=x**2, weight=WEIGHT, bias=WEIGHT[:, 0]),
    "linear of weights": lambda x: torch.stack([F.linear(D, weight=a, bias=a[:, 0]) ** 2
                                                for a in x]),
    "linear of a bias": lambda x: torch.stack([F.linear(D, D, bias=a[:, 0]) ** 2 for a in x]),
    "conv names": lambda x: F.conv1d(input=x**2, weight=KERNEL, bias=D[0, :2], stride=1, padding=1),
    "conv of a bias": lambda x: torch.stack([F.conv1d(C, KERNEL, a[0, :2]) ** 2 for a in x]),
    "conv of weights": lambda x: torch.stack([F.conv1d(C, a[None, :, :2], a[0, :1]) for a in x]),
    "conv torch": lambda x: torch.conv1d(x**2, KERNEL, None, 1, 1),
    "bilinear names": lambda x: F.bilinear(input1=x, input2=x.sin(), weight=constant(2, 4, 4)),
    "cosine names": lambda x: F.cosine_similarity(x1=x, x2=x.sin(), dim=2),
    "cosine torch": lambda x: torch.cosine_similarity(x, C, dim=1),
    "normalize names": lambda x: F.normalize(x, p=2, dim=2, eps=1e-9),
    "glu names": lambda x: F.glu(input=x, dim=2),
    "gelu names": lambda x: F.gelu(x, approximate="tanh"),
    "softplus names": lambda x: F.softplus(input=x, beta=2.0, threshold=10.0),
    "softplus negative": lambda x: F.softplus(x, beta=-2.0),
    "mse names": lambda x: F.mse_loss(x, target=C, reduction="none"),
    "mse of a target": lambda x: F.mse_loss(C, x, reduction="none"),
    "mse weighted": lambda x: F.mse_loss(x, C, weight=POSITIVE, reduction="mean") * x,
    "mse weighted sum": lambda x: F.mse_loss(x, C, weight=POSITIVE, reduction="sum") * x,
    "bce names": lambda x: F.binary_cross_entropy_with_logits(
        x, target=POSITIVE, weight=POSITIVE, pos_weight=POSITIVE[0, 0], reduction="mean") * x,
    "cross entropy names": lambda x: F.cross_entropy(
        x, target=LABELS, weight=POSITIVE[0, :, 0], ignore_index=1, reduction="mean") * x,
    "cross entropy sum": lambda x: F.cross_entropy(x, LABELS, reduction="sum") * x,
    "cross entropy shares": lambda x: F.cross_entropy(
        x, POSITIVE, weight=POSITIVE[0, :, 0], reduction="mean") * x,
    "nll": lambda x: F.nll_loss(x.sin(), target=LABELS, weight=POSITIVE[0, :, 0]) * x,
    "attention names": lambda x: F.scaled_dot_product_attention(
        value=x, key=x.sin(), query=x, attn_mask=EYE, scale=0.3),
    "interpolate": lambda x: F.interpolate(x**2, size=7, mode="linear", align_corners=True),
    "avg_pool names": lambda x: F.avg_pool1d(x**2, kernel_size=2, stride=1, padding=1,
                                             count_include_pad=False),
    "expand": lambda x: (x**2)[:, None].expand(size=(2, 5, 3, 4)),
    "flatten names": lambda x: torch.flatten(x**2, start_dim=1),
    "unfold": lambda x: (x**2).unfold(dimension=2, size=2, step=1),
    "transpose names": lambda x: torch.transpose(x**2, dim0=1, dim1=2),
    "movedim": lambda x: torch.movedim(x**2, source=1, destination=2),
    "roll names": lambda x: torch.roll(x**2, shifts=1, dims=2),
    "flip names": lambda x: torch.flip(x**2, dims=(1, 2)),
    "split names": lambda x: torch.split(x**2, split_size_or_sections=2, dim=2)[0],
    "chunk names": lambda x: torch.chunk(x**2, chunks=2, dim=2)[1],
    "tensor_split": lambda x: torch.tensor_split(x**2, indices=(1, 3), dim=2)[1],
    "narrow names": lambda x: torch.narrow(x**2, dim=2, start=1, length=2),
    "select names": lambda x: torch.select(x**2, dim=2, index=1),
    "repeat_interleave names": lambda x: torch.repeat_interleave(x**2, repeats=2, dim=1),
    "take_along_dim": lambda x: torch.take_along_dim(x**2, indices=INDEX, dim=2),
    "diag_embed": lambda x: torch.diag_embed(x**2, offset=1),
    "iterated": lambda x: torch.stack([row * row for row in x]),
    "unpacked": lambda x: torch.stack([*x.unbind(2)], 2) ** 2,
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_spellings_agree_with_nested_forward_mode(name: str) -> None:
    def f(x: Tensor) -> Tensor:
        y = CALLS[name](x)
        y = y.unsqueeze(1).flatten(1)
        return (y * constant(y.shape[1], seed=3)).sum(1)

    assert_close_to_nested(f, constant(2, 3, 4, seed=1), constant(2, 3, 4, seed=2), 2)


REFUSED: dict[str, tuple[Map, str]] = {
    "where by values": (lambda x: x.where(x, x), "where.*other arguments"),
    "where method": (lambda x: torch.ones(2, 3).bool().where(x, x), "where.*other arguments"),
    "where alone": (lambda x: torch.where(x)[0], "where.*two values"),
    "where condition": (lambda x: torch.where(x, C, C), "where.*other arguments"),
    "scatter products": (lambda x: x.scatter(2, INDEX, x, reduce="multiply"), "scatter.*multipl"),
    "scatter in place": (lambda x: x.clone().scatter_(2, INDEX, 2.0, reduce="multiply"),
                         "scatter_.*multipl"),
    "view of bits": (lambda x: x.view(torch.float32), "view.*bits"),
    "view of named bits": (lambda x: x.view(dtype=torch.float32), "view.*bits"),
    "mask that varies": (lambda x: C.masked_fill(MASK, x[0, 0, 0]), "masked_fill.*constant"),
    "fill that varies": (lambda x: F.pad(C, (1, 1), value=x[0, 0, 0]), "."),
    "old addcdiv": (lambda x: torch.addcdiv(x, 2.0, x, C), "addcdiv.*not known here"),
    "out": (lambda x: torch.sin(x, out=torch.empty(2, 3, 4)), "out="),
    "integer sum": (lambda x: x.sum(1, dtype=torch.int64), "floating"),
    "norm": (lambda x: torch.linalg.vector_norm(x, ord=3, dim=1), "p = 2"),
    "norm by position": (lambda x: torch.norm(x, 1, 2), "p = 2"),
    "nuclear": (lambda x: torch.norm(x, "nuc", (1, 2)), "p = 2"),
    "torch's own loss": (lambda x: torch.binary_cross_entropy_with_logits(x, C), "another order"),
    "reduction": (lambda x: F.mse_loss(x, C, reduction="median"), "median"),
    "two masks": (lambda x: F.scaled_dot_product_attention(x, x, x, EYE, is_causal=True), "mask"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(name: str) -> None:
    call, message = REFUSED[name]
    x = constant(2, 3, 4, seed=1)
    with pytest.raises(FlexureError, match=message):
        jet(lambda x: call(x).flatten(1).sum(1), x, x, order=2)


@pytest.mark.parametrize(
    ("call", "same"),
    [
        (lambda x: torch.layer_norm(x, normalized_shape=(4,), weight=D[0], eps=0.1),
         lambda x: F.layer_norm(x, (4,), D[0], None, 0.1)),
        (lambda x: torch.layer_norm(x, (4,), None, None, 0.1, False),
         lambda x: F.layer_norm(x, (4,), eps=0.1)),
        (lambda x: torch.instance_norm(
            input=x, weight=None, bias=D[:, 0], running_mean=None, running_var=None,
            use_input_stats=True, momentum=0.1, eps=0.1, cudnn_enabled=False),
         lambda x: F.instance_norm(x, bias=D[:, 0], eps=0.1)),
    ],
)  # fmt: skip
def test_norms_by_their_own_names(call: Map, same: Map) -> None:
    x, v = constant(2, 3, 4, seed=1), constant(2, 3, 4, seed=2)
    found = jet(lambda x: (call(x) * D).sum((1, 2)), x, v, order=3)
    expected = jet(lambda x: (same(x) * D).sum((1, 2)), x, v, order=3)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(found[0], (call(x) * D).sum((1, 2)))


def test_scatter_with_addition() -> None:
    x, v = constant(2, 3, 4, seed=1), constant(2, 3, 4, seed=2)
    for added in (
        lambda x: x.sin().scatter(2, INDEX, src=x.cos(), reduce="add"),
        lambda x: x.sin().scatter_(2, INDEX, x.cos(), reduce="add"),
    ):
        found = jet(lambda x, f=added: (f(x) * D).sum((1, 2)), x, v, order=3)
        expected = jet(lambda x: (x.sin().scatter_add(2, INDEX, x.cos()) * D).sum((1, 2)), x, v,
                       order=3)  # fmt: skip
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("call", [torch.linalg.vector_norm, torch.norm])
def test_norms_take_a_dtype(call: Callable[..., Tensor]) -> None:
    x, v = constant(2, 3).float(), constant(2, 3, seed=8).float()
    found = jet(lambda x: call(x, dim=1, dtype=torch.float64), x, v, order=2)
    assert found.dtype == torch.float64
    expected = jet(lambda x: call(x, dim=1), x.double(), v.double(), order=2)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_bases_of_powers_are_taken_in_the_result_s_precision() -> None:
    x, v = constant(2, 1), constant(2, 1, seed=8)
    for base in (torch.tensor(3), torch.tensor([3]), torch.tensor([3.0])):
        found = jet(lambda x, base=base: torch.pow(base, x), x, v, order=3)
        expected = jet(lambda x: torch.pow(3.0, x), x, v, order=3)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    zero = jet(lambda x: torch.tensor([0]) ** (x * x + 1), x, v, order=3)
    assert torch.equal(zero, torch.zeros(4, 2).double())
    mixed = jet(lambda x: x.float() ** x.double().sin(), x.abs() + 1, v, order=1)
    assert mixed.dtype == torch.float64
    found = jet(lambda x: torch.tensor([0.1]) ** x, x, v, order=2)
    expected = jet(lambda x: torch.tensor([0.1]).double() ** x, x, v, order=2)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
