"""The harness around attacks: exact where the truth is known, and no attack can deceive it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import flexure
from flexure.attacks import PGD, Bounded, Robustness, robust_accuracy
from flexure.attacks.catalogue import ATTACKS
from flexure.contracts import FlexureError, MissingExtraError
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
    model = Bounded(linear(), bounds=None)
    x = torch.randn(300, 12).double()
    z = model(x).detach()
    y = z.argmax(1)
    y[::7] = 1 - y[::7]
    w = (model.model.weight[1] - model.model.weight[0]).detach()
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
        by_name = robust_accuracy(model, x, y, attack="pgd", norm=norm, eps=eps, seed=0)
        assert found.accuracy - 0.01 <= by_name.accuracy <= found.accuracy + 0.01


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_no_radius_gives_the_clean_accuracy(norm: str) -> None:
    x, y = samples()
    found = robust_accuracy(Bounded(network()), x, y, attack="pgd", norm=norm, eps=0, seed=0)
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
        robust_accuracy(model, x, y, attack="pgd", norm="l2", eps=0.1, seed=0)
    cheat = Returns(lambda x, eps: x * torch.nan)
    with untouched(model, x, y), pytest.raises(FlexureError, match="finite inputs"):
        robust_accuracy(model, x, y, attack=cheat, eps=0.1, seed=0)


def weights_zeroed(model: Bounded) -> None:
    for parameter in model.parameters():
        parameter.data.zero_()


def weights_replaced(model: Bounded) -> None:
    model.model[0].weight = nn.Parameter(-model.model[0].weight)


def weights_resized(model: Bounded) -> None:
    model.model[0].weight.data = torch.zeros(32, 1)


def forward_replaced(model: Bounded) -> None:
    model.forward = lambda x: torch.eye(3)[torch.zeros(len(x)).long()]


def class_replaced(model: Bounded) -> None:
    model.__class__ = nn.Identity


def forward_of_class_replaced(model: Bounded) -> None:
    type(model).forward = lambda self, x: torch.eye(3)[torch.zeros(len(x)).long()]


def inherited_forward_replaced(model: Bounded) -> None:
    nn.Linear.forward = lambda self, x: torch.zeros(len(x), self.out_features)


def submodule_replaced(model: Bounded) -> None:
    model.model[3] = nn.Linear(32, 3)


def hook_left(model: Bounded) -> None:
    model.register_forward_hook(lambda module, args, output: -output)


def inner_hook_left(model: Bounded) -> None:
    model.model[3].register_forward_pre_hook(lambda module, args: (-args[0],))


def hook_of_all_left(model: Bounded) -> None:
    nn.modules.module.register_module_forward_hook(lambda module, args, output: -output)


@pytest.mark.parametrize(
    "change",
    [
        weights_zeroed,
        weights_replaced,
        weights_resized,
        forward_replaced,
        class_replaced,
        forward_of_class_replaced,
        inherited_forward_replaced,
        submodule_replaced,
        hook_left,
        inner_hook_left,
        hook_of_all_left,
    ],
)
def test_attacks_that_change_the_model_are_refused_and_undone(change) -> None:
    x, y = samples()
    model = Bounded(network())
    before = model(x)

    @dataclass(frozen=True)
    class Changing:
        norm: str = "linf"

        def run(self, model, x, y, *, eps, generator):
            change(model)
            return x

    forwards = [kind.forward for kind in (Bounded, nn.Linear)]
    with untouched(model, x, y), pytest.raises(FlexureError, match="Changing to leave the model"):
        robust_accuracy(model, x, y, attack=Changing(), eps=0.1, seed=0)
    assert [kind.forward for kind in (Bounded, nn.Linear)] == forwards
    assert torch.equal(model(x), before)


def test_what_a_call_may_write_is_put_back_before_scores() -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(10, 3)
            self.sign, self.signs, self.held = 1.0, [1.0], torch.ones(())
            self.bounds = (0.0, 1.0)
            self.register_buffer("factor", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            sign = self.sign * self.signs[0] * self.held * self.factor
            return super().forward(x) * sign

    @dataclass(frozen=True)
    class Disturbing:
        norm: str = "linf"

        def run(self, model, x, y, *, eps, generator):
            model.sign, model.signs[0] = -model.sign, -model.signs[0]
            model.signs.append(2.0)
            model.held.mul_(-3.0)
            model.factor.fill_(-5.0)
            model.bounds = (-9.0, 9.0)
            return x

    torch.manual_seed(0)
    model, x = Scaled(), torch.rand(8, 10)
    y = model(x).argmax(1)
    found = robust_accuracy(model, x, y, attack=Disturbing(), eps=0.1, seed=0)
    assert found.accuracy == 1.0
    assert model.signs == [1.0]
    assert float(model.held) == float(model.factor) == model.sign == 1.0


def test_embeddings_that_rewrite_their_weights_are_no_attack() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(3, 4, max_norm=0.1), nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x) + self.table(torch.zeros(len(x)).long())

    torch.manual_seed(0)
    model, x = Bounded(Embedded()), torch.rand(8, 10)
    y = torch.zeros(8).long()
    with untouched(model, x, y):
        robust_accuracy(model, x, y, attack="pgd", norm="l2", eps=0.1, seed=0)


def test_the_norm_is_that_of_the_beginning() -> None:
    class Flipping:
        def __init__(self) -> None:
            self.asked = 0

        @property
        def norm(self) -> str:
            self.asked += 1
            return "l2" if self.asked < 5 else "linf"

        def run(self, model, x, y, *, eps, generator):
            self.asked = 99
            return x + eps

    x, y = samples()
    found = robust_accuracy(Bounded(network()), x, y, attack=Flipping(), eps=0.1, seed=0)
    assert found.norm == "l2"
    assert float((found.x_adv - x).norm(dim=1).max()) <= 0.1 * (1 + 1e-4)


@pytest.mark.parametrize("high", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("eps", [0.0, 0.05])
def test_inputs_on_bounds_that_float32_cannot_hold(high: float, eps: float) -> None:
    x, y = samples()
    x = x.clamp(max=high)
    model = Bounded(network(), bounds=(0, high))
    found = robust_accuracy(model, x, y, attack="pgd", norm="linf", eps=eps, seed=0)
    assert float(found.x_adv.max()) <= float(x.max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_half_precision(norm: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Bounded(nn.Linear(10, 3).to(dtype))
    x = torch.rand(30, 10).to(dtype)
    y = model(x).argmax(1)
    for eps in (1 / 255, 8 / 255, 0.5):
        found = robust_accuracy(model, x, y, attack="pgd", norm=norm, eps=eps, seed=0)
        assert float(found.distance.max()) <= eps * (1 + 1e-6)
    assert found.accuracy < 1.0


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


def test_what_attacks_set_for_all_of_torch_is_put_back() -> None:
    @dataclass(frozen=True)
    class Setting:
        norm: str = "linf"

        def run(self, model, x, y, *, eps, generator):
            torch.set_grad_enabled(False)
            torch.set_default_dtype(torch.float64)
            y.fill_(0)
            return x

    x, y = samples()
    model, attack = Bounded(network()), PGD("linf", steps=3)
    try:
        found = robust_accuracy(model, x, y, attack=[Setting(), attack], eps=0.1, seed=0)
        state = torch.is_grad_enabled(), torch.get_default_dtype()
    finally:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
    assert state == (True, torch.float32)
    assert found.attacks[0].found == 0 < found.attacks[1].found


def test_a_lack_of_memory_is_no_fault_of_the_inputs() -> None:
    class Large(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("tried to allocate 2 EiB")

    x, y = torch.rand(3, 10), torch.zeros(3).long()
    with pytest.raises(torch.OutOfMemoryError, match="2 EiB"):
        robust_accuracy(Bounded(Large(10, 2)), x, y, attack="pgd", norm="l2", eps=0.1, seed=0)


def test_stochastic_models_are_the_same_again() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.3 * torch.randn_like(x))

    torch.manual_seed(0)
    model, x = Bounded(Noisy(10, 2)), torch.rand(60, 10)
    y = torch.arange(60) % 2
    one = robust_accuracy(model, x, y, attack="pgd", norm="l2", eps=0.05, seed=0)
    torch.rand(3)
    two = robust_accuracy(model, x, y, attack="pgd", norm="l2", eps=0.05, seed=0)
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
        robust_accuracy(model, x + 0.3, y, attack="pgd", norm="l2", eps=0.2, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attack": "apgd"}, "attack to be one of 'pgd', .*'autoattack', or an object"),
        ({"norm": None}, "one norm, got none"),
        ({"attack": PGD("l2")}, "one norm, got 'l2', 'linf'"),
        ({"norm": "l1"}, "one of l2, linf"),
        ({"norm": ["l2"]}, "one of l2, linf"),
        ({"attack": []}, "at least one attack"),
        ({"attack": object()}, "an object with norm and run"),
        ({"attack": PGD}, "an object with norm and run"),
        ({"attack": None}, "an object with norm and run"),
        ({"seed": 1.5}, "seed to be an integer"),
        ({"seed": "a"}, "seed to be an integer"),
        ({"seed": 2**70}, "seed to be an integer"),
        ({"y": [0, 1, 2]}, "3 integer labels, a tensor, got list"),
        ({"x": torch.rand(3, 10).double()}, "takes inputs .* of torch.float64"),
        ({"x": torch.rand(3, 9)}, "takes inputs"),
        ({"eps": -1}, "finite radius"),
        ({"eps": "1"}, "finite radius"),
        ({"eps": None}, "finite radius"),
        ({"batch_size": 0}, "batch_size of at least 1"),
        ({"every": "apgd-ce"}, "every to be True or False"),
        ({"x": torch.rand(3, 10) + 0.5}, "within the bounds"),
        ({"x": torch.rand(3, 10) * torch.nan}, "within the bounds"),
        ({"x": torch.zeros(3, 10, dtype=torch.uint8)}, "floating-point tensor"),
        ({"x": torch.rand(0, 10), "y": torch.zeros(0).long()}, "floating-point tensor"),
        ({"y": torch.zeros(2).long()}, "3 integer labels"),
        ({"y": torch.zeros(3)}, "3 integer labels"),
        ({"y": torch.tensor([0, 1, 3])}, "labels from 0 to 2"),
        ({"bounded": Bounded(nn.Flatten(0))}, "logits"),
        ({"bounded": network()}, r"Sequential without .* bounds; give .*mean=\.\.\., std="),
    ],
)
def test_what_does_not_fit(change, message: str) -> None:
    given = {
        "bounded": Bounded(network()),
        "x": torch.rand(3, 10),
        "y": torch.tensor([0, 1, 2]),
        "attack": "pgd",
        "norm": "linf",
        "eps": 0.1,
        "seed": 0,
    } | change
    with pytest.raises(FlexureError, match=message):
        robust_accuracy(given.pop("bounded"), given.pop("x"), given.pop("y"), **given)


def test_the_attack_of_no_name(monkeypatch) -> None:
    (x, y), model = samples(), Bounded(network())
    found = robust_accuracy(model, x, y, norm="linf", eps=0.1, seed=0)
    assert found.names == ("apgd-ce",)
    assert 0 < found.accuracy < found.clean_accuracy
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(MissingExtraError, match=r"run: pip install 'flexure\[robust\]'") as error:
        robust_accuracy(model, x, y, norm="linf", eps=0.1, seed=0)
    assert "\n" not in str(error.value)
    assert robust_accuracy(model, x, y, attack="pgd", norm="linf", eps=0.1, seed=0).names == (
        "pgd",
    )


def test_names() -> None:
    for make in ATTACKS.values():
        assert all(each.norm == norm for norm in ("l2", "linf") for each in make(norm))
    assert flexure.robust_accuracy is robust_accuracy
    assert flexure.Bounded is Bounded
