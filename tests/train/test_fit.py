"""The training loop: against a loop written out by hand, its determinism, and its refusals."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flexure.contracts import DataError, FlexureError, Step
from flexure.data import batches as prepare
from flexure.train import fit
from flexure.train.history import Record
from tests.train.scenarios import (
    gradient_norm,
    noise_of_positions,
    root_of_mean,
    sharpness_aware,
    shifted,
)


@dataclass(eq=False)
class Vectors:
    """Labelled vectors."""

    inputs: Tensor
    labels: Tensor
    classes: tuple[str, ...] = ("a", "b")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tensor:
        return self.inputs[index]


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 2))


def blobs(count: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    y = torch.arange(count) % 2
    return torch.randn(count, 2, generator=generator) + 3.0 * y[:, None], y


def batches() -> list[tuple[Tensor, Tensor]]:
    x, y = blobs()
    return list(zip(x.split(20), y.split(20), strict=True))


def state_of(model: nn.Module) -> Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_it_is_the_loop_it_says_it_is():
    model, by_hand = network(), network()
    history = fit(model, batches(), epochs=3, seed=0)
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        for x, y in batches():
            loss = nn.functional.cross_entropy(by_hand(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert history.losses == tuple(losses)
    assert torch.equal(state_of(model), state_of(by_hand))
    assert history.epoch_losses == pytest.approx([sum(losses[i : i + 3]) / 3 for i in (0, 3, 6)])
    assert history.val_accuracy == ()


def test_it_learns_and_reports_accuracy_on_val():
    x, y = blobs(200)
    model = network()
    history = fit(model, batches(), epochs=60, seed=0, val=[(x, y)], keep="last")
    assert len(history.val_accuracy) == 60
    assert history.val_accuracy[-1] > 0.95
    assert history.val_accuracy[-1] == (model.eval()(x).argmax(-1) == y).double().mean().item()


def test_dropout_follows_the_seed_and_the_generators_are_put_back():
    def train(seed: int) -> Tensor:
        model = network(dropout=0.5)
        torch.rand(seed + 5)  # a caller's generator in a different state each time
        before = torch.get_rng_state()
        fit(model, batches(), epochs=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return state_of(model)

    assert torch.equal(train(3), train(3))
    assert not torch.equal(train(3), train(4))


def test_modes_are_restored_and_train_mode_is_used():
    model = network(dropout=0.5).eval()
    modes = []
    model[2].register_forward_hook(lambda module, *_: modes.append(module.training))
    fit(model, batches(), epochs=1, seed=0, val=batches())
    assert modes == [True] * 3 + [False] * 3
    assert not any(module.training for module in model.modules())


def test_the_schedule_scales_the_rate():
    model, frozen = network(), network()
    fit(frozen, batches(), epochs=1, seed=0, schedule=lambda step: 0.0)
    assert torch.equal(state_of(frozen), state_of(model))
    seen: list[int] = []
    fit(model, batches(), epochs=2, seed=0, schedule=lambda step: seen.append(step) or 1.0)
    assert seen == list(range(6))


def test_regression_with_a_loss_of_ones_own():
    x = torch.linspace(-1, 1, 64)[:, None]
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    fit(
        model,
        [(x, 3 * x - 1)],
        epochs=200,
        seed=0,
        loss=nn.functional.mse_loss,
        optimizer=optimizer,
    )
    assert model.weight.item() == pytest.approx(3, abs=1e-3)
    assert model.bias.item() == pytest.approx(-1, abs=1e-3)


@pytest.mark.parametrize("shape", [(64, 1), (64,)])
def test_regression_is_validated_by_the_loss(shape: tuple[int, ...]):
    x = torch.linspace(-1, 1, 64)[:, None]
    y = (3 * x - 1).reshape(shape)

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return (output.reshape(y.shape) - y).square().mean()

    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    history = fit(
        model,
        [(x, y)],
        epochs=6,
        seed=0,
        loss=loss,
        val=[(x[:40], y[:40]), (x[40:], y[40:])],
        optimizer=optimizer,
        # It learns for four epochs, and then unlearns.
        schedule=lambda step: 0.3 if step < 4 else -0.5,
    )
    assert history.val_accuracy == ()
    assert history.best_epoch == 3
    assert min(history.val_loss) == history.val_loss[3]
    with torch.no_grad():
        assert history.val_loss[3] == pytest.approx(float(loss(model(x), y)))


def test_the_loss_on_val_is_recorded_beside_accuracy():
    x, y = blobs(50)
    model = network(dropout=0.5)
    val = [(x[:40], y[:40]), (x[40:], y[40:])]
    history = fit(
        model, batches(), epochs=2, seed=0, val=val, keep="last", penalties={root_of_mean: 1.0}
    )
    loss = nn.functional.cross_entropy(model.eval()(x), y).item()
    assert history.val_loss[1] == pytest.approx(loss)
    assert len(history.val_accuracy) == 2


def test_a_loss_on_val_that_is_not_finite_is_never_the_best():
    record = Record(())
    assert [record.validated(loss, None) for loss in (float("nan"), 2.0, 1.0, float("nan"))] == [
        True, True, True, False
    ]  # fmt: skip
    assert record.best_epoch == 2


def test_an_optimizer_that_needs_a_closure_needs_a_rule():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    with pytest.raises(FlexureError, match="LBFGS, whose step needs a closure; pass update="):
        fit(model, batches(), epochs=1, seed=0, optimizer=optimizer)
    history = fit(
        model,
        [blobs()],
        epochs=3,
        seed=0,
        optimizer=optimizer,
        update=lambda backward, optimizer: optimizer.step(backward),
    )
    assert history.losses[-1] < history.losses[0] / 2


def test_a_generator_of_batches_serves_every_epoch():
    history = fit(network(), iter(batches()), epochs=2, seed=0)
    assert len(history.losses) == 6


def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_last_good_weights():
    good, bad = batches()[0], (torch.full((2, 2), float("nan")), torch.tensor([0, 1]))
    model, reference = network(), network()
    fit(reference, [good], epochs=1, seed=0)
    with pytest.raises(FlexureError, match="step 1"):
        fit(model, [good, bad], epochs=1, seed=0)
    assert torch.equal(state_of(model), state_of(reference))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epochs": 0}, FlexureError, "epochs of at least 1"),
        ({"batches": []}, DataError, "at least one batch"),
        ({"val": []}, DataError, "in val"),
        ({"keep": "first"}, FlexureError, "keep to be"),
        ({"accumulate": 0}, FlexureError, "accumulate of at least 1"),
        ({"clip": 0.0}, FlexureError, "clip above 0"),
        ({"precision": "fp16"}, FlexureError, "precision None or 'bf16'"),
        ({"epochs": 1.5}, FlexureError, "epochs of at least 1, an integer, got 1.5"),
        ({"seed": None}, FlexureError, "seed to be an integer of 64 bits, got None"),
        ({"checkpoint": 3}, FlexureError, "checkpoint to be a folder or a Checkpoint, got 3"),
        ({"schedule": "cosine"}, FlexureError, "no scheduler of torch"),
        ({"schedule": lambda step: float("nan")}, FlexureError, "finite factor .* nan at step 0"),
        ({"optimizer": "adam"}, FlexureError, "an optimiser of torch.optim, got 'adam'"),
        (
            {"penalties": {root_of_mean: float("inf")}},
            FlexureError,
            "penalty root_of_mean, got inf",
        ),
        ({"batches": [torch.ones(2, 2)]}, DataError, "pairs .x, y., got a Tensor"),
        ({"batches": [{"x": 1, "y": 2}]}, DataError, "pairs .x, y., got a dict"),
        ({"val": [(torch.ones(2, 2),)]}, DataError, "pairs .x, y., got a tuple of 1"),
        ({"val": [(torch.ones(2, 2), torch.tensor([0, 2]))]}, DataError, "2 classes, got 0 to 2"),
        ({"val": [(torch.ones(2, 2), torch.tensor([0, -1]))]}, DataError, "classes, got -1 to 0"),
        ({"val": [(torch.ones(2, 2), torch.tensor([[0], [1]]))]}, DataError, r"got \(2, 1\)"),
        ({"val": [(torch.ones(2, 2), torch.ones(2))]}, DataError, "got .2,. of torch.float32"),
        ({"batches": [({}, None)]}, DataError, "without such a tensor"),
        ({"batches": [(torch.ones(0, 2), torch.ones(0))]}, DataError, "without samples"),
    ],
)
def test_refusals(arguments: dict, error: type[Exception], message: str):
    given = {"batches": batches(), "epochs": 1, "seed": 0} | arguments
    with pytest.raises(error, match=message):
        fit(network(), given.pop("batches"), **given)


def test_a_frozen_model_is_refused_unchanged():
    model = network().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FlexureError, match="requires_grad"):
        fit(model, batches(), epochs=1, seed=0)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def by_hand(model: nn.Module, groups: list[list[tuple[Tensor, Tensor]]], *, rate: float) -> None:
    """Plain SGD on the mean over all samples of each group."""
    for group in groups:
        x, y = (torch.cat(parts) for parts in zip(*group, strict=True))
        gradients = torch.autograd.grad(
            nn.functional.cross_entropy(model(x), y), list(model.parameters())
        )
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= rate * gradient


def test_accumulated_batches_make_the_update_of_one_large_batch():
    x, y = blobs()
    pieces = list(zip(x.split([20, 10, 5, 15, 10]), y.split([20, 10, 5, 15, 10]), strict=True))
    model, reference = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = fit(model, pieces, epochs=1, seed=0, optimizer=optimizer, accumulate=2)
    by_hand(reference, [pieces[:2], pieces[2:4], pieces[4:]], rate=0.1)
    torch.testing.assert_close(state_of(model), state_of(reference), atol=1e-6, rtol=0)
    assert len(history.losses) == 3


def test_positions_run_on_over_accumulated_batches():
    seen: list[list[int]] = []

    def look(step: Step) -> Tensor:
        seen.append(step.positions.tolist())
        assert (step.epochs, step.seed, step.model.training) == (1, 4, True)
        return step.output.sum() * 0

    fit(network(), batches(), epochs=1, seed=4, penalties={look: 1.0}, accumulate=2)
    assert seen == [list(range(20)), list(range(20, 40)), list(range(20))]


def test_clipping_bounds_the_norm_of_the_whole_gradient():
    model, before = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fit(model, batches()[:1], epochs=1, seed=0, optimizer=optimizer, clip=1e-3)
    moved = (state_of(model) - state_of(before)).norm().item()
    assert moved == pytest.approx(1e-3, rel=1e-3)
    loose = network()
    fit(
        loose,
        batches()[:1],
        epochs=1,
        seed=0,
        optimizer=torch.optim.SGD(loose.parameters(), lr=1.0),
        clip=1e6,
    )
    by_hand(before, [batches()[:1]], rate=1.0)
    assert torch.equal(state_of(loose), state_of(before))


def test_penalties_are_added_with_their_weights_and_reported_without():
    model, reference = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (x, y), *_ = batches()
    penalties = {gradient_norm: 0.5, root_of_mean: 0.25}
    history = fit(
        model, [(x, y)], epochs=2, seed=0, optimizer=optimizer, penalties=penalties, keep="last"
    )
    first: dict[str, float] = {}
    objectives = []
    for _ in range(2):
        inputs = x.clone().requires_grad_()
        losses = nn.functional.cross_entropy(reference(inputs), y, reduction="none")
        (slope,) = torch.autograd.grad(losses.sum(), inputs, create_graph=True)
        norm = slope.square().sum(1).mean()
        root = reference(x).square().sum(1).mean().sqrt()
        total = losses.mean() + 0.5 * norm + 0.25 * root
        first = first or {"gradient_norm": norm.item(), "root_of_mean": root.item()}
        objectives.append(total.item())
        gradients = torch.autograd.grad(total, list(reference.parameters()), materialize_grads=True)
        with torch.no_grad():
            for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    torch.testing.assert_close(state_of(model), state_of(reference), atol=1e-6, rtol=0)
    assert history.losses == pytest.approx(objectives, abs=1e-6)
    assert {name: values[0] for name, values in history.penalties.items()} == pytest.approx(
        first, abs=1e-6
    )


def test_the_output_is_computed_once_for_the_loss_and_all_penalties():
    model = network()
    calls: list[object] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    fit(model, batches(), epochs=1, seed=0, penalties={root_of_mean: 1.0, noise_of_positions: 1.0})
    assert len(calls) == 3


def test_two_penalties_of_one_name_are_told_apart():
    def penalty(step: Step) -> Tensor:
        return step.output.sum() * 0

    first, penalty_too = penalty, lambda step: step.output.sum() * 0 + 1
    penalty_too.__name__ = "penalty"
    history = fit(network(), batches(), epochs=1, seed=0, penalties={first: 1.0, penalty_too: 1.0})
    assert history.penalties == {"penalty": (0.0,), "penalty 2": (1.0,)}


def test_what_is_no_scalar_is_refused_by_name():
    def wide(step: Step) -> Tensor:
        return step.output

    with pytest.raises(FlexureError, match=r"the penalty wide .* \(20, 2\)"):
        fit(network(), batches(), epochs=1, seed=0, penalties={wide: 1.0})
    with pytest.raises(FlexureError, match="the loss to be a scalar"):
        fit(network(), batches(), epochs=1, seed=0, loss=lambda output, y: output)
    with pytest.raises(FlexureError, match="without a graph"):
        fit(network(), batches(), epochs=1, seed=0, loss=lambda output, y: output.detach().sum())


def test_the_perturbed_inputs_are_what_loss_and_penalties_see():
    seen: list[Tensor] = []

    def look(step: Step) -> Tensor:
        seen.append(step.x)
        return step.output.sum() * 0

    model, reference = network(), network()
    moved = [(x + 0.1 * x.sign(), y) for x, y in batches()]
    fit(model, batches(), epochs=1, seed=0, perturb=shifted, penalties={look: 1.0})
    fit(reference, moved, epochs=1, seed=0)
    assert torch.equal(state_of(model), state_of(reference))
    assert all(torch.equal(a, b) for a, (b, _) in zip(seen, moved, strict=True))


def test_an_update_rule_may_take_two_gradients():
    model, reference = network(), network()
    (x, y), *_ = batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = fit(model, [(x, y)], epochs=1, seed=0, update=sharpness_aware, optimizer=optimizer)

    def gradients(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        def loss(values: dict[str, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(torch.func.functional_call(reference, values, x), y)

        return torch.func.grad(loss)(parameters)

    weights = {name: p.detach() for name, p in reference.named_parameters()}
    uphill = gradients(weights)
    there = {name: p + 0.05 * uphill[name] / uphill[name].norm() for name, p in weights.items()}
    expected = {name: weights[name] - 0.1 * g for name, g in gradients(there).items()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=0)
    assert history.losses == (nn.functional.cross_entropy(reference(x), y).item(),)


def test_an_update_rule_that_fails_amid_its_steps_leaves_the_weights():
    (x, y), *_ = batches()
    model, before = network(), network()

    def far(backward: Callable[[], float], optimizer: torch.optim.Optimizer) -> float:
        value = backward()
        with torch.no_grad():
            model[0].weight.fill_(torch.inf)
        backward()
        return value

    with pytest.raises(FlexureError, match="step 0"):
        fit(model, [(x, y)], epochs=1, seed=0, update=far)
    assert torch.equal(state_of(model), state_of(before))
    with pytest.raises(FlexureError, match="call backward"):
        fit(model, [(x, y)], epochs=1, seed=0, update=lambda backward, optimizer: 0.0)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_weights_of_the_best_epoch_are_kept(keep: str):
    x, y = blobs()
    states: list[Tensor] = []

    def note(step: Step) -> Tensor:
        states.append(weights_of(step.model))
        return step.output.sum() * 0

    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    history = fit(
        model,
        [(x, y)],
        epochs=6,
        seed=0,
        val=[(x, y)],
        optimizer=optimizer,
        # It learns for two epochs, and then unlearns.
        schedule=lambda step: 0.5 if step < 2 else -5.0,
        penalties={note: 1.0},
        keep=keep,
    )
    accuracy = history.val_accuracy
    best = accuracy.index(max(accuracy))
    assert history.best_epoch == best < 5
    if keep == "best":  # an epoch is one update: its result is what the next one begins with
        assert torch.equal(weights_of(model), states[best + 1])
    right = (model.eval()(x).argmax(-1) == y).double().mean().item()
    assert right == accuracy[best if keep == "best" else -1]
    assert accuracy[best] > accuracy[-1]


def test_rates_of_groups_are_scaled_each_from_its_own_and_put_back():
    model = network()
    groups = [
        {"params": model[0].parameters(), "lr": 0.1},
        {"params": model[3].parameters(), "lr": 0.01},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    history = fit(
        model,
        batches(),
        epochs=2,
        seed=0,
        optimizer=optimizer,
        schedule=lambda step: 1.0 if step < 3 else 0.1,
    )
    assert history.learning_rates[0] == (0.1, 0.01)
    assert history.learning_rates[1] == pytest.approx((0.01, 0.001))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]


def test_shuffling_python_and_numpy_follow_the_seed():
    x, y = blobs()

    class Augmented(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(x)

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return x[index] + random.random() + np.random.rand(), y[index]

    def train(seed: int) -> Tensor:
        random.seed(None)
        np.random.seed(None)
        states = random.getstate(), np.random.get_state()[1].tolist()
        model = network()
        fit(
            model,
            torch.utils.data.DataLoader(Augmented(), batch_size=20, shuffle=True),
            epochs=2,
            seed=seed,
        )
        assert states == (random.getstate(), np.random.get_state()[1].tolist())
        return state_of(model)

    assert torch.equal(train(3), train(3))
    assert not torch.equal(train(3), train(4))


def test_batches_and_samplers_are_told_the_epoch():
    class Told(list):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            self.epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    told = Told(batches())
    fit(network(), told, epochs=3, seed=0)
    assert told.epochs == [0, 1, 2]

    x, y = blobs()
    prepared = prepare(Vectors(x, y), preprocess=lambda v: v, batch_size=20, seed=1, shuffle=True)
    first, second = network(), network()
    fit(first, prepared, epochs=2, seed=0)
    assert prepared.epoch == 2
    fit(second, prepared, epochs=2, seed=0)
    assert torch.equal(state_of(first), state_of(second))


def test_inputs_of_any_structure_are_trained_on():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, a: Tensor, scale: float, b: list[Tensor]) -> Tensor:
            return self.inner(scale * (a + b[0]))

    x, y = blobs()
    model, reference = Sum(), network()
    as_dict = {"a": x / 4, "scale": 2.0, "b": [x / 4]}
    fit(model, [(as_dict, y)], epochs=2, seed=0, accumulate=2)
    fit(reference, [(x, y)], epochs=2, seed=0)
    torch.testing.assert_close(state_of(model), state_of(reference))


def test_bfloat16_computes_the_loss_in_float32():
    model, exact = network(), network()
    seen: list[torch.dtype] = []
    weights: list[torch.dtype] = []

    def loss(output: Tensor, y: Tensor) -> Tensor:
        seen.append(output.dtype)
        return nn.functional.cross_entropy(output, y)

    model[3].register_forward_hook(lambda module, inputs, output: weights.append(output.dtype))
    half = fit(model, batches(), epochs=2, seed=0, val=batches(), loss=loss, precision="bf16")
    full = fit(exact, batches(), epochs=2, seed=0, val=batches())
    assert set(seen) == {torch.float32}
    assert set(weights) == {torch.bfloat16}
    assert half.losses != full.losses
    assert half.losses == pytest.approx(full.losses, rel=0.02)
    assert model[0].weight.dtype == torch.float32


@dataclass(frozen=True)
class Frozen:
    logits: Tensor
    rest: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Slotted:
    logits: Tensor


@pytest.mark.parametrize("kind", [SimpleNamespace, Frozen, Slotted])
def test_bfloat16_widens_the_logits_of_objects(kind: Callable):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()
            self.returned: list[object] = []

        def forward(self, x: Tensor) -> object:
            self.returned.append(kind(logits=self.inner(x)))
            return self.returned[-1]

    def loss(output: object, y: Tensor) -> Tensor:
        assert type(output) is kind
        assert output.logits.dtype == torch.float32
        return nn.functional.cross_entropy(output.logits, y)

    model = Wrapped()
    fit(model, batches(), epochs=1, seed=0, val=batches(), loss=loss, precision="bf16")
    assert {output.logits.dtype for output in model.returned} == {torch.bfloat16}


def test_a_parameter_without_gradient_is_warned_about():
    model = network()
    model.register_parameter("lonely", nn.Parameter(torch.ones(())))
    with pytest.warns(UserWarning, match="none for lonely") as said:
        fit(model, batches(), epochs=2, seed=0)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(network(), batches(), epochs=1, seed=0)


@pytest.mark.filterwarnings("ignore:expected a gradient")
def test_an_optimizer_of_what_nothing_depends_on_is_refused():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(()))], lr=1.0)
    with pytest.raises(FlexureError, match=r"none for any of them .parameter 0 of group 0"):
        fit(network(), batches(), epochs=1, seed=0, optimizer=optimizer)
    optimizer = torch.optim.SGD([torch.ones(())], lr=1.0)
    with pytest.raises(FlexureError, match="optimiser of trainable parameters"):
        fit(network(), batches(), epochs=1, seed=0, optimizer=optimizer)


def test_a_loss_that_is_not_finite_names_the_largest_gradient_before_it():
    good, bad = batches()[0], (torch.full((2, 2), float("nan")), torch.tensor([0, 1]))
    model = nn.Sequential(nn.BatchNorm1d(2), network())
    with pytest.raises(FlexureError) as caught:
        fit(model, [good, bad], epochs=1, seed=0, checkpoint=None)
    reference = nn.Sequential(nn.BatchNorm1d(2), network())
    loss = nn.functional.cross_entropy(reference(good[0]), good[1])
    named = dict(reference.named_parameters())
    norms = [g.norm().item() for g in torch.autograd.grad(loss, list(named.values()))]
    largest = max(norms)
    name = list(named)[norms.index(largest)]
    assert "got nan at step 1 (epoch 0); the largest gradient of the step" in str(caught.value)
    assert f"was {largest:.3g}, of {name};" in str(caught.value)
    assert torch.isfinite(state_of(model)).all()  # the statistics, too


def test_a_gradient_that_is_not_finite_names_its_parameter():
    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient * torch.inf

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(Root.apply(self.first(x)))

    model = Broken()
    before = state_of(model)
    with pytest.raises(FlexureError, match=r"finite gradients, got (inf|nan) for first\.\w+ at st"):
        fit(model, batches(), epochs=1, seed=0)
    assert torch.equal(state_of(model), before)


def test_progress_is_told():
    told: list[tuple[str, int, int]] = []
    fit(network(), batches(), epochs=2, seed=0, progress=lambda *given: told.append(given))
    assert told == [("train", done, 6) for done in range(1, 7)]


@pytest.mark.parametrize("labels", [[0, 3, 1, 1], [0, -1, 1, 1]])
def test_training_labels_that_the_head_has_no_class_for(labels: list[int]) -> None:
    model = nn.Linear(2, 3)
    before = model.weight.detach().clone()
    with pytest.raises(DataError, match="training batch of the model's 3 classes"):
        fit(model, [(torch.rand(4, 2), torch.tensor(labels))], epochs=1, seed=0)
    assert torch.equal(model.weight, before)


def test_a_batch_without_a_label_that_counts() -> None:
    y = torch.full((4,), -100)
    with pytest.raises(DataError, match="4 labels of -100"):
        fit(nn.Linear(2, 3), [(torch.randn(4, 2), y)], epochs=1, seed=0)


def test_labels_of_minus_100_do_not_count() -> None:
    model, x = nn.Linear(2, 3), torch.rand(4, 2)
    expected = nn.functional.cross_entropy(model(x[:2]), torch.tensor([0, 2])).item()
    y = torch.tensor([0, 2, -100, -100])
    assert fit(model, [(x, y)], epochs=1, seed=0).losses[0] == pytest.approx(expected)
