"""Certified radii: exact for linear models, and never beaten by an attack."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

import flexure
from flexure.attacks import PGD, Bounded, Robustness, robust_accuracy
from flexure.contracts import FlexureError
from flexure.layers import spectral_norm
from flexure.measure.bounds import hessian_bound
from flexure.measure.certificates import RADII, TOLERANCE, Certificates, certified_radius
from flexure.measure.lipschitz import lipschitz_bound
from tests.measure.untouched import untouched


def linear(classes: int, *, inputs: int = 6) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(inputs, classes).double()
    x = torch.randn(40, inputs, dtype=torch.float64)
    y = model(x).argmax(1)
    y[::5] = (y[::5] + 1) % classes
    return model, x, y


@torch.no_grad()
def distances(model: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    """To the nearest of the hyperplanes where another class's logit is the label's; 0: beyond."""
    found = []
    for point, label in zip(x, y.tolist(), strict=True):
        others = [k for k in range(model.out_features) if k != label]
        planes = [
            (
                (model.weight[label] - model.weight[k]) @ point + model.bias[label] - model.bias[k],
                (model.weight[label] - model.weight[k]).norm(),
            )
            for k in others
        ]
        found.append(max(0.0, min(float(gap / length) for gap, length in planes)))
    return torch.tensor(found, dtype=torch.float64)


def network(seed: int = 0, *, inputs: int = 8, classes: int = 4) -> nn.Sequential:
    """Of Lipschitz constant 1, as its layers have norm 1."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, classes))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.weight)
        spectral_norm(layer)
    return model.eval()


def attacked(model: nn.Module, x: Tensor, y: Tensor, attack: PGD, eps: float) -> Robustness:
    """Of inputs that have no bounds."""
    return robust_accuracy(Bounded(model, bounds=None), x, y, attack=attack, eps=eps, seed=0)


def digits() -> tuple[Tensor, Tensor]:
    data = flexure.load_data("sklearn:digits")["train"]
    x = torch.stack([data[i] for i in range(400)]).float()
    return x.flatten(1) / x.max(), data.labels[:400]


def trained(model: nn.Module, x: Tensor, y: Tensor, steps: int = 60) -> nn.Module:
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(8 * model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("classes", [2, 5])
def test_linear_models_have_their_distance_to_the_boundary(classes: int) -> None:
    model, x, y = linear(classes)
    found = certified_radius(model, x, y)
    torch.testing.assert_close(found.radius, distances(model, x, y), rtol=1e-8, atol=1e-9)
    assert (found.radius <= distances(model, x, y)).all()
    assert torch.equal(found.correct, model(x).argmax(1) == y)
    assert 0 < found.clean_accuracy < 1
    assert found.radius.dtype == torch.float64


def test_linf_is_that_of_the_cube_inside() -> None:
    model, x, y = linear(3, inputs=4)
    small = certified_radius(model, x, y, norm="linf")
    torch.testing.assert_close(small.radius, distances(model, x, y) / 2, rtol=1e-8, atol=1e-9)
    assert small.norm == "linf"


def test_known_constants_take_the_place_of_the_bound() -> None:
    model, x, y = linear(3)
    z = model(x).detach()
    rest = z.scatter(1, y[:, None], -math.inf).amax(1)
    margin = z.gather(1, y[:, None])[:, 0] - rest
    found = certified_radius(model, x, y, lipschitz=2.0)
    expected = margin.clamp(min=0) / (2 * math.sqrt(2))
    torch.testing.assert_close(found.radius, expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found.margin, margin, rtol=1e-8, atol=1e-8)
    assert found.lipschitz == 2.0
    # What cannot be bounded from the weights can be given.
    free = nn.Sequential(model, nn.Softmax(1))
    assert certified_radius(free, x, y, lipschitz=1.0).radius.max() > 0


def test_of_all_logits_at_least_what_one_constant_gives() -> None:
    model = network().double()
    x = torch.randn(50, 8, dtype=torch.float64)
    y = model(x).argmax(1)
    sharp = certified_radius(model, x, y)
    plain = certified_radius(model, x, y, lipschitz=lipschitz_bound(model, (8,)).value)
    assert sharp.lipschitz == pytest.approx(plain.lipschitz)
    assert (sharp.radius >= plain.radius * (1 - 1e-9)).all()
    assert float((sharp.radius / plain.radius).mean()) > 1.05


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    depth=st.integers(0, 3),
    classes=st.integers(2, 5),
    norm=st.sampled_from(sorted(RADII)),
)
def test_no_attack_succeeds_inside(seed: int, depth: int, classes: int, norm: str) -> None:
    """At .999 of each sample's own radius, in float64."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layer = nn.Linear(5, 5)
        nn.init.normal_(layer.weight)
        spectral_norm(layer)
        layers += [layer, nn.LeakyReLU(0.3)]
    model = nn.Sequential(*layers, nn.Linear(5, classes)).double().eval()
    x = 3 * torch.randn(4, 5, dtype=torch.float64)
    y = model(x).argmax(1)
    found = certified_radius(model, x, y, norm=norm)
    assert (found.radius > 0).all()
    free = Bounded(model, bounds=None)
    attack = PGD(norm=norm, steps=10, until_misclassified=True)
    for i in range(len(x)):
        eps = 0.999 * float(found.radius[i])
        got = robust_accuracy(free, x[i : i + 1], y[i : i + 1], attack=attack, eps=eps, seed=0)
        assert got.accuracy == 1.0


def test_attacks_succeed_just_outside_of_a_linear_models() -> None:
    """So that the tests with attacks above can fail."""
    model, x, y = linear(2)
    found = certified_radius(model, x, y)
    free = Bounded(model, bounds=None)
    for i in found.correct.nonzero().flatten().tolist()[:5]:
        eps = 1.01 * float(found.radius[i])
        attack = PGD(norm="l2", random_start=False)
        got = robust_accuracy(free, x[i : i + 1], y[i : i + 1], attack=attack, eps=eps, seed=0)
        assert got.accuracy == 0.0


@pytest.mark.parametrize("kind", ["lcnn", "spectral", "plain", "random", "steered"])
def test_certified_accuracy_is_never_above_the_attacked(kind: str, capsys) -> None:
    x, y = digits()
    mean, std = (float(x.mean()),) * 64, (0.5,) * 64
    torch.manual_seed(1)
    model: nn.Module = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    if kind == "lcnn":
        model = flexure.to_lcnn(model, example=x[:2])
    if kind == "spectral":
        for layer in (model[0], model[2]):
            spectral_norm(layer)
    bounded = Bounded(model, mean=mean, std=std).eval()
    if kind != "random":
        trained(bounded, x, y)
    if kind == "steered":
        flexure.steer(model, beta=0.7, c=1.0, example=x[:2])
    with untouched(bounded):
        found = certified_radius(bounded, x, y)
    for eps in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4):
        attack = PGD(norm="l2", steps=10, until_misclassified=True)
        got = robust_accuracy(bounded, x, y, attack=attack, eps=eps, seed=0)
        assert not (found.certified(eps) & ~got.robust).any()
        assert found.certified_accuracy(eps) <= got.accuracy
    if kind in ("lcnn", "spectral"):
        assert found.clean_accuracy > 0.8
        assert found.certified_accuracy(0.1) > 0.5  # it says something


def test_radii_of_a_bounded_model_are_in_pixels() -> None:
    """(x − mean)/std is a part of the network: the same one with other weights."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    bounded = Bounded(inner, mean=mean, std=std)
    x = torch.rand(20, 3, 2, 2, dtype=torch.float64)
    y = bounded(x).argmax(1)
    scale = bounded.std.repeat_interleave(4)
    folded = nn.Linear(12, 3).double()
    with torch.no_grad():
        folded.weight.copy_(inner[1].weight / scale)
        shift = (bounded.mean.repeat_interleave(4) / scale) @ inner[1].weight.T
        folded.bias.copy_(inner[1].bias - shift)
    found = certified_radius(bounded, x, y)
    expected = distances(folded, x.flatten(1), y)
    torch.testing.assert_close(found.radius, expected, rtol=1e-8, atol=1e-9)


def test_steering_shows_by_its_slope() -> None:
    """At c = 1 the unit's slope goes up to 1.0998393201."""
    model, x = network(), torch.randn(30, 8)
    plain = certified_radius(model, x, model(x).argmax(1))
    with flexure.steer(model, beta=0.5, c=1.0, example=x):
        steered = certified_radius(model, x, model(x).argmax(1))
    assert steered.lipschitz == pytest.approx(1.0998393201 * plain.lipschitz, rel=1e-4)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.LayerNorm(8), "layer_norm"),
        (nn.Softmax(1), "softmax"),
        (
            nn.Sequential(nn.Unflatten(1, (2, 4)), nn.TransformerEncoderLayer(4, 1)),
            "multi_head_attention",
        ),
    ],
)
def test_what_has_no_bound_is_refused_with_the_bounds_own_reason(
    layer: nn.Module, message: str
) -> None:
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(8, 3)).eval()
    with pytest.raises(FlexureError) as reason:
        lipschitz_bound(model, (8,))
    x, y = torch.ones(2, 8), torch.zeros(2, dtype=torch.long)
    with untouched(model), pytest.raises(FlexureError, match=message) as caught:
        certified_radius(model, x, y)
    assert str(caught.value) == str(reason.value)


def test_the_ball_is_open_and_attacks_may_exceed_eps_a_little() -> None:
    ones = torch.ones(3, dtype=torch.bool)
    radius = torch.tensor([0.0, 0.5, math.inf], dtype=torch.float64)
    found = Certificates(ones, ones, radius, radius, "l2", 1.0)
    assert found.curve((0.0, 0.5, 0.5 / 1.0001, 0.4999, 1e300)) == pytest.approx(
        (2 / 3, 1 / 3, 1 / 3, 2 / 3, 1 / 3)
    )
    assert found.certified(0.25).tolist() == [False, True, True]


@pytest.mark.parametrize("below", [1e-9, 1e-6, 5e-5, 2e-4])
def test_just_below_the_radius_in_float32(below: float) -> None:
    """The harness takes changes of up to eps·(1 + 1e-4), which cross the boundary there."""
    torch.manual_seed(0)
    model = nn.Linear(3072, 2)
    with torch.no_grad():
        model.weight.mul_(50.0)
        x = torch.rand(6, 3072)
        y = model(x).argmax(1)
        found = certified_radius(model, x, y)
        away = model.weight[1 - y] - model.weight[y]
        for i in range(len(x)):
            eps = float(found.radius[i]) * (1 - below)
            moved = x[i] + eps * (1 + 0.9 * TOLERANCE) * away[i] / away[i].norm()
            assert (moved - x[i]).double().norm() <= eps * (1 + TOLERANCE)
            crossed = bool(model(moved[None]).argmax() != y[i])
            assert crossed == (below < TOLERANCE)  # so that the next line can fail
            assert bool(found.certified(eps)[i]) == (not crossed)


def test_no_attack_succeeds_where_rounding_alone_would_make_it() -> None:
    """PGD at 1 − 1e-9 of the radius, in float32: it is misclassified, and not certified."""
    torch.manual_seed(1)
    model = nn.Linear(3072, 2)
    with torch.no_grad():
        model.weight.mul_(50.0)
    x = torch.rand(8, 3072)[2:3]
    y = model(x).argmax(1)
    found = certified_radius(model, x, y)
    eps = float(found.radius[0]) * (1 - 1e-9)
    got = attacked(model, x, y, PGD(norm="l2", steps=20, random_start=False), eps)
    assert found.certified_accuracy(eps) <= got.accuracy


# Networks that are no fixed function of one sample


class Mixed(nn.Module):
    """A linear layer, and something done to its logits."""

    def __init__(self, change: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.change = nn.Linear(8, 3), change
        self.register_buffer("calls", torch.zeros(()))
        self.own, self.numbers = torch.Generator(), np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self, self.layer(x))


def counted(model: Mixed, z: Tensor) -> Tensor:
    model.calls += 1
    return z * (1 + model.calls)


def noise(shape: tuple[int, ...], draw: Callable[[int], object]) -> Tensor:
    return torch.tensor(draw(math.prod(shape))).reshape(shape)


DRAWS: dict[str, Callable[[Mixed, Tensor], Tensor]] = {
    "like": lambda m, z: z + torch.randn_like(z),
    "shape": lambda m, z: z + torch.randn(z.shape),
    "in place": lambda m, z: z + torch.zeros(z.shape).normal_(),
    "factor": lambda m, z: z * torch.bernoulli(torch.full(z.shape, 0.5)),
    "own generator": lambda m, z: z + torch.randn(z.shape, generator=m.own),
    "python": lambda m, z: z + noise(z.shape, lambda n: [random.random() for _ in range(n)]),
    "numpy": lambda m, z: z + noise(z.shape, np.random.standard_normal),
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_networks_have_no_bound(name: str) -> None:
    model = Mixed(DRAWS[name]).eval()
    x, y = torch.rand(5, 8), torch.zeros(5, dtype=torch.long)
    for lipschitz in (None, 1.0):
        with (
            untouched(model),
            pytest.raises(FlexureError, match=r"random numbers.*remove the noise"),
        ):
            certified_radius(model, x, y, lipschitz=lipschitz)
    for bound in (lipschitz_bound, hessian_bound):
        with pytest.raises(FlexureError, match="random numbers"):
            bound(model, (8,))


MIXES: dict[str, Callable[[Mixed, Tensor], Tensor]] = {
    "centred": lambda m, z: z - z.mean(0, keepdim=True),
    "neighbours": lambda m, z: z + 0.001 * z.roll(1, 0),
    "size": lambda m, z: z * len(z),
    "calls": counted,
    "numpy's own": lambda m, z: z + noise(z.shape, m.numbers.standard_normal),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MIXES)
def test_networks_of_a_batch_have_no_certificate(name: str, dtype: torch.dtype) -> None:
    model = Mixed(MIXES[name]).to(dtype).eval()
    x, y = torch.rand(5, 8, dtype=dtype), torch.zeros(5, dtype=torch.long)
    for chunk in (None, 2):
        with untouched(model), pytest.raises(FlexureError, match="between a sample alone and in"):
            certified_radius(model, x, y, chunk=chunk)


def test_ties_and_constants() -> None:
    """A tie is right by the order of classes, and certified nowhere; a constant everywhere."""
    model = nn.Linear(3, 2)
    x, y = torch.randn(2, 3), torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
        tied = certified_radius(model, x, y)
        model.bias[0] = 1.0
        constant = certified_radius(model, x, y)
    assert tied.correct.all()
    assert tied.certified_accuracy(0.0) == 0.0
    # What rounding may have lost of the weights is below the smallest normal number.
    assert (constant.radius > 1e300).all()
    assert certified_radius(model, x, y, lipschitz=0.0).radius.tolist() == [math.inf] * 2


def test_what_rounding_hides_is_not_certified() -> None:
    """In float32, 1e8 + 3 is 1e8 + 0 or + 8: the logits there are not the network's."""
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [0.0]]))
        model.bias.fill_(1e8)
    x = torch.tensor([[3.0], [1e4]])
    found = certified_radius(model, x, torch.zeros(2, dtype=torch.long))
    assert found.radius[0] == 0.0
    assert 0.99e4 < found.radius[1] < 1e4
    # A tie in float32, where the first class comes first; -3 in float64.
    tie = certified_radius(model, -x[:1], torch.zeros(1, dtype=torch.long))
    assert model(-x[:1]).argmax(1).item() == 0
    assert not tie.correct.item()


def test_logits_that_are_not_finite_are_told() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    x = torch.tensor([[1.0, math.nan], [1.0, 2.0]])
    found = certified_radius(model, x, model(x).argmax(1))
    assert found.converged.tolist() == [False, True]
    assert found.radius[0] == 0.0
    assert not found.correct[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_chunks_and_dtypes(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    x = torch.randn(11, 8).to(dtype)
    y = model(x).argmax(1)
    whole = certified_radius(model, x, y)
    parts = certified_radius(model, x, y, chunk=4)
    torch.testing.assert_close(parts.radius, whole.radius, rtol=0.2, atol=1e-3)
    assert torch.equal(parts.correct, whole.correct)
    assert len(parts) == 11
    assert "11 samples" in str(whole)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"norm": "l1"}, "norm to be one of l2, linf"),
        ({"norm": ["l2"]}, "norm to be one of"),
        ({"lipschitz": -1.0}, "at least 0"),
        ({"lipschitz": math.nan}, "at least 0"),
        ({"lipschitz": True}, "at least 0"),
        ({"chunk": 0}, "chunk"),
        ({"x": torch.zeros(2, 8, dtype=torch.long)}, "floating-point"),
        ({"x": torch.zeros(2)}, "floating-point"),
        ({"x": torch.zeros(2, 7)}, "input"),
        ({"y": torch.zeros(3, dtype=torch.long)}, "2 integer labels"),
        ({"y": torch.zeros(2)}, "2 integer labels"),
        ({"y": torch.tensor([0, 4])}, "labels from 0 to 3"),
        ({"model": lambda x: x}, "Module"),
        ({"model": nn.Linear(8, 1)}, "at least 2 classes"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, object], message: str) -> None:
    given = {"model": network(), "x": torch.zeros(2, 8), "y": torch.zeros(2, dtype=torch.long)}
    given |= changed
    model, x, y = (given.pop(name) for name in ("model", "x", "y"))
    with pytest.raises(FlexureError, match=message):
        certified_radius(model, x, y, **given)


@pytest.mark.parametrize("eps", [-1.0, math.nan, math.inf, "1", True])
def test_radii_that_are_none(eps: object) -> None:
    model, x, y = linear(2)
    with pytest.raises(FlexureError, match="finite radius"):
        certified_radius(model, x, y).certified_accuracy(eps)


def test_a_pretrained_network_has_no_certificate_to_speak_of(real_data) -> None:
    """Its bound is a product of 20 layers: radii of less than a millionth of a pixel's scale."""
    file = real_data / "resnet-cifar10" / "resnet20.safetensors"
    loaded = flexure.load_model(f"flexure:resnet20?weights={file}")
    data = flexure.load_data(f"npz:{real_data / 'cifar10-lossless' / 'test846.npz'}")["train"]
    own = loaded.preprocess
    bounded = Bounded(loaded.model, mean=own.mean, std=own.std)
    x = torch.stack([data[i] for i in range(16)]).float() / 255
    found = certified_radius(bounded, x, data.labels[:16])
    assert found.clean_accuracy > 0.8
    assert (found.radius[found.correct] > 0).all()
    assert found.radius.max() < 1e-8
