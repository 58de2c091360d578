"""The training loop: against a loop written out by hand, its determinism, and its refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from flexure.contracts import DataError, FlexureError
from flexure.train import fit


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
