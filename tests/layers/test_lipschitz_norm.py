"""Lipschitz BatchNorm against its definition, against torch's, its derivatives and its constant."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.modules.batchnorm import _BatchNorm

from flexure.contracts import FlexureError
from flexure.layers import LipschitzBatchNorm, module_norm_bounds
from flexure.layers.lipschitz_norm import _by_formula, _fast
from flexure.memory import saved_bytes
from tests.reference.lipschitz_norm import lipschitz_normed, scaled

DOUBLE = torch.float64
SHAPES = [(7, 3), (4, 3, 5), (3, 3, 4, 2), (2, 3, 2, 3, 2)]
BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def channels(x: Tensor) -> list[list[float]]:
    return [row.tolist() for row in x.detach().transpose(0, 1).flatten(1)]


def uneven(shape: tuple[int, ...], dtype: torch.dtype = DOUBLE) -> Tensor:
    """Channels of spreads 0.05, 1 and 3: with weights near 1 and gamma 2, one is clipped."""
    torch.manual_seed(2)
    spread = torch.tensor([0.05, 1.0, 3.0], dtype=dtype).view(-1, *(1,) * (len(shape) - 2))
    return torch.randn(shape, dtype=dtype) * spread + 0.7


def trained(gamma: float, dtype: torch.dtype = DOUBLE, **options) -> LipschitzBatchNorm:
    torch.manual_seed(3)
    norm = LipschitzBatchNorm(3, gamma=gamma, dtype=dtype, **options)
    if norm.weight is not None:
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([-1.2, 0.9, 1.5]))
            norm.bias.normal_()
    return norm


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gamma", [1.0, 2.0, 10.0, 1e30])
@pytest.mark.parametrize("affine", [True, False])
def test_is_its_definition_in_both_modes(
    shape: tuple[int, ...], gamma: float, affine: bool
) -> None:
    x, norm = uneven(shape), trained(gamma, affine=affine)
    y = norm(x)
    weights = norm.weight.tolist() if affine else [1.0] * 3
    biases = norm.bias.tolist() if affine else [0.0] * 3
    count = x.numel() // 3
    running = []
    for given_x, got, w, b in zip(channels(x), channels(y), weights, biases, strict=True):
        expected, mean, var = lipschitz_normed(given_x, w, b, gamma, norm.eps)
        assert got == pytest.approx(expected, rel=1e-11, abs=1e-11)
        running.append((0.1 * mean, 0.9 + 0.1 * var * count / (count - 1)))
    assert norm.running_mean.tolist() == pytest.approx([m for m, _ in running])
    assert norm.running_var.tolist() == pytest.approx([v for _, v in running])
    assert norm.num_batches_tracked == 1
    norm.eval()
    rows = zip(channels(x), channels(norm(x)), running, weights, biases, strict=True)
    for given_x, got, (mean, var), w, b in rows:
        expected = scaled(given_x, mean, var, w, b, gamma, norm.eps)
        assert got == pytest.approx(expected, rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_is_batch_norm_where_gamma_is_huge(
    shape: tuple[int, ...], momentum: float | None, track: bool, dtype: torch.dtype
) -> None:
    plain = BATCH_NORMS[len(shape)](3, momentum=momentum, track_running_stats=track, dtype=dtype)
    nn.init.normal_(plain.weight)
    norm = LipschitzBatchNorm.from_batch_norm(copy.deepcopy(plain), gamma=1e30)
    for step in range(3):
        x = (uneven(shape, dtype) + step).requires_grad_()
        g = torch.randn_like(x)
        for layers in ((plain, norm), (plain.eval(), norm.eval())):
            results = []
            for layer in layers:
                y = layer(x)
                grads = torch.autograd.grad(y, (x, layer.weight, layer.bias), g, create_graph=True)
                second = torch.autograd.grad(
                    grads[0].square().sum(), (x, layer.weight), materialize_grads=True
                )
                results.append((y, *grads, *second))
            tolerance = 2e-4 if dtype == torch.float32 else 1e-10
            for a, b in zip(*results, strict=True):
                scale = float(a.detach().abs().max()) + 1e-30
                torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=tolerance)
        for name, buffer in plain.named_buffers():
            assert torch.equal(buffer, norm.get_buffer(name)), name
        plain.train(), norm.train()


def test_a_dead_channel_leaves_the_others_alone() -> None:
    """The published layer clips all channels by the largest slope: one dead channel kills all."""
    torch.manual_seed(0)
    x = torch.randn(256, 4, 3, 3)
    x[:, 2] = 0.3
    norm, alive = LipschitzBatchNorm(4, momentum=1.0), [0, 1, 3]
    for mode in (True, False):
        spread = norm.train(mode)(x).std((0, 2, 3))
        assert spread[alive].tolist() == pytest.approx([1.0] * 3, abs=0.01)
        assert spread[2] == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("run", [_fast, _by_formula])
def test_derivatives(run, training: bool) -> None:
    gamma = torch.tensor(2.2, dtype=DOUBLE, requires_grad=True)
    x = uneven((5, 3, 2)).requires_grad_()
    weight = torch.tensor([1.0, -2.0, 0.9], dtype=DOUBLE, requires_grad=True)
    bias = torch.randn(3, dtype=DOUBLE, requires_grad=True)
    spread = x.detach().std((0, 2), correction=0)
    clipped = weight.detach().abs() / spread > 2.2
    assert clipped.any()
    assert not clipped.all()
    if training:

        def f(*inputs: Tensor) -> Tensor:
            return run(*inputs, None, None, 0.1, 1e-5)

        inputs = (x, weight, bias, gamma)
    else:
        norm = LipschitzBatchNorm(3, dtype=DOUBLE, momentum=1.0)
        norm(x.detach())
        norm.eval()
        raw = torch.log(gamma.detach() - 1).requires_grad_()
        inputs = (x, weight, bias, raw)

        def f(*inputs: Tensor) -> Tensor:
            x, weight, bias, raw = inputs
            given = {"weight": weight, "bias": bias, "raw_gamma": raw}
            return torch.func.functional_call(norm, given, x)

    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


def test_fast_and_plain_agree_at_large_inputs() -> None:
    x = (uneven((64, 3, 8, 8), torch.float32) * 100).requires_grad_()
    g = torch.randn(x.shape)
    for gamma in (0.005, 0.02, 1.0):
        dial = torch.tensor(gamma, requires_grad=True)
        weight = torch.tensor([1.0, -2.0, 0.9], requires_grad=True)
        for second in (False, True):
            found = []
            for run in (_fast, _by_formula):
                y = run(x, weight, None, dial, None, None, 0.1, 1e-5)
                grads = torch.autograd.grad(y, (x, weight, dial), g, create_graph=second)
                if second:
                    grads = torch.autograd.grad(grads[0], (x, weight, dial), g * g)
                found.append((y, *grads))
            for a, b in zip(*found, strict=True):
                scale = float(b.detach().abs().max()) + 1e-12
                torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("gamma", [1.0, 2.5, 10.0, 1e4])
def test_gamma_is_what_was_asked_for(gamma: float) -> None:
    for dtype in (torch.float32, DOUBLE):
        norm = LipschitzBatchNorm(3, gamma=gamma, dtype=dtype)
        assert norm.gamma.item() == pytest.approx(gamma, rel=1e-6)
        assert norm.gamma.shape == norm.lipschitz.shape == ()
        assert norm.gamma.item() >= 1
    with torch.no_grad():
        norm.raw_gamma.fill_(-1e3)
    assert norm.gamma.item() == 1


@given(st.floats(-60, 60))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_gamma_is_at_least_one_whatever_the_parameter(raw: float) -> None:
    norm = LipschitzBatchNorm(1)
    with torch.no_grad():
        norm.raw_gamma.fill_(raw)
    assert norm.gamma.item() >= 1
    torch.testing.assert_close(norm.gamma.log(), nn.functional.softplus(norm.raw_gamma))


def test_lipschitz_constant_is_that_of_the_eval_map() -> None:
    for gamma, learnt in ((2.0, "raw_gamma"), (100.0, "weight")):
        norm = trained(gamma, momentum=1.0)
        norm(uneven((50, 3)))
        norm.eval()
        slopes = torch.autograd.functional.jacobian(norm, uneven((2, 3))[:1])
        steepest = torch.linalg.matrix_norm(slopes[0, :, 0], 2)
        assert norm.lipschitz.item() == pytest.approx(steepest.item(), rel=1e-12)
        norm.zero_grad()
        norm.lipschitz.backward()
        moved = {n for n, p in norm.named_parameters() if p.grad is not None and p.grad.any()}
        assert moved == {learnt}
        value, h = norm.lipschitz.item(), 1e-6
        parameter = getattr(norm, learnt)
        index = () if learnt == "raw_gamma" else (0,)
        with torch.no_grad():
            parameter[index] += h
        assert (norm.lipschitz.item() - value) / h == pytest.approx(
            parameter.grad[index].item(), rel=1e-4
        )


@pytest.mark.parametrize("gamma", [1.5, 100.0])
def test_norm_of_a_linear_module(gamma: float) -> None:
    norm = trained(gamma, momentum=1.0)
    norm(uneven((50, 3, 4, 4)))
    bounds = module_norm_bounds(norm.eval(), (3, 4, 4))
    assert bounds.spectral == pytest.approx(norm.lipschitz.item(), rel=1e-12)


def test_lipschitz_constant_without_weights_or_statistics() -> None:
    norm = LipschitzBatchNorm(3, affine=False, eps=1e-12)
    norm.running_var.copy_(torch.tensor([4.0, 0.25, 1.0]))
    assert norm.lipschitz.item() == pytest.approx(2.0)
    norm.running_var[1] = 0.0  # a dead channel
    assert norm.lipschitz.item() == norm.gamma.item()
    bare = LipschitzBatchNorm(3, track_running_stats=False, gamma=4.0)
    assert bare.lipschitz.item() == bare.gamma.item() == 4.0
    assert bare.clipped_weight is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_takes_over_a_batch_norm(
    training: bool, momentum: float | None, affine: bool, track: bool
) -> None:
    plain = nn.BatchNorm2d(
        3, eps=1e-3, momentum=momentum, affine=affine, track_running_stats=track, dtype=DOUBLE
    )
    plain(torch.randn(4, 3, 2, 2, dtype=DOUBLE))
    norm = LipschitzBatchNorm.from_batch_norm(plain.train(training), gamma=3.0)
    assert isinstance(norm, _BatchNorm)
    assert norm.weight is plain.weight
    assert norm.bias is plain.bias
    assert norm.running_var is plain.running_var
    # A layer without any tensor has no dtype to take over.
    assert norm.raw_gamma.dtype == (DOUBLE if affine or track else torch.float32)
    assert (norm.eps, norm.momentum, norm.training) == (1e-3, momentum, training)
    assert norm.track_running_stats is track
    state = norm.state_dict()
    assert state.keys() == {*plain.state_dict(), "raw_gamma"}
    fresh = LipschitzBatchNorm(3, affine=affine, track_running_stats=track, dtype=DOUBLE)
    fresh.load_state_dict(state)
    x = torch.randn(4, 3, 2, 2, dtype=DOUBLE)
    fresh.eps = norm.eps
    assert torch.equal(fresh.eval()(x), norm.eval()(x))
    with pytest.raises(RuntimeError, match="raw_gamma"):
        norm.load_state_dict(plain.state_dict())


class Activated(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(super().forward(input))


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.SyncBatchNorm(3), "all processes"),
        (nn.InstanceNorm2d(3), "pass a BatchNorm"),
        (nn.Linear(3, 3), "pass a BatchNorm"),
        (Activated(3), "something else"),
        (LipschitzBatchNorm(3), "something else"),
        (nn.LazyBatchNorm2d(), "channels yet"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_refuses_other_modules(module: nn.Module, why: str) -> None:
    with pytest.raises(FlexureError, match=why):
        LipschitzBatchNorm.from_batch_norm(module)


@pytest.mark.parametrize("gamma", [0.999, 0.0, -1.0, float("nan"), float("inf"), "10", None])
def test_refuses_gammas_below_one(gamma: object) -> None:
    with pytest.raises(FlexureError, match=r"gamma in \[1, 1e\+30\]"):
        LipschitzBatchNorm(3, gamma=gamma)  # type: ignore[arg-type]
    with pytest.raises(FlexureError, match=r"gamma in \[1, 1e\+30\]"):
        LipschitzBatchNorm.from_batch_norm(nn.BatchNorm1d(3), gamma=gamma)  # type: ignore[arg-type]


@pytest.mark.parametrize("eps", [0.0, -1e-5, float("nan"), "1e-5", None, True])
def test_refuses_an_eps_of_0(eps: object) -> None:
    with pytest.raises(FlexureError, match="expected eps above 0"):
        LipschitzBatchNorm(3, eps=eps)  # type: ignore[arg-type]
    bn = nn.BatchNorm1d(3)
    bn.eps = eps  # type: ignore[assignment]
    with pytest.raises(FlexureError, match="expected eps above 0"):
        LipschitzBatchNorm.from_batch_norm(bn)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bad", [torch.ones(4, 3, dtype=torch.int64), 3, None, [[1.0] * 3] * 4])
def test_refuses_what_is_no_tensor_of_numbers(bad: object, training: bool) -> None:
    with pytest.raises(FlexureError, match="expected an input"):
        LipschitzBatchNorm(3).train(training)(bad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gamma", [1e5, 1e30])
def test_gamma_stays_wide_in_half_precision(gamma: float, training: bool) -> None:
    made = LipschitzBatchNorm(3, gamma=gamma, dtype=torch.float16)
    cast = LipschitzBatchNorm(3, gamma=gamma).half()
    taken = LipschitzBatchNorm.from_batch_norm(nn.BatchNorm1d(3).half(), gamma=gamma)
    x = torch.randn(8, 3).half().requires_grad_()
    for norm in (made, cast, taken):
        norm.train(training)
        assert norm.raw_gamma.dtype == torch.float32
        assert norm.gamma.item() == pytest.approx(gamma, rel=1e-4)
        assert norm.lipschitz.item() == pytest.approx(1.0, rel=1e-2)
        plain = nn.BatchNorm1d(3).half().train(training)
        torch.testing.assert_close(norm(x), plain(x), rtol=1e-2, atol=1e-2)
        norm(x).float().square().sum().backward()
        assert norm.raw_gamma.grad.dtype == torch.float32
    assert cast.double().raw_gamma.dtype == DOUBLE


def test_at_one_gamma_stays_and_above_it_grows() -> None:
    """As the docstring says."""
    x = torch.randn(64, 1) * 0.1
    for start, grows in ((1.0, False), (1.0001, True)):
        norm = LipschitzBatchNorm(1, gamma=start)
        optimizer = torch.optim.Adam([norm.raw_gamma], lr=0.1)
        for _ in range(50):
            optimizer.zero_grad()
            (-norm(x).square().mean()).backward()
            optimizer.step()
        assert (norm.gamma.item() > 1.001) == grows


def test_channels_that_share_the_maximum_share_its_gradient() -> None:
    norm = LipschitzBatchNorm(4, gamma=10.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -2.0, 1.0, 2.0]))
    (gradient,) = torch.autograd.grad(norm.lipschitz, norm.weight)
    torch.testing.assert_close(gradient, torch.tensor([1.0, -1.0, 0.0, 1.0]) / 3, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(3,), (4, 2), (2, 4, 3), (2, 3, 1, 1, 1, 1)])
def test_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(FlexureError, match="expected an input"):
        LipschitzBatchNorm(3)(torch.randn(shape))


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1), (0, 3, 4, 4)])
def test_refuses_one_value_a_channel_in_train_mode(shape: tuple[int, ...]) -> None:
    norm = LipschitzBatchNorm(3)
    with pytest.raises(FlexureError, match="more than one value a channel"):
        norm(torch.randn(shape))
    assert norm.num_batches_tracked == 0
    assert norm.eval()(torch.randn(shape)).shape == shape


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gamma", [1.0, 10.0])
def test_compiled_copied_and_called_functionally(training: bool, gamma: float) -> None:
    torch._dynamo.reset()
    x = uneven((4, 3, 5, 5), torch.float32).requires_grad_()
    norm = trained(gamma, torch.float32).train(training)
    twins = [copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))]
    compiled = torch.compile(twins[0], backend="aot_eager", fullgraph=True)
    y, z = norm(x), compiled(x)
    torch.testing.assert_close(y, z)
    assert torch.equal(y, twins[1](x))
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(twins[0].get_buffer(name), buffer)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, *norm.parameters()), g, allow_unused=True)
    got = torch.autograd.grad(z, (x, *twins[0].parameters()), g, allow_unused=True)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    parameters = {name: 1.1 * p.detach() for name, p in norm.named_parameters()}
    called = torch.func.functional_call(norm, parameters, x)
    with torch.no_grad():
        for name, p in twins[1].named_parameters():
            p.copy_(parameters[name])
    torch.testing.assert_close(called, twins[1](x))


@pytest.mark.parametrize("training", [True, False])
def test_autocast_and_half_precision(training: bool) -> None:
    x, norm = uneven((16, 3, 8, 8), torch.float32), trained(2.0, torch.float32, momentum=1.0)
    norm(x)
    expected = norm.train(training)(x)
    half = x.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(half)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.05)
    y.float().square().sum().backward()
    assert half.grad.dtype == torch.bfloat16
    assert norm.raw_gamma.grad.isfinite()
    whole = norm.bfloat16()(x.bfloat16())
    assert whole.dtype == torch.bfloat16
    torch.testing.assert_close(whole.float(), expected, rtol=0.05, atol=0.1)


def test_memory_formats_and_what_is_saved() -> None:
    x = uneven((8, 3, 16, 16), torch.float32).requires_grad_()
    norm = trained(2.0, torch.float32)
    y, z = norm(x), norm(x.contiguous(memory_format=torch.channels_last))
    assert z.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, z)
    g = torch.randn_like(y)
    by_y, by_z = (torch.autograd.grad(out, norm.raw_gamma, g)[0] for out in (y, z))
    torch.testing.assert_close(by_y, by_z)
    assert saved_bytes(lambda: norm(x)) <= x.nbytes + 200


def test_forward_mode_takes_the_formula() -> None:
    x, norm = uneven((4, 3, 2)), trained(2.0, track_running_stats=False)
    v = torch.randn_like(x)
    _, tangent = torch.func.jvp(norm, (x,), (v,))
    h = 1e-6
    difference = (norm(x + h * v) - norm(x - h * v)) / (2 * h)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-7)


def test_says_what_it_is() -> None:
    assert "3, eps=1e-05" in repr(LipschitzBatchNorm(3))
    assert "gamma=2.5" in repr(LipschitzBatchNorm(3, gamma=2.5))
