"""Projected gradient ascent: linear models have a known optimum, and hard cases do not break it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from flexure.attacks.bounded import Bounded
from flexure.attacks.draws import SampleGenerators
from flexure.attacks.norms import norm_named
from flexure.attacks.pgd import PGD
from flexure.contracts import FlexureError
from tests.reference.projection import on_both


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(inputs: int = 12) -> tuple[nn.Linear, Tensor]:
    """A model of two classes, and the gradient of the second logit minus the first."""
    torch.manual_seed(0)
    model = nn.Linear(inputs, 2).double()
    return model, (model.weight[1] - model.weight[0]).detach()


def signed_margins(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    z = model(x).detach()
    return (z[:, 1] - z[:, 0]) * (2 * y - 1)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("random_start", [True, False])
def test_linear_models_are_attacked_optimally(norm: str, random_start: bool) -> None:
    model, w = linear()
    x = torch.randn(9, 12).double()
    y = torch.arange(9) % 2
    attack = PGD(norm, steps=60, step_size=0.5, random_start=random_start)
    found = attack.run(model, x, y, eps=0.3, generator=seeded())
    dual = w.norm() if norm == "l2" else w.abs().sum()
    drop = signed_margins(model, x, y) - signed_margins(model, found, y)
    torch.testing.assert_close(drop, 0.3 * dual.expand(9), rtol=1e-6, atol=0)
    # The settings that are the default: 1 % short of it at most where they start at x.
    default = PGD(norm, random_start=False).run(model, x, y, eps=0.3, generator=seeded())
    assert (signed_margins(model, x, y) - signed_margins(model, default, y) > 0.297 * dual).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_linear_models_within_bounds_are_attacked_optimally(norm: str) -> None:
    model, w = linear(6)
    x = torch.rand(8, 6).double()
    x[0] = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    y = torch.arange(8) % 2
    attack = PGD(norm, steps=300, step_size=1.0)
    found = attack.run(Bounded(model), x, y, eps=0.6, generator=seeded())
    for row, point, label in zip(found, x, y, strict=True):
        # A linear function is largest where a point far along its gradient is projected to.
        far = point + 1e2 * w * (1 - 2 * label)
        best = on_both(far, point, norm, 0.6, (0.0, 1.0))
        assert float(((row - best) @ w).abs()) < 1e-3 * float(w.norm())
        assert ((row >= 0) & (row <= 1)).all()


class Steps(nn.Module):
    """Quantised inputs: the gradient is zero everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        z = (10 * x).round() + 0 * x
        return torch.stack([z.sum(1), 11 - z.sum(1)], 1)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("random_start", [True, False])
def test_zero_gradients_become_a_random_direction(norm: str, random_start: bool) -> None:
    x, y = torch.full((40, 3), 0.2), torch.zeros(40, dtype=torch.int64)
    model = Bounded(Steps())
    with pytest.warns(UserWarning, match="not finite at every step at 40 of 40 samples"):
        found = PGD(norm, random_start=random_start).run(model, x, y, eps=0.1, generator=seeded())
    assert found.isfinite().all()
    assert (norm_named(norm).size(found - x) <= 0.1 * (1 + 1e-6)).all()
    wrong = model(found).argmax(1) != y
    assert 0.2 < float(wrong.float().mean()) < 0.9


class NotFinite(nn.Module):
    """Finite logits whose gradient is nan where x[0] > 0.5; infinite logits where x[1] > 0.9."""

    def forward(self, x: Tensor) -> Tensor:
        bad = torch.where(x[:, :1] > 0.5, (x[:, :1] * 0).sqrt(), 0.0)
        far = torch.where(x[:, 1:2] > 0.9, torch.inf, 0.0)
        return torch.cat([x[:, :1] + bad + far, x[:, 1:2]], 1)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_gradients_and_logits_that_are_not_finite(norm: str) -> None:
    x = torch.tensor([[0.8, 0.1], [0.2, 0.1], [0.6, 0.85]])
    y = torch.zeros(3, dtype=torch.int64)
    with pytest.warns(UserWarning, match="not finite at every step at 3 of 3 samples"):
        found = PGD(norm).run(NotFinite(), x, y, eps=0.3, generator=seeded())
    assert found.isfinite().all()
    assert ((found - x).abs() <= 0.3 + 1e-6).all()


class Flat(nn.Linear):
    """Without slope where x[0] > 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.where(x[:, :1] > 0.5, 0.5 + 0 * x, x))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_samples_without_a_gradient_are_told_where_no_step_had_one(norm: str) -> None:
    torch.manual_seed(0)
    model, y = Flat(2, 2), torch.zeros(3, dtype=torch.int64)
    x = torch.tensor([[0.9, 0.1], [0.2, 0.1], [0.51, 0.85]])
    with pytest.warns(UserWarning, match="at every step at 1 of 3 samples"):
        PGD(norm, restarts=5).run(model, x, y, eps=0.2, generator=seeded())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PGD(norm).run(model, x[1:2], y[1:2], eps=0.2, generator=seeded())


def small_network(scale: float = 1.0, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 4)).eval()
    with torch.no_grad():
        model[2].weight *= scale
        model[2].bias *= scale
    return model


def test_saturated_logits_do_not_hide_the_gradient() -> None:
    x = torch.randn(60, 10)
    plain, sure = small_network(), small_network(1e4)
    y = plain(x).argmax(1)
    loss = nn.functional.cross_entropy(sure(x.requires_grad_()), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    assert (gradient.flatten(1) == 0).all(1).float().mean() > 0.9
    broken = [
        (m(PGD("l2").run(m, x.detach(), y, eps=0.3, generator=seeded())).argmax(1) != y).sum()
        for m in (plain, sure)
    ]
    assert broken[0] > 10
    # Not equal: for a sure network the cross-entropy is the lead over the strongest class alone.
    assert broken[1] >= broken[0]


@pytest.mark.parametrize("attack", [PGD("l2"), PGD("linf", restarts=2, until_misclassified=True)])
def test_same_generator_same_result_whatever_the_batch(attack: PGD) -> None:
    model, x = small_network().double(), torch.randn(12, 10).double()
    y, numbers = model(x).argmax(1), torch.arange(12)

    def run(rows: slice, generator: torch.Generator) -> Tensor:
        return attack.run(model, x[rows], y[rows], eps=0.2, generator=generator)

    everything = slice(None)
    whole = run(everything, SampleGenerators((7,), numbers))
    assert torch.equal(whole, run(everything, SampleGenerators((7,), numbers)))
    assert torch.equal(run(everything, seeded()), run(everything, seeded()))
    assert not torch.equal(run(everything, seeded()), run(everything, seeded(1)))
    for rows in (slice(3, 5), slice(11, 12)):
        part = run(rows, SampleGenerators((7,), numbers[rows]))
        torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-10)


def test_more_restarts_break_no_fewer_and_early_stops_break_the_same() -> None:
    model, x = small_network(), torch.randn(200, 10)
    y = model(x).argmax(1)

    def wrong(**settings) -> Tensor:
        attack = PGD("l2", steps=5, **settings)
        generator = SampleGenerators((0,), torch.arange(200))
        return model(attack.run(model, x, y, eps=0.25, generator=generator)).argmax(1) != y

    one, three = wrong(), wrong(restarts=3)
    assert 0 < int(one.sum()) < 200
    assert (three >= one).all()
    assert torch.equal(wrong(until_misclassified=True), one)
    assert torch.equal(wrong(restarts=3, until_misclassified=True), three)
    assert (one >= wrong(keep="last")).all()


def test_the_best_point_visited_is_kept() -> None:
    model, x = small_network(), torch.randn(100, 10)
    y = model(x).argmax(1)
    losses = []
    for keep in ("best", "last"):
        attack = PGD("linf", steps=6, step_size=2.0, keep=keep)  # steps that leap over maxima
        found = attack.run(model, x, y, eps=2.0, generator=seeded())
        losses.append(nn.functional.cross_entropy(model(found), y, reduction="none").detach())
    assert (losses[0] >= losses[1] - 1e-6).all()
    assert (losses[0] > losses[1] + 1e-4).any()


def test_last_costs_as_many_calls_as_steps() -> None:
    calls = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    model, x, y = Counted(3, 2), torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)
    PGD(steps=3, keep="last").run(model, x, y, eps=0.1, generator=seeded())
    assert calls == [5] * 3
    PGD(steps=3).run(model, x, y, eps=0.1, generator=seeded())
    assert calls == [5] * 7


def test_inputs_parameters_and_results_are_apart() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    before = x.clone()
    for eps in (0.0, 0.5):
        found = PGD().run(model, x, y, eps=eps, generator=seeded())
        assert torch.equal(x, before)
        assert found.data_ptr() != x.data_ptr()
        assert not found.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(PGD().run(model, x, y, eps=0.0, generator=seeded()), x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "l1"}, "one of l2, linf"),
        ({"steps": 0}, "steps of at least 1"),
        ({"restarts": 1.5}, "restarts of at least 1"),
        ({"norm": ["l2"]}, "one of l2, linf"),
        ({"step_size": 0.0}, "step_size above 0"),
        ({"step_size": "a"}, "step_size above 0"),
        ({"random_start": "no"}, "True or False"),
        ({"until_misclassified": 1}, "True or False"),
        ({"keep": "first"}, "'best' or 'last'"),
        ({"keep": "last", "restarts": 2}, "one restart"),
    ],
)
def test_settings_that_do_not_fit(settings, message: str) -> None:
    with pytest.raises(FlexureError, match=message):
        PGD(**settings)


@pytest.mark.parametrize("eps", ["1", None, 1e300, 10**400, True])
def test_radii_that_do_not_fit(eps) -> None:
    with pytest.raises(FlexureError, match="finite radius"):
        PGD().run(nn.Linear(3, 2), torch.rand(1, 3), torch.tensor([1]), eps=eps, generator=seeded())


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_largest_radius(norm: str) -> None:
    x, y = torch.rand(4, 3), torch.zeros(4).long()
    for steps in (1, 3):
        attack = PGD(norm, steps=steps)
        found = attack.run(Bounded(nn.Linear(3, 2)), x, y, eps=1e19, generator=seeded())
        assert bool(((found >= 0) & (found <= 1)).all())


class Constant(nn.Linear):
    """Its logits do not depend on its input in autograd's eyes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class Ungraded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


@pytest.mark.parametrize("kind", [Constant, Ungraded])
def test_models_without_a_gradient_in_their_input(kind: type[nn.Linear]) -> None:
    with pytest.raises(FlexureError, match="differentiated in its input"):
        PGD().run(kind(3, 2), torch.rand(1, 3), torch.tensor([1]), eps=1, generator=seeded())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_half_precision_goes_as_far_as_single(norm: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 2)
    x, y = torch.rand(6, 40).to(dtype), torch.arange(6) % 2
    eps = 8 / 255
    attack = PGD(norm, steps=40, random_start=False)
    half = Bounded(nn.Linear(40, 2).to(dtype))
    half.model.load_state_dict({key: v.to(dtype) for key, v in model.state_dict().items()})
    ends = [
        attack.run(m, x.to(d), y, eps=eps, generator=seeded())
        for m, d in ((half, dtype), (Bounded(model), torch.float32))
    ]
    assert ends[0].dtype == dtype
    assert float(norm_named(norm).size(ends[0].double() - x.double()).max()) <= eps * (1 + 1e-6)
    w = (model.weight[1] - model.weight[0]).double().detach()
    gains = [((end.double() - x.double()) @ w) * (1 - 2 * y) for end in ends]
    assert bool((gains[0] > 0.7 * gains[1]).all())


def test_labels_out_of_range() -> None:
    with pytest.raises(FlexureError, match="labels from 0 to 1"):
        PGD().run(nn.Linear(3, 2), torch.rand(1, 3), torch.tensor([2]), eps=1, generator=seeded())
