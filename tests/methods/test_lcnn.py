"""Turning networks into low-curvature networks: what changes, what cannot, and the bound."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flexure
from flexure.contracts import FlexureError, SiteError
from flexure.layers import LipschitzBatchNorm, spectral_norms
from flexure.methods import lcnn
from flexure.methods.lcnn_report import LCNNReport, lcnn_report
from flexure.models import MLP, CifarResNet, resnet18, vgg11
from flexure.units import CenteredSoftplus
from flexure.units.flat import AveragePooling, LeakySoftplus, Overwriting
from tests import networks

IMAGE = torch.zeros(1, 3, 16, 16)


def to_lcnn(model: nn.Module, example: Any = IMAGE, **settings: Any) -> nn.Module:
    return flexure.to_lcnn(model, example=example, **settings)


def vgg_like() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 8),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(8, 5),
    )


class Hub(nn.Module):
    """transformers' ResNet, whose forward wants nothing but images."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ResNetConfig, ResNetForImageClassification

        config = ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=4
        )
        self.net = ResNetForImageClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).logits


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "torchvision basic": (lambda: networks.ResNet(networks.BasicBlock, [1, 1, 1, 1], 2), IMAGE),
    "torchvision bottleneck": (
        lambda: networks.ResNet(networks.Bottleneck, [1, 1, 1, 1], 2),
        IMAGE,
    ),
    "vgg": (vgg_like, IMAGE),
    "mlp": (lambda: MLP((3, 7, 6, 4)), torch.zeros(1, 3)),
    "tanh": (lambda: MLP((3, 7, 4), nn.Tanh), torch.zeros(1, 3)),
    "cifar": (lambda: CifarResNet(8), IMAGE),
    "leaky": (lambda: MLP((3, 7, 6, 4), lambda: nn.LeakyReLU(0.2)), torch.zeros(1, 3)),
    "hub": (Hub, IMAGE),
}


def after_training(model: nn.Module) -> nn.Module:
    """The model in eval mode with BatchNorms as after training, not at their start."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.05, 2.0),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


def jacobian_norm(model: nn.Module, x: Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x)[0], x)
    return float(torch.linalg.matrix_norm(jacobian.flatten(1), 2))


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything that a conversion may touch: classes, tensors by identity and bits, hooks."""
    found: list[Any] = []
    for path, module in model.named_modules(remove_duplicate=False):
        hooks = [len(v or ()) for k, v in sorted(vars(module).items()) if "_hook" in k]
        own = {**module._parameters, **module._buffers}
        tensors = [(k, id(t), None if t is None else t.tolist()) for k, t in own.items()]
        found.append((path, type(module), module.training, hooks, tensors))
    return [found, sorted(k for k in model.__dict__ if k.startswith("_flexure"))]


@pytest.mark.parametrize(
    ("name", "residual"),
    [*((name, "sum") for name in NETWORKS), ("torchvision bottleneck", "mean"), ("cifar", "sqrt2")],
)
def test_the_bound_is_above_dense_jacobians(name: str, residual: str) -> None:
    make, x = NETWORKS[name]
    torch.manual_seed(0)
    model = after_training(to_lcnn(after_training(make()).double(), x.double(), residual=residual))
    report = lcnn_report(model, x.double())
    assert math.isfinite(report.lipschitz), report.reason
    assert report.reason == ""
    for _ in range(3):
        norm = jacobian_norm(model, torch.randn(x.shape, dtype=torch.float64))
        assert 0 < norm <= report.lipschitz
    again = flexure.lipschitz_bound(model, tuple(x.shape[1:])).value
    assert again == report.lipschitz
    factor = {"sum": 1.0, "mean": 0.5, "sqrt2": 0.5**0.5}[residual]
    sums = [part for part in report.parts if part.kind == "sum"]
    assert all(part.left == (residual == "sum") for part in sums)
    assert residual == "sum" or all(part.constant == pytest.approx(factor) for part in sums)


def test_the_mean_of_residual_blocks_bounds_a_network_by_its_depth() -> None:
    """Linear parts of norm 1, BatchNorms of slope 1 or less and means: at most 1."""
    model = to_lcnn(resnet18(4, width=2), torch.zeros(1, 3, 8, 8), residual="mean")
    for module in model.modules():
        if isinstance(module, LipschitzBatchNorm):
            module.raw_gamma.data.fill_(-100.0)  # gamma = 1
            module.weight.data.fill_(3.0)
    report = lcnn_report(model, torch.zeros(1, 3, 8, 8))
    assert report.lipschitz <= 1.2  # certified norms are a little above 1
    assert all(part.constant == pytest.approx(1) for part in report.of("norm"))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_part_is_in_the_report(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, x = NETWORKS[name]
    model = make()
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    norms = [p for p, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    parameters = {id(p) for p in model.parameters()}
    sites = flexure.sites(model, x)
    to_lcnn(model, x)
    report = lcnn_report(model, x)
    assert capsys.readouterr().out == f"{report}\n"
    assert [part.name for part in report.of("linear")] == list(layers)
    assert all(model.get_submodule(path) is layer for path, layer in layers.items())
    assert list(spectral_norms(model)) == list(layers)
    assert all(1 - 1e-3 <= part.constant <= 1.2 for part in report.of("linear"))
    assert [part.name for part in report.of("norm")] == norms
    assert [part.name for part in report.of("activation")] == [site.name for site in sites.sites]
    assert all(part.constant == pytest.approx(5) for part in report.of("activation"))
    units = [m for m in model.modules() if isinstance(m, CenteredSoftplus)]
    assert len(units) == len(sites.sites)
    # The parameters are the same objects; new are one beta a site, one gamma a BatchNorm.
    assert parameters <= {id(p) for p in model.parameters()}
    assert len(list(model.parameters())) == len(parameters) + len(units) + len(norms)
    assert {p.name for p in report.parts if p.left} >= {r.name for r in sites.refused}
    for row in report.rows():
        assert set(row) == {"part", "name", "was", "is now", "constant", "note"}


def test_a_converted_twin_is_the_built_network() -> None:
    for make, size, settings in (
        (resnet18, 8, {"residual": "mean"}),
        (vgg11, 32, {"pooling": "average"}),
    ):
        example = torch.zeros(1, 3, size, size)
        built = make(4, width=2, lcnn=True, input_size=size)
        model = to_lcnn(make(4, width=2), example, **settings)
        assert model.state_dict().keys() == built.state_dict().keys()
        model.load_state_dict(built.state_dict())
        x = torch.randn(3, 3, size, size)
        for training in (True, False):
            assert torch.equal(model.train(training)(x), built.train(training)(x))
        model.load_state_dict(built.state_dict())  # the running statistics have moved
        mine, theirs = lcnn_report(model, example), lcnn_report(built, example)
        assert mine.lipschitz == theirs.lipschitz
        for kind in ("activation", "linear", "norm"):
            ours = [(part.name, part.constant) for part in mine.of(kind)]
            assert ours == [(part.name, part.constant) for part in theirs.of(kind)]
        assert len(mine.of("sum")) == len(theirs.of("sum"))


def test_at_large_beta_activations_alone_change_nothing() -> None:
    for name in ("torchvision basic", "vgg", "leaky", "mlp"):
        make, x = NETWORKS[name]
        plain = after_training(make().double())
        flat = to_lcnn(copy.deepcopy(plain), x.double(), parts=("activation",), beta=1e9)
        x = torch.randn(2, *x.shape[1:], dtype=torch.float64)
        torch.testing.assert_close(flat(x), plain(x), rtol=1e-6, atol=1e-7)


def test_state_dicts_fit_a_fresh_copy_converted_the_same_way() -> None:
    for name in ("torchvision basic", "leaky"):
        make, x = NETWORKS[name]
        first, second = (to_lcnn(make(), x, residual="mean") for _ in range(2))
        first.train()(torch.randn(4, *x.shape[1:]))
        second.load_state_dict(first.state_dict())
        x = torch.randn(2, *x.shape[1:])
        assert torch.equal(first.eval()(x), second.eval()(x))
        # Parametrised layers cannot be pickled whole, torch's rule; their state dicts can.
        restored = copy.deepcopy(first)
        assert torch.equal(restored(x), first(x))
        assert str(lcnn_report(restored, x[:1])) == str(lcnn_report(first, x[:1]))


def test_training_with_its_penalty() -> None:
    from flexure.penalties import LowCurvature

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    to_lcnn(model, x[:1])
    before = lcnn_report(model, x[:1])
    history = flexure.fit(
        model,
        [(x, y)],
        epochs=30,
        penalties={LowCurvature(): 1.0},
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        seed=0,
    )
    assert history is not None
    after = lcnn_report(model, x[:1])
    # The penalty lowers beta; constants, and the bound, are those of now.
    assert after.of("activation")[0].constant < before.of("activation")[0].constant
    assert after.of("norm")[0].constant != before.of("norm")[0].constant
    model.double().eval()
    bound = lcnn_report(model, x[:1].double())
    largest = max(jacobian_norm(model, each[None].double()) for each in x[:16])
    assert largest <= bound.lipschitz
    assert math.isfinite(flexure.hessian_bound(model, (3,)).vector)


def test_smooth_conversions_have_a_hessian_bound() -> None:
    make, x = NETWORKS["vgg"]
    kinked = to_lcnn(make(), x).eval()
    with pytest.raises(FlexureError, match="max_pool"):
        flexure.hessian_bound(kinked, tuple(x.shape[1:]))
    smooth = to_lcnn(make(), x, pooling="average").eval()
    assert math.isfinite(flexure.hessian_bound(smooth, tuple(x.shape[1:])).vector)
    pools = [part for part in lcnn_report(smooth, x).parts if part.kind == "pool"]
    assert len(pools) == 2
    assert not any(part.left for part in pools)
    assert all(part.left and "kinks" in part.note for part in _parts(kinked, x, "pool"))


def _parts(model: nn.Module, x: Tensor, kind: str) -> list[Any]:
    return [part for part in lcnn_report(model, x).parts if part.kind == kind]


def test_parts_for_ablations() -> None:
    for parts in (("activation",), ("linear",), ("norm",), ("linear", "norm")):
        model = to_lcnn(vgg_like(), parts=parts)
        has = {
            "activation": not any(isinstance(m, nn.ReLU) for m in model.modules()),
            "linear": bool(spectral_norms(model)),
            "norm": any(isinstance(m, LipschitzBatchNorm) for m in model.modules()),
        }
        assert {name for name, there in has.items() if there} == set(parts)
        report = lcnn_report(model, IMAGE)
        assert {part.kind for part in report.parts if not part.left} == set(parts)
        assert math.isfinite(report.lipschitz)


def test_modes_hooks_and_dtypes_are_kept() -> None:
    model = vgg_like().double()
    model[1].eval()
    calls: list[str] = []
    model[2].register_forward_hook(lambda *_: calls.append("activation"))
    model[1].register_forward_hook(lambda *_: calls.append("norm"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("conv"))
    modes = [module.training for module in (model, model[0], model[1], model[2], model[10])]
    state = torch.random.get_rng_state()
    to_lcnn(model, IMAGE.double())
    assert torch.equal(state, torch.random.get_rng_state())
    assert modes == [module.training for module in (model, model[0], model[1], model[2], model[10])]
    assert all(p.dtype == torch.float64 for p in model.parameters())
    calls.clear()
    model(torch.randn(2, 3, 16, 16, dtype=torch.float64))
    assert calls == ["conv", "norm", "activation"]
    half = to_lcnn(MLP((3, 5, 2)).to(torch.bfloat16), torch.zeros(1, 3, dtype=torch.bfloat16))
    assert half(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


class Overwritten(nn.Module):
    """Uses the input of its activations after they have overwritten it."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.act = nn.ReLU(inplace=True)
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        x = self.lin(x)
        F.relu_(x) if self.functional else self.act(x)
        return x


@pytest.mark.parametrize("functional", [False, True])
def test_activations_overwrite_where_it_matters(functional: bool) -> None:
    torch.manual_seed(0)
    example = torch.randn(4, 3)
    plain = Overwritten(functional)
    model = to_lcnn(copy.deepcopy(plain), example, parts=("activation",), beta=1e6)
    x = torch.randn(9, 3)
    torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=0)
    assert any(isinstance(m, Overwriting) for m in model.modules()) != functional
    model(x).sum().backward()
    assert lcnn_report(model, example).of("activation")[0].constant == pytest.approx(1e6)
    # Where it does not matter, nothing overwrites.
    model = to_lcnn(vgg_like(), IMAGE)
    assert not any(isinstance(m, Overwriting) for m in model.modules())


class Twice(nn.Module):
    """One convolution at two sizes, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.same = self.conv
        self.head = nn.Linear(3, 2)
        self.auxiliary = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(F.avg_pool2d(torch.relu(self.conv(x)), 2))
        return self.head(x.mean((2, 3)))


def test_shared_and_uncalled_layers() -> None:
    model = to_lcnn(Twice())
    linear = {part.name: part for part in _parts(model, IMAGE, "linear")}
    assert set(linear) == {"conv", "head", "auxiliary"}
    assert "16 x 16" in linear["conv"].note
    assert "several" in linear["conv"].note
    assert "also same" in linear["conv"].note
    assert linear["auxiliary"].left
    assert "not called" in linear["auxiliary"].note
    assert len(model.conv.parametrizations.weight) == 1


def test_slopes_of_prelu_stay_the_networks_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4, 0.3), nn.Conv2d(4, 2, 3), nn.PReLU())
    slopes = [m.weight for m in model.modules() if isinstance(m, nn.PReLU)]
    to_lcnn(model)
    units = [m for m in model.modules() if isinstance(m, LeakySoftplus)]
    assert [id(unit.weight) for unit in units] == [id(slope) for slope in slopes]
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(slope.grad is not None for slope in slopes)


def test_bounded_activations_stay() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.act = nn.Linear(3, 4), nn.Linear(4, 2), nn.ReLU6()

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.two(F.elu(self.act(self.one(x)))))

    model = to_lcnn(Gated(), torch.zeros(1, 3))
    parts = {part.was: part for part in _parts(model, torch.zeros(1, 3), "activation")}
    assert {was: part.left for was, part in parts.items()} == {
        "clamp": False,
        "elu": True,
        "sigmoid": True,
    }
    assert "cap" in parts["clamp"].note
    assert isinstance(model.act, CenteredSoftplus)


def test_other_normalisations_are_reported() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.layer = nn.LayerNorm(4)
            self.group = nn.GroupNorm(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(self.group(self.layer(torch.relu(self.lin(x)))), (4,))

    model = Normed()
    to_lcnn(model, torch.zeros(1, 4))
    report = lcnn_report(model, torch.zeros(1, 4))
    norms = [part for part in report.parts if part.kind == "norm"]
    assert [part.was for part in norms] == ["LayerNorm", "GroupNorm", "layer_norm"]
    assert all(part.left and part.note for part in norms)
    assert math.isnan(report.lipschitz)
    assert "layer_norm" in report.reason.lower().replace(" ", "_")
    assert "unknown" in report.summary


# what cannot be converted


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean()
        return F.conv2d(x, weight, self.bias)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0].mean(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.words(x).mean(1)))


class Bare(nn.Module):
    """A matrix of its own, and a positional embedding, which is only added."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 3))
        self.position = nn.Parameter(torch.randn(1, 3))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu((x + self.position) @ self.matrix.t()))


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "attention": (Attention, torch.zeros(1, 3, 4), r"attention\.in_proj_weight"),
    "out_proj": (Attention, torch.zeros(1, 3, 4), r"attention\.out_proj\.weight"),
    "recurrent": (Recurrent, torch.zeros(1, 3, 3), r"rnn\.weight_hh_l0"),
    "embedding": (Tied, torch.zeros(1, 3, dtype=torch.long), r"words\.weight"),
    "bare": (Bare, torch.zeros(1, 3), "matrix: a weight of Bare"),
    "swin": (networks.Swin, torch.zeros(1, 3, 8, 8), r"features\.0\.qkv\.weight.*linear"),
    "bilinear": (
        lambda: nn.Sequential(nn.ReLU(), _Pair(nn.Bilinear(3, 3, 2))),
        torch.zeros(1, 3),
        "Bilinear",
    ),
    "subclass": (lambda: nn.Sequential(Standardised(3, 2, 3), nn.ReLU()), IMAGE, "Standardised"),
    "weight_norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.ReLU()),
        torch.zeros(1, 3),
        "weight is computed",
    ),
}


class _Pair(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x)


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_cannot_be_normalised(name: str) -> None:
    make, x, message = REFUSED[name]
    model = make()
    before = fingerprint(model)
    with pytest.raises(FlexureError, match=message):
        to_lcnn(model, x)
    assert fingerprint(model) == before


def test_what_leave_names_stays() -> None:
    model = to_lcnn(Bare(), torch.zeros(1, 3), leave="matrix")
    parts = {part.name: part for part in _parts(model, torch.zeros(1, 3), "linear")}
    assert parts["matrix"].left
    assert not parts["head"].left
    model = to_lcnn(networks.Swin(), torch.zeros(1, 3, 8, 8), leave=["*.qkv", "*.proj"])
    assert "features.0.mlp.0" in spectral_norms(model)
    assert "features.0.qkv" not in spectral_norms(model)
    model = to_lcnn(MLP((3, 4, 2)), torch.zeros(1, 3), leave="head")
    assert list(spectral_norms(model)) == ["body.0"]
    for leave in ("haed", ["head", "nothing"]):
        with pytest.raises(FlexureError, match="names none"):
            to_lcnn(MLP((3, 4, 2)), torch.zeros(1, 3), leave=leave)
    with pytest.raises(FlexureError, match="leave="):
        to_lcnn(MLP((3, 4, 2)), torch.zeros(1, 3), leave="head", parts=("norm",))


class Branches(nn.Module):
    """A sum that is no a + b."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.one(x), torch.relu(self.two(x))]).sum(0)


def test_sums_that_cannot_be_followed() -> None:
    for residual in ("mean", "sqrt2"):
        model = Branches()
        before = fingerprint(model)
        with pytest.raises(SiteError, match=r"residual='sum'"):
            to_lcnn(model, torch.zeros(1, 3), residual=residual)
        assert fingerprint(model) == before
    model = to_lcnn(Branches(), torch.zeros(1, 3))
    assert [part.left for part in _parts(model, torch.zeros(1, 3), "sum")] == [True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta"),
        ({"beta": -1.0}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"beta": math.inf}, "beta"),
        ({"gamma": 0.999}, "gamma"),
        ({"gamma": math.nan}, "gamma"),
        ({"gamma": math.inf}, "gamma"),
        ({"residual": "max"}, "'sqrt2'.*'max'"),
        ({"pooling": "max"}, "'average'.*'max'"),
        ({"parts": ()}, "parts"),
        ({"parts": "linear"}, "tuple"),
        ({"parts": ("linear", "bias")}, "'bias'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    model = vgg_like()
    before = fingerprint(model)
    with pytest.raises(FlexureError, match=message):
        to_lcnn(model, **settings)
    assert fingerprint(model) == before


def test_wrong_examples_and_models() -> None:
    model = vgg_like()
    before = fingerprint(model)
    with pytest.raises(SiteError, match="does not run"):
        to_lcnn(model, torch.zeros(1, 2))
    assert fingerprint(model) == before
    with pytest.raises(FlexureError, match="network"):
        to_lcnn("resnet18")  # type: ignore[arg-type]
    with pytest.raises(SiteError, match="rrelu"):
        to_lcnn(nn.Sequential(nn.Linear(3, 2), nn.RReLU()), torch.zeros(1, 3))
    with pytest.raises(FlexureError, match="SyncBatchNorm"):
        to_lcnn(nn.Sequential(nn.Linear(3, 2), nn.SyncBatchNorm(2)).eval(), torch.zeros(2, 3))


def test_a_second_conversion_is_refused() -> None:
    for model in (to_lcnn(MLP((3, 4, 2)), torch.zeros(1, 3)), vgg11(2, lcnn=True, width=1)):
        with pytest.raises(FlexureError, match="already"):
            to_lcnn(model, torch.zeros(1, 3))
    model = MLP((3, 4, 2))
    steering = flexure.steer(model, beta=0.5, example=torch.zeros(1, 3))
    with pytest.raises(SiteError, match="steered already"):
        to_lcnn(model, torch.zeros(1, 3))
    steering.remove()
    with pytest.raises(FlexureError, match="to_lcnn first"):
        lcnn_report(model, torch.zeros(1, 3))


@pytest.mark.parametrize("step", ["install", "scale_sums", "report_of", "remember_parts"])
def test_an_error_on_the_way_leaves_the_model_as_it_was(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = networks.resnet18(2)
    x = torch.randn(2, 3, 16, 16)
    before, output = fingerprint(model), model.eval()(x)
    model.train()

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lcnn, step, fail)
    if step == "install":  # the check whether overwriting matters uses it too
        monkeypatch.setattr(lcnn, "_overwriting_matters", lambda *_: False)
    with pytest.raises(KeyboardInterrupt):
        to_lcnn(model, residual="mean")
    assert fingerprint(model) == before
    assert torch.equal(model.eval()(x), output)


def test_an_error_within_the_layers_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flexure.methods import lcnn_layers

    model, made = networks.resnet18(2), []
    before = fingerprint(model)

    def fail_later(module: nn.Module, **settings: Any) -> nn.Module:
        made.append(module)
        if len(made) == 5:
            raise FlexureError("expected four layers")
        return _spectral_norm(module, **settings)

    _spectral_norm = lcnn_layers.spectral_norm
    monkeypatch.setattr(lcnn_layers, "spectral_norm", fail_later)
    with pytest.raises(FlexureError, match="four layers"):
        to_lcnn(model)
    assert fingerprint(model) == before
    monkeypatch.undo()
    to_lcnn(model)


# wrappers


def test_wrapped_models_are_converted_inside() -> None:
    inner = MLP((3, 4, 2))
    wrapped = nn.DataParallel(inner)
    assert to_lcnn(wrapped, torch.zeros(1, 3)) is wrapped
    assert list(spectral_norms(inner)) == ["body.0", "head"]
    assert isinstance(lcnn_report(wrapped, torch.zeros(1, 3)), LCNNReport)


def test_compiled_models_follow() -> None:
    inner = MLP((3, 4, 2)).eval()
    compiled = torch.compile(inner, backend="eager")
    x = torch.randn(2, 3)
    plain = compiled(x)
    to_lcnn(compiled, x)
    torch.testing.assert_close(compiled(x), inner(x))
    assert not torch.allclose(compiled(x), plain)


def test_models_of_several_inputs_have_no_bound_but_a_report() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(self.lin(x) + y)

    model = to_lcnn(Two(), (torch.zeros(1, 3), torch.zeros(1, 2)), residual="mean")
    report = lcnn_report(model, (torch.zeros(1, 3), torch.zeros(1, 2)))
    assert math.isnan(report.lipschitz)
    assert "one tensor" in report.reason
    assert len(report.of("sum")) == 1


def test_average_pooling_has_the_windows_of_the_maximum() -> None:
    model = to_lcnn(vgg_like(), pooling="average")
    pools = [m for m in model.modules() if isinstance(m, AveragePooling)]
    assert len(pools) == 2
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(pools[0](x), F.avg_pool2d(x, 2))


def test_hooks_of_a_batch_norm_stay() -> None:
    called: list[str] = []
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    model[1].register_forward_hook(lambda *_: called.append("after"))
    model[1].register_forward_pre_hook(lambda *_: called.append("before"))
    to_lcnn(model, example=torch.randn(5, 3))
    assert isinstance(model[1], LipschitzBatchNorm)
    called.clear()
    model(torch.randn(5, 3))
    assert called == ["before", "after"]


def test_gamma_stays_wide_in_a_half_precision_network() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).bfloat16()
    to_lcnn(model, example=torch.randn(5, 3).bfloat16())
    assert model[1].raw_gamma.dtype == torch.float32
    assert model[1].gamma.item() == pytest.approx(10.0)


# what is refused before anything is changed, and what is told of what stays


class Resized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.ConvTranspose2d(3, 4, 3, 2, 1), nn.Linear(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.up(x, output_size=(8, 8))).flatten(1))


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(3, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))


@pytest.mark.parametrize(
    ("make", "x", "message"),
    [
        (Resized, torch.zeros(1, 3, 4, 4), "up: called with output_size.*output_padding"),
        (lazy, IMAGE, r"lazy ones at 0, 1, 3; run a batch"),
        (lambda: nn.BatchNorm2d(3), IMAGE, r"BatchNorm2d itself; wrap it in nn\.Sequential"),
    ],
)
def test_what_cannot_run_afterwards_is_refused_before(
    make: Callable[[], nn.Module], x: Tensor, message: str
) -> None:
    model = make()
    modes = [(path, type(module)) for path, module in model.named_modules()]
    with pytest.raises(FlexureError, match=f"(?s){message}"):
        to_lcnn(model, x)
    assert [(path, type(module)) for path, module in model.named_modules()] == modes


def test_a_converted_model_that_does_not_run_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    module: Any = importlib.import_module("flexure.layers.spectral_norm")
    model = vgg_like()
    before = fingerprint(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("does not run any more")

    monkeypatch.setattr(module._NoteSize, "__call__", fail)
    with pytest.raises(SiteError, match="does not run"):
        to_lcnn(model)
    assert fingerprint(model) == before


def test_no_conversion_inside_inference_mode() -> None:
    model = vgg_like()
    before = fingerprint(model)
    with torch.inference_mode(), pytest.raises(FlexureError, match="inference_mode"):
        to_lcnn(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": "5"}, "beta.*'5'"),
        ({"beta": True}, "beta.*True"),
        ({"gamma": None}, "gamma.*None"),
        ({"gamma": torch.ones(2)}, "gamma"),
        ({"residual": ["mean"]}, "residual"),
        ({"pooling": True}, "pooling"),
        ({"parts": None}, "parts.*None"),
        ({"parts": 5}, "parts.*5"),
        ({"leave": 5}, "leave.*5"),
        ({"leave": None}, "leave.*None"),
        ({"leave": ["0", 3]}, "leave.*3"),
        ({"example": None}, "example.*NoneType"),
        ({"example": 3}, "example.*int"),
    ],
)
def test_settings_of_wrong_types(settings: dict[str, Any], message: str) -> None:
    model = vgg_like()
    before = fingerprint(model)
    with pytest.raises(FlexureError, match=message):
        flexure.to_lcnn(model, **{"example": IMAGE, **settings})
    assert fingerprint(model) == before


def test_the_report_is_for_the_sizes_of_its_example() -> None:
    conv = nn.Conv2d(3, 4, 5, padding=2)
    model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))
    to_lcnn(model, torch.zeros(1, 3, 3, 3)).eval()
    model(torch.zeros(1, 3, 24, 24))
    for size in (3, 12):
        (conv_part, _) = lcnn_report(model, torch.zeros(1, 3, size, size)).of("linear")
        assert conv_part.note == f"input {size} x {size}"
        assert conv_part.constant == pytest.approx(1, abs=0.02)
    assert spectral_norms(model)["0"].size == (24, 24)  # nothing is changed


class Written(nn.Module):
    """One operation behind a layer."""

    def __init__(self, operation: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.full((5,), 9.0))
        self.register_buffer("matrix", 9 * torch.eye(5))
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(self, self.lin(x))


def assigned(x: Tensor, place: Any, value: Any) -> Tensor:
    y = x.clone()
    y[place] = value
    return y


@pytest.mark.parametrize(
    ("operation", "kind", "was", "note"),
    [
        (lambda m, x: x * m.scale, "factor", "times the parameter scale", "nothing bounds"),
        (lambda m, x: x @ m.matrix, "factor", "times the buffer matrix", "nothing bounds"),
        (lambda m, x: F.linear(x, m.matrix), "factor", "times the buffer matrix", "nothing"),
        (lambda m, x: 9 * x, "factor", "times the number 9", "nothing bounds"),
        (lambda m, x: x / m.scale.sum(), "factor", "times a tensor of shape ()", "nothing bounds"),
        (lambda m, x: x * (x > 0), "activation", "", "rectifier written out"),
        (lambda m, x: torch.where(x > 0, x, 0.0), "activation", "", "choice by a condition"),
        (lambda m, x: assigned(x, x < 0, 0.0), "activation", "", "choice by a condition"),
        (
            lambda m, x: assigned(torch.zeros_like(x), x > 0, x[x > 0]),
            "activation",
            "",
            "choice by a condition",
        ),
        (
            lambda m, x: x.index_put((x < 0,), torch.zeros(())),
            "activation",
            "",
            "choice by a condition",
        ),
        (
            lambda m, x: x.clone().index_put_(indices=(x < 0,), values=torch.zeros(())),
            "activation",
            "",
            "choice by a condition",
        ),
        *(
            (each, "activation", "", "kink")
            for each in (
                lambda m, x: x.abs(),
                lambda m, x: x.amax(1),
                lambda m, x: torch.amin(x, 1),
                lambda m, x: x.max(),
                lambda m, x: x.min(1).values,
            )
        ),
        *(
            (lambda m, x, step=step: getattr(x, step)(), "activation", "", "jumps")
            for step in ("round", "floor", "ceil", "sign", "round_", "floor_", "ceil_", "sign_")
        ),
        (lambda m, x: F.hardtanh(x), "activation", "hardtanh", "^bounded.*softplus is not$"),
        (lambda m, x: F.softshrink(x), "activation", "softshrink", "^no rectifier"),
    ],
)
def test_what_nothing_bounds_is_reported(operation: Any, kind: str, was: str, note: str) -> None:
    import re

    model = to_lcnn(Written(operation), torch.ones(1, 5))
    (part,) = lcnn_report(model, torch.ones(1, 5)).left
    assert (part.kind, part.was) == (kind, was)
    assert re.search(note, part.note)
    assert "CTU" not in part.note
    assert "1 left as it is;" in lcnn_report(model, torch.ones(1, 5)).summary


@pytest.mark.parametrize(
    "operation",
    [
        lambda m, x: assigned(x, 0, 0.0),
        lambda m, x: assigned(
            x, (slice(None), torch.tensor([True, False, True, True, False])), 0.0
        ),
        lambda m, x: assigned(torch.zeros_like(x), slice(None), x),
        lambda m, x: x.index_put((torch.tensor([0]),), x.detach()[:1]),
        lambda m, x: x + (x > 0).max(),
    ],
)
def test_places_and_conditions_alone_are_no_kinks(operation: Any) -> None:
    model = to_lcnn(Written(operation), torch.ones(1, 5))
    assert not [p for p in lcnn_report(model, torch.ones(1, 5)).left if p.kind == "activation"]


def test_layers_and_networks_of_our_own_have_no_factors() -> None:
    for model, x in (
        (nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.GELU()), torch.ones(1, 5)),
        (CifarResNet(8), IMAGE),
    ):
        report = lcnn_report(to_lcnn(model, x), x)
        assert not report.of("factor", left=True)


def test_a_preprocessing_inside_is_a_factor() -> None:
    from flexure.attacks import Bounded

    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 3))
    model = Bounded(inner, mean=[0.5] * 3, std=[0.1] * 3)
    report = lcnn_report(to_lcnn(model, IMAGE + 0.5), IMAGE + 0.5)
    assert [part.note for part in report.of("factor", left=True)] == ["nothing bounds this factor"]


def test_uncalled_layers_and_normalisations_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].spare = nn.Linear(2, 2)
    model[0].norm = nn.BatchNorm1d(2)
    model = to_lcnn(model, torch.zeros(1, 3))
    left = lcnn_report(model, torch.zeros(1, 3)).left
    assert [(p.kind, p.note) for p in left] == [
        ("linear", "not called by the example"),
        ("norm", "not called by the example"),
    ]
    assert type(model[0].norm) is nn.BatchNorm1d


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize(
    "make", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["old", "new"]
)
def test_a_computed_weight_is_named_once(make: Any) -> None:
    model = nn.Sequential(make(nn.Linear(3, 2)), nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(FlexureError, match="computed") as caught:
        to_lcnn(model, torch.zeros(1, 3))
    assert len(str(caught.value).splitlines()) == 3


def test_networks_that_branch_on_their_mode() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                x = F.relu(self.two(x))
            return F.relu(self.one(x))

    model = to_lcnn(Branching(), torch.zeros(1, 3))
    with pytest.raises(SiteError, match="before to_lcnn, write the model so that it makes the sa"):
        model.train()(torch.zeros(2, 3))
