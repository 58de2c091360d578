"""SPEC's site table: every row is steered, or refused with an error that names the site."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexure.contracts import SiteError
from flexure.methods.steer import steer
from flexure.surgery import sites
from flexure.units import ctu
from tests.networks import BasicBlock, Swin, resnet18, resnet50

BETA, C = 0.8, 0.3


class Calls(nn.Module):
    """Linear, then one activation call of the test's choice."""

    def __init__(self, call) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.linear(x))


FUNCTIONS = {
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "Tensor.relu": lambda x: x.relu(),
    "relu_": lambda x: x.relu_(),
    "torch.relu_": torch.relu_,
    "clamp(min=0)": lambda x: x.clamp(min=0),
    "clamp(0)": lambda x: torch.clamp(x, 0),
    "clamp_(min=0)": lambda x: x.clamp_(min=0),
    "clamp_min(0)": lambda x: x.clamp_min(0),
    "clamp_min_(0)": lambda x: x.clamp_min_(0.0),
    "clip": lambda x: torch.clip(x, min=0),
    "threshold": lambda x: F.threshold(x, 0, 0),
    "built inside forward": lambda x: nn.ReLU()(x),
    "by keyword": lambda x: F.relu(input=x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_found_and_steered(name: str) -> None:
    model, x = Calls(FUNCTIONS[name]), torch.randn(4, 6)
    report = sites(model, x)
    assert [(site.kind, site.axis, site.channels) for site in report.sites] == [("call", -1, 6)]
    with steer(model, beta=BETA, c=C, example=x):
        torch.testing.assert_close(model(x), ctu(model.linear(x), BETA, C))
    with steer(model, beta=1.0, example=x):
        assert torch.equal(model(x), torch.relu(model.linear(x)))


NOT_ACTIVATIONS = {
    "clamp(min=-1)": lambda x: x.clamp(min=-1),
    "clamp(max=0)": lambda x: x.clamp(max=0),
    "clamp to a tensor": lambda x: x.clamp(min=torch.ones(6)),
    "clamp of integers": lambda x: x + x.long().clamp(min=0),
    "maximum of two": lambda x: torch.maximum(x, x.flip(0)),
    "threshold(1, 0)": lambda x: F.threshold(x, 1, 0),
}


@pytest.mark.parametrize("name", NOT_ACTIVATIONS)
def test_other_calls_of_the_same_functions_are_left(name: str) -> None:
    model, x = Calls(NOT_ACTIVATIONS[name]), torch.randn(4, 6)
    assert sites(model, x).sites == ()
    with pytest.raises(SiteError, match="no activation"):
        steer(model, beta=BETA, example=x)


def test_one_module_under_two_names() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.first = self.second = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.linear(x))

    model, x = Net(), torch.randn(4, 6)
    report = sites(model, x)
    assert report.sites[0].modules == ("first", "second")
    with steer(model, beta=BETA, c=C, example=x):
        assert model.first is model.second
        torch.testing.assert_close(model(x), ctu(model.linear(x), BETA, C))
    assert type(model.first) is nn.ReLU
    assert model.first is model.second


def test_one_module_in_two_places_of_a_sequential() -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(6, 6), act, nn.Linear(6, 6), act)
    x = torch.randn(4, 6)
    before = model(x)
    report = sites(model, x)
    assert [site.name for site in report.sites] == [":0", ":1"]
    with steer(model, beta={":0": 1.0, ":1": BETA}, c=C, example=x):
        hidden = model[2](torch.relu(model[0](x)))
        torch.testing.assert_close(model(x), ctu(hidden, BETA, C))
    assert len(model) == 4
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("build", "units", "channels"), [(resnet18, 17, 3904), (resnet50, 49, 22720)]
)
def test_torchvision_resnets_get_one_unit_a_call(build, units: int, channels: int) -> None:
    # SPEC's counts of Trainable CT are two a channel: 7,808 and 45,440.
    report = sites(build(), torch.randn(1, 3, 64, 64))
    assert len(report.sites) == units
    assert sum(site.channels for site in report.sites) == channels
    assert {site.axis for site in report.sites} == {-3}
    assert [refusal.activation for refusal in report.refused] == ["max_pool2d"]


def test_swin_channels_are_last_not_image_rows() -> None:
    # SPEC: 35,328 trainable parameters, two a channel; the published code found image rows.
    report = sites(Swin(96, (2, 2, 6, 2), window=4, patch=4), torch.randn(1, 3, 128, 128))
    assert sum(site.channels for site in report.sites) * 2 == 35328
    assert {site.axis for site in report.sites} == {-1}


@pytest.mark.parametrize("activation", ["relu", nn.ReLU(), F.relu])
@pytest.mark.parametrize("container", [True, False])
def test_transformer_encoder_fast_path_is_not_taken(activation, container: bool) -> None:
    model: nn.Module = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, activation=activation, batch_first=True
    )
    if container:
        model = nn.TransformerEncoder(model, 2)
    model.eval()
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        plain = model(x)
    with steer(model, beta=BETA, c=C, example=x):
        slow = model(x)  # autograd is recording: the fast path is closed anyway
        with torch.no_grad():
            fast = model(x)
            masked = model(x, src_key_padding_mask=mask)
    assert (plain - slow).abs().max() > 1e-4
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(masked[0], slow[0])
    with torch.no_grad():
        assert torch.equal(model(x), plain)


INPLACE = {
    "ignored result": lambda x: (F.relu(x, inplace=True), x * 2)[1],
    "module ignored": lambda x: (nn.ReLU(inplace=True)(x), x + 1)[1],
    "relu6": lambda x: (F.relu6(x, inplace=True), x * 2)[1],
    "leaky": lambda x: (F.leaky_relu(x, 0.1, inplace=True), x * 2)[1],
    "view": lambda x: (x[:, :3].relu_(), x)[1],
}


@pytest.mark.parametrize("name", INPLACE)
@pytest.mark.parametrize("grad", [True, False])
def test_in_place_mutation_is_kept(name: str, grad: bool) -> None:
    model, x = Calls(INPLACE[name]), torch.randn(4, 6)
    with torch.set_grad_enabled(grad):
        before = model(x)
        with steer(model, beta=1.0, example=x):
            torch.testing.assert_close(model(x), before)
        with steer(model, beta=BETA, example=x):
            after = model(x)
            assert not torch.equal(after, before)
            if grad:
                after.sum().backward()
                assert model.linear.weight.grad.abs().sum() > 0


def test_in_place_gradients_equal_the_original_at_beta_1() -> None:
    model, x = BasicBlock(4, 4).eval(), torch.randn(2, 4, 6, 6)

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))

    before = gradients()
    with steer(model, beta=1.0, example=x):
        for new, old in zip(gradients(), before, strict=True):
            torch.testing.assert_close(new, old)


class Conv1dNet(nn.Module):
    """Mamba's layout: a 3-D tensor with channels on axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(4, 10)
        self.conv = nn.Conv1d(5, 5, 3, padding=2, groups=5)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.inside(x).transpose(1, 2).chunk(2, dim=1)
        h = F.silu(self.conv(h)[..., : x.shape[1]])
        return h * F.silu(gate)


class MatVec(nn.Module):
    """A weight on the left: its channels are second to last."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.weight @ x.transpose(1, 2))


AXES = {
    "linear 4-D": (nn.Sequential(nn.Linear(6, 5), nn.ReLU()), (2, 3, 4, 6), -1, 5),
    "conv2d": (nn.Sequential(nn.Conv2d(6, 5, 1), nn.ReLU()), (2, 6, 4, 4), -3, 5),
    "conv2d unbatched": (nn.Sequential(nn.Conv2d(6, 5, 1), nn.ReLU()), (6, 4, 4), -3, 5),
    "conv1d": (Conv1dNet(), (2, 7, 4), -2, 5),
    "weight on the left": (MatVec(), (2, 7, 4), -2, 7),
    "norm 2-D": (nn.Sequential(nn.BatchNorm1d(6), nn.ReLU()), (2, 6), -1, 6),
    "norm 3-D": (nn.Sequential(nn.BatchNorm1d(6), nn.ReLU()), (2, 6, 6), -2, 6),
    "group norm": (nn.Sequential(nn.GroupNorm(2, 6), nn.ReLU()), (2, 6, 6, 6), -3, 6),
    "layer norm": (nn.Sequential(nn.LayerNorm(6), nn.ReLU()), (2, 6, 6, 6), -1, 6),
    "flattened": (
        nn.Sequential(nn.Conv2d(3, 5, 4), nn.Flatten(), nn.ReLU()),
        (2, 3, 4, 4),
        -1,
        5,
    ),
    "conv transpose": (nn.Sequential(nn.ConvTranspose2d(3, 5, 2), nn.ReLU()), (1, 3, 3, 3), -3, 5),
}


@pytest.mark.parametrize("name", AXES)
def test_axis_comes_from_the_producing_layer(name: str) -> None:
    model, shape, axis, channels = AXES[name]
    for site in sites(model.eval(), torch.randn(shape)).sites:
        assert (site.axis, site.channels) == (axis, channels)


def test_ambiguous_axis_is_asked_for() -> None:
    model, x = nn.Sequential(nn.ReLU(), nn.Flatten(0)), torch.randn(3, 4, 5)
    assert sites(model, x).sites[0].axis is None
    steer(model, beta=BETA, example=x).remove()  # one shared dial needs no axis
    with pytest.raises(SiteError, match="axis="):
        steer(model, beta=BETA, example=x, calibration=[x])
    assert type(model[0]) is nn.ReLU
    assert sites(model, x, axis=1).sites[0].channels == 4
    with steer(model, beta=BETA, example=x, calibration=[x], axis={"0": 2}) as steering:
        assert steering.units["0"].shift.shape == (5,)
    with pytest.raises(SiteError, match="outside"):
        sites(model, x, axis=3)
    with pytest.raises(SiteError, match="names no site"):
        sites(model, x, axis={"nowhere": 1})


def test_hooks_of_a_replaced_module_are_kept() -> None:
    model, x, seen = nn.Sequential(nn.Linear(6, 6), nn.ReLU()), torch.randn(4, 6), []
    handle = model[1].register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    steering = steer(model, beta=BETA, c=C, example=x)
    seen.clear()
    model(x)
    torch.testing.assert_close(seen[0], ctu(model[0](x), BETA, C))
    later = model[1].register_forward_hook(lambda module, args, out: seen.append("later"))
    steering.remove()
    model(x)
    assert seen[-1] == "later"
    handle.remove()
    later.remove()
    seen.clear()
    model(x)
    assert seen == []


class Branch(nn.Module):
    """Calls more, fewer or other activations, as told."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.mode = "two"

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.linear(x))
        if self.mode == "one":
            return x
        x = F.gelu(x) if self.mode == "other" else F.relu(self.linear(x))
        return F.relu(x) if self.mode == "three" else x


@pytest.mark.parametrize("mode", ["one", "three", "other"])
def test_another_branch_than_the_examples_raises_and_names_the_site(mode: str) -> None:
    model, x = nn.Sequential(Branch()), torch.randn(4, 6)
    before = model(x)
    steering = steer(model, beta=BETA, example=x)
    model[0].mode = mode
    with pytest.raises(SiteError, match=r"'0'.*0:1"):
        model(x)
    model[0].mode = "two"
    model(x)
    assert torch._C._len_torch_function_stack() == 0
    steering.remove()
    assert torch.equal(model(x), before)


def test_other_channels_than_the_examples_raise_and_name_the_site() -> None:
    model = nn.Sequential(nn.LazyLinear(6), nn.Identity(), nn.ReLU())
    model(torch.randn(2, 6))
    with steer(model, beta=BETA, example=torch.randn(2, 6)):
        model[1] = nn.Linear(6, 5)
        with pytest.raises(SiteError, match="site '2': expected 6 channels"):
            model(torch.randn(2, 6))


def _quantized() -> nn.Module:
    quantization = torch.ao.quantization
    net = nn.Sequential(quantization.QuantStub(), nn.Linear(6, 6), nn.ReLU(), nn.Identity())
    net[3] = quantization.DeQuantStub()
    net.eval()
    net.qconfig = quantization.get_default_qconfig("fbgemm")
    prepared = quantization.prepare(quantization.fuse_modules(net, [["1", "2"]]))
    prepared(torch.randn(4, 6))
    return quantization.convert(prepared)


class RNNLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(6, 6, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.rnn(x)[0])


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.relu(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class ScriptedClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0)


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return torch.relu(x)


def _exported() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    return torch.export.export(net, (torch.randn(4, 6),)).module()


UNREACHABLE = {
    "TorchScript module": (
        lambda: nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))),
        "0.*TorchScript",
    ),
    "TorchScript model": (
        lambda: torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU())),
        "TorchScript",
    ),
    "traced": (
        lambda: nn.Sequential(
            torch.jit.trace(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), torch.randn(4, 6))
        ),
        "TorchScript",
    ),
    "TorchScript function": (lambda: Calls(scripted), "relu.*raw operator"),
    "fused RNN": (RNNLast, "rnn:0: rnn_relu.*recurrence"),
    "fused RNN cell": (
        lambda: nn.Sequential(nn.RNNCell(6, 6, nonlinearity="relu")),
        "rnn_relu_cell|rnn_relu",
    ),
    "aten operator": (lambda: Calls(torch.ops.aten.relu.default), "raw operator"),
    "exported graph": (_exported, "raw operator"),
    "autograd function": (lambda: Calls(Custom.apply), "custom autograd function"),
    "zero tensor as a bound": (
        lambda: Calls(lambda x: torch.max(x, torch.zeros_like(x))),
        "zero_bound.*write torch.relu",
    ),
    "maximum": (lambda: Calls(lambda x: torch.maximum(x, torch.zeros(()))), "zero_bound"),
    "clamp from a zero tensor": (
        lambda: Calls(lambda x: x.clamp(min=torch.zeros(6))),
        "zero_bound",
    ),
    "logaddexp": (lambda: Calls(lambda x: torch.logaddexp(x, torch.zeros(()))), "zero_bound"),
    "out=": (lambda: Calls(lambda x: torch.clamp(x, 0, out=torch.empty(4, 6))), "zero_bound"),
    "raw clamp": (lambda: Calls(lambda x: torch.ops.aten.clamp_min(x, 0)), "raw operator"),
    "scripted clamp": (lambda: nn.Sequential(nn.ReLU(), torch.jit.script(ScriptedClamp())), "1: "),
    "random slopes": (lambda: nn.Sequential(nn.RReLU()), "rrelu: its slopes are random"),
    "model is an activation": (nn.ReLU, "itself is an activation"),
}


@pytest.mark.parametrize("name", UNREACHABLE)
@pytest.mark.filterwarnings("ignore")
def test_unreachable_rectifiers_are_an_error_that_names_them(name: str) -> None:
    build, message = UNREACHABLE[name]
    model, x = build(), torch.randn(4, 6)
    if name != "exported graph":
        model.eval()
    with torch.no_grad():
        before = model(x)
    with pytest.raises(SiteError, match=message):
        steer(model, beta=BETA, example=x)
    with torch.no_grad():
        assert torch.equal(model(x), before)


@pytest.mark.filterwarnings("ignore")
def test_quantized_model_is_an_error() -> None:
    model = _quantized()
    with pytest.raises(SiteError, match="quantised"):
        steer(model, beta=BETA, example=torch.randn(4, 6))


def test_nothing_matched_is_an_error() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), torch.randn(4, 6)
    with pytest.raises(SiteError, match=r"no activation.*tanh: bounded"):
        steer(model, beta=BETA, example=x)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    with pytest.raises(SiteError, match=r"'layer1.\*' matches no site; the sites are 1"):
        steer(model, beta=BETA, example=x, where="layer1.*")
    with pytest.raises(SiteError, match="got none from where="):
        steer(model, beta=BETA, example=x, where=lambda site: False)


class Noisy(nn.Module):
    """Moves every kind of state that a forward pass can move."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(()))
        self.steps = 0
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.steps += 1
        self.cache = x
        noise = torch.rand_like(x)
        return F.relu(self.dropout(self.norm(x)) + noise)


def test_probing_leaves_no_trace() -> None:
    model, x = Noisy().train(), torch.randn(4, 6)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    sites(model, x)
    assert torch.equal(torch.get_rng_state(), generator)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert (model.steps, model.cache) == (0, None)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_unreached_module_is_reported_and_guarded() -> None:
    class Aux(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.act, self.aux = nn.Linear(6, 6), nn.ReLU(), Aux()
            self.spare = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.linear(x))
            return self.aux(x) if self.training else x

    model, x = Net(), torch.randn(4, 6)
    report = sites(model, x)
    assert report.unreached == ("aux",)
    assert ("spare", "not called by the example") in [(r.name, r.reason) for r in report.refused]
    with steer(model, beta=BETA, example=x):
        with pytest.raises(SiteError, match="'aux' was not reached"):
            model.train()(x)
        model.eval()(x)
    model.train()(x)


def test_copies_are_independent() -> None:
    model, x = resnet18(8).eval(), torch.randn(2, 3, 32, 32)
    steering = steer(model, beta=BETA, c=C, example=x)
    steered = model(x)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    steering.beta = 1.0
    for twin in twins:
        assert torch.equal(twin(x), steered)
    steering.remove()
    for twin in twins:
        assert torch.equal(twin(x), steered)
        assert any("CTU" in type(module).__name__ for module in twin.modules())


class Chain(nn.Module):
    """A layer, a function of its output, a ReLU."""

    def __init__(self, layer: nn.Module, between) -> None:
        super().__init__()
        self.layer, self.between = layer, between

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.between(self.layer(x)))


CONV = nn.Conv2d(3, 4, 1)
BARE_NORM = nn.LayerNorm((4, 4, 4), elementwise_affine=False)
FOLLOWED = {
    "roll": (lambda y: y.roll(1, 2), -3),
    "cat": (lambda y: torch.cat([y, y], 1), -3),
    "softmax, scaled": (lambda y: 2 * y.softmax(-1) + 1, -3),
    "three-axis norm without weights": (BARE_NORM, -3),
    "rot90": (lambda y: torch.rot90(y, 1, (1, 2)), None),
    "swapaxes_": (lambda y: y.swapaxes_(1, 2), None),
    "as_strided": (lambda y: y.as_strided(y.shape, (64, 4, 16, 1)), None),
    "batch swallowed": (lambda y: y[:1].reshape(-1, 1, 4, 4), None),
    "unknown function": (torch.linalg.matrix_exp, None),
    "attention": (lambda y: F.scaled_dot_product_attention(y, y, y), None),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_axis_is_followed_or_unknown_never_guessed(name: str) -> None:
    between, axis = FOLLOWED[name]
    model, x = Chain(CONV, between), torch.randn(2, 3, 4, 4)
    assert [site.axis for site in sites(model, x).sites] == [axis]
    assert not hasattr(x, "__dict__") or not vars(x)


@pytest.mark.parametrize("call", ["matrix-vector", "addmm"])
def test_axis_of_products_with_the_weight_on_the_left(call: str) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = (
                nn.Parameter(torch.randn(5, 3)),
                nn.Parameter(torch.randn(5, 1)),
            )

        def forward(self, x: Tensor) -> Tensor:
            if call == "addmm":
                return F.relu(torch.addmm(self.bias, self.weight, x))
            return F.relu((self.weight @ x) + 1)

    x = torch.randn(3) if call == "matrix-vector" else torch.randn(3, 3)
    site = sites(Product(), x).sites[0]
    assert (site.axis, site.channels) == (-1 if call == "matrix-vector" else -2, 5)


def test_pooling_by_norm_is_no_hidden_rectifier() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.LPPool2d(2, 2))
    assert sites(model, torch.randn(1, 3, 4, 4)).refused == ()
