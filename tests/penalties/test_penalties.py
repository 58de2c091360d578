"""Each penalty against its definition, and its gradient against differences."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import flexure
from flexure.contracts import FlexureError
from flexure.layers.lipschitz_norm import LipschitzBatchNorm
from flexure.layers.spectral_norm import spectral_norm
from flexure.penalties import CURE, CurvatureRate, GradientNorm, LowCurvature
from flexure.penalties.curvature_rate import unit_directions
from flexure.train import Checkpoint, fit
from flexure.train.identity import describe
from flexure.units.smooth import CenteredSoftplus
from tests.penalties.steps import labelled, objective, step_of
from tests.reference import penalties as slow

ALL = [LowCurvature(), GradientNorm(), CURE(), CurvatureRate()]


def by_name(penalty) -> str:
    return type(penalty).__name__


def network(*, norm: bool = True) -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Linear(3, 5),
        LipschitzBatchNorm(5, gamma=2.0) if norm else nn.Identity(),
        CenteredSoftplus(2.0),
        nn.Linear(5, 4),
        nn.BatchNorm1d(4) if norm else nn.Identity(),
        nn.Tanh(),
        nn.Linear(4, 3),
    ).double()


def with_dropout() -> nn.Module:
    return network().insert(3, nn.Dropout(0.3))


def convolutional() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), CenteredSoftplus(), nn.Flatten(), nn.Linear(48, 3)
    ).double()


CASES = [(network(norm=False), (3,)), (convolutional(), (2, 4, 4))]


@pytest.mark.parametrize(("model", "shape"), CASES, ids=["vectors", "images"])
def test_values_are_those_of_the_definition(model: nn.Module, shape: tuple[int, ...]):
    x, y = labelled(6, *shape)
    step = step_of(model, x, y)
    v = unit_directions(step, x)
    torch.testing.assert_close(v.flatten(1).norm(dim=1), torch.ones(6).double())
    for penalty, expected in (
        (GradientNorm(), slow.gradient_norm(model, x, y)),
        (CURE(), slow.cure(model, x, y, 1.5)),
        (CurvatureRate(), slow.curvature_rate(model, x, v)),
    ):
        torch.testing.assert_close(penalty(step), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("penalty", ALL, ids=by_name)
def test_gradients_of_definition_and_penalty_agree(penalty):
    model = network(norm=False)
    x, y = labelled()
    step = step_of(model, x, y)
    parameters = list(model.parameters())
    definitions = {
        LowCurvature: lambda: 1e-2 * torch.log1p(model[2].raw_beta.exp()),
        GradientNorm: lambda: slow.gradient_norm(model, x, y),
        CURE: lambda: slow.cure(model, x, y, 1.5),
        CurvatureRate: lambda: slow.curvature_rate(model, x, unit_directions(step, x)),
    }
    found, expected = (
        torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        for value in (penalty(step), definitions[type(penalty)]())
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("penalty", ALL, ids=by_name)
def test_the_objective_s_gradient_is_that_of_differences(penalty, norm: bool):
    model, (x, y) = network(norm=norm), labelled()
    if norm:
        for _ in range(3):
            model(x * 2)  # statistics that are not the batch's
        model[1].momentum = model[4].momentum = 0.0  # they are constants of the gradient
    weight = 5 * penalty.default_weight

    def value(place: str, index: int, change: float) -> float:
        copied = deepcopy(model)
        with torch.no_grad():
            dict(copied.named_parameters())[place].view(-1)[index] += change
        return float(objective(copied, penalty, x, y, weight).detach())

    copied = deepcopy(model)
    whole = objective(copied, penalty, x, y, weight)
    names = dict(copied.named_parameters())
    gradients = torch.autograd.grad(whole, list(names.values()))
    h, checked = 1e-6, 0
    for name, gradient in zip(names, gradients, strict=True):
        for index in range(0, gradient.numel(), 3):
            difference = (value(name, index, h) - value(name, index, -h)) / (2 * h)
            assert float(gradient.view(-1)[index]) == pytest.approx(difference, rel=1e-5, abs=1e-8)
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("penalty", ALL[:3], ids=by_name)
def test_a_batch_twice_has_the_same_penalty(penalty, norm: bool):
    x, y = labelled()
    once, twice = (
        penalty(step_of(network(norm=norm), x.repeat(n, 1), y.repeat(n))) for n in (1, 2)
    )
    torch.testing.assert_close(once, twice, rtol=1e-10, atol=0)


@pytest.mark.parametrize("penalty", ALL[:3], ids=by_name)
def test_accumulated_batches_are_one(penalty):
    x, y = labelled(12)
    trained = []
    for batches, accumulate in (
        ([(x, y)], 1),
        ([(x[:5], y[:5]), (x[5:7], y[5:7]), (x[7:], y[7:])], 3),
    ):
        model = network(norm=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        history = fit(
            model,
            batches,
            epochs=3,
            seed=1,
            penalties={penalty: 0.5},
            optimizer=optimizer,
            accumulate=accumulate,
        )
        trained.append((history.losses, *model.parameters()))
    assert trained[0][0] == pytest.approx(trained[1][0], rel=1e-10)
    for a, b in zip(trained[0][1:], trained[1][1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_accumulated_rates_are_the_mean_of_the_batches():
    """The one that is not linear in the mean over samples."""
    x, y = labelled(12)
    model = network(norm=False)
    v = unit_directions(step_of(model, x, y), x)
    rates = [float(slow.curvature_rate(model, x[rows], v[rows]).detach()) for rows in _HALVES]
    batches = [(x[rows], y[rows]) for rows in _HALVES]
    history = fit(model, batches, epochs=1, seed=7, penalties={CurvatureRate(): 1.0}, accumulate=2)
    assert history.penalties["CurvatureRate"][0] == pytest.approx(sum(rates) / 2, rel=1e-9)


_HALVES = (slice(0, 6), slice(6, 12))


def test_directions_depend_on_seed_update_and_place_alone():
    x, y = labelled(70, 2, 2)
    whole = step_of(network(), x, y, index=3)
    v = unit_directions(whole, x)
    for rows in (slice(0, 1), slice(31, 66), slice(50, 70)):
        part = step_of(network(), x[rows], y[rows], index=3)
        part.positions = torch.arange(70)[rows]
        assert torch.equal(unit_directions(part, x[rows]), v[rows])
    torch.testing.assert_close(unit_directions(whole, x.float()).double(), v, rtol=1e-6, atol=1e-7)
    for other in (step_of(network(), x, y, index=4), step_of(network(), x, y, index=3, seed=8)):
        assert not torch.isclose(unit_directions(other, x), v).any()
    assert abs(float(v.mean())) < 0.1
    assert float((v.flatten(1) @ v.flatten(1).T).tril(-1).abs().max()) < 1


@pytest.mark.parametrize("gain", [1.0, 30.0, 3000.0])
def test_the_rate_of_a_sure_network_is_exact(gain: float):
    """p(top) = sigmoid(gain·w·x): D²p/Dp = gain·w·v·(1 - 2p), which sees no saturation."""
    x = torch.tensor([[1.0, 0.5], [0.8, 0.9]])
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 0.0]]) * gain)
    step = step_of(model, x, torch.tensor([0, 0]))
    v = unit_directions(step, x).double()
    margin = gain * (x[:, 0] + 2 * x[:, 1]).double()
    slope = gain * (v[:, 0] + 2 * v[:, 1])
    weight = 2 * (torch.nn.functional.logsigmoid(-margin) + torch.nn.functional.logsigmoid(margin))
    weight = (weight - weight.max()).exp()
    tanh = torch.tanh(margin / 2)
    expected = ((weight * slope**4 * tanh**2).sum() / (weight * slope**2).sum()).sqrt()
    found = CurvatureRate()(step)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    (gradient,) = torch.autograd.grad(found, model.weight)
    assert bool(gradient.isfinite().all())


def test_of_samples_sure_beyond_float64_the_least_sure_counts():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 0.0]]) * 3000)
    x = torch.tensor([[1.0, 0.5], [0.8, 0.9], [3.0, 1.0]])
    step = step_of(model, x, torch.tensor([0, 0, 0]))
    v = unit_directions(step, x)
    # Margins 6000, 7800 and 15000: of |D²p/Dp| = |gain·w·v|·tanh(margin/2) the first sample's.
    slope = 3000 * float((v[0, 0] + 2 * v[0, 1]).abs())
    assert float(CurvatureRate()(step).detach()) == pytest.approx(slope, rel=1e-5)


def test_a_sample_without_derivatives_hides_no_surer_one():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(500.0))

        def forward(self, x):
            z = self.gain * (1 + x[:, :1] ** 4)
            return torch.cat([z, -z], 1)

    x, y = torch.tensor([[0.0], [2.0]]), torch.zeros(2).long()
    alone, both = (CurvatureRate()(step_of(Flat(), x[i:], y[i:])) for i in (1, 0))
    assert float(alone.detach()) > 100
    assert float(both.detach()) == pytest.approx(float(alone.detach()), rel=1e-5)


def test_a_rate_without_derivatives_is_zero():
    model = network(norm=False)
    with torch.no_grad():
        model[-1].weight.zero_()
    x, y = labelled()
    found = CurvatureRate()(step_of(model, x, y))
    gradients = torch.autograd.grad(found, list(model.parameters()), allow_unused=True)
    assert float(found.detach()) == 0
    assert all(g is None or not g.any() for g in gradients)


def test_the_step_of_cure_rises_over_the_first_epochs():
    assert [CURE().length(epoch) for epoch in range(7)] == pytest.approx(
        [0.3, 0.6, 0.9, 1.2, 1.5, 1.5, 1.5]
    )
    assert CURE(2.0, rise_epochs=0).length(0) == 2.0
    x, y = labelled()
    model = network(norm=False)
    found = CURE()(step_of(model, x, y, epoch=1))
    torch.testing.assert_close(found, slow.cure(model, x, y, 0.6), rtol=1e-10, atol=0)


def test_cure_goes_nowhere_where_the_gradient_is_zero():
    model = network(norm=False)
    x, y = labelled()
    step = step_of(model, x, torch.where(y == 1, -100, y))
    expected = slow.cure(model, x[y != 1], y[y != 1], 1.5) * 4 / 6
    torch.testing.assert_close(CURE()(step), expected, rtol=1e-10, atol=0)


def test_low_curvature_counts_shared_parameters_once():
    unit, norm = CenteredSoftplus(3.0), LipschitzBatchNorm(4, gamma=4.0)
    other = CenteredSoftplus(5.0)
    alias = CenteredSoftplus()
    alias.raw_beta = other.raw_beta
    with torch.no_grad():
        norm.running_var.fill_(1 / 4)
        norm.weight.fill_(1.0)
    small = LipschitzBatchNorm(4)
    with torch.no_grad():
        small.weight.zero_()  # a constant of 0: no reward, and no gradient that is not finite
    model = nn.Sequential(unit, norm, unit, nn.Sequential(norm, other), alias, small)
    step = step_of(model, torch.randn(5, 4), torch.arange(5) % 3)
    found = LowCurvature(0.1, 0.2)(step)
    constant = float(norm.lipschitz.detach())
    assert float(found.detach()) == pytest.approx(0.1 * 8 + 0.2 * math.log(constant), rel=1e-5)
    found.backward()
    assert bool(small.weight.grad.isfinite().all())
    assert constant == pytest.approx(2, rel=1e-3)


class Doubled(nn.Module):
    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        return raw + raw.abs()


def test_low_curvature_counts_parametrized_betas_and_gammas():
    units = [CenteredSoftplus(beta) for beta in (1.0, 2.0, 3.0, 4.0, 5.0)]
    norms = [LipschitzBatchNorm(3, gamma=gamma) for gamma in (2.0, 3.0, 4.0)]
    for norm in norms:
        parametrize.register_parametrization(norm, "raw_gamma", Doubled())
        with torch.no_grad():
            norm.weight.fill_(1e9)
    for unit in units:
        parametrize.register_parametrization(unit, "raw_beta", Doubled())
    step = step_of(nn.Sequential(*units, *norms), torch.randn(5, 3), torch.arange(5) % 3)
    expected = sum(0.1 * float(u.beta.detach()) for u in units)
    expected += sum(0.2 * math.log(float(n.gamma.detach())) for n in norms)
    found = LowCurvature(0.1, 0.2)(step)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    alias = CenteredSoftplus()
    parametrize.register_parametrization(alias, "raw_beta", Doubled())
    alias.parametrizations.raw_beta.original = units[0].parametrizations.raw_beta.original
    step.model.append(alias)
    assert torch.equal(LowCurvature(0.1, 0.2)(step), found)


def test_low_curvature_sees_every_layer_of_a_shared_gamma():
    norms = [LipschitzBatchNorm(3, gamma=20.0) for _ in range(3)]
    for norm, weight in zip(norms, (0.1, 7.0, 90.0), strict=True):
        norm.raw_gamma = norms[0].raw_gamma
        with torch.no_grad():
            norm.weight.fill_(weight)
    step = step_of(nn.Sequential(*norms), torch.randn(5, 3), torch.arange(5) % 3)
    found = LowCurvature(0.0, 1.0)(step)
    assert float(found.detach()) == pytest.approx(math.log(7) + math.log(20), rel=1e-5)
    found.backward()
    assert bool(norms[1].weight.grad.any())


@pytest.mark.parametrize("penalty", [CurvatureRate(), LowCurvature()], ids=by_name)
def test_scripted_networks_are_named(penalty):
    x, y = labelled()
    traced = torch.jit.trace(nn.Sequential(nn.Linear(3, 5), nn.Tanh()).double(), x)
    step = step_of(nn.Sequential(traced, CenteredSoftplus(), nn.Linear(5, 3).double()), x, y)
    told = refused(lambda: penalty(step))
    assert "0 in it made by torch.jit" in told
    assert type(penalty).__name__ in told


def test_all_together_write_statistics_once_an_update_and_leave_the_modes():
    x, y = labelled()
    alone, penalised = network(), network()
    still = {"epochs": 3, "seed": 0}
    fit(alone, [(x, y)], optimizer=torch.optim.SGD(alone.parameters(), lr=0.0), **still)
    optimizer = torch.optim.SGD(penalised.parameters(), lr=0.0)
    weights = dict.fromkeys(ALL, 1.0)
    fit(penalised, [(x, y)], optimizer=optimizer, penalties=weights, **still)
    for key, value in alone.state_dict().items():
        assert torch.equal(penalised.state_dict()[key], value), key
    assert int(penalised[4].num_batches_tracked) == 3


def test_spectral_norms_go_on_as_without_penalties():
    """In eval mode, in which f is differentiated, they would converge, and cost many steps."""
    x, y = labelled()
    found = []
    for weights in ({}, dict.fromkeys(ALL, 1.0)):
        model = network()
        model[0], model[3] = spectral_norm(model[0]), spectral_norm(model[3])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        fit(model, [(x, y)] * 3, epochs=2, seed=0, optimizer=optimizer, penalties=weights)
        found.append(model.state_dict())
    assert all(torch.equal(found[1][key], value) for key, value in found[0].items())
    step = step_of(model, x, y)
    alike = nn.Sequential(*(deepcopy(layer) for layer in model))
    for place in (0, 3):
        alike[place] = nn.Linear(*model[place].weight.shape[::-1]).double()
        alike[place].weight, alike[place].bias = (
            nn.Parameter(t.detach()) for t in (model[place].weight, model[place].bias)
        )
    expected = slow.curvature_rate(alike.eval(), x, unit_directions(step, x))
    torch.testing.assert_close(CurvatureRate()(step), expected, rtol=1e-9, atol=0)


def test_a_compiled_network_keeps_its_curvature_rate():
    x, y = labelled()
    model = network(norm=False)
    expected = CurvatureRate()(step_of(model, x, y))
    model[0].compile(backend="eager")
    model(x)
    assert torch.equal(CurvatureRate()(step_of(model, x, y)), expected)


def test_bfloat16_gives_nearly_the_penalties_of_float32():
    x, y = labelled(12)
    x = x.float()
    values = {}
    for precision in (None, "bf16"):
        model = network(norm=False).float()
        weights = dict.fromkeys(ALL, 0.1)
        history = fit(model, [(x, y)], epochs=2, seed=0, penalties=weights, precision=precision)
        values[precision] = history.penalties
    for name, wide in values[None].items():
        assert values["bf16"][name] == pytest.approx(wide, rel=0.05), name
    assert values["bf16"]["CurvatureRate"][0] == values[None]["CurvatureRate"][0]


def test_what_tells_penalties_apart_are_their_settings():
    assert describe(CURE()) != describe(CURE(h=1.0))
    assert describe(LowCurvature()) != describe(LowCurvature(beta_weight=1.0))
    assert "default_weight" not in describe(GradientNorm())
    assert CURE() == CURE(1.5, 5)
    assert [p.default_weight for p in ALL] == [1.0, 6.1e-3, 4.0, 0.03]
    assert flexure.penalties.CURE is CURE


def refused(call) -> str:
    with pytest.raises(FlexureError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CURE(h=0.0), "expected h above 0"),
        (lambda: CURE(h=float("nan")), "expected h above 0"),
        (lambda: CURE(h="a"), "expected h above 0"),  # type: ignore[arg-type]
        (lambda: CURE(h=True), "expected h above 0"),
        (lambda: CURE(h=torch.tensor(1.0)), "expected h above 0"),  # type: ignore[arg-type]
        (lambda: LowCurvature(beta_weight="a"), "expected beta_weight"),  # type: ignore[arg-type]
        (lambda: LowCurvature(gamma_weight=None), "expected gamma_weight"),  # type: ignore[arg-type]
        (lambda: LowCurvature(gamma_weight=True), "expected gamma_weight"),
        (lambda: CURE(rise_epochs=-1), "rise_epochs"),
        (lambda: LowCurvature(beta_weight=-1.0), "expected beta_weight"),
        (lambda: LowCurvature(gamma_weight=float("inf")), "expected gamma_weight"),
    ],
)
def test_settings_that_do_not_fit(make, message: str):
    assert message in refused(make)


@pytest.mark.parametrize(
    ("penalty", "model", "message"),
    [
        (LowCurvature(), nn.Linear(3, 3), "convert it by flexure.to_lcnn"),
        (CurvatureRate(), nn.Sequential(nn.Linear(3, 3), nn.ReLU()), "relu"),
        (CurvatureRate(), nn.Linear(3, 1), "affine in it"),
    ],
)
def test_nothing_to_act_on(penalty, model: nn.Module, message: str):
    x, y = labelled()
    step = step_of(model.double(), x, y)
    assert message in refused(lambda: penalty(step))
    assert model.training


def test_an_interrupted_training_ends_as_an_undisturbed_one(tmp_path):
    x, y = labelled(24)
    batches = list(zip(x.split(8), y.split(8), strict=True))
    results = []
    for stop in (None, 5):
        seen = 0

        def loss(output, target, stop=stop):
            nonlocal seen
            seen += 1
            if seen == stop:
                raise RuntimeError("stopped")
            return nn.functional.cross_entropy(output, target)

        for _ in range(2):
            model = with_dropout()
            try:
                history = fit(
                    model,
                    batches,
                    epochs=3,
                    seed=0,
                    loss=loss,
                    penalties={penalty: penalty.default_weight for penalty in ALL},
                    checkpoint=Checkpoint(tmp_path / f"run-{stop}", every=1),
                )
            except RuntimeError:
                continue
        results.append((model.state_dict(), history.losses, history.penalties))
    (there, *told), (here, *retold) = results
    assert told == retold
    assert all(torch.equal(here[key], value) for key, value in there.items())
    with pytest.raises(FlexureError, match="penalties"):
        fit(
            with_dropout(),
            batches,
            epochs=3,
            seed=0,
            loss=loss,
            penalties={CURE(h=1.0): 4.0},
            checkpoint=tmp_path / "run-None",
        )


@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    batch=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([1e-4, 1.0, 1e2]),
)
@settings(max_examples=25, deadline=None)
def test_any_shape_dtype_and_scale(shape: list[int], batch: int, dtype, scale: float):
    x, y = labelled(batch, *shape)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 4), nn.Tanh(), nn.Linear(4, 3))
    model, x = model.to(dtype), (x * scale).to(dtype)
    step = step_of(model, x, y)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    with torch.no_grad():
        v = unit_directions(step, x)
    for penalty, expected in (
        (GradientNorm(), slow.gradient_norm(model, x, y)),
        (CURE(), slow.cure(model, x, y, 1.5)),
        (CurvatureRate(), slow.curvature_rate(model, x, v)),
    ):
        found = penalty(step)
        assert found.dtype == dtype
        gradients = torch.autograd.grad(
            found, list(model.parameters()), allow_unused=True, retain_graph=True
        )
        assert all(g is None or bool(g.isfinite().all()) for g in gradients)
        if scale <= 1:  # where the plain formulas are exact
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 1e-3)
