"""Lipschitz bounds with kinks: never below what is found, exact where they can be."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

import flexure
from flexure.contracts import FlexureError
from flexure.layers import LipschitzBatchNorm, ResidualSum, spectral_norm
from flexure.measure.bounds import hessian_bound
from flexure.measure.lipschitz import lipschitz_bound
from flexure.models.resnet import CifarResNet
from tests.measure.test_bounds import NETWORKS as SMOOTH
from tests.measure.test_bounds import Smooth, pooled_unit, worn
from tests.measure.test_bounds import built as built_smooth
from tests.measure.untouched import untouched
from tests.networks import BasicBlock, ResNet, Swin
from tests.reference.dense_hessian import logit_jacobian, norm

ROUNDING = 1 + 1e-12


class Around(nn.Module):
    """A shortcut, of any way to combine it with the branch."""

    def __init__(self, part: nn.Module, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.part, self.join = part, join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.part(x))


def steered_at_1() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.LeakyReLU(0.3))
    model.append(nn.Linear(8, 3))
    flexure.steer(model, beta=1.0, example=torch.zeros(1, 1, 4, 4))
    return model


def block_net() -> nn.Module:
    return ResNet(BasicBlock, [1, 1, 0, 0], 2)


def pooled(pool: nn.Module, size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), pool, nn.Flatten(), nn.Linear(size, 3)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "relu": (lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3)), (3,)),
    "leaky": (lambda: nn.Sequential(nn.Linear(3, 6), nn.LeakyReLU(-1.7), nn.Linear(6, 3)), (3,)),
    "prelu": (
        lambda: nn.Sequential(nn.Conv1d(1, 3, 2), nn.PReLU(3), nn.Flatten(), nn.Linear(9, 2)),
        (1, 4),
    ),
    "overlapping": (lambda: pooled(nn.MaxPool2d(3, 2, 1), 18), (1, 5, 5)),
    "gapped": (lambda: pooled(nn.MaxPool2d((2, 3), 1, (1, 0), (2, 1)), 30), (1, 5, 5)),
    "ceil": (lambda: pooled(nn.MaxPool2d(2, 2, ceil_mode=True), 18), (1, 5, 5)),
    "adaptive": (lambda: pooled(nn.AdaptiveMaxPool2d((3, 2)), 12), (1, 5, 4)),
    "resnet": (block_net, (3, 16, 16)),
    "cifar": (lambda: CifarResNet(8), (3, 8, 8)),
    "steered at 1": (steered_at_1, (1, 4, 4)),
}


def built(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    make, shape = NETWORKS[name]
    model = worn(make()).double().eval()
    for module in model.modules():
        if isinstance(module, nn.PReLU):
            nn.init.normal_(module.weight, std=2.0)
    return model, shape


def steepest(model: nn.Module, shape: tuple[int, ...], starts: int = 4) -> float:
    """The largest of ‖Jacobian‖ and ‖z(x) − z(y)‖/‖x − y‖ at random points and after ascent."""
    largest = 0.0
    for start in range(starts):
        x = (start + 0.1) * torch.randn(1, *shape, dtype=torch.float64)
        x.requires_grad_()
        for _ in range(6):
            jacobian = logit_jacobian(model, x[0].detach())
            u, _, v = torch.linalg.svd(jacobian)
            largest = max(largest, norm(jacobian))
            y = x.detach() + 3.0 * v[0].reshape(x.shape) * torch.rand(()).double()
            change = (model(y) - model(x)).norm() / (y - x).norm()
            largest = max(largest, float(change))
            (slope,) = torch.autograd.grad((model(x) @ u[:, :1]).sum(), x)
            x = (x + 0.5 * slope / (slope.norm() + 1e-12)).detach().requires_grad_()
    return largest


@pytest.mark.parametrize("name", NETWORKS)
def test_never_below_what_is_found(name: str) -> None:
    model, shape = built(name)
    with untouched(model):
        bound = lipschitz_bound(model, shape)
    found = steepest(model, shape)
    assert 0 < found <= bound.value * ROUNDING
    assert all(math.isfinite(each.constant) for each in bound.steps)
    assert bound.value <= bound.steps[-1].constant * ROUNDING


@pytest.mark.parametrize("name", SMOOTH)
def test_is_that_of_the_hessians_bound_where_there_is_one(name: str) -> None:
    model, shape = built_smooth(name)
    assert lipschitz_bound(model, shape).value == hessian_bound(model, shape).lipschitz


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "relu": (F.relu, 1.0),
    "leaky 2.5": (lambda x: F.leaky_relu(x, 2.5), 2.5),
    "leaky -3": (lambda x: F.leaky_relu(x, -3.0), 3.0),
    "leaky in place": (lambda x: F.leaky_relu_(x.clone(), 0.2), 1.0),
    "prelu": (lambda x: F.prelu(x, torch.tensor([-4.0]).double()), 4.0),
    "rrelu": (lambda x: F.rrelu(x, 2.0, 4.0), 3.0),
    "relu6": (F.relu6, 1.0),
    "hardtanh": (lambda x: F.hardtanh(x, -2.0, 0.5), 1.0),
    "atan": (torch.atan, 1.0),
    "clamp": (lambda x: x.clamp(-1.0, 1.0), 1.0),
    "clamp by name": (lambda x: torch.clamp(input=x, max=1.0), 1.0),
    "clip": (lambda x: torch.clip(x, min=0.0), 1.0),
    "clamp_min": (lambda x: x.clamp_min(0.3), 1.0),
    "abs": (lambda x: x.abs(), 1.0),
    "elu": (lambda x: F.elu(x, 2.0), 2.0),
    "elu negative": (lambda x: F.elu(x, -3.0), 3.0),
    "celu": (lambda x: F.celu(x, 2.0), 1.0),
    "selu": (F.selu, 1.7580993408473769),
    "hardswish": (F.hardswish, 1.5),
    "hardsigmoid": (F.hardsigmoid, 1 / 6),
    "softshrink": (lambda x: F.softshrink(x, 0.2), 1.0),
    "threshold": (lambda x: F.threshold(x, 0.4, 0.4), 1.0),
    "maximum": (lambda x: torch.maximum(x, torch.zeros(()).double()), 1.0),
    "minimum": (lambda x: torch.min(x, torch.ones(3).double()), 1.0),
    "softplus 1000": (lambda x: F.softplus(x, 1000.0), 1.0),
    "centered softplus": (lambda x: flexure.units.centered_softplus(x, 5.0), 1.0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_their_exact_constants(name: str) -> None:
    function, constant = ACTIVATIONS[name]
    grid = torch.linspace(-8, 8, 64001, dtype=torch.float64)
    values = function(grid.reshape(-1, 1).expand(-1, 3))[:, 0]
    found = float(((values[1:] - values[:-1]) / (grid[1:] - grid[:-1])).abs().max())
    assert found == pytest.approx(constant, rel=2e-3)
    model = nn.Sequential(nn.Linear(3, 3), Smooth(function), nn.Linear(3, 3)).double()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(2.0 * torch.eye(3))
    bound = lipschitz_bound(model, (3,))
    assert bound.value == pytest.approx(4.0 * constant, rel=1e-9)
    assert bound.value >= 4.0 * constant
    assert [each.kind for each in bound.steps] == ["layer", "activation", "layer"]


MAXIMA: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], float]] = {
    "disjoint": (lambda x: F.max_pool2d(x, 2), (1, 4, 4), 1.0),
    "overlapping": (lambda x: F.max_pool2d(x, 3, 2, 1), (1, 5, 5), 2.0),
    "every shift": (lambda x: F.max_pool1d(x, 3, 1), (1, 9), math.sqrt(3)),
    "dilated": (lambda x: F.max_pool1d(x, 2, 1, dilation=3), (1, 9), math.sqrt(2)),
    "three axes": (lambda x: F.max_pool3d(x, 2, 1), (1, 3, 3, 3), math.sqrt(8)),
    "ceil": (lambda x: F.max_pool1d(x, 2, 2, ceil_mode=True), (1, 5), 1.0),
    "skipping": (lambda x: F.max_pool1d(x, 1, 2), (1, 5), 1.0),
    "adaptive": (lambda x: F.adaptive_max_pool1d(x, 2), (1, 4), 1.0),
    "adaptive uneven": (lambda x: F.adaptive_max_pool1d(x, 2), (1, 5), math.sqrt(2)),
    "amax": (lambda x: x.amax((2, 3)), (2, 3, 3), 1.0),
    "amin": (lambda x: x.amin(1, keepdim=True), (3, 2), 1.0),
    "max of all": (lambda x: x.max().reshape(1, 1), (4,), 1.0),
    "maximum": (lambda x: torch.maximum(x[:, :1], x[:, 1:]).abs(), (2,), 1.0),
    "two maxima": (lambda x: torch.maximum(x[:, :2], x[:, 2:]), (4,), math.sqrt(2)),
    "maximum of one": (lambda x: torch.maximum(x, 2.0 * x), (4,), math.sqrt(5)),
    "maximum that broadcasts": (lambda x: torch.max(x[:, :1], x[:, 1:]), (4,), math.sqrt(3)),
    "minimum": (lambda x: torch.fmin(x[:, :1], 3.0 * x[:, 1:]), (2,), 3.0),
    "means out": (lambda x: 1 - F.max_pool1d(-x, 2), (1, 4), 1.0),
}


@pytest.mark.parametrize("name", MAXIMA)
def test_maxima_by_the_windows_that_elements_are_in(name: str) -> None:
    function, shape, constant = MAXIMA[name]
    model = Smooth(lambda x: function(x).flatten(1))
    model.register_parameter("dtype", nn.Parameter(torch.zeros(()).double()))
    value = lipschitz_bound(model, shape).value
    assert value == pytest.approx(constant, rel=1e-9)
    # Attained by a peak that every window around it takes, or by all elements alike.
    found = max(norm(logit_jacobian(model, x)) for x in _peaks(shape))
    assert found <= value * ROUNDING
    # Of two operands that share the input, only the sum of their squares is seen.
    if name not in ("two maxima", "maximum of one"):
        assert found == pytest.approx(constant, rel=1e-9)


def _peaks(shape: tuple[int, ...]) -> list[Tensor]:
    """Inputs with one element far above the others, or far below, and a random one."""
    found = [torch.randn(shape, dtype=torch.float64)]
    for place, sign in itertools.product(range(math.prod(shape)), (1.0, -1.0)):
        x = 0.1 * torch.randn(shape, dtype=torch.float64)
        x.view(-1)[place] = 9.0 * sign
        found.append(x)
    return found


def test_rows_are_bounded_one_by_one() -> None:
    # Two channels of norms 5 and 1, maxima over each, weights 1 and 5: 5·√2, not 25.
    model = nn.Sequential(nn.Linear(2, 2), Smooth(lambda x: x[:, :, None]), nn.MaxPool1d(1))
    model += nn.Sequential(nn.Flatten(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([5.0, 1.0])))
        model[-1].weight.copy_(torch.tensor([[1.0, 5.0]]))
    assert lipschitz_bound(model, (2,)).value == pytest.approx(5 * math.sqrt(2), rel=1e-6)


@pytest.mark.parametrize("layers", [1, 4])
def test_products_of_diagonal_layers_are_exact(layers: int) -> None:
    parts: list[nn.Module] = []
    for _ in range(layers):
        layer = nn.Linear(3, 3).double()
        with torch.no_grad():
            layer.weight.copy_(torch.diag(torch.tensor([-2.0, 0.5, 1.0])))
        parts += [layer, nn.ReLU()]
    bound = lipschitz_bound(nn.Sequential(*parts), (3,))
    assert 2.0**layers <= bound.value <= 2.0**layers * (1 + 1e-9)
    assert [each.constant for each in bound.steps[::2]] == pytest.approx(
        [2.0 ** (i + 1) for i in range(layers)]
    )


@pytest.mark.parametrize(("factor", "constant"), [(0.5, 1.0), (1 / math.sqrt(2), 2**1.5), (1, 8)])
def test_blocks_of_identities(factor: float, constant: float) -> None:
    add = ResidualSum(factor)
    model = nn.Sequential(*(Around(nn.Identity(), add) for _ in range(3))).double()
    model.register_parameter("dtype", nn.Parameter(torch.zeros(()).double()))
    bound = lipschitz_bound(model, (4,))
    assert bound.value == pytest.approx(constant, rel=1e-9)
    assert [each.kind for each in bound.steps if each.kind == "sum"] == ["sum"] * 3


def test_normalisation_is_merged_and_named_with_its_layer() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU()).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([4.0, 0.1])))
        model[1].running_var.copy_(torch.tensor([4.0, 0.01]))
    bound = lipschitz_bound(model, (2,))
    assert bound.value == pytest.approx(2.0, rel=1e-4)
    assert [each.name for each in bound.steps] == ["0 + 1", "2"]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(6, 4), (6,)),
        (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 6, 6)),
        (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 6, 6)),
        (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), (2, 6, 6)),
        (lambda: nn.Conv2d(2, 4, (3, 2), padding="same", padding_mode="reflect"), (2, 5, 6)),
        (lambda: nn.Conv2d(2, 4, (5, 3), padding=(2, 1), padding_mode="replicate"), (2, 5, 4)),
        (lambda: nn.Conv1d(2, 4, 3), (2, 8)),
    ],
)
def test_normalised_layers_have_norm_1(layer: Callable[[], nn.Module], shape: Any) -> None:
    first = layer()
    spectral_norm(first, input_size=shape[1:] or None)
    model = nn.Sequential(first, nn.ReLU(), nn.Flatten()).eval()
    value = lipschitz_bound(model, shape).value
    assert 1 - 1e-3 <= value <= 1 + 2e-4
    assert steepest(model.double(), shape, 1) <= lipschitz_bound(model, shape).value * ROUNDING


@pytest.mark.parametrize("gamma", [1.0, 3.0])
def test_lipschitz_batch_norm_and_centered_softplus(gamma: float) -> None:
    norm_layer = LipschitzBatchNorm.from_batch_norm(nn.BatchNorm1d(3), gamma=gamma)
    with torch.no_grad():
        norm_layer.running_var.copy_(torch.tensor([1e-4, 1.0, 4.0]))
    model = nn.Sequential(norm_layer, flexure.units.CenteredSoftplus(5.0)).eval()
    bound = lipschitz_bound(model, (3,))
    assert bound.value == pytest.approx(float(norm_layer.lipschitz), rel=1e-5)
    assert bound.value == pytest.approx(gamma, rel=1e-3)
    assert [each.kind for each in bound.steps] == ["layer", "activation"]


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """Convolutional nets of any order of layers, with kinks, pools and shortcuts."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    slopes = st.sampled_from([-2.0, -0.3, 0.1, 1.0, 1.8])
    activations = [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Tanh, nn.ELU]
    width = draw(st.integers(1, 3))
    size = draw(st.integers(3, 5))
    layers: list[nn.Module] = [nn.Conv2d(2, width, 3, padding=1)]
    kinds = ["bend", "leaky", "norm", "pool", "residual", "join", "scaled"]
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=4)):
        branch = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        if kind == "bend":
            layers.append(draw(st.sampled_from(activations))())
        elif kind == "leaky":
            layers.append(nn.LeakyReLU(draw(slopes)))
        elif kind == "norm":
            layers.append(nn.BatchNorm2d(width))
        elif kind == "pool":
            layers.append(nn.MaxPool2d(draw(st.sampled_from([2, 3])), 1, 1))
        elif kind == "residual":
            layers.append(Around(branch, torch.add))
        elif kind == "scaled":
            layers.append(Around(branch, ResidualSum(0.5)))
        else:
            layers.append(Around(branch, lambda a, b: torch.cat([a, b], 1)))
            width *= 2
    layers += [nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(4 * width, 3)]
    return worn(nn.Sequential(*layers)).double().eval(), (2, size, size)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(networks())
def test_never_below_for_any_architecture(drawn: tuple[nn.Module, tuple[int, ...]]) -> None:
    model, shape = drawn
    assert steepest(model, shape, 1) <= lipschitz_bound(model, shape).value * ROUNDING


REFUSED: dict[str, tuple[nn.Module, str, str]] = {
    "layer norm": (nn.LayerNorm(4), "layer_norm in module '1' (LayerNorm)", "no bound"),
    "softmax": (nn.Softmax(1), "softmax in module '1'", "no bound"),
    "product": (Smooth(lambda x: x * torch.tanh(x)), "mul", "two values"),
    "square": (Smooth(lambda x: x**2), "pow", "no bound"),
    "attention": (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), "in module", "no bound"),
    "jump": (nn.Hardshrink(), "hardshrink", "jumps"),
    "step": (nn.Threshold(0.0, 1.0), "threshold", "jumps"),
    "rounded": (Smooth(torch.floor), "floor", "jumps"),
    "indices": (nn.MaxPool1d(2, return_indices=True), "max_pool1d", "largest"),
    "places": (Smooth(lambda x: x.max(1).values[:, None]), "max", "indices"),
    "sorted": (Smooth(lambda x: x.sort(1).values), "sort", "largest"),
    "limits": (Smooth(lambda x: x.clamp(min=x.mean())), "clamp", "depend on the input"),
    "random slopes": (Smooth(lambda x: F.rrelu(x, training=True)), "rrelu", "eval"),
    "pool unit": (pooled_unit(), "soft_maximum", "AvgPool"),
}


MATRIX = torch.tensor([[2.0, 0.0, 0.0], [0.0, -3.0, 0.0], [0.0, 0.0, 1.0]]).double()

LINEAR: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "lerp of a constant": (lambda x: torch.lerp(x, torch.ones(3).double(), 0.25), 0.75, 1.0),
    "lerp to a signal": (lambda x: torch.ones(1, 3).double().lerp(x, 4.0), 4.0, 1.0),
    "lerp of two": (lambda x: torch.lerp(x, 2.0 * x, -0.5), 0.5, 6.0),
    "addmm": (lambda x: torch.addmm(torch.ones(3).double(), x, MATRIX, alpha=-2.0), 6.0, 1.0),
    "addmm of two": (lambda x: torch.addmm(x, x, MATRIX, beta=2.0), 4.0, 2.0),
    "addmm to a signal": (lambda x: torch.addmm(x, MATRIX[:1], MATRIX, beta=-2.0), 2.0, 1.0),
    "baddbmm": (
        lambda x: torch.baddbmm(torch.ones(3).double(), x[None], MATRIX[None])[0],
        3.0,
        2.0,
    ),
    "addmv": (lambda x: torch.addmv(torch.ones(3).double(), MATRIX, x[0])[None], 3.0, 1.0),
    "diff": (lambda x: torch.diff(x), math.sqrt(3), 1.2),
    "diff twice": (lambda x: x.diff(2, dim=1), math.sqrt(6), 1.7),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_operations_by_their_exact_norms(name: str) -> None:
    """At least the norm of the map, and above it by no more than is said."""
    function, constant, looseness = LINEAR[name]
    jacobian = torch.autograd.functional.jacobian(function, torch.randn(1, 3).double())
    assert norm(jacobian.reshape(-1, 3)) == pytest.approx(constant)
    model = nn.Sequential(nn.Linear(3, 3), Smooth(function)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
    found = lipschitz_bound(model, (3,)).value
    assert constant <= found * ROUNDING
    assert found <= looseness * constant * ROUNDING


def test_atan_has_curvature() -> None:
    grid = torch.linspace(-9, 9, 90001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(grid.atan().sum(), grid, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), grid)
    model = nn.Sequential(nn.Linear(1, 1), Smooth(torch.atan), nn.Linear(1, 2)).double()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[2].weight.copy_(torch.tensor([[1.0], [0.0]]))
    assert lipschitz_bound(model, (1,)).value == pytest.approx(float(slope.detach().max()))
    layers = hessian_bound(model, (1,))
    assert layers.logits[0] == pytest.approx(float(bend.abs().max()), rel=1e-6)


def test_what_has_no_slope_is_not_refused_for_its_curvature() -> None:
    for module in (nn.Softmax(1), Smooth(F.normalize), Smooth(lambda x: x * x.tanh())):
        model = nn.Sequential(nn.Linear(3, 4), module)
        with pytest.raises(FlexureError, match="its slope has no bound") as caught:
            lipschitz_bound(model, (3,))
        assert "second derivative" not in str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name_with_advice(name: str) -> None:
    module, where, advice = REFUSED[name]
    model = nn.Sequential(nn.Linear(3, 4), module, nn.Linear(4, 2))
    with untouched(model), pytest.raises(FlexureError, match="Lipschitz constant") as caught:
        lipschitz_bound(model, (3,))
    assert where in str(caught.value)
    assert advice in str(caught.value)


def test_refuses_what_it_cannot_run() -> None:
    with pytest.raises(FlexureError, match=r"Lipschitz constant|layer_norm"):
        lipschitz_bound(Swin(), (3, 16, 16))
    with pytest.raises(FlexureError, match="input_shape"):
        lipschitz_bound(nn.Linear(2, 2), 2)  # type: ignore[arg-type]
    with pytest.raises(FlexureError, match="shape"):
        lipschitz_bound(nn.Conv1d(1, 1, 1), (1, 4))


def test_overflow_is_inf_and_said() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        model[0].weight.fill_(1e200)
        model[2].weight.fill_(1e200)
    bound = lipschitz_bound(model, (2,))
    assert bound.value == math.inf
    assert "overflowed" in bound.summary


def test_prints_a_table() -> None:
    model, shape = built("cifar")
    bound = lipschitz_bound(model, shape)
    lines = str(bound).splitlines()
    assert lines[0].split()[:2] == ["step", "kind"]
    assert len(lines) == 3 + len(bound.steps)
    assert lines[2].split()[:4] == ["conv1", "+", "bn1", "layer"]
    assert lines[-1] == bound.summary
    assert f"{bound.value:.6g}" in bound.summary
    assert bound.rows()[0]["from input"] == f"{bound.steps[0].constant:.4g}"


def test_a_thousand_classes_cost_one_pass() -> None:
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    seconds = []
    for classes in (10, 1000):
        model = nn.Sequential(body, nn.ReLU(), nn.Linear(512, classes))
        start = time.process_time()
        lipschitz_bound(model, (3, 16, 16))
        seconds.append(time.process_time() - start)
    assert seconds[1] < seconds[0] + 5.0
