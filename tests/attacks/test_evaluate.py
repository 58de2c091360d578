"""The harness around attacks: exact where the truth is known, and no attack can deceive it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import flexure
from flexure.attacks import PGD, Bounded, Robustness, robust_accuracy
from flexure.attacks.evaluate import ATTACKS
from flexure.contracts import FlexureError
from tests.measure.untouched import untouched


def linear(inputs: int = 12) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, 2).double()


def network(*, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, 32),
        nn.BatchNorm1d(32) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Linear(32, 3),
    )


def samples(count: int = 40, *, wrong: int = 8) -> tuple[Tensor, Tensor]:
    x = torch.rand(count, 10, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = network().eval()(x).argmax(1)
    y[:wrong] = (y[:wrong] + 1) % 3
    return x, y


@dataclass(frozen=True)
class Returns:
    """Returns what a function makes of the inputs."""

    make: object
    norm: str = "linf"

    def run(self, model, x, y, *, eps, generator) -> object:
        return self.make(x, eps)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_linear_models_have_the_accuracy_that_is_known(norm: str) -> None:
    model = linear()
    x = torch.randn(300, 12).double()
    z = model(x).detach()
    y = z.argmax(1)
    y[::7] = 1 - y[::7]
    w = (model.weight[1] - model.weight[0]).detach()
    dual = float(w.norm() if norm == "l2" else w.abs().sum())
    distance = (z[:, 1] - z[:, 0]) * (2 * y - 1) / dual
    for eps in (0.05, 0.3, 1.0):
        attack = PGD(norm, step_size=0.5)
        found = robust_accuracy(model, x, y, attack=attack, eps=eps, seed=0)
        sure = (distance - eps).abs() > 1e-6
        assert torch.equal(found.robust[sure], (distance > eps)[sure])
        assert torch.equal(found.clean, distance > 0)
        assert found.accuracy == pytest.approx(float((distance > eps).double().mean()), abs=0.004)
        assert torch.equal(found.x_adv[~found.clean], x[~found.clean])
        assert (found.distance[~found.clean] == 0).all()
        assert float(found.distance.max()) <= eps * (1 + 1e-4)
        by_name = robust_accuracy(model, x, y, norm=norm, eps=eps, seed=0)
        assert found.accuracy - 0.01 <= by_name.accuracy <= found.accuracy + 0.01


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_no_radius_gives_the_clean_accuracy(norm: str) -> None:
    x, y = samples()
    found = robust_accuracy(Bounded(network()), x, y, norm=norm, eps=0, seed=0)
    assert torch.equal(found.robust, found.clean)
    assert found.accuracy == found.clean_accuracy == 32 / 40
    assert torch.equal(found.x_adv, x)
    assert "clean accuracy 80.0%, robust accuracy 80.0%" in str(found)
    assert bool(found.converged.all())


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("outside", [1e3, 1e30])
def test_what_leaves_the_ball_or_the_bounds_is_projected(norm: str, outside: float) -> None:
    x, y = samples()
    cheat = Returns(lambda x, eps: x + outside * torch.where(x > 0.5, 1.0, -1.0), norm)
    found = robust_accuracy(Bounded(network()), x, y, attack=cheat, eps=0.1, seed=0)
    assert float(found.distance.max()) <= 0.1 * (1 + 1e-4)
    assert float(found.distance[found.clean].min()) > 0.01
    assert ((found.x_adv >= 0) & (found.x_adv <= 1)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x, eps: x * torch.nan, "finite inputs"),
        (lambda x, eps: x / 0, "finite inputs"),
        (lambda x, eps: x[:-1], "to return inputs"),
        (lambda x, eps: x[:, :1], "to return inputs"),
        (lambda x, eps: None, "got NoneType"),
    ],
)
def test_results_that_are_no_inputs(make, message: str) -> None:
    x, y = samples()
    with pytest.raises(FlexureError, match=f"expected Returns .*{message}"):
        robust_accuracy(Bounded(network()), x, y, attack=Returns(make), eps=0.1, seed=0)


def test_inputs_changed_in_place_or_returned_as_they_are() -> None:
    x, y = samples()
    before = x.clone()
    model = Bounded(network())

    def far(x: Tensor, eps: float) -> Tensor:
        return x.add_(10.0)  # farther from the true input than it looks

    for make in (far, lambda x, eps: x, lambda x, eps: x[:, torch.arange(10)].T.contiguous().T):
        found = robust_accuracy(model, x, y, attack=Returns(make), eps=0.01, seed=0)
        assert torch.equal(x, before)
        assert float((found.x_adv - x).abs().max()) <= 0.01 * (1 + 1e-4)
        assert found.x_adv.data_ptr() != x.data_ptr()
    assert found.accuracy == found.clean_accuracy
    double = Returns(lambda x, eps: x.double() + eps)
    assert robust_accuracy(model, x, y, attack=double, eps=0.01, seed=0).x_adv.dtype == x.dtype


def test_results_are_scored_again_in_eval_mode() -> None:
    torch.manual_seed(0)
    model = Bounded(nn.Sequential(nn.Dropout(0.9), network()))
    x, y = samples(wrong=0)

    @dataclass(frozen=True)
    class Disturbing:
        norm: str = "linf"

        def run(self, model, x, y, *, eps, generator):
            model.train()
            for p in model.parameters():
                p.requires_grad_(True)
            model(x).sum().backward()
            return x

    model.train()
    with untouched(model, x, y):
        found = robust_accuracy(model, x, y, attack=Disturbing(), eps=0.1, seed=0)
    assert found.accuracy == found.clean_accuracy == 1.0


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_changed(training: bool) -> None:
    model = Bounded(network(norm=True).train(training))
    x, y = samples()
    (model(x).sum()).backward()
    for attack in ("pgd", PGD("linf", restarts=2)):
        with untouched(model, x, y):
            found = robust_accuracy(model, x, y, attack=attack, norm="linf", eps=0.1, seed=0)
    assert found.x_adv.grad_fn is None
    with untouched(model, x, y), torch.no_grad():
        robust_accuracy(model, x, y, norm="l2", eps=0.1, seed=0)
    cheat = Returns(lambda x, eps: x * torch.nan)
    with untouched(model, x, y), pytest.raises(FlexureError, match="finite inputs"):
        robust_accuracy(model, x, y, attack=cheat, eps=0.1, seed=0)


def test_batches_seeds_and_repetitions() -> None:
    x, y = samples(50)
    model = Bounded(network()).double()
    x = x.double()

    def run(**settings) -> Robustness:
        given = {"attack": PGD("l2", steps=10, restarts=2), "eps": 0.1, "seed": 3} | settings
        return robust_accuracy(model, x, y, **given)

    found = run()
    assert 0 < found.accuracy < found.clean_accuracy
    torch.manual_seed(99)
    assert torch.equal(run().x_adv, found.x_adv)
    for size in (1, 7, 50):
        other = run(batch_size=size)
        assert torch.equal(other.robust, found.robust)
        torch.testing.assert_close(other.x_adv, found.x_adv, rtol=0, atol=1e-9)
    assert not torch.equal(run(seed=4).x_adv, found.x_adv)
    half = Robustness.joined([found.taken(slice(0, 25)), found.taken(slice(25, 50))])
    assert torch.equal(half.x_adv, found.x_adv)
    assert half.accuracy == found.accuracy


def test_stochastic_models_are_the_same_again() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.3 * torch.randn_like(x))

    torch.manual_seed(0)
    model, x = Noisy(10, 2), torch.rand(60, 10)
    y = torch.arange(60) % 2
    one = robust_accuracy(model, x, y, norm="l2", eps=0.05, seed=0)
    torch.rand(3)
    two = robust_accuracy(model, x, y, norm="l2", eps=0.05, seed=0)
    assert torch.equal(one.clean, two.clean)
    assert torch.equal(one.robust, two.robust)


def test_several_attacks_leave_the_worst_case() -> None:
    x, y = samples()
    model = Bounded(network())
    seen = []

    @dataclass(frozen=True)
    class Up:
        sign: int
        norm: str = "linf"

        def run(self, model, x, y, *, eps, generator):
            seen.append(len(x))
            return x + self.sign * eps

    alone = [robust_accuracy(model, x, y, attack=Up(s), eps=0.2, seed=0).robust for s in (1, -1)]
    seen.clear()
    found = robust_accuracy(model, x, y, attack=[Up(1), Up(-1), "pgd"], eps=0.2, seed=0)
    assert seen == [int(found.clean.sum()), int(alone[0].sum())]
    assert (found.robust <= (alone[0] & alone[1])).all()
    broken = ~alone[0] & found.clean
    assert torch.equal(found.x_adv[broken], (x[broken] + 0.2).clamp(0, 1))
    with torch.no_grad():
        assert torch.equal(model.eval()(found.x_adv).argmax(1) == y, found.robust)


def test_logits_that_are_not_finite() -> None:
    class Breaking(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :1] > 0.6, torch.nan, super().forward(x))

    torch.manual_seed(0)
    model, x = Bounded(Breaking(10, 2)), torch.full((4, 10), 0.5)
    with torch.no_grad():
        y = model(x).argmax(1)
    found = robust_accuracy(model, x, y, attack=Returns(lambda x, eps: x + eps), eps=0.2, seed=0)
    assert found.clean_accuracy == 1.0
    assert found.accuracy == 0.0
    with pytest.raises(FlexureError, match="finite logits at the given inputs"):
        robust_accuracy(model, x + 0.3, y, norm="l2", eps=0.2, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attack": "apgd"}, "attack to be one of 'pgd', or an object"),
        ({"norm": None}, "one norm, got none"),
        ({"attack": PGD("l2")}, "one norm, got 'l2', 'linf'"),
        ({"norm": "l1"}, "one of l2, linf"),
        ({"eps": -1}, "finite radius"),
        ({"batch_size": 0}, "batch_size of at least 1"),
        ({"x": torch.rand(3, 10) + 0.5}, "within the bounds"),
        ({"x": torch.rand(3, 10) * torch.nan}, "within the bounds"),
        ({"x": torch.zeros(3, 10, dtype=torch.uint8)}, "floating-point tensor"),
        ({"x": torch.rand(0, 10), "y": torch.zeros(0).long()}, "floating-point tensor"),
        ({"y": torch.zeros(2).long()}, "3 integer labels"),
        ({"y": torch.zeros(3)}, "3 integer labels"),
        ({"y": torch.tensor([0, 1, 3])}, "labels from 0 to 2"),
        ({"bounded": Bounded(nn.Flatten(0))}, "logits"),
    ],
)
def test_what_does_not_fit(change, message: str) -> None:
    given = {
        "bounded": Bounded(network()),
        "x": torch.rand(3, 10),
        "y": torch.tensor([0, 1, 2]),
        "norm": "linf",
        "eps": 0.1,
        "seed": 0,
    } | change
    with pytest.raises(FlexureError, match=message):
        robust_accuracy(given.pop("bounded"), given.pop("x"), given.pop("y"), **given)


def test_names() -> None:
    assert all(make(norm).norm == norm for make in ATTACKS.values() for norm in ("l2", "linf"))
    assert flexure.robust_accuracy is robust_accuracy
    assert flexure.Bounded is Bounded
