"""Going on from a checkpoint: from every update, with every kind of batches, and refusals."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flexure.contracts import DataError, FlexureError, Step
from flexure.data import batches as prepare
from flexure.train import Checkpoint, History, cosine, fit
from flexure.train.checkpoint import load_state, save_state
from flexure.train.resume import CheckpointError
from tests.train.scenarios import data, gradient_norm, network, sharpness_aware, shifted
from tests.train.test_fit import Vectors

EPOCHS, UPDATES = 3, 9
"""Five batches an epoch, two an update: three updates an epoch."""


class Interrupted(Exception):
    pass


def stopping(stop: int | None) -> Callable[[Step], Tensor]:
    """A penalty that draws, and stops the training at its `stop`-th update."""

    def drawn(step: Step) -> Tensor:
        if step.index == stop:
            raise Interrupted
        return torch.rand(()) * step.output.square().mean()

    return drawn


def loader(**settings: Any) -> torch.utils.data.DataLoader:
    dataset = torch.utils.data.TensorDataset(*data())
    return torch.utils.data.DataLoader(dataset, batch_size=9, shuffle=True, **settings)


def with_own_generator() -> torch.utils.data.DataLoader:
    return loader(generator=torch.Generator().manual_seed(8))


def with_sampler() -> torch.utils.data.DataLoader:
    sampler = torch.utils.data.WeightedRandomSampler(
        torch.arange(1.0, 46), 45, generator=torch.Generator().manual_seed(8)
    )
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*data()), batch_size=9, sampler=sampler
    )


def prepared() -> Any:
    vectors = Vectors(*data(), classes=("a", "b", "c"))
    return prepare(vectors, preprocess=lambda v: v, batch_size=9, seed=1, shuffle=True)


def drawn_as_they_come() -> list:
    """Batches made anew in every pass, with numbers from torch's default generator."""

    class Fresh:
        def __iter__(self):
            for _ in range(5):
                yield torch.randn(9, 4), torch.randint(3, (9,))

    return Fresh()


def train(
    batches: Any, folder: Path | None, *, stop: int | None = None, **settings: Any
) -> tuple[nn.Module, History]:
    model = settings.pop("model", network(norm=True, dropout=0.3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    given = {
        "epochs": EPOCHS,
        "seed": 3,
        "val": [data(20)],
        "accumulate": 2,
        "penalties": {stopping(stop): 0.1, gradient_norm: 0.1},
        "schedule": lambda step: 1 / (1 + step),
        "optimizer": optimizer,
        "checkpoint": None if folder is None else Checkpoint(folder, every=1),
        **settings,
    }
    return model, fit(model, batches, **given)


def same(a: nn.Module, b: nn.Module) -> bool:
    there = b.state_dict()
    return all(torch.equal(value, there[key]) for key, value in a.state_dict().items())


@pytest.mark.parametrize(
    "make",
    [loader, with_own_generator, with_sampler, prepared, drawn_as_they_come],
    ids=lambda make: make.__name__,
)
def test_it_ends_bit_by_bit_as_if_undisturbed(tmp_path, make: Callable):
    model, history = train(make(), None)
    assert len(history.losses) == UPDATES
    # At the start, amid an epoch, at its end, before the batch that is left over; saved or not.
    for every, stop in ((1, 0), (1, 4), (1, 6), (1, 8), (2, 5), (None, 4)):
        place = Checkpoint(tmp_path / f"{every}-{stop}", every=every)
        with pytest.raises(Interrupted):
            train(make(), None, stop=stop, checkpoint=place)
        resumed, later = train(make(), None, checkpoint=place)
        assert same(resumed, model)
        assert later == history


def test_with_an_update_rule_and_the_default_optimizer(tmp_path):
    settings = {"update": sharpness_aware, "optimizer": None, "clip": 0.5, "keep": "last"}
    model, history = train(loader(), None, **settings)
    with pytest.raises(Interrupted):
        train(loader(), tmp_path, stop=5, **settings)
    resumed, later = train(loader(), tmp_path, **settings)
    assert same(resumed, model)
    assert later == history


def test_interrupted_again_and_again(tmp_path):
    model, history = train(loader(), None)
    for stop in (2, 2, 4, 8):
        with pytest.raises(Interrupted):
            train(loader(), tmp_path, stop=stop)
    resumed, later = train(loader(), tmp_path)
    assert same(resumed, model)
    assert later == history
    assert later.seconds > 0


def test_a_finished_training_is_returned_at_once(tmp_path):
    model, history = train(loader(), tmp_path)
    again, later = train(
        loader(), tmp_path, penalties={stopping(UPDATES - 1): 0.1, gradient_norm: 0.1}
    )
    assert same(again, model)
    assert later == history


def test_a_path_is_a_checkpoint_at_the_end_of_each_epoch(tmp_path):
    model, _ = train(loader(), None)
    with pytest.raises(Interrupted):
        train(loader(), None, stop=5, checkpoint=str(tmp_path))
    resumed, _ = train(loader(), None, checkpoint=tmp_path)
    assert same(resumed, model)


def test_the_checkpoint_changes_nothing(tmp_path):
    model, history = train(loader(), None)
    kept, later = train(loader(), tmp_path)
    assert same(kept, model)
    assert later == history


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 4}, "seed: 3 there, 4 here"),
        ({"epochs": 4}, "epochs: 3 there, 4 here"),
        ({"accumulate": 1}, "accumulate: 2 there, 1 here"),
        ({"clip": 1.0}, "clip: None there, 1.0 here"),
        ({"precision": "bf16"}, "precision: None there, 'bf16' here"),
        ({"penalties": {gradient_norm: 0.2}}, "penalties:"),
        ({"keep": "last"}, "keep: 'best' there, 'last' here"),
        ({"val": None}, "val: True there, False here"),
        ({"optimizer": None}, "optimizer: SGD there, Adam here"),
        ({"loss": nn.functional.mse_loss}, "loss: flexure.train.arguments.cross_entropy there"),
        ({"update": sharpness_aware}, "update: None there, tests.train.scenarios.sharpness_aware"),
        ({"perturb": shifted}, "perturb: None there, tests.train.scenarios.shifted here"),
        (
            {"schedule": cosine(9)},
            "schedule: tests.train.test_resume.train.<locals>.<lambda> there",
        ),
        ({"batches": [data(9)] * 6}, "batches: 5 there, 6 here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_checkpoint_of_another_training_is_refused(tmp_path, changed: dict, named: str):
    with pytest.raises(Interrupted):
        train(loader(), tmp_path, stop=4)
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="that of another") as caught:
        train(changed.pop("batches", loader()), tmp_path, **changed)
    assert named in str(caught.value)
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_another_network_or_rate_is_refused_unchanged(tmp_path):
    with pytest.raises(Interrupted):
        train(loader(), tmp_path, stop=4)
    other = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    before = [parameter.clone() for parameter in other.parameters()]
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    penalties = {stopping(None): 0.1, gradient_norm: 0.1}
    with pytest.raises(FlexureError, match=r"shape of 0\.weight: \(16, 4\) there, \(5, 4\) here"):
        fit(
            other,
            loader(),
            epochs=EPOCHS,
            seed=3,
            val=[data(20)],
            accumulate=2,
            penalties=penalties,
            optimizer=optimizer,
            checkpoint=tmp_path,
        )
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), before, strict=True))
    model = network(norm=True)
    slower = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with pytest.raises(FlexureError, match=r"lr of group 0: 0\.05 there, 0\.01 here"):
        train(loader(), tmp_path, optimizer=slower)


class Endless:
    """A batch, several times, nobody knows how often."""

    def __init__(self, batch: Any, count: int) -> None:
        self._batch, self._count = batch, count

    def __iter__(self) -> Any:
        return (self._batch for _ in range(self._count))


@dataclass(frozen=True)
class Scaled:
    """A penalty with settings."""

    scale: float
    of: Callable[[Tensor], Tensor] = torch.square

    def __call__(self, step: Step) -> Tensor:
        return self.scale * self.of(step.output).mean()


def test_a_schedule_of_one_name_with_other_factors_is_refused(tmp_path):
    def falling(rate: float) -> Callable[[int], float]:
        return lambda step: rate**step

    train(loader(), tmp_path, schedule=falling(0.5))
    with pytest.raises(FlexureError, match="factors of the schedule: 1 to"):
        train(loader(), tmp_path, schedule=falling(0.4))
    train(loader(), tmp_path, schedule=falling(0.5))


def test_a_penalty_with_other_settings_is_refused(tmp_path):
    train(loader(), tmp_path, penalties={Scaled(1.0): 0.1})
    train(loader(), tmp_path, penalties={Scaled(1.0): 0.1})
    with pytest.raises(FlexureError, match=r"Scaled\(scale=1\.0.*there.*Scaled\(scale=2\.0.*here"):
        train(loader(), tmp_path, penalties={Scaled(2.0): 0.1})


@pytest.mark.parametrize("stop", [2, 3, None], ids=["amid", "between", "ended"])
def test_other_data_are_refused_unchanged(tmp_path, stop: int | None):
    x, y = data(45)
    pieces = list(zip(x.split(9), y.split(9), strict=True))
    place = {"checkpoint": tmp_path if stop == 3 else Checkpoint(tmp_path, every=1)}
    with suppress(Interrupted):
        train(pieces, tmp_path, stop=stop, **place)
    model = network(norm=True, dropout=0.3)
    before = [value.clone() for value in model.state_dict().values()]
    others = [(2 * x, y) for x, y in pieces]
    with pytest.raises(DataError, match="another first batch in epoch"):
        train(others, tmp_path, model=model, **place)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before, strict=True))


def test_other_frozen_weights_are_refused(tmp_path):
    def frozen(seed: int) -> nn.Module:
        model = network()
        torch.manual_seed(seed)
        nn.init.normal_(model[0].weight)
        model[0].requires_grad_(False)
        return model

    fit(frozen(1), loader(), epochs=1, seed=0, checkpoint=tmp_path)
    fit(frozen(1), loader(), epochs=1, seed=0, checkpoint=tmp_path)
    with pytest.raises(FlexureError, match="frozen parameters: 2 with values"):
        fit(frozen(2), loader(), epochs=1, seed=0, checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tree: tree.pop("format"), "format 2, got format 1, of another version"),
        (lambda tree: tree["record"].pop("val_loss"), "a whole checkpoint"),
        (lambda tree: tree["position"].pop("first"), "a whole checkpoint"),
        (lambda tree: tree["weights"].pop("0.bias"), "got nothing there .* for 0.bias"),
        (lambda tree: tree["optimizer"].pop("state"), "tree of an optimiser"),
    ],
)
def test_a_checkpoint_without_an_entry_changes_nothing(tmp_path, damage: Callable, message: str):
    fit(network(), loader(), epochs=1, seed=0, checkpoint=tmp_path)
    tree = load_state(tmp_path)
    damage(tree)
    save_state(tmp_path, tree)
    model = network()
    with torch.no_grad():
        model[4].bias.add_(1.0)
        before = [value.clone() for value in model.state_dict().values()]
    with pytest.raises(FlexureError, match=message):
        fit(model, loader(), epochs=1, seed=0, checkpoint=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before, strict=True))


def test_a_first_step_that_fails_after_resuming_says_so(tmp_path):
    def bad(step: Step) -> Tensor:
        return step.x * (torch.nan if step.index == 4 else 1.0)

    for said in ("largest gradient of the step before", "the first step since the training was"):
        with pytest.raises(FlexureError, match=f"got nan at step 4 .*{said}"):
            train(loader(), tmp_path, perturb=bad)


def test_a_folder_that_another_training_uses_is_named_as_the_reason(tmp_path, monkeypatch):
    true = os.replace

    def replace(source: Any, target: Any) -> None:
        os.unlink(source)  # as another training does with what it takes for left over
        true(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(FlexureError, match="another training that runs now uses this folder"):
        fit(network(), loader(), epochs=1, seed=0, checkpoint=tmp_path)


def test_fewer_data_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(Interrupted):
        train(Endless(data(9), 5), tmp_path / "run", stop=2)
    with pytest.raises(DataError, match="at least the 4 batches"):
        train(Endless(data(9), 1), tmp_path / "run")
    save_state(tmp_path / "foreign", {"something": 1})
    with pytest.raises(FlexureError, match="another kind of state"):
        train(loader(), tmp_path / "foreign")


def test_a_place_that_cannot_be_written_shows_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    model = network()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(FlexureError):
        fit(model, loader(), epochs=1, seed=0, checkpoint=tmp_path / "file")
    assert not calls
