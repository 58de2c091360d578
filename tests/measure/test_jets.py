"""Jets of whole functions and networks; single operations are in `test_jet_rules.py`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import flexure
from flexure import FlexureError, jet, units
from flexure.measure import series
from flexure.measure.jet_layers import KINKS
from tests import networks
from tests.reference.jets import Formulas, assert_close_to_nested, nested_forward_mode

Field = Callable[[Tensor], Tensor]


def points(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, dtype=torch.float64), torch.randn(*shape, dtype=torch.float64)


def frozen(model: nn.Module) -> nn.Module:
    return model.double().eval()


# --- closed forms -----------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2, 6, 11])
def test_sine_of_a_projection(order: int) -> None:
    x, v = points(5, 3)
    w = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64)
    found = jet(lambda x: torch.sin(x @ w), x, v, order=order)
    rate = v @ w
    expected = [rate**n * torch.sin(x @ w + n * math.pi / 2) for n in range(order + 1)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_geometric_series_and_exponential() -> None:
    x = torch.tensor([[0.3], [-0.5]], dtype=torch.float64)
    v = torch.ones_like(x)
    factorials = [math.factorial(n) for n in range(8)]
    found = jet(lambda x: 1 / (1 - x[:, 0]), x, v, order=7)
    expected = torch.stack([f * (1 - x[:, 0]) ** -(n + 1) for n, f in enumerate(factorials)])
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    found = jet(lambda x: torch.exp(2 * x).sum(1), x, v, order=7)
    expected = torch.stack([2.0**n * torch.exp(2 * x[:, 0]) for n in range(8)])
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    coefficients=st.lists(st.floats(-10, 10), min_size=1, max_size=7),
    at=st.floats(-3, 3),
    double=st.booleans(),
)
def test_polynomials_are_exact(coefficients: list[float], at: float, double: bool) -> None:
    dtype = torch.float64 if double else torch.float32
    x = torch.full((1, 1), at, dtype=dtype)
    order = len(coefficients) + 1
    found = jet(
        lambda x: sum(a * x[:, 0] ** k for k, a in enumerate(coefficients)),
        x,
        torch.ones_like(x),
        order=order,
    )
    assert found.dtype == dtype
    for n in range(order + 1):
        terms = [a * math.perm(k, n) * at ** (k - n) for k, a in enumerate(coefficients) if k >= n]
        scale = sum(abs(t) for t in terms) + 1e-30
        assert abs(found[n, 0].item() - sum(terms)) <= (1e-13 if double else 1e-5) * scale


# --- order six, and extreme inputs ------------------------------------------------------------

SMOOTH: dict[str, Field] = {
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "mish": F.mish,
    "logsigmoid": F.logsigmoid,
    "ctu": lambda x: units.ctu(x, 0.8, 0.3),
    "ctu steep": lambda x: units.ctu(x, 0.999),
    "centered softplus": lambda x: units.centered_softplus(x, 5.0),
}


@pytest.mark.parametrize("name", ["tanh", "gelu", "ctu"])
def test_order_six_agrees_with_nested_forward_mode(name: str) -> None:
    weight = torch.randn(3, dtype=torch.float64)
    assert_close_to_nested(lambda x: SMOOTH[name](x @ weight), *points(4, 3), 6)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_inputs_are_stable(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[-1e3], [1e3], [-30.0], [30.0], [0.0], [-0.0]], dtype=dtype)
    found = jet(lambda x: SMOOTH[name](x)[:, 0], x, torch.ones_like(x), order=4)
    assert bool(found.isfinite().all())
    tails = found[2:, :2]
    assert float(tails.abs().max()) == 0.0
    assert float(found[1, 0].abs()) in (0.0, 1.0)


def test_units_at_zero_exactly() -> None:
    x, v = torch.zeros(2, 1).double(), torch.ones(2, 1).double()
    beta, c = 0.75, 0.4
    found = jet(lambda x: units.ctu(x, beta, c)[:, 0], x, v, order=4)[:, 0]
    eta, gamma = beta / (1 - beta), 1 / (1 - beta)
    expected = [(1 - c) * math.log(2) / gamma, 0.5, c * eta / 2 + (1 - c) * gamma / 4, 0.0]
    expected.append(-c * eta**3 / 2 - (1 - c) * gamma**3 / 8)
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14
    )
    found = jet(lambda x: units.centered_softplus(x, 3.0)[:, 0], x, v, order=4)[:, 0]
    expected = [0.0, 0.5, 0.75, 0.0, -27 / 8]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14
    )


def test_softmax_of_large_and_masked_logits() -> None:
    x, v = points(3, 4)
    found = jet(lambda x: torch.softmax(1e3 * x, 1)[:, 0], x, v, order=4)
    assert bool(found.isfinite().all())
    mask = torch.tensor([True, False, False, True])

    def masked(x: Tensor) -> Tensor:
        return torch.softmax(x.masked_fill(mask, -torch.inf), 1)[:, 1]

    torch.testing.assert_close(
        jet(masked, x, v, order=4),
        jet(lambda x: torch.softmax(x[:, 1:3], 1)[:, 0], x, v, order=4),
    )


# --- networks ---------------------------------------------------------------------------------


def steered(model: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    flexure.steer(model, beta=0.8, example=x, **options)
    return model


@pytest.mark.parametrize("activation", [nn.Tanh, nn.SiLU, nn.GELU, nn.Softplus, nn.Sigmoid])
def test_multilayer_perceptrons(activation: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(5, 7), activation(), nn.Linear(7, 7), activation())
    model = frozen(nn.Sequential(model, nn.Linear(7, 1)))
    assert_close_to_nested(lambda x: model(x)[:, 0], *points(3, 5), 4)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv2d": (nn.Conv2d(4, 4, 3, 2, 1, groups=2, padding_mode="reflect"), (4, 6, 6)),
    "conv3d": (nn.Conv3d(2, 2, 2, dilation=2), (2, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(2, 3, 3, 2, 1, 1), (2, 3, 4)),
    "batch norm": (nn.BatchNorm2d(3), (3, 2, 2)),
    "instance norm": (nn.InstanceNorm2d(2), (2, 3, 3)),
    "group norm": (nn.GroupNorm(2, 4), (4, 3, 2)),
    "local response norm": (nn.LocalResponseNorm(3), (4, 3, 2)),
    "average pooling": (nn.AvgPool2d(3, 2, 1), (2, 6, 6)),
    "adaptive pooling": (nn.AdaptiveAvgPool3d((1, 2, None)), (1, 4, 4, 2)),
    "upsampling": (nn.Upsample(scale_factor=2, mode="bicubic"), (1, 3, 3)),
    "unfold": (nn.Unfold(2), (2, 3, 3)),
    "pixel shuffle": (nn.PixelShuffle(2), (4, 2, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_between_smooth_activations(name: str) -> None:
    layer, shape = LAYERS[name]
    frozen(layer)

    def f(x: Tensor) -> Tensor:
        return torch.tanh(layer(torch.sin(x))).flatten(1).mean(1)

    assert_close_to_nested(f, *points(2, *shape), 3)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GELU()))
    model.append(nn.Linear(2, 2).double())
    x, v = points(5, 3, 7, 6)
    flexure.adapt(model, flexure.TrainableCT(), example=x)

    def f(x: Tensor) -> Tensor:
        return units.ctu(model(x), 0.6).flatten(1).sum(1)

    with torch.no_grad():
        whole = jet(f, x, v, order=3)
        for size in (1, 100, 300):
            monkeypatch.setattr(series, "BLOCK", size)
            torch.testing.assert_close(jet(f, x, v, order=3), whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(jet(f, x, v, order=3).detach(), whole, rtol=1e-13, atol=0)


def test_single_precision_is_close_to_double() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 1))
    model, (x, v) = model.eval(), points(3, 5)
    steered(model, x.float())
    single = jet(model, x.float(), v.float(), order=4)
    assert single.dtype == torch.float32
    double = jet(model.double(), x.float().double(), v.float().double(), order=4)
    errors = (single - double).abs().amax(1) / double.abs().amax(1)
    assert float(errors.detach().max()) < 1e-4


def test_steered_resnet_with_pooling() -> None:
    model, (x, v) = frozen(networks.resnet18(width=4)), points(2, 3, 16, 16)
    steered(model, x, pooling=True)
    assert_close_to_nested(lambda x: model(x)[:, 3], x, v, 2)


def test_calibrated_steering_in_place() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU6())
    model = frozen(nn.Sequential(model, nn.LeakyReLU(0.2, inplace=True), nn.Flatten()))
    x, v = points(2, 3, 8, 8)
    steered(model, x, calibration=[x], match="mean+std")
    assert_close_to_nested(lambda x: model(x).mean(1), x, v, 3)


def test_functional_sites_of_a_steered_swin() -> None:
    model, (x, v) = frozen(networks.Swin(depths=(2,))), points(1, 3, 8, 8)
    steered(model, x)
    assert_close_to_nested(lambda x: model(x)[:, 0], x, v, 2)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        h = torch.relu_(self.first(h) + x)
        return self.second(h.clamp(min=0))


def test_routed_activations_are_steered() -> None:
    model, (x, v) = frozen(Functional()), points(3, 4)
    with pytest.raises(FlexureError, match="relu"):
        jet(model, x, v, order=2)
    steered(model, x)
    assert_close_to_nested(lambda x: model(x)[:, 0], x, v, 4)


def test_trainable_units() -> None:
    model, (x, v) = frozen(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))), points(3, 4)
    flexure.adapt(model, flexure.TrainableCT(), example=x)
    model.double()  # 1 - beta rounded to float32 is not the same number in every formula
    assert_close_to_nested(lambda x: model(x)[:, 0], x, v, 3)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_transformer_encoders_never_take_the_fast_path(norm_first: bool, gradients: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model, (x, v) = frozen(layer), points(2, 3, 8)
    steered(model, x)
    with torch.set_grad_enabled(gradients):
        found = jet(lambda x: model(x)[:, 0, 0], x, v, order=2)
    expected = nested_forward_mode(lambda x: model(x)[:, 0, 0], x, v, 2)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-11, atol=1e-12)


def test_padding_and_causal_masks_of_multihead_attention() -> None:
    attention = frozen(nn.MultiheadAttention(4, 2, batch_first=True, bias=False))
    padding = torch.tensor([[False, False, True], [False, False, False]])
    causal = nn.Transformer.generate_square_subsequent_mask(3).double().isinf()

    def f(x: Tensor) -> Tensor:
        y = attention(x, x, x, key_padding_mask=padding, attn_mask=causal, need_weights=False)[0]
        return y[:, 1].sum(1)

    assert_close_to_nested(f, *points(2, 3, 4), 3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("causal", [False, True])
def test_transformers_models(attention: str, causal: bool) -> None:
    transformers = pytest.importorskip("transformers")
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    if causal:
        model = transformers.GPT2ForSequenceClassification(
            transformers.GPT2Config(
                n_embd=8,
                n_layer=1,
                n_head=2,
                vocab_size=5,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                attn_implementation=attention,
            )
        )
        body, read = frozen(model).transformer, lambda y: y.last_hidden_state[:, 2, 0]
    else:
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=8,
                vocab_size=5,
                attn_implementation=attention,
            )
        )
        body, read = frozen(model), lambda y: y.logits[:, 0]
    assert_close_to_nested(
        lambda x: read(body(inputs_embeds=x, attention_mask=mask)), *points(2, 4, 8), 2
    )


def test_a_model_is_as_it_was() -> None:
    model, (x, v) = frozen(networks.resnet18(width=4)), points(2, 3, 16, 16)
    steered(model, x, pooling=True)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x.requires_grad_(True)
    jet(lambda x: model(x)[:, 0], x, v, order=2)
    with pytest.raises(FlexureError):
        jet(lambda x: torch.relu(model(x)[:, 0]), x, v, order=2)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


# --- derivatives of jets ----------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.GELU(), nn.SiLU(), nn.ReLU()])
def test_gradients_agree_with_repeated_backward(activation: nn.Module) -> None:
    model = frozen(nn.Sequential(nn.Linear(3, 4), activation, nn.LayerNorm(4), nn.Linear(4, 1)))
    x, v = points(2, 3)
    if isinstance(activation, nn.ReLU):
        flexure.adapt(model, flexure.TrainableCT(), example=x)
        model.double()
    wanted = [p for p in model.parameters() if p.requires_grad]
    x.requires_grad_(True)
    found = jet(model, x, v, order=3)
    with Formulas():  # torch's layer norm is wrong from its third backward on
        values = model(x)[:, 0]
    for n in range(4):
        ours = torch.autograd.grad(found[n].square().sum(), [x, *wanted], retain_graph=True,
                                   allow_unused=True)  # fmt: skip
        theirs = torch.autograd.grad(values.square().sum(), [x, *wanted], retain_graph=True,
                                     allow_unused=True)  # fmt: skip
        for mine, other in zip(ours, theirs, strict=True):
            other = x.new_zeros(()) if other is None else other
            mine = torch.zeros_like(other) if mine is None else mine
            torch.testing.assert_close(mine, other.expand_as(mine), rtol=1e-9, atol=1e-10)
        values = (torch.autograd.grad(values.sum(), x, create_graph=True)[0] * v).sum(1)


def test_finite_differences() -> None:
    model, (x, v) = frozen(nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 1))), points(3, 4)
    h = 1e-4
    with torch.no_grad():
        found = jet(model, x, v, order=2)
        below, here, above = (model(x + k * h * v)[:, 0] for k in (-1, 0, 1))
    torch.testing.assert_close(found[0], here, rtol=1e-14, atol=0)
    torch.testing.assert_close(found[1], (above - below) / (2 * h), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[2], (above - 2 * here + below) / h**2, rtol=1e-5, atol=1e-5)


def test_inside_transforms_of_torch_func() -> None:
    model, (x, v) = frozen(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))), points(2, 3)
    third = jet(model, x, v, order=3)
    directions = torch.stack([v, 2 * v])
    many = torch.vmap(lambda v: jet(model, x, v, order=3))(directions)
    torch.testing.assert_close(many, torch.stack([third, third * 2.0 ** torch.arange(4)[:, None]]))
    _, along = torch.func.jvp(lambda x: jet(model, x, v, order=2), (x,), (v,))
    torch.testing.assert_close(along, third[1:])
    gradient = torch.func.grad(lambda x: jet(model, x, v, order=2)[2].sum())(x)
    torch.testing.assert_close((gradient * v).sum(1), third[3])


class SquareTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        return (x * x) @ w

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads


@pytest.mark.parametrize("kind", ["checkpoint", "function", "no_grad"])
def test_gradients_are_not_lost_in_silence(kind: str) -> None:
    layer, (x, v) = frozen(nn.Linear(3, 3)), points(2, 3)

    def f(x: Tensor) -> Tensor:
        if kind == "checkpoint":
            return checkpoint(lambda x: layer(x.sin()), x, use_reentrant=True).sum(1)
        if kind == "function":
            return SquareTimes.apply(x, layer.weight).sum(1)
        with torch.no_grad():
            return layer(x.sin()).sum(1)

    with pytest.raises(FlexureError, match=r"gradients were on.*use_reentrant=False"):
        jet(f, x, v, order=2)
    with torch.no_grad():
        expected = jet(f, x, v, order=2)  # no gradient is asked for
    layer.requires_grad_(False)
    torch.testing.assert_close(jet(f, x, v, order=2), expected, rtol=0, atol=0)
    assert float(expected[2].abs().max()) > 0


def test_checkpoints_that_record_pass() -> None:
    layer, (x, v) = frozen(nn.Linear(3, 3)), points(2, 3)
    found = jet(lambda x: checkpoint(lambda x: layer(x.sin()), x, use_reentrant=False).sum(1), x, v,
                order=2)  # fmt: skip
    expected = jet(lambda x: layer(x.sin()).sum(1), x, v, order=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    (mine,) = torch.autograd.grad(found[2].sum(), [layer.weight])
    (other,) = torch.autograd.grad(expected[2].sum(), [layer.weight])
    torch.testing.assert_close(mine, other)


# --- what f may be, and what it may not -------------------------------------------------------


def test_forms_of_the_output() -> None:
    x, v = points(3, 2)
    column = jet(lambda x: (x * x).sum(1, keepdim=True), x, v, order=2)
    assert torch.equal(column, jet(lambda x: (x * x).sum(1), x, v, order=2))
    constant = jet(lambda x: torch.ones(3).double(), x, v, order=2)
    assert torch.equal(constant, torch.tensor([[1.0], [0.0], [0.0]]).double().expand(3, 3))
    unused = jet(lambda x: x[:, 0] * 0 + 2, x, v, order=1)
    assert torch.equal(unused[1], torch.zeros(3).double())
    compiled = torch.compile(lambda x: (x * x).sum(1), backend="eager")
    assert torch.equal(jet(compiled, x, v, order=2), column)


def test_autocast_is_off() -> None:
    model, (x, v) = nn.Linear(3, 1).double(), points(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(jet(model, x, v, order=1), jet(model, x, v, order=1))
        assert jet(model, x, v, order=1).dtype == torch.float64


def kinked(name: str) -> Field | None:
    function = getattr(F, name, None) or getattr(torch, name, None)
    return function if callable(function) else None


ONE_ARGUMENT = {
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "hardtanh", "hardsigmoid", "hardswish",
    "hardshrink", "softshrink", "softsign", "rrelu", "abs", "sign", "sgn", "amax", "amin", "max",
    "min", "median", "floor", "ceil", "round", "trunc", "frac", "sort", "nan_to_num", "absolute",
}  # fmt: skip


def test_the_kinks_are_in_the_catalogue() -> None:
    assert set(" ".join(KINKS).split()) >= ONE_ARGUMENT


@pytest.mark.parametrize("name", sorted(ONE_ARGUMENT))
def test_kinks_are_refused_with_advice(name: str) -> None:
    function = kinked(name)
    assert function is not None
    x, v = points(2, 3)
    with pytest.raises(FlexureError, match=rf"{name}.*flexure\.steer") as error:
        jet(lambda x: function(x), x, v, order=2)
    assert "0 almost everywhere for n >= 2" in str(error.value)


def test_the_module_is_named() -> None:
    model = frozen(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Sequential(nn.Tanh(), nn.MaxPool2d(2))))
    with pytest.raises(FlexureError, match=r"max_pool2d in module '1\.1' \(MaxPool2d\)"):
        jet(model, *points(2, 1, 8, 8), order=1)


IMAGES, LABELS = torch.ones(2, 1, 2, 2), torch.tensor([0, 1])

REFUSED: dict[str, tuple[Field, str]] = {
    "rectifier": (lambda x: units.ctu(x, 1.0).sum(1), "rectifier"),
    "rectifying channel": (lambda x: units.ctu(x, torch.tensor([0.5, 1.0])).sum(1), "rectifier"),
    "training dropout": (lambda x: F.dropout(x).sum(1), r"random.*\.eval\(\)"),
    "training statistics": (lambda x: F.batch_norm(x, None, None, training=True).sum(1), "couples"),
    "branch": (lambda x: x[:, 0] if x.sum() > 0 else x[:, 1], "gt.*branch"),
    "number": (lambda x: x[:, 0] * float(x[0, 0]), "__float__"),
    "numpy": (lambda x: torch.from_numpy(x.numpy()).sum(1), "numpy"),
    "detach": (lambda x: x.detach().sum(1), "detach.*drop"),
    "data": (lambda x: x.data.sum(1), "data.*drop"),
    "integers": (lambda x: x.long().sum(1), "long"),
    "unknown": (lambda x: torch.lgamma(x).sum(1), "lgamma.*no rule"),
    "one norm": (lambda x: x.norm(1, dim=1), "p = 2"),
    "a varying mask": (lambda x: x.masked_fill(x > 0, 0.0).sum(1), "gt"),
    "a varying dial": (lambda x: units.ctu(x, torch.sigmoid(x)).sum(1), "dial"),
    "vmap": (lambda x: torch.vmap(lambda row: (row * row).sum())(x), "aten.mul.*vmap"),
    "vmap beside": (lambda x: (x + torch.vmap(torch.sin)(x)).sum(1), "aten.sin.*vmap"),
    "copied": (lambda x: (x + torch.tensor(x)).sum(1), r"aten.detach.*torch\.tensor"),
    "fill": (lambda x: torch.full_like(x, x[0, 0]).sum(1), "full_like"),
    "grid": (lambda x: F.grid_sample(IMAGES, x[:, None, None])[:, 0, 0, 0], "other"),
    "shape": (lambda x: x, r"shape \(2,\), got \(2, 2\)"),
    "smoothing": (lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.1), "labels"),
    "rounding": (lambda x: torch.div(x, 2, rounding_mode="floor").sum(1), "round"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_and_why(name: str) -> None:
    f, message = REFUSED[name]
    x, v = points(2, 2)
    with pytest.raises(FlexureError, match=message):
        jet(f, x.float(), v.float(), order=2)


def test_arguments_are_checked() -> None:
    x, v = points(2, 2)
    f: Any = lambda x: x.sum(1)  # noqa: E731
    for bad_x, bad_v, order in [
        (x.long(), v, 1), (x, v[:1], 1), (x, v.float(), 1), (x, v, -1), (x, v, 1.5), ([1.0], v, 1),
        (x, None, 1), (torch.tensor(1.0), torch.tensor(1.0), 1),
    ]:  # fmt: skip
        with pytest.raises(FlexureError, match="expected"):
            jet(f, bad_x, bad_v, order=order)


def exponentials_of_a_projection(x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Functions with f'' = f, and the signs of their derivatives' arguments: (even, odd) orders."""
    u = x[:, 0]
    return {
        "exp": (u.exp(), u.exp()),
        "sinh": (u.sinh(), u.cosh()),
        "cosh": (u.cosh(), u.sinh()),
    }


@pytest.mark.parametrize("order", [21, 32, 170])
@pytest.mark.parametrize("name", ["exp", "sinh", "cosh"])
def test_high_orders(name: str, order: int) -> None:
    """Factorials above 20! are no machine integers."""
    x = torch.tensor([[0.3], [-2.0]], dtype=torch.float64)
    even, odd = exponentials_of_a_projection(x)[name]
    found = jet(lambda x: exponentials_of_a_projection(x)[name][0], x, torch.ones_like(x),
                order=order)  # fmt: skip
    torch.testing.assert_close(found[0::2], even.expand_as(found[0::2]), rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1::2], odd.expand_as(found[1::2]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("unit", ["ctu", "softplus"])
def test_high_orders_of_units_with_tensors_of_dials(unit: str) -> None:
    """Against the series of the same unit with a number for its dial."""
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    beta = 0.6 if unit == "ctu" else 1.5

    def f(x: Tensor, dial: Any) -> Tensor:
        y = units.ctu(x, dial, 0.4) if unit == "ctu" else units.centered_softplus(x, dial)
        return y.sum(1)

    v = torch.ones_like(x)
    dial = torch.tensor(beta, dtype=torch.float64)
    number = jet(lambda x: f(x, beta), x, v, order=40)
    tensor = jet(lambda x: f(x, dial), x, v, order=40)
    assert number.isfinite().all()
    torch.testing.assert_close(tensor, number, rtol=1e-12, atol=0)


def test_single_precision_has_derivatives_above_its_factorials() -> None:
    x = torch.tensor([[0.0]])
    found = jet(lambda x: 1e-30 / (1 - x[:, 0]), x, torch.ones_like(x), order=37)
    truth = [1e-30 * math.factorial(n) for n in range(33, 38)]
    assert found[33:, 0].tolist() == pytest.approx(truth, rel=1e-5)
    square = jet(lambda x: x.square().sum(1), x, torch.ones_like(x), order=40)
    assert square[3:].tolist() == [[0.0]] * 38


def test_orders_beyond_float64_are_refused() -> None:
    x = torch.zeros(1, 1, dtype=torch.float64)
    with pytest.raises(FlexureError, match="orders up to 170, got 171"):
        jet(lambda x: x.exp().sum(1), x, x, order=171)
    with pytest.raises(FlexureError, match="orders up to 170, got 200"):
        flexure.curvature_rate(lambda x: x.exp().sum(1), x, orders=(1, 200))
    with pytest.raises(FlexureError, match=r"order 150, got one that is not .*lower order"):
        jet(lambda x: F.softplus(x, beta=1000.0).sum(1), x, x, order=150)
