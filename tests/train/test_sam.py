"""SAM as an update rule: the two steps written out, the optimiser left alone, resumed exactly."""

from __future__ import annotations

import sys
from copy import deepcopy

import pytest
import torch
from torch import nn

from flexure.contracts import FlexureError, MissingExtraError
from flexure.layers import LipschitzBatchNorm, spectral_norm
from flexure.penalties import CurvatureRate, LowCurvature
from flexure.train import SAM, Checkpoint, fit
from flexure.train.identity import describe
from flexure.train.update import plain
from flexure.units.smooth import CenteredSoftplus
from tests.train.scenarios import data


def network(*, norm: bool = False, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 16),
        nn.BatchNorm1d(16) if norm else nn.Identity(),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(16, 3),
    ).double()


def batches(size: int = 15) -> list:
    x, y = data(45)
    return list(zip(x.double().split(size), y.split(size), strict=True))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    groups = [{"params": [*model[0].parameters()], "lr": 0.05, "weight_decay": 0.1}]
    groups += [{"params": [*model[1:].parameters()]}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)


def clipped(gradients: list, largest: float | None) -> list:
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    factor = 1.0 if largest is None else min(1.0, largest / (float(norm) + 1e-6))
    return [g * factor for g in gradients]


def by_hand(model, optimizer, groups, *, rho: float, adaptive: bool, clip: float | None) -> None:
    """Each update: the gradient at w, w up by e, the gradient there, w back, and a step."""
    parameters = list(model.parameters())

    def gradients(group: list) -> list:
        x, y = (torch.cat(parts) for parts in zip(*group, strict=True))
        loss = nn.functional.cross_entropy(model(x), y)
        return clipped(list(torch.autograd.grad(loss, parameters)), clip)

    for group in groups:
        first = gradients(group)
        scales = [p.detach().abs() if adaptive else torch.ones_like(p) for p in parameters]
        norm = sum(((s * g) ** 2).sum() for s, g in zip(scales, first, strict=True)).sqrt()
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, s, g in zip(parameters, scales, first, strict=True):
                p += rho * s**2 * g / norm
        second = gradients(group)
        with torch.no_grad():
            for p, value, g in zip(parameters, before, second, strict=True):
                p.copy_(value)
                p.grad = g
        optimizer.step()


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("rho", "adaptive"), [(0.05, False), (1.0, False), (0.5, True)])
def test_it_is_the_two_steps_written_out(rho, adaptive, accumulate, clip):
    model, expected = network(), network()
    optimizer = optimizer_of(model)
    given = batches()
    fit(
        model,
        given,
        epochs=4,
        seed=0,
        update=SAM(rho, adaptive),
        optimizer=optimizer,
        accumulate=accumulate,
        clip=clip,
    )
    groups = [given[i : i + accumulate] for i in range(0, len(given), accumulate)] * 4
    by_hand(expected, optimizer_of(expected), groups, rho=rho, adaptive=adaptive, clip=clip)
    plain = network()
    fit(plain, given, epochs=4, seed=0, optimizer=optimizer_of(plain), accumulate=accumulate)
    for a, b, c in zip(*(m.parameters() for m in (model, expected, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(a, c, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_the_optimiser_keeps_its_own_groups_and_state(kind):
    states = {}
    for rule in (None, SAM()):
        model = network()
        optimizer = kind(model.parameters(), lr=0.01)
        fit(model, batches(), epochs=1, seed=0, optimizer=optimizer, update=rule)
        states[rule] = optimizer.state_dict()
    plain, sharp = states.values()
    assert [g.keys() for g in plain["param_groups"]] == [g.keys() for g in sharp["param_groups"]]
    assert plain["param_groups"] == sharp["param_groups"]
    assert {k: v.keys() for k, v in plain["state"].items()} == {
        k: v.keys() for k, v in sharp["state"].items()
    }


def test_statistics_are_those_of_the_first_pass():
    """As without SAM, since the weights do not move; the gradient's own pass is not counted."""
    kept = []
    for rule in (None, SAM(rho=0.5)):
        model = network(norm=True)
        still = torch.optim.SGD(model.parameters(), lr=0.0)
        fit(model, batches(), epochs=2, seed=0, update=rule, optimizer=still)
        kept.append(model.state_dict())
    assert int(kept[0]["1.num_batches_tracked"]) == 6
    for key, value in kept[0].items():
        assert torch.equal(kept[1][key], value), key


def test_an_interrupted_training_ends_as_an_undisturbed_one(tmp_path):
    results = []
    for stop in (None, 5):
        seen = 0

        def loss(output, y, stop=stop):
            nonlocal seen
            seen += 1
            if seen == stop:
                raise RuntimeError("stopped")
            return nn.functional.cross_entropy(output, y)

        place = Checkpoint(tmp_path / f"run-{stop}", every=1)
        for _ in range(2):
            model = network(norm=True, dropout=0.3)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            try:
                fit(
                    model,
                    batches(),
                    epochs=3,
                    seed=0,
                    loss=loss,
                    update=SAM(0.1),
                    optimizer=optimizer,
                    checkpoint=place,
                )
            except RuntimeError:
                continue
        results.append((model.state_dict(), optimizer.state_dict()["state"]))
    (there, state), (here, resumed) = results
    assert all(torch.equal(here[key], value) for key, value in there.items())
    for index, values in state.items():
        assert all(torch.equal(resumed[index][key], value) for key, value in values.items())


def test_an_error_at_the_second_gradient_puts_the_weights_back():
    seen = 0

    def loss(output, y):
        nonlocal seen
        seen += 1
        return nn.functional.cross_entropy(output, y) * (torch.nan if seen == 2 else 1)

    model = network(norm=True)
    before = deepcopy(model.state_dict())
    with pytest.raises(FlexureError, match="finite"):
        fit(model, batches(), epochs=1, seed=0, update=SAM(), loss=loss)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_zero_gradients_stay_finite():
    model = network()
    fit(model, batches(), epochs=1, seed=0, update=SAM(), loss=lambda z, y: (z * 0).sum())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("rho", [0.0, -1.0, float("nan"), float("inf"), True, "a", None])
def test_a_radius_that_does_not_fit(rho):
    with pytest.raises(FlexureError, match=r"expected rho above 0, .*; take 0\.05"):
        SAM(rho)


def test_an_optimiser_that_asks_for_a_closure_is_refused():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(FlexureError, match="LBFGS, whose step needs a closure"):
        fit(model, batches(), epochs=1, seed=0, update=SAM(), optimizer=optimizer)


def test_settings_and_the_missing_library(monkeypatch):
    with pytest.raises(FlexureError, match="adaptive to be True or False, got 1; take False"):
        SAM(adaptive=1)
    assert describe(SAM()) != describe(SAM(0.1)) != describe(SAM(0.1, adaptive=True))
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(MissingExtraError, match="flexure\\[sam\\]"):
        fit(network(), batches(), epochs=1, seed=0, update=SAM())


class LeavingOut(nn.Module):
    """Writes another buffer in the place of its own at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls = torch.ones(len(self.calls) + 1)
        return x


def lcnn() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        spectral_norm(nn.Linear(4, 16), every=3),
        LipschitzBatchNorm(16, gamma=3.0),
        CenteredSoftplus(),
        spectral_norm(nn.Linear(16, 3)),
    )


@pytest.mark.parametrize("penalty", [CurvatureRate(), LowCurvature(0.0, 1.0)])
def test_all_gradients_of_an_update_are_of_one_function(penalty):
    found = []

    def thrice(backward, optimizer):
        found.append([backward() for _ in range(3)])
        optimizer.step()
        return found[-1][0]

    fit(lcnn(), batches_of_floats(), epochs=2, seed=0, penalties={penalty: 1.0}, update=thrice)
    assert all(len(set(values)) == 1 for values in found)
    assert len({values[0] for values in found}) == len(found)


def batches_of_floats() -> list:
    return [(x.float() * 2 + 1, y) for x, y in batches()]


def test_buffers_age_once_an_update():
    kept = []
    for rule in (None, SAM(rho=0.5)):
        model = nn.Sequential(LeavingOut(), *lcnn())
        still = torch.optim.SGD(model.parameters(), lr=0.0)
        fit(model, batches_of_floats(), epochs=3, seed=0, update=rule, optimizer=still)
        kept.append(model.state_dict())
    for key, value in kept[0].items():
        assert torch.equal(kept[1][key], value), key


def test_an_error_puts_back_spectral_norms():
    def second_fails(backward, optimizer):
        backward()
        with torch.no_grad():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.mul_(-3).add_(1)
        backward()
        raise RuntimeError("stopped")

    model = nn.Sequential(LeavingOut(), *lcnn())
    before = deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="stopped"):
        fit(model, batches_of_floats(), epochs=1, seed=0, update=second_fails)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("rule", [None, SAM(0.1)])
def test_an_interrupted_lcnn_ends_as_an_undisturbed_one(tmp_path, rule):
    results = []
    for stop in (None, 7):
        seen = 0

        def stopping(backward, optimizer, stop=stop):
            nonlocal seen
            seen += 1
            if seen == stop:
                raise RuntimeError("stopped")
            return (rule or plain)(backward, optimizer)

        for _ in range(2):
            model = lcnn()
            try:
                fit(
                    model,
                    batches_of_floats(),
                    epochs=8,
                    seed=0,
                    update=stopping,
                    penalties={LowCurvature(): 1.0, CurvatureRate(): 0.03},
                    optimizer=torch.optim.Adam(model.parameters(), lr=0.02),
                    checkpoint=Checkpoint(tmp_path / f"{stop}", every=1),
                )
            except RuntimeError:
                continue
            break
        results.append(model.state_dict())
    assert seen == 7 + 8 * 3 - 6
    for key, value in results[0].items():
        assert torch.equal(results[1][key], value), key
