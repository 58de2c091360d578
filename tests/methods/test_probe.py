"""Probes: against scikit-learn, against sequential training, and against bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flexure.contracts import DataError, FlexureError
from flexure.methods import probe as probe_module
from flexure.methods.logistic import minimise, solve, with_ones
from flexure.methods.probe import RIDGES, Probe, fit_probes, fit_published_probes
from tests.reference.probe import train_sequentially

CLASSES = 4


def problem(n: int, k: int = 3, dimension: int = 12, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """k related feature sets with correlated, badly scaled columns and noisy labels."""
    fixed = torch.Generator().manual_seed(99)
    centres = torch.randn(CLASSES, dimension, generator=fixed)
    mix = torch.randn(dimension, dimension, generator=fixed)
    scales = torch.logspace(-2, 2, dimension)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    base = centres[labels] + 1.5 * torch.randn(n, dimension, generator=generator)
    return [((base + 0.3 * i * base.sin()) @ mix * scales + 5.0 * i) for i in range(k)], labels


def standardised(train: Tensor, *others: Tensor) -> list[Tensor]:
    mean, std = train.mean(0), train.std(0, correction=0)
    std = std.clamp_min(0.1 * float(std.square().mean().sqrt()))
    return [(x - mean) / std for x in (train, *others)]


@pytest.mark.parametrize("solver", ["lbfgs", "newton-cg"])
@pytest.mark.parametrize("ridge", [1.0, 1e-2, 1e-4])
def test_coefficients_and_loss_agree_with_scikit_learn(solver: str, ridge: float) -> None:
    from sklearn.linear_model import LogisticRegression

    train, y = problem(400, k=2)
    xs = [standardised(x.double())[0] for x in train]
    start = torch.zeros(2, CLASSES, 13, dtype=torch.float64)
    ours = minimise(with_ones(torch.stack(xs)), y, ridge=ridge, start=start, tolerance=1e-11)
    assert ours.converged.all()
    for k, x in enumerate(xs):
        theirs = LogisticRegression(C=1 / (len(y) * ridge), solver=solver, tol=1e-10, max_iter=5000)
        theirs.fit(x.numpy(), y.numpy())
        weight = torch.as_tensor(theirs.coef_)
        bias = torch.as_tensor(theirs.intercept_)
        torch.testing.assert_close(ours.theta[k, :, :-1], weight, atol=2e-5, rtol=1e-4)
        mine = ours.theta[k, :, -1]
        torch.testing.assert_close(mine - mine.mean(), bias - bias.mean(), atol=2e-5, rtol=1e-4)
        nll = [
            F.cross_entropy(x @ w.T + b, y)
            for w, b in ((weight, bias), (ours.theta[k, :, :-1], mine))
        ]
        torch.testing.assert_close(nll[0], nll[1], atol=1e-7, rtol=1e-7)


def test_the_gradient_at_the_solution_is_that_of_the_stated_objective() -> None:
    train, y = problem(300, k=1)
    x = standardised(train[0].double())[0]
    start = torch.zeros(1, CLASSES, 13, dtype=torch.float64)
    found = minimise(with_ones(x[None]), y, ridge=0.03, start=start, tolerance=1e-9)
    theta = found.theta[0].clone().requires_grad_()
    weight, bias = theta[:, :-1], theta[:, -1]
    objective = F.cross_entropy(x @ weight.T + bias, y) + 0.015 * weight.square().sum()
    (gradient,) = torch.autograd.grad(objective, theta)
    assert gradient.abs().max() <= 1.01e-9
    assert float(found.gradient) == pytest.approx(float(gradient.abs().max()), abs=1e-13)


def test_a_fit_that_is_cut_short_says_so() -> None:
    train, y = problem(300)
    val, y_val = problem(200, seed=1)
    good = fit_probes(train, y, val_features=val, val_labels=y_val)
    cut = fit_probes(train, y, val_features=val, val_labels=y_val, max_iterations=1)
    assert all(probe.converged for probe in good)
    assert not any(probe.converged for probe in cut)


@pytest.mark.parametrize("ridge", RIDGES)
def test_the_default_call_is_within_a_per_cent_of_a_tight_float64_solution(ridge: float) -> None:
    """Where the data leave many directions to the ridge alone: more features than samples."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(300, 300, generator=generator)
    x, y = torch.randn(100, 300, generator=generator) @ mix, torch.arange(100) % 5
    x[torch.arange(100), y] += 20
    (probe,) = fit_probes([x], y, val_features=[x], val_labels=y, ridges=[ridge])
    z, mean = x.double(), x.double().mean(0)
    scale = z.std(0, correction=0)
    z = (z - mean) / scale.clamp_min(0.1 * float(scale.square().mean().sqrt()))
    start = torch.zeros(1, 5, 301, dtype=torch.float64)
    tight = minimise(with_ones(z[None]), y, ridge=ridge, start=start, tolerance=1e-10)
    assert probe.converged
    assert tight.converged.all()
    raw = tight.theta[0, :, :-1] / scale.clamp_min(0.1 * float(scale.square().mean().sqrt()))
    assert (probe.weight.double() - raw).norm() < 0.01 * raw.norm()


def test_float64_takes_the_steps_that_float32_cannot() -> None:
    train, y = problem(200)
    probes = fit_probes(train, y, val_features=train, val_labels=y, tolerance=1e-7)
    assert all(probe.converged for probe in probes)
    x = torch.stack([with_ones(standardised(t)[0]) for t in train])
    start = torch.zeros(3, CLASSES, 13)
    alone = minimise(x, y, ridge=1e-4, start=start, tolerance=1e-8)
    _, converged = solve(x, y, ridge=1e-4, start=start, tolerance=1e-8, max_iterations=100)
    assert not alone.converged.all()
    assert converged.all()


def test_ridge_is_chosen_on_validation_data_as_scikit_learn_would() -> None:
    from sklearn.linear_model import LogisticRegression

    ridges = (1.0, 0.1, 0.01, 0.001)
    train, y = problem(120, k=3)
    val, y_val = problem(400, k=3, seed=1)
    ours = fit_probes(train, y, val_features=val, val_labels=y_val, ridges=ridges, tolerance=2e-6)
    chosen = set()
    for probe, x, x_val in zip(ours, train, val, strict=True):
        z, z_val = standardised(x.double(), x_val.double())
        best = None
        for ridge in ridges:
            model = LogisticRegression(C=1 / (len(y) * ridge), tol=1e-8, max_iter=5000)
            model.fit(z.numpy(), y.numpy())
            accuracy = model.score(z_val.numpy(), y_val.numpy())
            logits = torch.as_tensor(model.decision_function(z_val.numpy()))
            key = (accuracy, -float(F.cross_entropy(logits, y_val)), ridge)
            if best is None or key > best[0]:
                best = (key, ridge, logits)
        assert best is not None
        assert (probe.accuracy, probe.ridge) == (pytest.approx(best[0][0]), best[1])
        mine = probe.logits(x_val.double())
        # Raw-feature logits of the folded float32 weights, up to a shift common to all classes.
        difference = (mine - mine.mean(1, keepdim=True)) - (best[2] - best[2].mean(1, keepdim=True))
        assert difference.abs().max() < 2e-3
        assert probe.accuracy == int((mine.argmax(1) == y_val).sum()) / len(y_val)
        assert probe.nll == pytest.approx(float(F.cross_entropy(mine, y_val)), abs=1e-4)
        chosen.add(probe.ridge)
    assert chosen != {ridges[0]}


def test_results_do_not_depend_on_batching() -> None:
    train, y = problem(200, k=4)
    val, y_val = problem(100, k=4, seed=1)
    together = fit_probes(train, y, val_features=val, val_labels=y_val, chunk_bytes=2**30)
    alone = fit_probes(train, y, val_features=val, val_labels=y_val, chunk_bytes=1)
    stacked = fit_probes(
        torch.stack(train), y, val_features=torch.stack(val), val_labels=y_val, chunk_bytes=2**30
    )
    for a, b, c in zip(together, alone, stacked, strict=True):
        assert (a.accuracy, a.ridge) == (b.accuracy, b.ridge) == (c.accuracy, c.ridge)
        torch.testing.assert_close(a.weight, b.weight, atol=1e-3, rtol=1e-3)
        assert torch.equal(a.weight, c.weight)


def test_nearly_dead_features_do_no_harm() -> None:
    """What a ReLU that is dead for this data becomes just below beta = 1."""
    train, y = problem(200, k=1)
    val, y_val = problem(100, k=1, seed=1)
    spread = float(train[0].std(0, correction=0).square().mean().sqrt())
    noise, noise_val = (1e-4 * spread * torch.randn(n, 60) for n in (200, 100))
    fits = fit_probes(
        [torch.cat([train[0], torch.zeros(200, 60)], 1), torch.cat([train[0], noise], 1)],
        y,
        val_features=[
            torch.cat([val[0], torch.zeros(100, 60)], 1),
            torch.cat([val[0], noise_val], 1),
        ],
        val_labels=y_val,
    )
    # Blown up to unit variance they cost 14 points here.
    assert abs(fits[1].accuracy - fits[0].accuracy) < 0.03
    assert abs(fits[1].nll - fits[0].nll) < 0.05


def test_dead_and_constant_features_do_no_harm() -> None:
    train, y = problem(200, k=1)
    val, y_val = problem(100, k=1, seed=1)
    plain = fit_probes(train, y, val_features=val, val_labels=y_val)[0]
    # Zero in training, constant up to rounding, and both different in validation.
    extra = torch.stack([torch.zeros(200), torch.full((200,), 1e4)], dim=1)
    extra[::2, 1] += 1e-3
    wide = fit_probes(
        [torch.cat([train[0], extra], 1)],
        y,
        val_features=[torch.cat([val[0], torch.randn(100, 2)], 1)],
        val_labels=y_val,
    )[0]
    assert wide.weight[:, -2:].abs().max() == 0
    assert wide.accuracy == plain.accuracy
    torch.testing.assert_close(wide.weight[:, :-2], plain.weight, atol=1e-3, rtol=1e-3)


def test_large_features_are_not_rotated_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    train, y = problem(200)
    val, y_val = problem(100, seed=1)
    rotated = fit_probes(train, y, val_features=val, val_labels=y_val)
    monkeypatch.setattr(probe_module, "_MAX_ROTATED", 0)
    plain = fit_probes(train, y, val_features=val, val_labels=y_val)
    for a, b in zip(rotated, plain, strict=True):
        assert b.converged
        assert (a.accuracy, a.ridge) == (b.accuracy, b.ridge)
        assert a.nll == pytest.approx(b.nll, rel=1e-3)


def test_separable_classes_converge() -> None:
    labels = torch.arange(3).repeat(20)
    x = F.one_hot(labels, 3).float() + 0.01 * torch.randn(60, 3)
    probe = fit_probes([x], labels, val_features=[x], val_labels=labels)[0]
    assert probe.converged
    assert probe.accuracy == 1.0


@pytest.mark.parametrize(("seed", "chunk_bytes"), [(42, None), (43, 1)])
def test_published_probes_equal_sequential_training(seed: int, chunk_bytes: int | None) -> None:
    train, y = problem(330, k=4)
    val, y_val = problem(150, k=4, seed=1)
    train, val = ([x / 50 for x in sets] for sets in (train, val))
    state = torch.random.get_rng_state()
    ours = fit_published_probes(
        train, y, val_features=val, val_labels=y_val, seed=seed, chunk_bytes=chunk_bytes
    )
    assert torch.equal(state, torch.random.get_rng_state())
    theirs = [
        train_sequentially(x, y, val_features=x_val, val_labels=y_val, seed=seed)
        for x, x_val in zip(train, val, strict=True)
    ]
    assert [p.accuracy for p in ours] == [p.accuracy for p in theirs]
    assert [p.epoch for p in ours] == [p.epoch for p in theirs]
    assert len({p.accuracy for p in ours}) > 1
    for mine, other, x_val in zip(ours, theirs, val, strict=True):
        torch.testing.assert_close(mine.logits(x_val), other.layer(x_val), atol=2e-4, rtol=1e-4)
        assert (mine.converged, mine.ridge) == (None, None)


def test_published_probes_do_not_reseed_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seed: int) -> None:
        raise AssertionError(f"reseeded with {seed}")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    train, y = problem(100, k=1)
    fit_published_probes(train, y, val_features=train, val_labels=y, seed=1, epochs=1)


def test_the_seed_of_the_published_probe_matters() -> None:
    train, y = problem(100, k=1)
    probes = [
        fit_published_probes(train, y, val_features=train, val_labels=y, seed=seed, epochs=1)[0]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(probes[0].weight, probes[1].weight)
    assert not torch.equal(probes[0].weight, probes[2].weight)


def test_a_probe_becomes_a_layer() -> None:
    probe = Probe(torch.randn(3, 5), torch.randn(3), torch.ones(2, dtype=torch.bool), 1.0, 0.0)
    layer, x = probe.linear(), torch.randn(7, 5)
    assert torch.equal(layer(x), probe.logits(x))
    assert layer.weight.requires_grad
    with torch.no_grad():
        layer.weight.zero_()
    assert probe.weight.abs().sum() > 0


@pytest.mark.parametrize("fit", [fit_probes, fit_published_probes])
def test_bad_input_is_refused(fit) -> None:
    x, y = torch.randn(10, 3), torch.arange(10) % 2
    extra = {"seed": 0} if fit is fit_published_probes else {}
    cases = [
        ([], y, [], y, "at least one"),
        ([x], y, [x, x], y, "as many"),
        ([x], y.float(), [x], y, "integer training"),
        ([x], y - 1, [x], y, ">= 0"),
        ([x], y[:9], [x], y, "shape"),
        ([x], y, [x[:, :2]], y, "shape"),
        ([x], y, [x], y + 1, "every class"),
        ([x, x.where(x < 1, torch.inf)], y, [x, x], y, "set 1"),
    ]
    for train, labels, val, val_labels, message in cases:
        with pytest.raises(DataError, match=message):
            fit(train, labels, val_features=val, val_labels=val_labels, **extra)


def test_bad_ridges_are_refused() -> None:
    x, y = torch.randn(10, 3), torch.arange(10) % 2
    for ridges in ((), (-1.0,), (float("nan"),)):
        with pytest.raises(FlexureError, match="ridge"):
            fit_probes([x], y, val_features=[x], val_labels=y, ridges=ridges)
