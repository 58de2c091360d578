"""ResNet-18, ResNet-34 and VGG-11, plain and as low-curvature networks, and their addresses."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from flexure.contracts import AddressError, FlexureError
from flexure.data import load_data
from flexure.layers import LipschitzBatchNorm
from flexure.models import (
    CIFAR,
    NETWORKS,
    RESIDUAL_FACTORS,
    AsFloat,
    load_model,
    resnet18,
    resnet34,
    vgg11,
)
from flexure.units import CenteredSoftplus

BUILT = {"resnet18": resnet18, "resnet34": resnet34, "vgg11": vgg11}


def shuffled_norms(model: nn.Module) -> nn.Module:
    """The model in eval mode with BatchNorms as after training, not at their start."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.2, 3.0),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    ("make", "count", "layers", "activations"),
    [
        (resnet18, 11_173_962, 21, 17),
        (resnet34, 21_282_122, 37, 33),
        (vgg11, 9_231_114, 9, 8),
    ],
)
def test_parameter_counts(
    make: Callable[..., nn.Module], count: int, layers: int, activations: int
) -> None:
    plain, flat = make(), make(lcnn=True, width=2)
    assert sum(p.numel() for p in plain.parameters()) == count
    twin = sum(p.numel() for p in make(width=2).parameters())
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in plain.modules()) == layers
    assert sum(isinstance(m, nn.ReLU) for m in plain.modules()) == activations
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    # One beta a call, one gamma a norm, and nothing else is learned besides the weights.
    assert sum(p.numel() for p in flat.parameters()) == twin + activations + norms
    assert sum(isinstance(m, CenteredSoftplus) for m in flat.modules()) == activations
    assert sum(isinstance(m, LipschitzBatchNorm) for m in flat.modules()) == norms
    assert not any(isinstance(m, nn.MaxPool2d | nn.ReLU) for m in flat.modules())


def reference_resnet18(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network written out flat."""

    def conv_bn(x: Tensor, conv: str, bn: str, stride: int = 1) -> Tensor:
        weight = state[f"{conv}.weight"]
        y = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(y, *(state[f"{bn}.{name}"] for name in names))

    x = F.relu(conv_bn(x, "conv1", "bn1"))
    for stage in (1, 2, 3, 4):
        for block in range(2):
            path = f"layer{stage}.{block}"
            down = stage > 1 and block == 0
            y = F.relu(conv_bn(x, f"{path}.conv1", f"{path}.bn1", 2 if down else 1))
            y = conv_bn(y, f"{path}.conv2", f"{path}.bn2")
            if down:
                x = conv_bn(x, f"{path}.shortcut.0", f"{path}.shortcut.1", 2)
            x = F.relu(x + y)
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


def reference_vgg11(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network written out flat: positions of convolutions in the list of layers."""
    for position in (0, 4, 8, 11, 15, 18, 22, 25):
        conv, bn = f"features.{position}", f"features.{position + 1}"
        x = F.conv2d(x, state[f"{conv}.weight"], state[f"{conv}.bias"], padding=1)
        names = ("running_mean", "running_var", "weight", "bias")
        x = F.relu(F.batch_norm(x, *(state[f"{bn}.{name}"] for name in names)))
        if position not in (8, 15, 22):
            x = F.max_pool2d(x, 2)
    return F.linear(x.flatten(1), state["linear.weight"], state["linear.bias"])


@pytest.mark.parametrize(
    ("make", "reference"), [(resnet18, reference_resnet18), (vgg11, reference_vgg11)]
)
def test_forward_against_a_flat_reference(make, reference) -> None:
    model = shuffled_norms(make(7, width=4).double())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x), reference(model.state_dict(), x))


@pytest.mark.parametrize("make", BUILT.values())
def test_every_activation_is_made_by_the_argument(make) -> None:
    model = make(width=2, activation=nn.Tanh)
    assert sum(isinstance(m, nn.Tanh) for m in model.modules()) in (8, 17, 33)
    assert not any(isinstance(m, nn.ReLU) for m in model.modules())
    calls = []
    for module in model.modules():
        if isinstance(module, nn.Tanh):
            module.register_forward_hook(lambda module, *_: calls.append(module))
    model(torch.zeros(2, 3, 32, 32))
    assert len(calls) == len(set(calls)) == sum(isinstance(m, nn.Tanh) for m in model.modules())


@pytest.mark.parametrize(("make", "size"), [(resnet18, 9), (vgg11, 33)])
def test_operators_of_an_lcnn_have_norm_one_at_the_sizes_that_they_see(make, size: int) -> None:
    """Each weight against the largest singular value of the dense matrix of its layer."""
    model = make(4, lcnn=True, width=2, input_size=size).double().eval()
    seen: dict[nn.Module, Tensor] = {}

    def see(module: nn.Module, args: tuple[Tensor]) -> None:
        seen[module] = args[0]

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(see)
    with torch.no_grad():
        model(torch.randn(1, 3, size, size, dtype=torch.float64))
        # Of layers of large matrices every entry costs; those of small inputs have every shape.
        small = {module: x for module, x in seen.items() if x.numel() <= 300}
        assert len(small) >= 4
        for module, x in small.items():
            eye = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape[1:])
            bias = 0 if module.bias is None else module(torch.zeros_like(x))
            matrix = (module(eye) - bias).flatten(1)
            largest = torch.linalg.svdvals(matrix)[0].item()
            assert 1 - 1e-3 <= largest <= 1 + 1e-3, module


@pytest.mark.parametrize("residual", RESIDUAL_FACTORS)
def test_residual_sums_of_an_lcnn(residual: str) -> None:
    model = resnet18(3, lcnn=True, width=2, residual=residual, activation=nn.Identity)
    block = model.eval().layer1[0]
    for path in ("bn1", "bn2"):
        setattr(block, path, nn.Identity())
    block.conv1 = block.conv2 = nn.Identity()
    x = torch.randn(2, 2, 5, 5)
    torch.testing.assert_close(block(x), 2 * RESIDUAL_FACTORS[residual] * x)


def test_a_mean_block_of_identities_has_norm_one() -> None:
    assert RESIDUAL_FACTORS["mean"] * 2 == 1


@pytest.mark.parametrize("make", [resnet18, vgg11])
def test_an_lcnn_is_smooth_and_trains(make) -> None:
    model = make(4, lcnn=True, width=2)
    x, y = torch.randn(4, 3, 32, 32, requires_grad=True), torch.tensor([0, 1, 2, 3])
    F.cross_entropy(model(x), y).backward()
    assert x.grad is not None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    deepcopy(model).load_state_dict(model.state_dict())


def test_wrong_settings() -> None:
    for make in BUILT.values():
        for settings in ({"num_classes": 0}, {"width": 0}, {"input_size": 0}):
            with pytest.raises(FlexureError, match="at least 1 class"):
                make(**settings)
        for name, value in (("beta", 0.0), ("beta", -1.0), ("beta", float("nan"))):
            with pytest.raises(FlexureError, match="beta"):
                make(lcnn=True, **{name: value})
        for value in (0.99, float("inf"), float("nan")):
            with pytest.raises(FlexureError, match="gamma"):
                make(lcnn=True, gamma=value)
    with pytest.raises(FlexureError, match="32 x 32"):
        vgg11(input_size=31)
    with pytest.raises(FlexureError, match="'product'"):
        resnet18(residual="product")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lcnn": "no"}, "lcnn to be True or False"),
        ({"lcnn": True, "beta": "5"}, "beta.*'5'"),
        ({"lcnn": True, "beta": True}, "beta.*True"),
        ({"lcnn": True, "gamma": [10]}, "gamma"),
        ({"lcnn": True, "residual": ["mean"]}, "residual"),
        ({"lcnn": True, "residual": ""}, "residual"),
        ({"lcnn": True, "activation": 5}, "activation.*5"),
        ({"lcnn": True, "activation": nn.Tanh, "beta": 3.0}, "beta=.*activation of its own"),
        ({"width": "4"}, "width to be a whole number"),
        ({"width": 2.5}, "width to be a whole number"),
        ({"num_classes": True}, "num_classes to be a whole number"),
        ({"beta": -1}, "beta"),
        ({"gamma": 0.5}, "gamma"),
        ({"beta": 7.0}, "beta= with lcnn=True"),
        ({"gamma": 10.0, "residual": "mean"}, "residual=, gamma= with lcnn=True"),
    ],
)
def test_no_setting_is_dropped_silently(settings: dict[str, object], message: str) -> None:
    with pytest.raises(FlexureError, match=message):
        resnet18(**{"width": 4, **settings})


# addresses


@pytest.mark.parametrize(
    ("name", "lcnn"), [("resnet18", 1), ("resnet34", 0), ("vgg11", 0), ("vgg11", 1)]
)
def test_weights_round_trip(name: str, lcnn: int, tmp_path: Path) -> None:
    size = 32 if name == "vgg11" else 8
    model = shuffled_norms(BUILT[name](5, lcnn=bool(lcnn), width=2, input_size=size))
    file = tmp_path / "w.safetensors"
    save_file(model.state_dict(), file)
    address = f"flexure:{name}?weights={file}&width=2&input_size={size}&lcnn={lcnn}"
    loaded = load_model(address)
    assert (loaded.address, loaded.head, loaded.preprocess) == (
        address,
        "linear",
        replace(CIFAR, size=(size, size)),
    )
    stored = load_file(file)
    assert all(torch.equal(loaded.model.state_dict()[key], stored[key]) for key in stored)
    x = torch.randn(2, 3, size, size)
    assert torch.equal(loaded.model(x), model(x))
    if lcnn:  # not the weights of its plain twin
        with pytest.raises(AddressError, match="missing keys"):
            load_model(f"flexure:{name}?weights={file}&width=2")


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_options_reach_the_network() -> None:
    loaded = load_model("flexure:resnet18?num_classes=3&width=2&input_size=9&lcnn=1&residual=sum")
    assert loaded.model.linear.out_features == 3
    assert loaded.model.conv1.out_channels == 2
    assert loaded.model.layer1[0].add.factor == 1
    x = loaded.preprocess(torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8))
    assert x.shape == (3, 9, 9)
    assert loaded.model(x[None]).shape == (1, 3)


@pytest.mark.parametrize("name", NETWORKS)
def test_random_weights_warn_and_follow_the_seed(name: str) -> None:
    small = "" if "width" not in NETWORKS[name].options else "width=2&"
    made = []
    state = torch.random.get_rng_state()
    for seed in (0, 0, 1):
        with pytest.warns(UserWarning, match=f"flexure:{name} .*random weights") as caught:
            made.append(load_model(f"flexure:{name}?{small}seed={seed}").model)
        assert caught[0].filename == __file__
    assert torch.equal(state, torch.random.get_rng_state())
    first, again, other = (nn.utils.parameters_to_vector(m.parameters()) for m in made)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_mlp(tmp_path: Path) -> None:
    loaded = load_model("flexure:mlp?sizes=64-20-10&activation=tanh")
    assert loaded.preprocess == AsFloat()
    assert [m.out_features for m in loaded.model.modules() if isinstance(m, nn.Linear)] == [20, 10]
    assert isinstance(loaded.model.body[1], nn.Tanh)
    digits = load_data("sklearn:digits")["train"]
    x = loaded.preprocess(digits[0])
    assert loaded.model(x[None]).shape == (1, 10)
    save_file(loaded.model.state_dict(), tmp_path / "m.safetensors")
    again = load_model(
        f"flexure:mlp?sizes=64-20-10&activation=tanh&weights={tmp_path / 'm.safetensors'}"
    )
    assert again.head == "head"
    assert torch.equal(again.model(x[None]), loaded.model(x[None]))
    with pytest.raises(AddressError, match=r"head\.weight"):
        load_model(f"flexure:mlp?sizes=64-20-9&weights={tmp_path / 'm.safetensors'}")


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("resnet18?lcnn=yes", "lcnn=0 or lcnn=1"),
        ("resnet18?width=0", "flexure:resnet18.*at least 1 class"),
        ("resnet18?residual=max", "mean.*'max'"),
        ("resnet20?lcnn=1", "weights=.*'lcnn=1'"),
        ("vgg11?residual=mean", "'residual=mean'"),
        ("vgg11?input_size=16", "32 x 32"),
        ("mlp?sizes=2", "at least an input and an output"),
        ("mlp?sizes=2-x-2", "whole number.* for sizes"),
        ("mlp?activation=sine", "relu, tanh, softplus.*'sine'"),
        ("mlp?num_classes=3", "'num_classes=3'"),
        ("resnet18?width=4&residual=mean", "residual= with lcnn=True"),
        ("resnet18?seed=99999999999999999999999", "below 2\\^64 for seed"),
        (f"resnet18?seed={'9' * 5000}", "below 2\\^64 for seed"),
        ("resnet18?width=\u0663", "whole number.* for width"),
        ("resnet18?width=999999999999", "fits into memory.*smaller"),
        ("resnet18?width=18446744073709551615", "fits into memory.*smaller"),
        ("mlp?sizes=2-99999999999999-2", "fits into memory.*smaller"),
    ],
)
def test_wrong_addresses(rest: str, message: str, recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(AddressError, match=message):
        load_model(f"flexure:{rest}")
    assert not recwarn  # nothing is said of the weights of a network that there is not
