"""Curvature against dense Hessians, closed forms and the pretrained network."""

from __future__ import annotations

import copy
import warnings
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import flexure
from flexure.contracts import FlexureError
from flexure.measure.curvature import Curvature, curvature
from flexure.measure.fields import measuring
from flexure.measure.products import PRODUCTS
from flexure.measure.rounding import RoundingWarning
from flexure.memory import peak_bytes
from flexure.models.preprocess import CIFAR
from tests.measure.untouched import untouched
from tests.reference.curvature import dense, logistic_curvature

DOUBLE = torch.float64
TIGHT = {"tol": 1e-10, "max_products": 200}


def convnet(activation: type[nn.Module] = nn.Softplus, classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        activation(),
        nn.Conv2d(4, 6, 3, stride=2, dilation=1, groups=2),
        activation(),
        nn.Flatten(),
        nn.Linear(24, classes),
    ).eval()


def mlp(size: int, classes: int, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    return nn.Sequential(nn.Linear(size, 6), activation(), nn.Linear(6, classes))


def cross_entropy(model: nn.Module, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of dense gradients and Hessians of the plain cross-entropy."""
    model = copy.deepcopy(model).double().eval()
    found = [
        dense(lambda s, label=label: F.cross_entropy(model(s[None]), label[None]), x[i : i + 1])
        for i, label in enumerate(y)
    ]
    return torch.cat([g for g, _ in found]), torch.cat([h for _, h in found])


def agrees(found: Curvature, gradient: Tensor, hessian: Tensor, rel: float) -> None:
    assert found.converged.all()
    for mine, true in (
        (found.gradient_norm, gradient),
        (found.hessian_norm, hessian),
        (found.normalized, hessian / gradient),
    ):
        torch.testing.assert_close(mine.double(), true, rtol=rel, atol=0)


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("activation", [nn.Softplus, nn.Tanh, nn.GELU, nn.ReLU])
def test_float64_is_the_dense_hessian(activation: type[nn.Module], products: str) -> None:
    model, x = convnet(activation).double(), torch.randn(6, 2, 6, 6, dtype=DOUBLE)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    with untouched(model, x, y):
        found = curvature(model, x, y, products=products, **TIGHT)
    agrees(found, *cross_entropy(model, y, x), rel=1e-9)
    loss = F.cross_entropy(model(x), y, reduction="none").detach()
    torch.testing.assert_close(found.value, loss)
    torch.testing.assert_close(found.probability, (-loss).exp())


def test_defaults_in_float32() -> None:
    model, x = convnet(), torch.randn(20, 2, 6, 6)
    y = torch.arange(20) % 4
    agrees(curvature(model, x, y), *cross_entropy(model, y, x), rel=2e-2)
    agrees(curvature(model, x, y, tol=1e-3, max_products=40), *cross_entropy(model, y, x), rel=1e-3)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(1, 4), st.integers(2, 4))
def test_shapes(shape: list[int], batch: int, classes: int) -> None:
    size = int(np.prod(shape))
    model = nn.Sequential(nn.Flatten(), mlp(size, classes)).double()
    x, y = torch.randn(batch, *shape, dtype=DOUBLE), torch.randint(classes, (batch,))
    agrees(curvature(model, x, y, **TIGHT), *cross_entropy(model, y, x), rel=1e-9)


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_surely_right_and_surely_wrong_samples(scale: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = nn.Linear(3, 4).to(dtype)
    with torch.no_grad():
        model.weight.mul_(scale)
    x = torch.randn(1, 3).to(dtype).expand(4, 3)
    found = curvature(model, x, torch.arange(4), tol=1e-6)
    for y in range(4):
        g, h, c = logistic_curvature(model.weight.detach(), model.bias.detach(), x[y], y)
        rel = 1e-4 * (scale if dtype == torch.float32 else 1e-6) + 1e-9
        assert found.normalized[y].item() == pytest.approx(c, rel=min(rel, 2e-3))
        assert found.gradient_norm[y].item() == pytest.approx(g, rel=min(rel, 2e-3), abs=1e-30)
        assert found.hessian_norm[y].item() == pytest.approx(h, rel=min(rel, 2e-3), abs=1e-30)
    assert found.converged.all()
    assert not found.zero_gradient.any()


def test_a_gradient_that_underflows_is_no_zero_gradient() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[300.0, 0.0], [0.0, 1.0]]))
    found = curvature(model, torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert found.gradient_norm.item() == 0
    assert not found.zero_gradient.item()
    # H = σ(−m)σ(m)∇m∇mᵀ, so C = σ(m)·‖∇m‖.
    assert found.normalized.item() == pytest.approx((300**2 + 1) ** 0.5)


def test_zero_gradients_are_masked() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    found = curvature(nn.Identity(), x, field=lambda x: x.square().sum(1))
    assert found.zero_gradient.tolist() == [True, False]
    assert found.normalized[0].isnan()
    assert found.hessian_norm.tolist() == pytest.approx([2, 2])
    assert found.converged.all()


def test_affine_fields_have_no_curvature() -> None:
    model = nn.Linear(3, 1)
    found = curvature(model, torch.randn(4, 3))
    assert found.hessian_norm.tolist() == [0.0] * 4
    assert found.normalized.tolist() == [0.0] * 4
    assert found.converged.all()
    torch.testing.assert_close(found.gradient_norm, model.weight.norm().detach().expand(4))
    assert found.probability.isnan().all()


def test_regression() -> None:
    torch.manual_seed(2)
    single, x = mlp(4, 1).double(), torch.randn(5, 4, dtype=DOUBLE)
    agrees(curvature(single, x, **TIGHT), *dense(lambda s: single(s)[0], x), rel=1e-9)
    several, target = mlp(4, 3).double(), torch.randn(5, 3, dtype=DOUBLE)
    found = [
        dense(lambda s, t=t: (several(s) - t).square().sum() / 2, x[i : i + 1])
        for i, t in enumerate(target)
    ]
    gradient, hessian = (torch.cat(each) for each in zip(*found, strict=True))
    agrees(curvature(several, x, target, **TIGHT), gradient, hessian, rel=1e-9)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "sine": (lambda x: torch.sin(x.sum(1)), lambda x: torch.sin(x.sum())),
    "product": (lambda x: x.prod(1), lambda x: x.prod()),
    "norm": (lambda x: x.norm(dim=1), lambda x: x.norm()),
    "saddle": (lambda x: x[:, 0] ** 2 - x[:, 1] ** 2, lambda x: x[0] ** 2 - x[1] ** 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_field(name: str) -> None:
    batched, single = FUNCTIONS[name]
    x = torch.randn(4, 3, dtype=DOUBLE)
    agrees(curvature(nn.Identity(), x, field=batched, **TIGHT), *dense(single, x), rel=1e-9)


def test_closures_over_a_model_and_models_that_are_functions() -> None:
    model, x = convnet().double(), torch.randn(3, 2, 6, 6, dtype=DOUBLE)
    y = torch.tensor([1, 2, 3])
    expected = curvature(model, x, y, **TIGHT)
    closed = curvature(lambda x: model(x), x, y, **TIGHT)
    torch.testing.assert_close(closed.normalized, expected.normalized, rtol=1e-9, atol=0)
    loss = curvature(
        model,
        x[:1],
        field=lambda x: F.cross_entropy(model(x), y[:1].expand(len(x)), reduction="none"),
        **TIGHT,
    )
    torch.testing.assert_close(loss.hessian_norm, expected.hessian_norm[:1], rtol=1e-9, atol=0)


def test_two_classes_of_a_tiny_network() -> None:
    torch.manual_seed(3)
    model, x = mlp(1, 2).double(), torch.linspace(-3, 3, 9, dtype=DOUBLE)[:, None]
    y = torch.arange(9) % 2
    found = curvature(model, x, y, **TIGHT)
    agrees(found, *cross_entropy(model, y, x), rel=1e-9)
    assert found.products.tolist() == [1] * 9


def test_chunks_change_rounding_only_and_seeds_change_starts() -> None:
    model, x = convnet().double(), torch.randn(7, 2, 6, 6, dtype=DOUBLE)
    y = torch.arange(7) % 4
    whole = curvature(model, x, y)
    for chunk in (1, 3, 7, 100):
        part = curvature(model, x, y, chunk=chunk)
        torch.testing.assert_close(part.hessian_norm, whole.hessian_norm, rtol=1e-11, atol=0)
        assert part.products.tolist() == whole.products.tolist()
    other = curvature(model, x, y, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(other.hessian_norm, whole.hessian_norm)
    torch.testing.assert_close(other.hessian_norm, whole.hessian_norm, rtol=2e-2, atol=0)
    assert torch.equal(curvature(model, x, y).hessian_norm, whole.hessian_norm)


def test_a_memory_budget_is_kept() -> None:
    model, x = convnet(), torch.randn(64, 2, 6, 6)
    y = torch.arange(64) % 4
    unlimited = peak_bytes(lambda: curvature(model, x, y, check=False))
    budget = unlimited // 3
    used = peak_bytes(lambda: curvature(model, x, y, memory=budget, check=False))
    assert used <= budget
    with untouched(model, x, y):
        found = curvature(model, x, y, memory=budget)
    torch.testing.assert_close(found.normalized, curvature(model, x, y).normalized)
    with untouched(model, x, y), pytest.raises(FlexureError, match="memory budget of at least"):
        curvature(model, x, y, memory=1000)


@pytest.mark.parametrize("products", PRODUCTS)
def test_models_in_training_mode_are_evaluated_and_left_alone(products: str) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh())
    model.append(nn.Linear(8, 3)).train()
    model[0].bias.requires_grad_(False)
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with untouched(model, x, y), torch.no_grad(), torch.autocast("cpu"):
        found = curvature(model, x, y, products=products)
    assert torch.equal(
        found.normalized, curvature(model.eval(), x, y, products=products).normalized
    )


class Half(torch.autograd.Function):
    """A backward pass that cannot be differentiated: it hides its dependence on the input."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.slope = 2 * x.detach()  # type: ignore[attr-defined]
        return x.square()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * ctx.slope  # type: ignore[attr-defined]


def test_wrong_second_derivatives_are_refused() -> None:
    def field(x: Tensor) -> Tensor:
        return Half.apply(x).sum(1)

    x = torch.randn(4, 3)
    with pytest.raises(FlexureError, match="second derivative is missing or wrong"):
        curvature(nn.Identity(), x, field=field)
    # Which nothing else would notice.
    assert curvature(nn.Identity(), x, field=field, check=False).converged.all()


def test_what_is_out_of_range_is_refused() -> None:
    x = torch.randn(2, 3)
    wrong = [{"products": "magic"}, {"chunk": 0}, {"tol": 0.0}, {"max_products": 0}]
    for options in wrong:
        with pytest.raises(FlexureError, match="expected"):
            curvature(nn.Linear(3, 2), x, **options)
    with pytest.raises(FlexureError, match="float"):
        curvature(nn.Linear(3, 2).half(), x.half())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"y": [0, 1]}, r"expected y to be a tensor, got \[0, 1\]"),
        ({"chunk": 2.5}, "expected chunk to be a count"),
        ({"tol": "a"}, "expected tol to be a number between 0 and 1"),
        ({"max_products": 2.5}, "expected max_products to be a count"),
        ({"generator": 3}, "expected generator to be a torch.Generator"),
        ({"x": UserDict(input=torch.randn(2, 3))}, r"got UserDict; give dict\(x\)"),
        ({"x": torch.randn(2, 3, dtype=DOUBLE)}, r"model, torch.float32, got torch.float64"),
        ({"x": torch.randn(2, 3, dtype=DOUBLE), "y": torch.tensor([0, 1])}, "dtype of the model"),
    ],
)
def test_arguments_of_other_kinds_are_refused_in_one_line(
    options: dict[str, Any], message: str
) -> None:
    model, x = nn.Linear(3, 2), torch.randn(2, 3)
    with untouched(model, x), pytest.raises(FlexureError, match=message):
        curvature(model, **{"x": x, **options})


def test_rounding_of_the_network_itself_is_told() -> None:
    """What cancels in float32 has other derivatives there; sound networks are silent."""
    x = torch.randn(6, 3)

    def cancels(x: Tensor) -> Tensor:
        return (x.sin() + 1e6).square().sum(1) - 2e6 * x.sin().sum(1)

    with pytest.warns(RoundingWarning, match=r"within 1% of those in float64.*model.double"):
        curvature(nn.Identity(), x, field=cancels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curvature(nn.Identity(), x.double(), field=cancels)
        curvature(convnet(), torch.randn(6, 2, 6, 6))
        curvature(convnet(nn.ReLU), torch.randn(6, 2, 6, 6))


def test_checked_samples_are_spread_over_the_batch() -> None:
    """Batches are often sorted."""
    x = torch.rand(40, 3)
    x[8:, 0] += 2.0

    def field(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 1.5, Half.apply(x).sum(1), x.square().sum(1))

    with pytest.raises(FlexureError, match="second derivative is missing or wrong"):
        curvature(nn.Identity(), x, field=field)


def test_a_tensor_that_samples_share_is_asked_to_be_closed_over() -> None:
    class Positions(nn.Module):
        def forward(self, inputs: Tensor, positions: Tensor) -> Tensor:
            return (inputs + positions.sin()[None, :, None]).tanh().sum(1)

    x = {"inputs": torch.randn(4, 4, 3), "positions": torch.arange(4)}
    with pytest.raises(FlexureError, match="close over tensors that samples share"):
        curvature(Positions(), x)


def test_joins_like_every_measure() -> None:
    model, x = convnet(), torch.randn(4, 2, 6, 6)
    found = curvature(model, x)
    joined = Curvature.joined([found.taken(slice(0, 1)), found.taken(slice(1, 4))])
    assert torch.equal(joined.normalized, found.normalized)


@pytest.fixture(scope="module")
def pretrained(real_data: Path) -> tuple[nn.Module, Tensor, Tensor]:
    file = real_data / "resnet-cifar10" / "resnet20.safetensors"
    model = flexure.load_model(f"flexure:resnet20?weights={file}").model
    with np.load(real_data / "cifar10-lossless" / "test846.npz") as data:
        images = torch.from_numpy(data["images"][:24]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(data["labels"][:24])
    x = torch.stack([CIFAR(image) for image in images])
    # Some labels are wrong, so that samples are surely wrong too.
    return model, x, torch.where(torch.arange(24) % 3 == 0, (labels + 1) % 10, labels)


def test_relu_resnet_in_float32(pretrained: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = pretrained
    with untouched(model, x, y):
        found = curvature(model, x, y, tol=1e-3)
    assert found.converged.all()
    assert ((found.probability < 1e-6) | (found.probability > 1 - 1e-6)).sum() >= 6
    g, c = [], []
    for z, rows, label in zip(model(x).detach().double(), jacobian(model, x), y, strict=True):
        # ∇m of m = z_y − logsumexp of the others, whose ∇² is minus that of the logsumexp.
        others = torch.cat([rows[:label], rows[label + 1 :]])
        rest = torch.cat([z[:label], z[label + 1 :]])
        p = rest.softmax(0)
        slope = rows[label] - p @ others
        m = z[label] - rest.logsumexp(0)
        factors = torch.cat([others, slope[None]])
        core = torch.block_diag(torch.diag(p) - torch.outer(p, p), m.sigmoid())
        # Fᵀ core F has the nonzero eigenvalues of core F Fᵀ.
        c.append(torch.linalg.eigvals(core @ (factors @ factors.T)).abs().max() / slope.norm())
        g.append(slope.norm() * (-m).sigmoid())
    agrees(found, torch.stack(g), torch.stack(c) * torch.stack(g), rel=1e-3)


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """(B, classes, d), in float64, of the network that rounds like the float32 one at its kinks."""
    rows = []
    x = x.clone().requires_grad_()
    z = model(x)
    for k in range(z.shape[1]):
        rows.append(torch.autograd.grad(z[:, k].sum(), x, retain_graph=True)[0].flatten(1))
    return torch.stack(rows, 1).double()


def test_smooth_resnet_is_never_believed_when_wrong(
    pretrained: tuple[nn.Module, Tensor, Tensor],
) -> None:
    model, x, y = copy.deepcopy(pretrained[0]), *pretrained[1:]
    flexure.steer(model, beta=0.9, example=x[:1])
    x, y = x[:6], y[:6]
    found = curvature(model, x, y, tol=1e-3, max_products=40)
    true = curvature(model.double(), x.double(), y, tol=1e-7, max_products=100, check=False)
    assert true.converged.all()
    agrees(found, true.gradient_norm, true.hessian_norm, rel=1e-3)
    x, norm = x[:3].double(), true.hessian_norm[:3]
    wrong, kinds = 0, set()
    for count in range(1, 13):
        few = curvature(model, x, y[:3], max_products=count, check=False)
        off = (few.hessian_norm - norm).abs() > 0.02 * norm
        assert not (off & few.converged).any()
        wrong, kinds = wrong + int(off.sum()), kinds | set(few.converged.tolist())
    assert wrong
    assert kinds == {True, False}


def test_a_sample_that_is_not_finite_does_not_touch_the_others() -> None:
    model, x = convnet().double(), torch.randn(3, 2, 6, 6, dtype=DOUBLE)
    y = torch.tensor([0, 1, 2])
    expected = curvature(model, x, y)
    x[1, 0, 0, 0] = torch.nan
    found = curvature(model, x, y, check=False)
    assert found.converged.tolist() == [True, False, True]
    assert found.normalized[1].isnan()
    torch.testing.assert_close(found.normalized[::2], expected.normalized[::2])


def test_inputs_that_are_not_finite_are_refused_wherever_they_are() -> None:
    model, x = convnet().double(), torch.randn(40, 2, 6, 6, dtype=DOUBLE)
    x[20, 0, 0, 0] = torch.nan
    with pytest.raises(FlexureError, match=r"infinity in 1 of 40 samples .numbers 20."):
        curvature(model, x)
    x[21:] = torch.inf
    with pytest.raises(FlexureError, match=r"20 of 40 samples .numbers 20, 21, .*27, \.\.\.\)"):
        curvature(model, x, torch.zeros(40, dtype=torch.long), chunk=2)


def test_attention_and_embedded_tokens() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, "gelu", batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
            hidden = self.layer(inputs_embeds, src_key_padding_mask=attention_mask == 0)
            return self.head(hidden[:, 0])

    model = Encoder().double().train()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    x = {"inputs_embeds": torch.randn(3, 4, 8, dtype=DOUBLE), "attention_mask": mask}
    y = torch.tensor([0, 1, 2])
    with untouched(model, *x.values()):
        found = curvature(model, x, y, chunk=2, **TIGHT)
    model.eval()
    with measuring(model):
        true = [
            dense(
                lambda s, i=i: F.cross_entropy(model(s[None], mask[i : i + 1]), y[i : i + 1]),
                x["inputs_embeds"][i : i + 1],
            )
            for i in range(3)
        ]
    gradient, hessian = (torch.cat(each) for each in zip(*true, strict=True))
    agrees(found, gradient, hessian, rel=1e-9)
