"""Hessian-vector products in every way, on layers as they are and as affine maps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from flexure.measure.constant_weights import ConstantWeights
from flexure.measure.fields import Field, measuring, scalar_field
from flexure.measure.products import PRODUCTS
from tests.measure.untouched import untouched
from tests.networks import BasicBlock, ResNet

DOUBLE = torch.float64


def classifier(*layers: nn.Module) -> nn.Module:
    """Followed by what makes two logits of anything, without curvature of its own being lost."""
    return nn.Sequential(*layers, nn.Tanh(), Pooled()).double().eval()


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return torch.stack([x.square().sum(1), x.sin().sum(1), x.sum(1)], 1)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: classifier(nn.Conv1d(2, 3, 3)), (2, 7)),
    "conv1d, same": (lambda: classifier(nn.Conv1d(2, 3, 4, padding="same")), (2, 7)),
    "conv2d": (lambda: classifier(nn.Conv2d(4, 6, 3, 2, 1, 2, 2)), (4, 8, 9)),
    "conv2d, circular": (
        lambda: classifier(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")),
        (2, 5, 5),
    ),
    "conv2d, no bias": (lambda: classifier(nn.Conv2d(2, 3, (3, 1), bias=False)), (2, 5, 5)),
    "conv3d": (lambda: classifier(nn.Conv3d(2, 2, 2, stride=(1, 2, 1))), (2, 3, 4, 3)),
    "transposed": (lambda: classifier(nn.ConvTranspose2d(2, 3, 3, 2)), (2, 4, 4)),
    "batch norm": (lambda: classifier(moved(nn.BatchNorm2d(3))), (3, 4, 4)),
    "batch norm, 1d": (lambda: classifier(moved(nn.BatchNorm1d(3, affine=False))), (3,)),
    "batch norm, no statistics": (
        lambda: classifier(nn.Unflatten(1, (1, 6)), nn.InstanceNorm1d(1)),
        (6,),
    ),
    "weight norm": (lambda: classifier(parametrizations.weight_norm(nn.Conv1d(2, 3, 3))), (2, 7)),
    "residual blocks, in-place ReLU": (
        lambda: ResNet(BasicBlock, [1, 1, 1, 1], width=4).double().eval(),
        (3, 32, 32),
    ),
    "attention": (
        lambda: (
            nn.Sequential(
                nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu"), Pooled()
            )
            .double()
            .eval()
        ),
        (3, 8),
    ),
}


def moved(norm: nn.Module) -> nn.Module:
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


def reference(field: Field, v: Tensor) -> Tensor:
    """Plain double backward with torch's own layers."""
    x = field.x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(field(x).sum(), x, create_graph=True)
    (product,) = torch.autograd.grad(gradient, x, v)
    return product


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("products", PRODUCTS)
def test_products_are_those_of_torch(name: str, products: str) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make(), torch.randn(4, *shape, dtype=DOUBLE)
    v = torch.randn_like(x)
    with untouched(model, x), measuring(model):
        field = scalar_field(model, x, torch.tensor([0, 1, 2, 0]))
        hessian = PRODUCTS[products](field)
        expected = reference(field, v)
        torch.testing.assert_close(hessian.values, field(x).detach())
        torch.testing.assert_close(hessian(v, torch.arange(4)), expected)
        # Fewer and fewer samples: padded, then with another graph.
        for rows in ([0, 1, 3], [1, 3], [3]):
            at = torch.tensor(rows)
            torch.testing.assert_close(hessian(v[at], at), expected[at])


def test_weights_that_depend_on_the_input_are_differentiated() -> None:
    x, v = torch.randn(1, 2, 3, 3, dtype=DOUBLE), torch.randn(1, 2, 3, 3, dtype=DOUBLE)
    image = torch.randn(1, 2, 6, 6, dtype=DOUBLE)
    made = torch.randn(2, 2, dtype=DOUBLE)
    for field in (
        lambda x: F.conv2d(image, x).square().sum((1, 2, 3)),
        lambda x: F.conv2d(image, torch.einsum("oi,bihw->bohw", made, x)).square().sum((1, 2, 3)),
    ):
        of = scalar_field(nn.Identity(), x, field=field)
        for make in PRODUCTS.values():
            torch.testing.assert_close(make(of)(v, torch.arange(1)), reference(of, v))


def test_fields_that_use_function_transforms() -> None:
    model = classifier(nn.Conv2d(2, 3, 3), moved(nn.BatchNorm2d(3)))

    def field(x: Tensor) -> Tensor:
        return torch.func.vmap(lambda sample: model(sample[None])[0, 0])(x)

    x = torch.randn(3, 2, 4, 4, dtype=DOUBLE)
    v = torch.randn_like(x)
    with measuring(model):
        of = scalar_field(model, x, field=field)
        expected = reference(of, v)
        torch.testing.assert_close(PRODUCTS["double-backward"](of)(v, torch.arange(3)), expected)


def test_affine_maps_keep_their_derivatives_of_all_kinds() -> None:
    layer = moved(nn.BatchNorm2d(3)).double().eval().requires_grad_(False)
    conv = nn.Conv2d(2, 3, 3, padding=1).double().requires_grad_(False)
    x = torch.randn(2, 2, 4, 4, dtype=DOUBLE, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        with ConstantWeights():
            return layer(conv(x.clone()))

    torch.testing.assert_close(run(x), layer(conv(x)))
    assert torch.autograd.gradcheck(run, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: run(x).sin(), x)


def test_training_mode_statistics_are_left_to_torch() -> None:
    layer = nn.BatchNorm1d(3).double()
    x = torch.randn(5, 3, dtype=DOUBLE)
    with ConstantWeights():
        found = layer(x)
    torch.testing.assert_close(found.mean(0), torch.zeros(3, dtype=DOUBLE))
    assert layer.num_batches_tracked == 1
