"""Gradients under noise: closed forms, a slow reference, and where the bound does not hold."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

import flexure
from flexure.contracts import BudgetError, FlexureError
from flexure.measure.over import over
from flexure.measure.robustness_of_gradients import RADII, gradient_change
from flexure.memory import peak_bytes
from tests.measure.untouched import untouched
from tests.reference import gradient_change as reference

WIDE = torch.float64


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def directions(count: int, x: Tensor, seed: int = 0) -> Tensor:
    """Those of a measurement with this generator."""
    drawn = torch.randn((count, *x.shape), generator=seeded(seed)).flatten(2).double()
    return (drawn / drawn.norm(dim=2, keepdim=True)).view(count, *x.shape)


def network(activation: type[nn.Module] = nn.Tanh, width: int = 5) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(6, width), activation(), nn.Dropout(0.5), nn.Linear(width, 3)]
    return nn.Sequential(nn.Flatten(), *layers).double()


def inputs(count: int = 4) -> Tensor:
    return torch.randn(count, 2, 3, generator=seeded(3), dtype=WIDE)


# Closed forms


def test_a_quadratic_field():
    x = inputs()
    found = gradient_change(None, x, field=lambda x: 1.5 * x.square().flatten(1).sum(1))
    length = x.flatten(1).norm(dim=1)
    truth = torch.tensor(RADII, dtype=WIDE) / length[:, None]
    torch.testing.assert_close(found.change, truth, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.normalized, 1 / length, rtol=1e-9, atol=0)
    assert found.converged.all()
    assert (found.change < found.estimated_bound).all()
    assert (found.violations == 0).all()
    # To first order the bound is the paper's ‖ε‖·C, which is exact here.
    torch.testing.assert_close(found.estimated_bound[:, 0], truth[:, 0], rtol=0.05, atol=0)


@pytest.mark.parametrize("x", [0.1, 1.0, 5.0])
def test_a_logarithm_of_a_hyperbolic_cosine(x: float):
    """∇ = tanh, ∇² = sech²."""
    at = torch.full((1, 1), x, dtype=WIDE)
    u = directions(1, at).item()

    def log_cosh(x: Tensor) -> Tensor:
        return x.cosh().log().sum(1)

    found = gradient_change(None, at, field=log_cosh, directions=1, points=4, generator=seeded())
    for radius, change, bound in zip(RADII, found.change[0], found.estimated_bound[0], strict=True):
        assert change == pytest.approx(abs(math.tanh(x + radius * u) / math.tanh(x) - 1), rel=1e-7)
        rates = [
            1 / math.cosh(t) ** 2 / abs(math.tanh(t))
            for t in (x + u * 0.025 * k for k in range(1 + math.ceil(radius / 0.025 - 1e-9)))
        ]
        assert bound == pytest.approx(math.expm1(radius * max(rates)), rel=1e-9)
    assert found.normalized[0] == pytest.approx(1 / math.sinh(x) / math.cosh(x), rel=1e-9)
    assert (found.violations == 0).all()


def test_the_bound_of_an_exponential_is_attained():
    x = torch.zeros(20, 1, dtype=WIDE)
    found = gradient_change(None, x, field=lambda x: (3 * x).exp().sum(1), directions=1)
    radii = 3 * torch.tensor(RADII, dtype=WIDE)
    up = found.change[:, -1] > math.expm1(-0.3) * -1 + 1e-9
    assert 0 < up.sum() < 20
    torch.testing.assert_close(found.change[up], radii.expm1().expand(int(up.sum()), -1))
    torch.testing.assert_close(found.change[~up], -(-radii).expm1().expand(int((~up).sum()), -1))
    torch.testing.assert_close(found.estimated_bound, radii.expm1().expand(20, -1))
    assert (found.violations == 0).all()


def test_a_linear_field_does_not_change():
    weight = torch.randn(6, generator=seeded(), dtype=WIDE)
    for dtype in (torch.float32, WIDE):
        x = inputs().to(dtype)
        found = gradient_change(None, x, field=lambda x: x.flatten(1) @ weight.to(x.dtype))
        assert (found.change == 0).all()
        assert (found.estimated_bound == 0).all()
        assert (found.violations == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, WIDE])
@pytest.mark.parametrize("margin", [-300.0, -3.0, 0.5, 20.0, 300.0])
def test_sure_samples_of_a_linear_classifier(margin: float, dtype: torch.dtype):
    """Where the cross-entropy's own gradient underflows, or its difference cancels."""
    slope = 50.0
    model = nn.Linear(1, 2, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[slope], [0.0]]))
    x = torch.full((1, 1), margin / slope, dtype=dtype)
    u = directions(1, x).item()
    radii = (0.125, 0.25)  # exact in both dtypes
    found = gradient_change(model, x, torch.tensor([0]), radii=radii, directions=1, points=20)
    for radius, change in zip(radii, found.change[0], strict=True):
        at = float((x + radius * u).item())
        truth = reference.logistic_change(slope * x.item(), slope * at)
        assert change == pytest.approx(truth, rel=2e-4 if dtype == torch.float32 else 1e-9)
    assert (found.violations == 0).all()
    assert found.converged.all()


# The reference


@pytest.mark.parametrize("how", ["labels", "prediction", "targets"])
def test_changes_and_bounds_are_the_references(how: str):
    model, x = network().eval(), inputs()
    with torch.no_grad():
        outputs = model(x)
    y = {
        "labels": torch.tensor([0, 1, 2, 0]),
        "prediction": None,
        "targets": torch.randn(4, 3, generator=seeded(4), dtype=WIDE),
    }[how]
    radii, count = (0.01, 0.5, 2.0), 3
    found = gradient_change(
        model, x, y, radii=radii, directions=count, points=2, tol=1e-9, generator=seeded(7)
    )
    target = outputs.argmax(1) if y is None else y
    for i in range(4):

        def loss(z: Tensor, i: int = i) -> Tensor:
            out = model(z[None])
            if how == "targets":
                return (out - target[i]).square().sum() / 2
            return F.cross_entropy(out, target[i : i + 1])

        along = directions(count, x, 7)[:, i]
        for column, radius in enumerate(radii):
            changes = [reference.relative_change(loss, x[i], radius * u) for u in along]
            assert found.change[i, column] == pytest.approx(sum(changes) / count, rel=1e-6)
            steps = [0.0, 1.0] if radius < 1 else [0.0, 1.0, 2.0]
            largest = [
                max(reference.normalized_curvature(loss, x[i] + t * u) for t in steps)
                for u in along
            ]
            bounds = [math.expm1(radius * c) for c in largest]
            assert found.estimated_bound[i, column] == pytest.approx(sum(bounds) / count, rel=1e-6)
            exceeded = [a > b * (1 + 1e-6) for a, b in zip(changes, bounds, strict=True)]
            assert found.violations[i, column] == pytest.approx(sum(exceeded) / count)


def test_the_label_is_that_at_the_sample():
    """A prediction that noise changes must not be the label there."""
    model = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    x = torch.full((1, 1), 1e-3, dtype=WIDE)
    found = gradient_change(model, x, radii=(0.1,), directions=8, points=2)
    held = gradient_change(model, x, torch.tensor([0]), radii=(0.1,), directions=8, points=2)
    assert torch.equal(found.change, held.change)
    assert torch.equal(found.estimated_bound, held.estimated_bound)


# Where the bound does not hold


def test_kinks_are_not_in_the_bound():
    """The gradient jumps from 1 to 11; C is 0 on both sides, with any number of points."""
    x = torch.full((20, 1), -0.05, dtype=WIDE)
    found = gradient_change(
        None, x, field=lambda x: (x + 10 * x.relu()).sum(1), radii=(0.01, 0.1), directions=1,
        points=50,
    )  # fmt: skip
    across = found.change[:, 1] == 10
    assert 0 < across.sum() < 20
    assert (found.change[~across] == 0).all()
    assert (found.estimated_bound == 0).all()
    assert torch.equal(found.violations[:, 1], across.double())
    assert (found.violations[:, 0] == 0).all()


def test_peaks_between_points_are_missed_and_counted():
    x = torch.full((20, 1), -0.05, dtype=WIDE)

    def bent(x: Tensor) -> Tensor:
        return (x + 10 * F.softplus(x, beta=200)).sum(1)

    def measured(points: int) -> Tensor:
        return gradient_change(
            None, x, field=bent, radii=(0.1,), directions=1, points=points
        ).violations

    assert 0 < measured(1).sum() < 20
    assert (measured(40) == 0).all()


def test_zero_gradients_are_masked():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=WIDE)
    found = gradient_change(None, x, field=lambda x: x.square().sum(1))
    assert found.zero_gradient.tolist() == [True, False]
    for values in (found.change, found.estimated_bound, found.violations, found.normalized):
        assert values[0].isnan().all()
        assert values[1].isfinite().all()


def test_a_gradient_that_vanishes_on_the_way_has_no_bound():
    x = torch.full((8, 1), 0.1, dtype=WIDE)
    found = gradient_change(
        None, x, field=lambda x: x.square().sum(1), radii=(0.1,), directions=1, points=1
    )
    towards = found.change[:, 0].sub(1).abs() < 1e-6
    assert towards.all()  # on both sides the gradient changes by its own length
    assert (found.estimated_bound > found.change).all()
    assert (found.violations == 0).all()


def test_a_pretrained_network(real_data: Path):
    """Steering smooths the kinks away, with which changes shrink and no longer pass the bound."""
    stored = np.load(real_data / "cifar10-lossless/test846.npz")
    (weights,) = (real_data / "resnet-cifar10").glob("*resnet20*.safetensors")
    loaded = flexure.load_model(f"flexure:resnet20?weights={weights}")
    x = torch.stack(
        [loaded.preprocess(torch.tensor(i).movedim(-1, 0)) for i in stored["images"][:8]]
    )
    y = torch.tensor(stored["labels"][:8])
    radii = (1e-3, 1e-2)
    plain = gradient_change(loaded.model, x, y, radii=radii, points=1)
    x, y = x[:3], y[:3]
    with flexure.steer(loaded.model, beta=0.9, example=x[:1]):
        smooth = gradient_change(loaded.model, x, y, radii=radii, points=1)
        wide = gradient_change(loaded.model.double(), x.double(), y, radii=radii, points=0)
    assert plain.converged.all()
    assert smooth.converged.all()
    torch.testing.assert_close(smooth.change, wide.change, rtol=0.02, atol=0)
    assert (smooth.change < plain.change[:3] / 2).all()
    assert (smooth.violations == 0).all()
    assert plain.violations[:, 0].any()


# Settings


def test_without_points_there_is_no_bound():
    model, x = network(), inputs()
    found = gradient_change(model, x, points=0)
    assert found.estimated_bound.isnan().all()
    assert found.violations.isnan().all()
    assert found.normalized.isnan().all()
    assert torch.equal(found.change, gradient_change(model, x).change)
    assert found.converged.all()


def test_chunks_do_not_matter():
    model, x, y = network(), inputs(5), torch.arange(5) % 3
    whole, cut = (gradient_change(model, x, y, tol=1e-9, chunk=chunk) for chunk in (None, 2))
    for name, values in whole.samples().items():
        torch.testing.assert_close(cut.samples()[name], values, rtol=1e-6, atol=1e-12)


def test_a_budget_is_kept_to():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(400, 100), nn.Tanh(), nn.Linear(100, 3))
    x, y = torch.randn(64, 1, 20, 20), torch.arange(64) % 3
    measure = functools.partial(gradient_change, model, x, y, tol=1e-3)
    whole = peak_bytes(measure)
    for budget in (whole // 4, whole // 2):
        assert budget / 4 < peak_bytes(lambda b=budget: measure(memory=b)) <= budget
    free, kept = measure(), measure(memory=whole // 4)
    torch.testing.assert_close(kept.change, free.change, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(kept.estimated_bound, free.estimated_bound, rtol=0.02, atol=1e-6)


def test_the_budget_that_an_error_names_works():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 80), nn.Softplus(), nn.Linear(80, 3))
    x, budgets, errors = torch.randn(6, 50), [1000], []
    while len(errors) < 3:  # the gradients, the check of derivatives and C may each ask for more
        try:
            found = gradient_change(model, x, memory=budgets[-1])
            break
        except BudgetError as error:
            errors.append(str(error))
            budgets.append(error.needed)
    assert len(errors) in (1, 2)
    assert budgets == sorted(set(budgets))
    for error, given, named in zip(errors, budgets[:-1], budgets[1:], strict=True):
        assert f"at least {named:,} bytes" in error
        assert f"got {given:,};" in error
    assert found.converged.all()


def test_not_converged_is_said():
    torch.manual_seed(0)
    model, x = network(width=20), inputs()
    assert not gradient_change(model, x, max_products=1, tol=1e-9).converged.any()


def test_derivatives_are_checked_once():
    class Detached(torch.autograd.Function):
        """A layer whose second derivative is silently missing."""

        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.exp()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return grad * ctx.saved_tensors[0].detach().exp()

    def field(x: Tensor) -> Tensor:
        return Detached.apply(x.flatten(1)).sum(1)

    with pytest.raises(FlexureError, match="second derivative"):
        gradient_change(None, inputs(), field=field)
    gradient_change(None, inputs(), field=field, check=False)


def test_noise_is_the_generators():
    model, x = network(), inputs()
    first, same, other = (gradient_change(model, x, generator=seeded(s)).change for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_whole_data():
    model, x, y = network(), inputs(5), torch.arange(5) % 3
    measure = functools.partial(gradient_change, model, radii=(0.01, 0.1), directions=1)
    found = over(measure, [(x[:3], y[:3]), (x[3:], y[3:])])
    assert found.mean["change"].shape == (2,)
    assert found.result.radii == (0.01, 0.1)
    assert len(found) == 5
    assert (found.mean["change"] < found.mean["estimated_bound"]).all()


def test_nothing_is_changed():
    model, x, y = network(), inputs().requires_grad_(), torch.arange(4) % 3
    with untouched(model, x, y), torch.no_grad():
        found = gradient_change(model, x, y)
    assert not found.change.requires_grad
    with untouched(model, x), pytest.raises(FlexureError):
        gradient_change(model, x, y[:2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radii": ()}, "radii that increase from above 0, got ()"),
        ({"radii": (0.0, 1.0)}, "increase from above 0"),
        ({"radii": (0.1, 0.1)}, "increase"),
        ({"radii": (0.2, 0.1)}, "increase"),
        ({"radii": (0.1, math.inf)}, "increase"),
        ({"radii": (math.nan,)}, "increase"),
        ({"radii": (-0.1, 0.1)}, "increase"),
        ({"radii": 0.1}, "increase from above 0, got 0.1"),
        ({"radii": "12"}, "increase from above 0, got '12'"),
        ({"radii": (None,)}, "increase"),
        ({"directions": 0}, "directions to be a whole number from 1, got 0"),
        ({"directions": 1.5}, "directions to be a whole number from 1, got 1.5"),
        ({"points": -1}, "points to be a whole number from 0, got -1"),
        ({"points": 1.5}, "points to be a whole number from 0, got 1.5"),
        ({"chunk": 0}, "chunk to be a whole number from 1, got 0"),
        ({"chunk": -2}, "chunk to be a whole number from 1, got -2"),
        ({"chunk": True}, "chunk to be a whole number from 1, got True"),
        ({"max_products": 1.5}, "max_products to be a whole number"),
        ({"memory": 0.5}, "memory to be a whole number"),
        ({"memory": 1000}, "a memory budget of at least"),
    ],
)
def test_refusals(settings: dict, message: str):
    with pytest.raises(FlexureError, match=message.replace("()", r"\(\)")):
        gradient_change(network(), inputs(), **settings)


def test_radii_lost_in_rounding_are_refused():
    x = 1000 + inputs().float()
    with pytest.raises(FlexureError, match=r"got 0\.001, which is lost in their rounding"):
        gradient_change(network().float(), x)
    gradient_change(network(), x.double(), points=0)
