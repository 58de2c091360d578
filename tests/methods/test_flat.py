"""Training by several methods side by side: fair, repeatable, resumable, and honest on failure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import flexure
from flexure.contracts import DataError, FlexureError
from flexure.data import Augmentation
from flexure.fingerprints import fingerprint
from flexure.methods import flat_run
from flexure.methods.flat_measured import settled
from flexure.methods.flat_methods import flat_methods
from flexure.methods.flat_result import FlatRun, FlatTraining
from flexure.models import MLP
from flexure.train import fit

Batch = tuple[Tensor, Tensor]


def network(seed: int) -> nn.Module:
    return MLP((2, 8, 8, 2))


def data(sizes: Sequence[int] = (64, 24, 40)) -> list[list[Batch]]:
    """Two arcs, noisy."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for size in sizes:
        y = torch.arange(size) % 2
        angle = 3.14 * torch.rand(size, generator=generator) + 3.14 * y
        x = torch.stack([angle.cos() + y, angle.sin() + 0.5 * y], 1)
        x = x + 0.2 * torch.randn(size, 2, generator=generator)
        found.append(list(zip(x.split(16), y.split(16), strict=True)))
    return found


FAST: dict[str, Any] = {
    "methods": ("standard", "relu", "gradreg"), "seeds": (1, 2), "epochs": 2, "batch_size": 16,
    "samples": 6, "radii": (0.1, 0.2),
}  # fmt: skip


def trained(model: Any = network, splits: Any = None, **options: Any) -> FlatTraining:
    train, val, test = splits or data()
    given = {"train": train, "val": val, "test": test, **FAST, **options}
    return flexure.train_flat(model, **given)


@pytest.fixture(scope="module")
def found() -> FlatTraining:
    return trained()


def numbers(result: FlatTraining) -> Any:
    """All that must be the same when a comparison is repeated."""
    told = json.loads(json.dumps(result.to_dict()))
    told.pop("timing")
    for row in told["rows"]:
        row.pop("relative_time")
        for estimates in (row["estimates"], row["differences"]):
            estimates.pop("seconds_per_epoch", None)
        for run in row["runs"]:
            run.pop("seconds")
            run.pop("seconds_per_epoch")
    return told


def tensors(run: FlatRun) -> dict[str, Tensor]:
    """All values of single samples."""
    kept = {"robust": run.robust, "probabilities": run.probabilities}
    for split in ("test", "train"):
        for measure, summary in getattr(run, split).items():
            for name, value in summary.result.samples().items():
                kept[f"{split}/{measure}/{name}"] = value
    return {name: value for name, value in kept.items() if value is not None}


def assert_same(first: FlatTraining, second: FlatTraining) -> None:
    assert numbers(first) == numbers(second)
    for one, other in zip(first.runs, second.runs, strict=True):
        mine, theirs = tensors(one), tensors(other)
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(
                mine[name], theirs[name], rtol=0, atol=0, equal_nan=True, msg=name
            )


def test_every_run_is_there_with_its_numbers(found: FlatTraining) -> None:
    assert [(r.method, r.seed) for r in found.runs] == [
        (method, seed) for method in FAST["methods"] for seed in (1, 2)
    ]
    assert found.samples == {"train": 64, "val": 24, "test": 40, "measured": 6}
    for run in found.runs:
        assert run.failure is None
        assert len(run.losses) == len(run.val_accuracy) == len(run.val_loss) == 2
        assert (run.kept, run.parameters) == (2, 8 * 3 + 8 * 9 + 2 * 9)
        assert len(run.test["curvature"]) == len(run.train["curvature"]) == 6
        assert len(run.test["calibration"]) == 40
        assert run.robust is not None
        assert run.robust.shape == (6, 2)
        assert run.robust[:, 0].sum() >= run.robust[:, 1].sum()
        assert run.probabilities is not None
        assert run.probabilities.shape == (200, 200, 2)
        assert run.seconds_per_epoch is not None
        assert 0 < run.seconds_per_epoch * 2 <= run.seconds
        assert run.lipschitz is not None
        assert run.lipschitz > 0
    assert [list(r.penalties) for r in found.runs[::2]] == [[], [], ["GradientNorm"]]


def test_all_methods_start_from_the_same_weights(found: FlatTraining) -> None:
    starts = {seed: {r.start for r in found.runs if r.seed == seed} for seed in (1, 2)}
    assert [len(one) for one in starts.values()] == [1, 1]
    assert starts[1] != starts[2]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert starts[1] == {fingerprint(network(1))}


def test_all_methods_see_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[tuple[int, int], list[Tensor]] = {}

    def spying(model: nn.Module, batches: Any, *, seed: int, **options: Any) -> Any:
        number = sum(key[0] == seed for key in seen)
        for epoch in range(2):
            batches.set_epoch(epoch)
            seen.setdefault((seed, number), []).extend(x for x, _ in batches)
        return fit(model, batches, seed=seed, **options)

    monkeypatch.setattr(flat_run, "fit", spying)
    trained(methods=("relu", "at"), epochs=2)
    assert set(seen) == {(1, 0), (1, 1), (2, 0), (2, 1)}
    orders = {key: torch.cat(xs) for key, xs in seen.items()}
    for seed in (1, 2):
        assert torch.equal(orders[seed, 0], orders[seed, 1])
        assert not torch.equal(orders[seed, 0][:64], orders[seed, 0][64:])
    assert not torch.equal(orders[1, 0], orders[2, 0])


def test_a_comparison_can_be_repeated(found: FlatTraining) -> None:
    assert_same(trained(), found)


def test_more_methods_do_not_change_a_run(found: FlatTraining) -> None:
    alone = trained(methods="gradreg", seeds=(1,))
    assert numbers(alone)["rows"][0]["runs"][0] == numbers(found)["rows"][2]["runs"][0]


class Stop(Exception):
    """Ends a comparison amid its work."""


@pytest.mark.parametrize("where", ["train", "curvature", "attack"])
def test_an_interrupted_comparison_goes_on_bit_by_bit(
    where: str, found: FlatTraining, tmp_path: Path
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("relu, seed 2") and where in stage and done >= total / 2:
            raise Stop

    with pytest.raises(Stop):
        trained(store=tmp_path, progress=stop)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(kept) == 3
    stages: list[str] = []
    again = trained(store=tmp_path, progress=lambda stage, done, total: stages.append(stage))
    assert_same(again, found)
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    assert not [stage for stage in stages if stage.startswith("standard")]
    assert not list(tmp_path.glob("*.checkpoint"))


def test_a_finished_comparison_is_read_and_extended(found: FlatTraining, tmp_path: Path) -> None:
    trained(store=tmp_path, methods="relu")
    again = trained(store=tmp_path, methods=("relu", "standard", "gradreg"))
    assert tensors(again.runs[0]).keys() == tensors(found.runs[2]).keys()
    assert numbers(again)["rows"][0]["runs"] == numbers(found)["rows"][1]["runs"]
    with pytest.raises(FlexureError, match="another lr"):
        trained(store=tmp_path, lr=0.01)
    other = trained(store=tmp_path, methods="gradreg", strengths={"gradreg": 1.0}, seeds=(1,))
    assert other.runs[0].losses != found.runs[4].losses
    shutil.rmtree(tmp_path)


def test_a_training_that_fails_is_told_and_the_others_go_on() -> None:
    result = trained(methods=("standard", "gradreg"), strengths={"gradreg": 1e30})
    assert [run.failure is None for run in result.runs] == [True, True, False, False]
    assert "finite" in (result.runs[2].failure or "")
    assert result["gradreg"].estimates == {}
    assert any("gradreg, seed 1: failed" in note for note in result.notes)
    assert "–" in str(result).splitlines()[2]
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_network_that_is_not_finite_in_the_end_is_a_failed_run() -> None:
    result = trained(methods="relu", lr=1e25, weight_decay=0.0, epochs=1, batch_size=64)
    for run in result.runs:  # one step alone, whose loss and gradient were finite
        assert "validation" in (run.failure or "")
        assert (run.test, run.robust) == ({}, None)


def test_what_a_network_does_not_have_is_told(found: FlatTraining) -> None:
    assert "rate" not in found["relu"].estimates
    assert any(note.startswith("relu has no rate") for note in found.notes)
    assert "rate" in found["standard"].estimates


def test_a_network_is_trained_on_from_its_weights_and_is_left_alone() -> None:
    model = network(0)
    before = fingerprint(model)
    result = trained(model, methods=("relu", "standard"), epochs=1)
    assert fingerprint(model) == before
    assert {run.start for run in result.runs} == {before}
    assert [type(m) for m in model.modules() if isinstance(m, nn.ReLU | nn.Softplus)] == [
        nn.ReLU
    ] * 2
    assert any("weights that the network had" in note for note in result.notes)
    assert result.runs[0].losses != result.runs[1].losses  # other batches from another seed


def test_a_factory_that_does_not_look_at_the_seed_is_told() -> None:
    def always(seed: int) -> nn.Module:
        torch.manual_seed(0)
        return network(0)

    result = trained(always, methods="relu", epochs=1)
    assert any("same initial weights for every seed" in note for note in result.notes)


def images() -> list[list[Batch]]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for size in (48, 16, 24):
        y = torch.arange(size) % 2
        x = 0.4 * torch.rand(size, 2, 6, 6, generator=generator) + 0.5 * y[:, None, None, None]
        found.append([(x, y)])
    return found


def convolutions(seed: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip


PIXELS: dict[str, Any] = {"mean": (0.4, 0.5), "std": (0.25, 0.5), "bounds": (0.0, 1.0)}


def test_low_curvature_networks_of_images(tmp_path: Path) -> None:
    result = trained(
        convolutions, images(), methods=("standard", "lcnn+gradreg"), seeds=(1,),
        augment=Augmentation(crop=1), weights=tmp_path, **PIXELS,
    )  # fmt: skip
    standard, flat = result.runs
    assert (standard.failure, flat.failure) == (None, None)
    assert list(flat.betas) == ["2"]
    assert list(flat.gammas) == ["1"]
    assert flat.parameters == standard.parameters + 2
    assert set(flat.penalties) == {"LowCurvature", "GradientNorm"}
    assert flat.lipschitz is not None
    assert flat.probabilities is None
    stored = load_file(tmp_path / "standard-1.safetensors")
    model = convolutions(0)
    model.load_state_dict(stored)
    x, y = images()[2][0]
    mean, std = (torch.tensor(PIXELS[k])[:, None, None] for k in ("mean", "std"))
    right = model.eval()((x - mean) / std).argmax(1) == y
    assert torch.equal(standard.test["calibration"].result.correct, right)


def test_measures_are_in_pixels_whatever_the_network_normalises() -> None:
    """The same network as one of pixels: dividing by std inside, or by the first layer."""
    settings: dict[str, Any] = {"methods": "relu", "seeds": (1,), "epochs": 1, "lr": 1e-9}
    inside = trained(convolutions, images(), **settings, **PIXELS).runs[0]

    def outside(seed: int) -> nn.Module:
        model = convolutions(seed)
        mean, std = (torch.tensor(PIXELS[k])[:, None, None] for k in ("mean", "std"))

        class Normalised(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, x: Tensor) -> Tensor:
                return self.model((x - mean) / std)

        return Normalised()

    plain = trained(outside, images(), **settings, bounds=(0.0, 1.0)).runs[0]
    for name in ("gradient_norm", "normalized"):
        mine, theirs = (r.test["curvature"].result.samples()[name] for r in (inside, plain))
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert torch.equal(inside.robust, plain.robust)  # type: ignore[arg-type]


def test_learned_betas_and_gammas_have_no_weight_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[Any] = []

    def spying(model: nn.Module, batches: Any, *, optimizer: Any, **options: Any) -> Any:
        groups.extend(optimizer.param_groups)
        return fit(model, batches, optimizer=optimizer, **options)

    monkeypatch.setattr(flat_run, "fit", spying)
    trained(convolutions, images(), methods="lcnn", seeds=(1,), epochs=1, **PIXELS)
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(5e-4, 5), (0.0, 2)]


def test_the_best_epoch_can_be_kept() -> None:
    result = trained(methods="relu", epochs=3, keep="best", lr=0.5, seeds=(1, 2, 3))
    for run in result.runs:
        assert run.kept == 1 + run.val_accuracy.index(max(run.val_accuracy))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no method": ({"methods": ()}, "at least one method"),
    "method": ({"methods": "magic"}, "magic"),
    "optimizer": ({"optimizer": "magic"}, "sgd, adam"),
    "lr": ({"lr": 0.0}, "learning rate"),
    "lr nan": ({"lr": float("nan")}, "learning rate"),
    "decay": ({"weight_decay": -1.0}, "weight decay"),
    "clip": ({"clip": 0.0}, "gradient norm"),
    "keep": ({"keep": "first"}, "'last' or 'best'"),
    "epochs": ({"epochs": 0}, "epochs"),
    "samples": ({"samples": 0}, "samples"),
    "seeds": ({"seeds": (1, 1)}, "seeds"),
    "radii": ({"radii": (0.0,)}, "radii"),
    "radius twice": ({"radii": (0.1, 0.1)}, "once"),
    "no rectifiers": ({"model": lambda seed: MLP((2, 3, 2), nn.Tanh), "methods": "softplus-wd"},
                      "'softplus-wd' does not fit"),
    "factory": ({"model": lambda seed: None}, "factory to return"),
    "classes": ({"model": lambda seed: MLP((2, 3, 2)), "splits": "three"}, "3 classes"),
    "residual": ({"methods": "lcnn", "residual": "magic"}, "residual"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_told_before_any_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, told = BAD[name]
    options = dict(options)
    splits = data()
    if options.pop("splits", None):
        splits = [[(x, torch.arange(len(y)) % 3) for x, y in split] for split in splits]
    monkeypatch.setattr(flat_run, "fit", None)
    with pytest.raises(FlexureError, match=told):
        trained(options.pop("model", network), splits, **options)


def test_shared_samples_are_refused() -> None:
    train, val, _ = data()
    with pytest.raises(DataError, match="disjoint"):
        trained(splits=[train, val, list(train)])


def test_what_is_measured_is_the_trained_network_without_its_parametrizations() -> None:
    model = convolutions(0)
    x = torch.rand(3, 2, 6, 6)
    flat_methods("lcnn")[0].change(model, x, residual="sum")
    before = fingerprint(model)
    copy = settled(model)
    assert not any(nn.utils.parametrize.is_parametrized(m) for m in copy.modules())
    assert torch.equal(copy(x), model.eval()(x))
    assert nn.utils.parametrize.is_parametrized(model[0])
    assert fingerprint(model) == before
    assert type(copy[0]) is nn.Conv2d
