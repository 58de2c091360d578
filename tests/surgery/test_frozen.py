"""Frozen networks: constants, modes, light layers, and the undoing of it all."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flexure.calling import evaluating
from flexure.contracts import FlexureError
from flexure.fingerprints import fingerprint
from flexure.methods.steer import steer
from flexure.surgery import sites
from flexure.surgery.frozen import freeze
from flexure.surgery.light import LIGHT
from tests.networks import resnet18, resnet50

ROOT = Path(__file__).parents[2]


def wild(module: nn.Module) -> nn.Module:
    """BatchNorm statistics and weights as of a trained network."""
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if m.running_var is not None:
                m.running_mean.normal_()
                m.running_var.uniform_(0.3, 3)
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias)
    return module


def saved(run) -> list[Tensor]:
    """The tensors that backward keeps."""
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (found.append(t), t)[1], lambda t: t):
        run()
    return found


class Headed(nn.Module):
    """A backbone with normalisation and dropout, and a head with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5)
        )
        self.scale = nn.Sequential(nn.Conv2d(6, 6, 1), nn.PReLU(6), nn.BatchNorm2d(6))
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(6 * 16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scale(self.body(x)))


def headed() -> tuple[Headed, list[nn.Parameter]]:
    model = wild(Headed())
    return model, [*model.head.parameters(), *model.scale[1].parameters()]


def frozen_modes(model: Headed) -> list[bool]:
    return [
        m.training
        for name, m in model.named_modules()
        if not name.startswith("head") and name != "scale.1"
    ]


class Counting(nn.Module):
    """What a user writes: a buffer that moves in train mode, around what is trained."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.inner = inner
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.drop(self.norm(self.inner(x)))


# --- What freeze does, and undoes ---


def test_parameters_are_frozen_but_for_the_trainable_and_put_back():
    model, trainable = headed()
    model.body[0].bias.requires_grad_(False)
    trainable[0].requires_grad_(False)
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    before = [(p.requires_grad, p.grad) for p in model.parameters()]

    undo = freeze(model, trainable=trainable)
    ids = {id(p) for p in trainable}
    for p in model.parameters():
        assert p.requires_grad == (id(p) in ids)
        assert id(p) in ids or p.grad is None
    undo()
    undo()
    after = [(p.requires_grad, p.grad) for p in model.parameters()]
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(before, after, strict=True))


def test_undo_restores_everything_a_module_holds():
    model, trainable = headed()
    model.body.train(False)
    before = [
        (type(m), m.__dict__.copy(), [dict(v) for k, v in m.__dict__.items() if "hooks" in k])
        for m in model.modules()
    ]
    text = repr(model)
    undo = freeze(model, trainable=trainable, following=[model.head])
    assert repr(model) == text
    model.train()
    model(torch.randn(2, 3, 4, 4))
    undo()
    model.head.train()
    model.scale[1].train()
    for m, (kind, held, hooks) in zip(model.modules(), before, strict=True):
        assert type(m) is kind
        assert m.__dict__ == held
        assert [dict(v) for k, v in m.__dict__.items() if "hooks" in k] == hooks


def test_a_stranger_among_the_trainable_is_refused_and_nothing_changes():
    model, trainable = headed()
    with pytest.raises(FlexureError, match=r"1 that are not its own, of shape \(7,\)"):
        freeze(model, trainable=[*trainable, nn.Parameter(torch.zeros(7))])
    assert all(p.requires_grad for p in model.parameters())
    assert all(type(m) not in LIGHT.values() for m in model.modules())


def test_a_failure_half_way_is_undone(monkeypatch):
    model, trainable = headed()
    monkeypatch.setattr(model.scale, "register_forward_pre_hook", None)
    with pytest.raises(TypeError):
        freeze(model, trainable=trainable)
    monkeypatch.undo()
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert all(type(m) not in LIGHT.values() for m in model.modules())


def test_nothing_trainable_and_everything_trainable():
    model, _ = headed()
    undo = freeze(model, trainable=[])
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.train().modules())
    undo()
    undo = freeze(model, trainable=model.parameters(), following=[model])
    assert all(m.training for m in model.train().modules())
    assert all(type(m) not in LIGHT.values() for m in model.modules())
    undo()


def test_a_layer_with_a_trainable_bias_is_not_light_but_stays_in_eval_mode():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    freeze(model, trainable=[model[0].bias, model[1].bias])
    model.train()
    assert type(model[0]) is nn.Conv2d
    assert type(model[1]) is nn.BatchNorm2d
    assert not model[1].training


def test_shared_and_repeated_modules():
    conv, relu = nn.Conv2d(3, 3, 1), nn.ReLU()
    model = nn.Sequential(conv, relu, conv, relu, nn.Linear(4, 2))
    undo = freeze(model, trainable=model[4].parameters())
    model.train()
    assert not conv.training
    assert not relu.training
    assert model[4].training
    model(torch.randn(1, 3, 4, 4)).sum().backward()
    undo()
    assert type(conv) is nn.Conv2d


def test_undo_reaches_parameters_that_were_replaced_meanwhile():
    model, trainable = headed()
    undo = freeze(model, trainable=trainable)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert not model.body[0].weight.requires_grad
    undo()
    assert all(p.requires_grad for p in model.parameters())


def test_freezing_what_is_frozen():
    model, trainable = headed()
    undo_outer = freeze(model, trainable=trainable)
    undo_inner = freeze(model, trainable=[*trainable, *model.body.parameters()])
    model.train()
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    assert model.body[0].weight.grad is not None
    assert not model.body[1].training
    undo_inner()
    assert not model.body[0].weight.requires_grad
    assert not model.train().body[1].training
    undo_outer()
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.train().modules())
    assert type(model.body[0]) is nn.Conv2d


def test_gradients_that_came_meanwhile_are_taken_away():
    model, trainable = headed()
    undo = freeze(model, trainable=trainable)
    model.requires_grad_(True)
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    assert model.body[0].weight.grad is not None
    undo()
    ids = {id(p) for p in trainable}
    assert all(p.grad is None for p in model.parameters() if id(p) not in ids)


def test_gradients_kept_aside_are_put_back_into_a_model_that_was_cast():
    model, trainable = headed()
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    expected = model.body[0].weight.grad.clone()
    undo = freeze(model, trainable=trainable)
    model.double()
    undo()
    assert torch.equal(model.body[0].weight.grad, expected.double())


# --- Modes ---


class Parent(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.drop = nn.Dropout(0.5)


WAYS = {
    "train": lambda m: m.train(),
    "part": lambda m: m.body.train(),
    "parent": lambda m: Parent(m).train(),
    "each": lambda m: [x.train() for x in m.modules()],
    "apply": lambda m: m.apply(lambda x: x.train()),
    "class": lambda m: m.body[1].train(True),
    "eval and back": lambda m: m.eval().train(),
}


@pytest.mark.parametrize("way", WAYS)
def test_frozen_modules_stay_in_eval_mode(way):
    model, trainable = headed()
    freeze(model, trainable=trainable, following=[model.head])
    WAYS[way](model)
    assert not any(frozen_modes(model))
    if way not in ("part", "class"):
        assert all(m.training for m in model.head.modules())
    model.eval()
    assert not any(m.training for m in model.modules())


def test_what_holds_only_trained_modules_stays_in_eval_mode():
    model = nn.Sequential(nn.Linear(6, 8), Counting(nn.PReLU(8)), nn.Linear(8, 3))
    inner = model[1].inner
    freeze(
        model,
        trainable=[*inner.parameters(), *model[2].parameters()],
        following=[model[2]],
    )
    before = [b.clone() for b in model.buffers()]
    model.train()
    assert inner.training
    assert model[2].training
    assert not any(m.training for m in (model, model[1], model[1].drop, model[1].norm))
    x = torch.randn(5, 6)
    assert torch.equal(model(x), model(x))
    assert all(map(torch.equal, model.buffers(), before))


def test_a_parent_follows_the_caller():
    model, trainable = headed()
    freeze(model, trainable=trainable)
    parent = Parent(model)
    assert parent.train() is parent
    assert parent.drop.training
    assert model.train() is model
    with pytest.raises(ValueError, match="boolean"):
        model.train("yes")


def test_evaluating_restores_the_modes():
    model, trainable = headed()
    freeze(model, trainable=trainable, following=[model.head])
    model.train()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert all(m.training for m in model.head.modules())
    assert not any(frozen_modes(model))


def test_assigning_the_mode_directly_changes_nothing():
    model, trainable = headed()
    freeze(model, trainable=trainable)
    model.eval()
    x = torch.randn(3, 3, 4, 4)
    expected, buffers = model(x), [b.clone() for b in model.buffers()]
    for m in model.modules():
        m.training = True
    model.head.eval()
    assert torch.equal(model(x), expected)
    assert all(map(torch.equal, buffers, model.buffers()))
    assert not any(frozen_modes(model))


def test_scripted_children_stay_in_eval_mode_too():
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)))
    model = nn.Sequential(scripted, nn.Linear(4, 2))
    undo = freeze(model, trainable=model[1].parameters())
    model.train()
    before = {k: v.clone() for k, v in scripted.state_dict().items()}
    x = torch.randn(8, 4)
    assert torch.equal(model(x), model(x))
    assert all(torch.equal(v, before[k]) for k, v in scripted.state_dict().items())
    undo()
    model.train()
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("mode", [True, False])
def test_buffers_and_weights_are_bit_identical_after_training(mode):
    model, trainable = headed()
    # Weight decay and a gradient from before: neither may move a frozen weight.
    model(torch.randn(4, 3, 4, 4)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    freeze(model, trainable=trainable)
    ids = {id(p) for p in trainable}
    before = {k: v.clone() for k, v in model.state_dict(keep_vars=True).items() if id(v) not in ids}
    moved = [p.detach().clone() for p in trainable]
    for _ in range(3):
        model.train(mode)
        F.cross_entropy(model(torch.randn(4, 3, 4, 4)), torch.randint(4, (4,))).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert not any(map(torch.equal, moved, trainable))


# --- Light layers ---

CONVS = {
    "1d": (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8)),
    "3d": (nn.Conv3d(4, 6, 3, padding=(0, 1, 2)), (2, 4, 5, 4, 5)),
    "1x1 strided": (nn.Conv2d(4, 6, 1, 2, bias=False), (2, 4, 9, 8)),
    "groups": (nn.Conv2d(4, 8, 3, groups=2), (2, 4, 9, 8)),
    "depthwise": (nn.Conv2d(4, 4, (3, 5), padding="same", groups=4), (2, 4, 9, 8)),
    "dilation": (nn.Conv2d(4, 6, 3, dilation=2, padding=1), (2, 4, 9, 8)),
    "same": (nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 9, 8)),
    "same, even": (nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(1, 3)), (2, 4, 9, 14)),
    "same, mixed": (nn.Conv2d(4, 6, (3, 4), padding="same"), (2, 4, 9, 8)),
    "same, 1d even": (nn.Conv1d(4, 6, 4, padding="same"), (2, 4, 9)),
    "same, 3d mixed": (nn.Conv3d(2, 3, (1, 2, 3), padding="same"), (2, 2, 3, 4, 5)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 9, 8)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 9, 8)),
    "circular": (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 9)),
    "replicate, same": (nn.Conv2d(4, 6, 4, padding="same", padding_mode="replicate"), (2, 4, 9, 8)),
    "unbatched": (nn.Conv2d(4, 6, 3), (4, 9, 8)),
    "unbatched 1d": (nn.Conv1d(4, 6, 3), (4, 9)),
    "empty": (nn.Conv2d(4, 6, 3), (0, 4, 9, 8)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, 2), (2, 4, 5)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, dilation=2), (2, 4, 5, 4)),
    "transposed 3d": (nn.ConvTranspose3d(4, 6, 3, bias=False), (2, 4, 3, 3, 2)),
    "transposed, unbatched": (nn.ConvTranspose2d(4, 6, 3, 2), (4, 5, 4)),
}
NORMS = {
    "norm 1d": (nn.BatchNorm1d(4), (5, 4)),
    "norm 1d of sequences": (nn.BatchNorm1d(4), (5, 4, 3)),
    "norm 2d": (nn.BatchNorm2d(4), (2, 4, 9, 8)),
    "norm 3d": (nn.BatchNorm3d(4), (2, 4, 3, 2, 3)),
    "norm without weights": (nn.BatchNorm2d(4, affine=False, eps=0.1), (2, 4, 9, 8)),
}
POOLS = {
    "pool": (nn.MaxPool2d(3, 2, 1), (2, 4, 9, 8)),
    "pool, ceil": (nn.MaxPool2d((2, 3), (1, 2), (1, 0), ceil_mode=True), (2, 4, 9, 8)),
}
LAYERS = CONVS | NORMS | POOLS


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, Tensor]:
    """A layer as torch runs it, the same layer light, and an input."""
    layer, shape = LAYERS[name]
    plain = wild(copy.deepcopy(layer)).eval().requires_grad_(False).to(dtype)
    light = copy.deepcopy(plain)
    freeze(light, trainable=[])
    assert type(light) is LIGHT[type(plain)]
    return plain, light, torch.randn(shape, dtype=dtype)


def gradients(layer: nn.Module, x: Tensor, **settings) -> tuple[Tensor, Tensor]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x, **settings)
    weights = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    (grad,) = torch.autograd.grad((y * weights.to(y.device)).sum(), x)
    assert grad.dtype == x.dtype
    return y.detach(), grad


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max()) if a.numel() else True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_light_layers_agree_with_torch(name, dtype):
    plain, light, x = pair(name, dtype)
    (y, grad), (expected, by_x) = gradients(light, x), gradients(plain, x)
    assert torch.equal(y, expected)
    assert grad.stride() == by_x.stride()
    if name not in NORMS:
        assert torch.equal(grad, by_x)
    else:
        assert close(grad, by_x, max(1e-6, torch.finfo(dtype).eps))


@pytest.mark.parametrize("name", LAYERS)
def test_light_layers_keep_no_input(name):
    plain, light, x = pair(name)
    x.requires_grad_()
    own = {t.untyped_storage().data_ptr() for t in (*light.parameters(), *light.buffers())}
    kept = [t for t in saved(lambda: light(x)) if t.untyped_storage().data_ptr() not in own]
    if "re" not in name.split(",")[0][:2]:  # reflected and replicated borders are torch's own pads
        limit = light(x).numel() if name in POOLS else 8
        assert all(t.numel() <= limit for t in kept), [t.shape for t in kept]
        assert not any(t.is_floating_point() and t.numel() > 8 for t in kept)
    assert any(t.numel() >= x.numel() for t in saved(lambda: plain(x)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4), (2, 2, 3, 4)])
def test_torch_keeps_no_input_of_a_frozen_linear(shape, bias):
    """Should this fail, nn.Linear needs a light layer."""
    layer = nn.Linear(4, 5, bias=bias).requires_grad_(False)
    x = torch.randn(shape, requires_grad=True)
    kept = saved(lambda: layer(x))
    assert all(t.data_ptr() == layer.weight.data_ptr() for t in kept)


@pytest.mark.parametrize(
    "name", ["2d", "1x1 strided", "depthwise", "transposed 2d", "norm 2d", "pool", "pool, ceil"]
)
@pytest.mark.parametrize("weight", [True, False])
def test_channels_last(name, weight):
    plain, light, x = pair(name)
    x = x.to(memory_format=torch.channels_last)
    if weight:
        plain, light = (m.to(memory_format=torch.channels_last) for m in (plain, light))
    (y, grad), (expected, by_x) = gradients(light, x), gradients(plain, x)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    assert close(grad, by_x)
    if name not in NORMS:
        assert grad.stride() == by_x.stride()


@pytest.mark.parametrize("name", ["2d", "same, even", "transposed 2d", "norm 2d", "1d", "pool"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(name, low):
    plain, light, x = pair(name)
    results = []
    for layer in (light, plain):
        with torch.autocast("cpu", low):
            results.append(gradients(layer, x))
    (y, grad), (expected, by_x) = results
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)
    assert close(grad, by_x)


@pytest.mark.parametrize("name", ["norm 2d", "norm 1d"])
@pytest.mark.parametrize("low", [torch.bfloat16])
def test_half_inputs_of_a_float32_norm(name, low):
    plain, light, x = pair(name)
    (y, grad), (expected, by_x) = gradients(light, x.to(low)), gradients(plain, x.to(low))
    assert torch.equal(y, expected)
    assert close(grad, by_x, 2**-7)


def test_output_size_of_a_transposed_convolution():
    plain, light, x = pair("transposed 1d")
    for size in ([12], [11]):
        (y, grad), (expected, by_x) = (gradients(m, x, output_size=size) for m in (light, plain))
        assert y.shape[-1] == size[0]
        assert torch.equal(y, expected)
        assert torch.equal(grad, by_x)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "empty"])
def test_second_derivatives(name):
    _, light, x = pair(name, torch.float64)
    x = x[..., :5].contiguous().requires_grad_() if "same, even" not in name else x.requires_grad_()
    assert torch.autograd.gradcheck(light, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: torch.sin(light(x)), x, fast_mode=True)


@pytest.mark.parametrize("name", ["2d", "transposed 2d", "norm 2d"])
def test_function_transforms_and_batched_gradients(name):
    plain, light, x = pair(name, torch.float64)

    def f(layer):
        return lambda x: torch.sin(layer(x[None]))[0].flatten()[:7]

    v = torch.randn_like(x[0])
    for transform in (
        lambda f: torch.func.vmap(f)(x),
        lambda f: torch.func.jvp(f, (x[0],), (v,))[1],
        lambda f: torch.func.jacrev(f)(x[0]),
        lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(x),
        lambda f: torch.func.hessian(lambda x: f(x).sum())(x[0]),
        lambda f: torch.autograd.functional.jacobian(f, x[0], vectorize=True),
        lambda f: torch.autograd.functional.hvp(lambda x: f(x).sum(), x[0], v)[1],
        lambda f: torch.autograd.functional.jacobian(
            f, x[0], vectorize=True, strategy="forward-mode"
        ),
    ):
        torch.testing.assert_close(transform(f(light)), transform(f(plain)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_of_ties_and_of_what_is_not_finite(dtype, layout):
    plain, light, _ = pair("pool", dtype)
    x = torch.randint(-2, 3, (3, 5, 17, 14)).to(dtype).relu().contiguous(memory_format=layout)
    x[0, 0, 3, 3], x[1, 2, 5, 6], x[2, 1] = float("nan"), float("inf"), -float("inf")
    (y, grad), (expected, by_x) = gradients(light, x), gradients(plain, x)
    assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7))
    assert torch.equal(grad, by_x)


def test_pooling_with_indices_or_gaps_is_torchs():
    for layer in (nn.MaxPool2d(2, return_indices=True), nn.MaxPool2d(2, dilation=2)):
        x, plain = torch.randn(2, 3, 8, 8, requires_grad=True), copy.deepcopy(layer)
        freeze(layer, trainable=[])
        y, expected = layer(x), plain(x)
        pairs = zip(y, expected, strict=True) if isinstance(y, tuple) else [(y, expected)]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_steered_pooling_in_a_frozen_network():
    """The census knows the light pooling, and units replace it."""
    model, trainable = network()
    freeze(model, trainable=trainable)
    x = torch.randn(2, 3, 32, 32)
    report = sites(model, x, pooling=True)
    assert "maxpool" in [site.name for site in report.sites]
    expected = model(x)
    with steer(model, beta=1.0, example=x) as steering:
        assert len(steering.units) == len(sites(resnet18(8), x).sites)
        # With gradients the light pooling runs, under the modes that route activations.
        y = model(x.requires_grad_())
        torch.testing.assert_close(y, expected)
        y.sum().backward()


def test_a_layer_thawed_by_hand_learns_again():
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    model = nn.Sequential(conv, norm)
    freeze(model, trainable=[])
    conv.bias.requires_grad_(True)
    norm.weight.requires_grad_(True)
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    assert conv.bias.grad is not None
    assert norm.weight.grad is not None
    assert conv.weight.grad is None


def test_changed_and_parametrised_layers_are_left_alone():
    class Mine(nn.Conv2d):
        pass

    model = nn.Sequential(Mine(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model[2].track_running_stats = False
    nn.utils.parametrizations.weight_norm(model[1])
    parametrised = type(model[1])
    undo = freeze(model, trainable=[model[1].parametrizations.weight.original0])
    assert type(model[0]) is Mine
    assert type(model[1]) is parametrised
    # Parametrised afterwards: torch derives the parametrised class from the light one.
    nn.utils.parametrize.register_parametrization(model[3], "weight", nn.Tanh())
    model[3].parametrizations.weight.original.requires_grad_(True)
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    assert model[1].parametrizations.weight.original0.grad is not None
    assert model[3].parametrizations.weight.original.grad is not None
    nn.utils.parametrize.remove_parametrizations(model[3], "weight")
    undo()
    assert type(model[3]) is nn.Conv2d


def test_wrong_inputs_raise_what_torch_raises():
    for name, shape in (("2d", (2, 9)), ("norm 2d", (2, 4, 9)), ("transposed 2d", (3,))):
        plain, light, _ = pair(name)
        errors = []
        for layer in (plain, light):
            with pytest.raises((ValueError, RuntimeError)) as error:
                layer(torch.randn(shape, requires_grad=True))
            errors.append((type(error.value), str(error.value)))
        assert errors[0] == errors[1]


# --- Whole networks ---


def network() -> tuple[nn.Module, list[nn.Parameter]]:
    """A narrow ResNet-18 whose PReLUs and head are trained."""
    model = wild(resnet18(8))
    for block in (model, *(b for n in range(1, 5) for b in getattr(model, f"layer{n}"))):
        block.relu = nn.PReLU(1)
    return model, [p for n, p in model.named_parameters() if "relu" in n or "fc" in n]


def train(model: nn.Module, trainable: list[nn.Parameter], steps: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(trainable, 0.01)
    for _ in range(steps):
        x = torch.randn(4, 3, 32, 32, generator=generator)
        y = torch.randint(10, (4,), generator=generator)
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return [p.detach().clone() for p in trainable]


def by_hand() -> list[Tensor]:
    """The same training with torch's own layers, each set to eval mode by hand."""
    torch.manual_seed(0)
    model, trainable = network()
    model.requires_grad_(False)
    for p in trainable:
        p.requires_grad_(True)
    model.train = lambda mode=True: nn.Module.train(model, False)
    return train(model, trainable)


def test_training_is_that_of_torchs_layers():
    expected = by_hand()
    torch.manual_seed(0)
    model, trainable = network()
    freeze(model, trainable=trainable)
    for p, q in zip(train(model, trainable), expected, strict=True):
        assert close(p, q, 1e-5)


def test_the_network_looks_as_before():
    model, trainable = network()
    x = torch.randn(2, 3, 32, 32)
    keys, text, digest = list(model.state_dict()), repr(model), fingerprint(model)
    report = sites(model, x)
    undo = freeze(model, trainable=trainable)
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    assert fingerprint(model) == digest
    assert sites(model, x) == report
    undo()
    assert fingerprint(model) == digest


def test_light_layers_that_an_example_does_not_reach_hide_no_activation():
    model, trainable = network()
    model.auxiliary = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    expected = sites(model, torch.randn(2, 3, 32, 32)).unreached
    freeze(model, trainable=trainable)
    assert sites(model, torch.randn(2, 3, 32, 32)).unreached == expected == ()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    expected = by_hand()
    torch.manual_seed(0)
    model, trainable = network()
    freeze(model, trainable=trainable)
    for stage in (model.layer1, model.layer2, model.layer3):
        run = stage.forward
        stage.forward = lambda x, run=run: checkpoint(run, x, use_reentrant=reentrant)
    for p, q in zip(train(model, trainable), expected, strict=True):
        assert close(p, q, 1e-5)


def copies(model: nn.Module, how: str) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies_are_frozen_of_their_own_and_train_alike(how):
    model, trainable = network()
    freeze(model, trainable=trainable)
    train(model, trainable, 1)
    twin = copies(model, how)
    other = [p for p in twin.parameters() if p.requires_grad]
    twin.train()
    assert twin.fc.training
    assert not twin.bn1.training
    assert not model.fc.eval().training
    assert twin.fc.training
    twin.eval()
    model.train()
    assert model.fc.training
    assert not twin.fc.training
    for p, q in zip(train(model, trainable), train(twin, other), strict=True):
        assert torch.equal(p, q)
    del model
    twin.train()
    assert not twin.layer1[0].bn1.training


def test_a_dropped_network_is_freed_at_once():
    import gc
    import weakref

    model, trainable = headed()
    freeze(model, trainable=trainable)
    gone = weakref.ref(model.body[0].weight)
    gc.disable()
    try:
        del model, trainable
        assert gone() is None
    finally:
        gc.enable()


def test_functional_call():
    model, trainable = network()
    x = torch.randn(2, 3, 32, 32)
    freeze(model, trainable=trainable)
    model.train()
    parameters = {
        n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()
    }  # all trained, those of the light layers too
    buffers = dict(model.named_buffers())
    y = torch.func.functional_call(model, (parameters, buffers), (x,))
    assert torch.equal(y, model(x))
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())


def test_compile_and_export():
    model, trainable = network()
    freeze(model, trainable=trainable)
    model.train()
    x = torch.randn(2, 3, 32, 32)
    expected = torch.autograd.grad(model(x).square().sum(), trainable)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, model(x))
    for a, b in zip(torch.autograd.grad(y.square().sum(), trainable), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    model.fc.eval()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_compile_sees_the_mode_assigned_directly():
    model, trainable = headed()
    freeze(model, trainable=trainable)
    model.eval()
    x = torch.randn(3, 3, 4, 4)
    expected, compiled = model(x), torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    for m in model.modules():
        m.training = True
    model.head.eval()
    before = [b.clone() for b in model.buffers()]
    torch.testing.assert_close(compiled(x), expected)
    assert all(map(torch.equal, before, model.buffers()))


def test_undoing_reaches_compiled_code():
    model, trainable = headed()
    undo = freeze(model, trainable=trainable)
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 3, 4, 4)
    compiled(x).sum().backward()
    assert model.body[0].weight.grad is None
    undo()
    model.train()
    before = model.body[1].running_mean.clone()
    compiled(x).sum().backward()
    assert model.body[0].weight.grad is not None
    assert not torch.equal(model.body[1].running_mean, before)


def test_two_optimisers():
    model, trainable = network()
    freeze(model, trainable=trainable)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    parts = [[p for p in trainable if p.ndim == 1], [p for p in trainable if p.ndim == 2]]
    optimizers = [torch.optim.Adam(parts[0], 0.01), torch.optim.SGD(parts[1], 0.1)]
    for index in range(4):
        model.train().zero_grad()
        model(torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimizers[index % 2].step()
    ids = {id(p) for p in trainable}
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (id(p) not in ids), name


def test_fx_traces_it():
    model, trainable = network()
    freeze(model, trainable=trainable)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_torchscript_traces_it():
    model, trainable = network()
    freeze(model, trainable=trainable)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


def test_batch_norm_statistics_replaced_in_place_between_forward_and_backward():
    """As DDP does when it broadcasts buffers."""
    _, light, x = pair("norm 2d")
    y = light(x.requires_grad_())
    expected = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    light.running_var.mul_(2)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


DDP = """
import os, sys
import torch, torch.distributed as dist
sys.path.insert(0, {root!r})
from torch.nn.parallel import DistributedDataParallel
from tests.surgery.test_frozen import freeze, network, train
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
model, trainable = network()
freeze(model, trainable=trainable)
before = [b.clone() for b in model.buffers()]
ddp = DistributedDataParallel(model)
first = train(ddp, trainable)
assert all(map(torch.equal, before, model.buffers())), "buffers moved"
torch.save(first, sys.argv[3] + str(rank))
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(DDP.format(root=str(ROOT)))
    arguments = [str(tmp_path / "meeting"), str(tmp_path / "result")]
    runs = [
        subprocess.Popen([sys.executable, str(script), str(rank), *arguments]) for rank in (0, 1)
    ]
    assert [run.wait(120) for run in runs] == [0, 0]
    expected = by_hand()  # both saw the same batches
    for rank in (0, 1):
        found = torch.load(f"{arguments[1]}{rank}")
        assert all(close(p, q, 1e-5) for p, q in zip(found, expected, strict=True))


def test_resnet50_blocks_are_light():
    model = resnet50(8)
    freeze(model, trainable=model.fc.parameters())
    kinds = {type(m) for m in model.modules()}
    assert not kinds & set(LIGHT)
    assert {LIGHT[nn.Conv2d], LIGHT[nn.BatchNorm2d]} <= kinds
