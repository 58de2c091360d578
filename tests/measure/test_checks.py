"""Every refusal fires on a constructed culprit, and none on a sound network."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flexure
from flexure.contracts import FlexureError
from flexure.measure import products
from flexure.measure.checks import check_field
from flexure.measure.fields import measuring
from flexure.measure.wide import in_float64
from flexure.measuring import unchanged_randomness
from tests.networks import Swin, resnet18

IMAGE, VECTOR = (3, 16, 16), (5,)


def convnet(norm: Callable[[int], nn.Module], act: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    layers = [nn.Conv2d(3, 6, 3, 2), norm(6), act(), nn.Conv2d(6, 8, 3, 2), norm(8), act()]
    return nn.Sequential(*layers, nn.AvgPool2d(3), nn.Flatten(), nn.Linear(8, 4))


def steered() -> nn.Module:
    net = convnet(nn.BatchNorm2d)
    flexure.steer(net, beta=0.7, example=torch.zeros(1, *IMAGE))
    return net


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Insistent(nn.Module):
    """Code that demands float32 in every usual way."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.constant = torch.randn(8, 4)  # no buffer: nothing moves it

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x).float())
        hidden = hidden.to(torch.float32) * torch.linspace(1, 2, 8)
        hidden = hidden.type_as(torch.zeros(1)) @ self.constant
        out = torch.zeros(len(x), 4)
        out[:, :] = hidden
        out += torch.ones(4, dtype=torch.float32)
        return out.to(x.dtype)


class Parametrized(nn.Module):
    """Weights that are computed from others, in both of torch's ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 8))
        self.second = nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
        self.second_again = self.second
        self.tied = nn.Linear(5, 8)
        self.tied.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second_again(torch.tanh(self.first(x))) + self.second(self.tied(x).sin())


def mlp(act: Callable[[], nn.Module] = nn.Softplus) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), act(), nn.Linear(8, 8), act(), nn.Linear(8, 4))


class Times(nn.Module):
    """Multiplies by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Shifted(nn.Module):
    """Adds one to the first class."""

    def forward(self, x: Tensor) -> Tensor:
        return x + F.one_hot(torch.zeros(len(x), dtype=torch.long), 4)


class EqualHeads(nn.Module):
    """Gives the first two classes the same logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, [0, 0, 2, 3]]


def sigmoids() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 10), Times(30.0), nn.Sigmoid(), nn.Linear(10, 4))


SOUND: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ReLU MLP": (lambda: mlp(nn.ReLU), VECTOR),
    "softplus MLP": (mlp, VECTOR),
    "sharp softplus MLP": (lambda: mlp(lambda: nn.Softplus(beta=1000)), VECTOR),
    "linear": (lambda: nn.Linear(5, 4), VECTOR),
    "ReLU convnet": (lambda: convnet(nn.BatchNorm2d), IMAGE),
    "GroupNorm": (lambda: convnet(lambda n: nn.GroupNorm(2, n), nn.GELU), IMAGE),
    "InstanceNorm": (lambda: convnet(nn.InstanceNorm2d, nn.SiLU), IMAGE),
    "dropout": (lambda: nn.Sequential(nn.Dropout(), mlp()), VECTOR),
    "steered": (steered, IMAGE),
    "resnet18": (lambda: resnet18(4), (3, 32, 32)),
    "transformer": (Encoder, (6, 8)),
    "LSTM": (Recurrent, (6, 8)),
    "Swin": (Swin, (3, 16, 16)),
    "input overwritten": (lambda: nn.Sequential(nn.ELU(inplace=True), mlp()), VECTOR),
    "parametrized": (Parametrized, VECTOR),
    "scripted": (lambda: torch.jit.script(mlp()), VECTOR),
    "float32 inside": (Insistent, VECTOR),
    "saturated": (lambda: nn.Sequential(Times(100.0), sigmoids()), VECTOR),
    "sharp softmax": (lambda: nn.Sequential(mlp(nn.Tanh), Times(100.0), nn.Softmax(-1)), VECTOR),
    "equal heads": (lambda: nn.Sequential(mlp(), EqualHeads()), VECTOR),
    "nearly constant": (lambda: nn.Sequential(mlp(nn.Tanh), Times(1e-12), Shifted()), VECTOR),
}


def checked(net: nn.Module, x: Tensor, **options: Any) -> None:
    """Checks the cross-entropy of a classifier, and a logit."""
    y = torch.arange(len(x)) % 4
    loss = lambda rows: lambda z: F.cross_entropy(net(z), y[rows], reduction="none")  # noqa: E731
    with measuring(None):
        check_field(loss, x, model=net, **options)
        check_field(lambda rows: lambda z: net(z)[:, 0], x, model=net, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("batch", [1, 2, 11])
def test_sound_networks_pass(name: str, dtype: torch.dtype, batch: int) -> None:
    make, shape = SOUND[name]
    net = make().eval()
    if name != "float32 inside":
        net.to(dtype)
    x = torch.randn(batch, *shape, dtype=torch.float32 if name == "float32 inside" else dtype)
    before = {key: (value, value.clone()) for key, value in net.state_dict(keep_vars=True).items()}
    checked(net, x)
    after = net.state_dict(keep_vars=True)
    assert all(after[key] is value and value.equal(old) for key, (value, old) in before.items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("scale", [0.0, 1e-6, 255.0])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_inputs_of_any_scale_pass(scale: float, offset: float) -> None:
    x = scale * torch.randn(9, 5) + offset
    checked(mlp(nn.ReLU), x)
    checked(mlp(), x)
    # Every unit of the first layer is on its kink.
    checked(nn.Sequential(nn.Linear(5, 8, bias=False), nn.ReLU(), nn.Linear(8, 4)), 0 * x)


def test_a_few_samples_without_finite_values_are_left_to_the_measure() -> None:
    x = torch.randn(9, 5)
    x[0] = 1e30
    inner = mlp()
    checked(Calls(lambda z: inner(z) + torch.exp(z.sum(1, keepdim=True))), x)
    with pytest.raises(
        FlexureError, match=r"finite inputs, got nan or infinity in 1 of 9 samples .numbers 3.;"
    ):
        checked(inner, x.index_fill(0, torch.tensor(3), torch.nan))


class Once(torch.autograd.Function):
    """A square whose backward cannot be differentiated; torch says so, but not to `grad`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Silent(torch.autograd.Function):
    """A square whose backward cannot be differentiated, and does not say so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x.detach()
        return x**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.kept * grad


class FirstOrder(torch.autograd.Function):
    """A square that refuses to be differentiated twice, as compiled graphs do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("no double backward")
        return 2 * ctx.saved_tensors[0] * grad


class Straight(torch.autograd.Function):
    """Rounding with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def detached(x: Tensor) -> Tensor:
    return x * x.detach()


def through_data(x: Tensor) -> Tensor:
    return x * x.data


def without_graph(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x**2


class Calls(nn.Module):
    """A function as a layer of a network."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def across(x: Tensor) -> Tensor:
    return (x @ x.T).softmax(-1) @ x


CULPRITS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "once": (Once.apply, "Hessian-vector products within 1 %"),
    "first order only": (FirstOrder.apply, "expected a field with second derivatives"),
    "silent": (Silent.apply, "Hessian-vector products within 1 %"),
    "detached": (detached, "gradients within 1 %"),
    "data": (through_data, "gradients within 1 %"),
    "no graph": (without_graph, "gradients within 1 %"),
    "straight-through": (Straight.apply, "gradients within 1 %"),
    "dropout": (lambda x: F.dropout(x, 0.5, training=True), "same values in every evaluation"),
    "noise": (lambda x: x + torch.randn_like(x), "same values in every evaluation"),
    "NumPy noise": (
        lambda x: x + torch.from_numpy(np.random.randn(*x.shape)),
        "same values in every evaluation",
    ),
    "batch mean": (lambda x: x - x.mean(0), "no sample depends on another"),
    "neighbour": (lambda x: x + 0.01 * x.roll(1, 0), "no sample depends on another"),
    "attention": (across, "no sample depends on another"),
    "infinite": (lambda x: x / 0, "finite values"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [2, 3, 11])
@pytest.mark.parametrize("name", CULPRITS)
def test_culprits_are_refused(name: str, batch: int, dtype: torch.dtype) -> None:
    culprit, message = CULPRITS[name]
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), Calls(culprit), nn.Linear(8, 4)).to(dtype)
    with pytest.raises(FlexureError, match=message):
        checked(net, torch.randn(batch, 5, dtype=dtype))


@pytest.mark.parametrize("track", [True, False])
def test_batch_statistics_are_refused(track: bool) -> None:
    net = convnet(lambda n: nn.BatchNorm2d(n, track_running_stats=track))
    net.train(track)  # without running statistics eval mode couples as well
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(FlexureError, match="no sample depends on another"):
        checked(net, torch.randn(6, *IMAGE))
    assert all(value.equal(before[key]) for key, value in net.state_dict().items())


class TrainsAlways(nn.Module):
    """Sets its normalisation to training in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm.train()(x)


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 6])
@pytest.mark.parametrize("name", ["no statistics", "training", "mean", "image"])
def test_coupling_is_told_whatever_the_batch(name: str, batch: int, alike: bool) -> None:
    norms = {
        "no statistics": lambda: nn.BatchNorm1d(5, track_running_stats=False),
        "training": TrainsAlways,
        "mean": lambda: Calls(lambda x: x - x.mean(0)),
        "image": lambda: nn.Sequential(
            nn.Unflatten(1, (1, 5)), nn.BatchNorm1d(1, track_running_stats=False), nn.Flatten()
        ),
    }
    net = nn.Sequential(norms[name](), mlp(nn.Tanh)).eval()
    x = torch.randn(batch, 5)
    with pytest.raises(FlexureError, match="no sample depends on another"):
        checked(net, x[:1].expand(batch, -1) if alike else x)


@pytest.mark.parametrize("scale", [30.0, 100.0, 300.0])
def test_saturated_networks_pass(scale: float) -> None:
    """Labels of the least likely class: margins are large, and change by less than rounding."""
    passed = 0
    for seed in range(6):
        torch.manual_seed(seed)
        net, x = sigmoids(), scale * torch.randn(8, 5)
        passed += flexure.curvature(net, x, net(x).argmin(1)).converged.all().item()
    assert passed >= 5


@pytest.mark.parametrize(
    "field",
    [
        lambda x: 1 - torch.exp(-20 * x.square().sum(1)),
        lambda x: 1e9 + 1e-3 * x.sin().sum(1),
    ],
)
def test_fields_that_change_by_less_than_their_rounding_pass(
    field: Callable[[Tensor], Tensor],
) -> None:
    check_field(lambda rows: field, torch.randn(8, 6))


@pytest.mark.parametrize("name", products.PRODUCTS)
def test_products_are_those_that_are_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = products.PRODUCTS[name]

    class Wrong(real):  # type: ignore[valid-type, misc]
        def __call__(self, v: Tensor, rows: Tensor) -> Tensor:
            return 1.05 * super().__call__(v, rows)

    checked(mlp(), torch.randn(4, 5), products=name)
    monkeypatch.setitem(products.PRODUCTS, name, Wrong)  # type: ignore[arg-type]
    with pytest.raises(FlexureError, match="within 1 %"):
        checked(mlp(), torch.randn(4, 5), products=name)


def test_a_wrong_layer_that_acts_on_few_samples_is_refused_by_most_of_those_it_acts_on() -> None:
    """Samples without curvature do not vote."""
    y = torch.tensor([0.0] * 5 + [1.0] * 3)
    field = lambda rows: lambda x: y[rows] * Silent.apply(x).sum(1) + (1 - y[rows]) * x.sum(1)  # noqa: E731
    with pytest.raises(FlexureError, match="in 3 of 8 samples"):
        check_field(field, torch.randn(8, 5))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (lambda x: x, "one value for each of"),
        (lambda x: x.sum(), "one value for each of"),
        (lambda x: (x.sum(1), x), "got tuple"),
        (lambda x: x.sum(1) + torch.zeros(7), "any number of samples"),
    ],
)
def test_what_is_no_scalar_field_is_refused(field: Any, message: str) -> None:
    with pytest.raises(FlexureError, match=message):
        check_field(lambda rows: field, torch.randn(7, 5))


@pytest.mark.parametrize("name", ["dropout", "NumPy noise"])
def test_random_generators_are_put_back(name: str) -> None:
    net = Calls(CULPRITS[name][0])
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with pytest.raises(FlexureError):
        checked(net, torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))
    got = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    assert got == (torch.rand(1), np.random.rand(), random.random())


def test_everything_inside_is_float64() -> None:
    net = Insistent()
    seen: list[torch.dtype] = []
    x = torch.randn(3, 5, dtype=torch.float64)
    wide = copy.deepcopy(net).double()
    net.first.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    wide.constant = net.constant.double()
    out: list[Tensor] = []
    in_float64(net, lambda: out.append(net(x)))
    factors = torch.linspace(1, 2, 8).double()  # widened as they came
    expected = (torch.tanh(wide.first(x)) * factors) @ wide.constant + 1
    assert seen == [torch.float64]
    assert net.first.weight.dtype == torch.float32
    torch.testing.assert_close(out[0], expected, rtol=1e-12, atol=1e-12)


def test_randomness_is_put_back_after_errors() -> None:
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), unchanged_randomness(torch.device("cpu")):
        torch.rand(3) / (1 // 0)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("depth", [20, 56])
def test_pretrained_networks_pass(real_data: Any, depth: int) -> None:
    file = next((real_data / "resnet-cifar10").glob(f"*{depth}*.safetensors"))
    net = flexure.load_model(f"flexure:resnet{depth}?weights={file}").model
    images = np.load(real_data / "cifar10-lossless" / "test846.npz")["images"][:40:5]
    checked(net, torch.from_numpy(images).permute(0, 3, 1, 2).float() / 64 - 2, samples=8)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", ["silent", "detached", "dropout", "noise", "batch mean"])
def test_curvature_refuses_culprits_and_changes_nothing(name: str, labelled: bool) -> None:
    culprit, message = CULPRITS[name]
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), Calls(culprit), nn.Linear(8, 4))
    x = torch.randn(6, 5)
    state = torch.get_rng_state()
    with pytest.raises(FlexureError, match=message):
        flexure.curvature(net, x, torch.arange(6) % 4 if labelled else None)
    assert torch.get_rng_state().equal(state)
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_curvature_of_networks_in_training_mode_is_that_of_eval_mode() -> None:
    net = nn.Sequential(convnet(nn.BatchNorm2d), nn.Dropout())
    x, y = torch.randn(6, *IMAGE), torch.arange(6) % 4
    found = flexure.curvature(net.train(), x, y)
    assert net[0][1].training
    assert found.normalized.equal(flexure.curvature(net.eval(), x, y).normalized)


class Arrays(nn.Module):
    """NumPy's arrays and strings among the arguments of torch's functions."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.profiler.record_function("here"):
            shift = torch.as_tensor(np.linspace(0.0, 1.0, 5, dtype=np.float32))
            return x.sin() * torch.tensor(np.ones(5)) + shift


def test_numpy_constants_labels_and_data_parallel_pass() -> None:
    checked(nn.Sequential(Arrays(), mlp()), torch.randn(5, 5))
    checked(nn.DataParallel(mlp()), torch.randn(5, 5))
