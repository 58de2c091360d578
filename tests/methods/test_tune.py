"""The comparison of adaptation methods: fair, repeatable, resumable, and without a trace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flexure
from flexure.contracts import DataError, FlexureError
from flexure.fingerprints import fingerprint
from flexure.methods import tune_run
from flexure.methods.baselines import FullFinetune, LinearProbe
from flexure.methods.lora import LoRA
from flexure.methods.shuffled import Shuffled
from flexure.methods.trainable_ct import TrainableCT
from flexure.methods.tune import tune
from flexure.methods.tune_result import TuneResult

Batch = tuple[Tensor, Tensor]


def network() -> nn.Module:
    """Convolutions, BatchNorm with statistics of its own, dropout: all that can leak."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.1), nn.Linear(32, 5),
        )  # fmt: skip
        model(torch.randn(64, 1, 8, 8))
        nn.init.constant_(model[4].weight, 20.0)  # features that a head learns from at once
    return model.eval()


def data(sizes: tuple[int, ...] = (90, 60, 80), classes: int = 3) -> Iterator[list[Batch]]:
    """Patterns of three classes under noise, in batches of 40."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randn(classes, 1, 8, 8, generator=generator)
    for size in sizes:
        y = torch.arange(size) % classes
        x = patterns[y] + 1.5 * torch.randn(size, 1, 8, 8, generator=generator)
        yield list(zip(x.split(40), y.split(40), strict=True))


FAST: dict[str, Any] = {"epochs": 2, "seeds": (1, 2), "rate_factors": (1.0, 10.0), "batch_size": 8}


def compare(model: nn.Module | None = None, **options: Any) -> TuneResult:
    train, val, test = data()
    given = {"train": train, "val": val, "test": test, **FAST, **options}
    return tune(network() if model is None else model, **given)


@pytest.fixture(scope="module")
def found() -> TuneResult:
    return compare()


def numbers(result: TuneResult) -> Any:
    """All that must be the same when a comparison is repeated."""
    found = json.loads(json.dumps(result.to_dict()))
    found.pop("timing")
    for arm in found["arms"]:
        arm.pop("seconds")
        for run in arm["runs"]:
            run.pop("seconds")
    return found


def test_every_arm_is_there_with_its_numbers(found: TuneResult) -> None:
    assert [arm.name for arm in found.arms] == ["probe", "steered", "lora", "trainable_ct", "full"]
    counts = {arm.name: arm.parameters for arm in found.arms}
    assert counts["probe"] == counts["steered"] == 0
    assert counts["trainable_ct"] == 2 * (6 + 8)
    assert counts["lora"] == (6 + 9) + (8 + 54)
    assert counts["full"] == (54 + 6) + 12 + (8 * 54 + 8) + 16
    assert {arm.head_parameters for arm in found.arms} == {32 * 3 + 3}
    for arm in found.arms:
        assert len(arm.runs) == len(arm.accuracies) == 2
        assert [run.seed for run in arm.runs] == [1, 2]
        assert all(len(run.val_accuracy) == len(run.losses) == 2 for run in arm.runs)
        assert arm.accuracy is not None
        assert 0 <= arm.accuracy.low <= arm.accuracy.mean <= arm.accuracy.high <= 1
        assert arm.accuracy.mean == pytest.approx(sum(arm.accuracies) / 2)
        assert (arm.step_bytes or 0) > 0
        assert arm.seconds > 0
    sweeps = {arm.name: len(arm.candidates) for arm in found.arms}
    assert sweeps == {"probe": 1, "steered": 2, "lora": 2, "trainable_ct": 2, "full": 2}


def test_the_difference_to_the_probe_is_paired(found: TuneResult) -> None:
    _, _, test = data()
    y = torch.cat([y for _, y in test])
    probe = torch.stack([run.predictions == y for run in found["probe"].runs]).int()
    assert found["probe"].difference is None
    for arm in found.arms[1:]:
        hits = torch.stack([run.predictions == y for run in arm.runs]).int()
        told = arm.difference
        assert told is not None
        assert told.points == pytest.approx(100 * float((hits - probe).float().mean()), abs=1e-4)
        assert told.wins == int(((hits - probe).sum(0) > 0).sum())
        assert told.losses == int(((hits - probe).sum(0) < 0).sum())
        assert told.n == 80
        assert told.low <= told.points <= told.high


def test_learned_dials_are_told_and_nothing_else_has_any(found: TuneResult) -> None:
    for run in found["trainable_ct"].runs:
        assert [len(v) for v in run.betas.values()] == [len(v) for v in run.cs.values()] == [6, 8]
        assert run.saturated is not None
    assert found["steered"].saturated is None
    assert found["lora"].runs[0].betas == {}


def test_the_model_is_left_as_it_was() -> None:
    model = network()
    model[0].train()
    model[3].weight.requires_grad_(False)
    before = fingerprint(model), [m.training for m in model.modules()]
    asked = [p.requires_grad for p in model.parameters()]
    rng = torch.get_rng_state()
    compare(model)
    assert (fingerprint(model), [m.training for m in model.modules()]) == before
    assert [p.requires_grad for p in model.parameters()] == asked
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)


def test_the_same_arguments_give_the_same_numbers(found: TuneResult) -> None:
    assert numbers(compare()) == numbers(found)


def test_arms_do_not_depend_on_each_other(found: TuneResult) -> None:
    alone = compare(arms=["lora"])
    assert [arm.name for arm in alone.arms] == ["probe", "lora"]
    for name in ("probe", "lora"):
        assert numbers(alone)["arms"][name == "lora"] in numbers(found)["arms"]


def test_all_arms_start_from_one_head_and_see_the_same_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heads, seen, plans = [], [], []
    original = tune_run.fit

    def fit(model: nn.Module, batches: Any, **options: Any) -> Any:
        heads.append((options["seed"], model[9].weight.detach().clone()))
        rates = [(g["name"], g["lr"]) for g in options["optimizer"].param_groups]
        plans.append((dict(rates)["head"], options.get("schedule"), options["epochs"]))
        batches.set_epoch(1)
        seen.append((options["seed"], torch.cat([y for _, y in batches])))
        return original(model, batches, **options)

    monkeypatch.setattr(tune_run, "fit", fit)
    monkeypatch.setattr(tune_run, "_step_bytes", lambda *given: 0)
    compare()
    assert len(heads) == (1 + 1) + 4 * (2 + 1)
    for seed in (1, 2):
        for found in (heads, seen):
            own = [tensor for s, tensor in found if s == seed]
            assert all(torch.equal(tensor, own[0]) for tensor in own)
    assert not torch.equal(heads[0][1], heads[1][1])
    assert len(set(plans)) == 1
    rate, schedule, epochs = plans[0]
    assert (rate, epochs) == (1e-3, 2)
    assert [schedule(k) for k in (0, 1, 11, 12)] == pytest.approx([1 / 12, 2 / 12, 1, 1])


def test_rank_0_lora_is_the_probe() -> None:
    result = compare(arms={"nothing": LoRA(rank=0)}, rate_factors=(1.0,))
    probe, nothing = numbers(result)["arms"]
    assert nothing["runs"][0]["val_accuracy"] == probe["runs"][0]["val_accuracy"]
    assert result["nothing"].difference is not None
    assert result["nothing"].difference.points == 0


def test_selection_never_sees_test_labels(found: TuneResult) -> None:
    train, val, test = data()
    poisoned = [(x, (y + 1) % 3) for x, y in test]
    other = tune(network(), train=train, val=val, test=poisoned, **FAST)
    for arm, clean in zip(other.arms, found.arms, strict=True):
        assert (arm.setting, arm.method, arm.candidates) == (
            clean.setting, clean.method, clean.candidates,
        )  # fmt: skip
        assert [run.kept for run in arm.runs] == [run.kept for run in clean.runs]
    assert other["probe"].accuracies != found["probe"].accuracies
    without = compare(test=None)
    assert [arm.setting for arm in without.arms] == [arm.setting for arm in found.arms]
    assert without["lora"].difference is None


def test_the_best_on_validation_data_is_chosen(found: TuneResult) -> None:
    for arm in found.arms:
        scores = [c.score for c in arm.candidates]
        chosen = next(c for c in arm.candidates if c.setting == arm.setting)
        assert chosen.score == max(scores)
        assert scores.index(chosen.score) == list(arm.candidates).index(chosen)
        assert arm.runs[0].score == chosen.score


def test_arms_of_ones_own() -> None:
    several = [TrainableCT(init_beta=0.9), TrainableCT(init_beta=0.7)]
    result = compare(arms={"mine": several, "wide": LoRA(rank=2)}, epochs=1)
    assert [c.setting for c in result["mine"].candidates] == ["init_beta 0.9", "init_beta 0.7"]
    assert [c.rate for c in result["wide"].candidates] == [1e-3, 1e-2]
    assert result["wide"].method["rank"] == 2
    assert result["probe"].method == {"method": "linear_probe"}


def test_a_setting_that_diverges_is_told_and_not_chosen() -> None:
    result = compare(arms={"wild": [LoRA(learning_rate=1e30), LoRA()]}, epochs=1)
    assert result["wild"].method["learning_rate"] == 1e-3
    assert result["wild"].candidates[0].score is None
    assert any("wild, learning_rate 1e+30: failed" in note for note in result.notes)
    with pytest.raises(FlexureError, match=r"wild.*lower its learning rate, or leave"):
        compare(arms={"wild": [LoRA(learning_rate=1e30)]}, epochs=1)


def test_a_choice_at_the_end_of_its_sweep_is_told() -> None:
    result = compare(arms=["full"], epochs=1, rate_factors=(1.0, 1e-3, 1e-6))
    assert any("full: the chosen learning rate is the largest of" in note for note in result.notes)


def test_adapters_are_those_of_the_chosen_runs(tmp_path: Path, found: TuneResult) -> None:
    result = compare(adapters=tmp_path)
    assert numbers(result) == numbers(found)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(a.name for a in found.arms)
    _, _, test = data()
    for arm in found.arms:
        model = network()
        flexure.load_adapter(model, tmp_path / arm.name)
        with torch.no_grad():
            classes = torch.cat([model(x).argmax(-1) for x, _ in test])
        assert torch.equal(classes, arm.runs[0].predictions), arm.name


class Cut(Exception):
    pass


def test_an_interrupted_comparison_continues(
    tmp_path: Path, found: TuneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = tune_run.fit, []

    def fit(*given: Any, **options: Any) -> Any:
        calls.append(options["seed"])
        if len(calls) == 12:
            raise Cut
        return original(*given, **options)

    monkeypatch.setattr(tune_run, "fit", fit)
    model = network()
    with pytest.raises(Cut):
        compare(model, store=tmp_path)
    assert fingerprint(model) == fingerprint(network())
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(done) >= 5
    assert numbers(compare(store=tmp_path)) == numbers(found)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(list(tmp_path.glob("*.safetensors"))) == 14
    calls.clear()
    monkeypatch.setattr(tune_run, "fit", lambda *given, **options: pytest.fail("trained again"))
    assert numbers(compare(store=tmp_path)) == numbers(found)


def test_a_run_in_progress_continues(
    tmp_path: Path, found: TuneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second epoch of the first run, which then goes on from its first."""
    original, began = tune_run.fit, []

    class Cutting:
        def __init__(self, batches: Any) -> None:
            self._batches = batches

        def set_epoch(self, epoch: int) -> None:
            began.append(epoch)
            if began == [0, 1]:
                raise Cut
            self._batches.set_epoch(epoch)

        def __iter__(self) -> Any:
            return iter(self._batches)

        def __len__(self) -> int:
            return len(self._batches)

    monkeypatch.setattr(tune_run, "fit", lambda m, b, **o: original(m, Cutting(b), **o))
    monkeypatch.setattr(tune_run, "_step_bytes", lambda *given: found["probe"].step_bytes)
    with pytest.raises(Cut):
        compare(arms=["probe"], store=tmp_path)
    result = compare(arms=["probe"], store=tmp_path)
    # On its return it draws the first batch of epoch 0 again, to see that the data are the same.
    assert began == [0, 1, 0, 1, 0, 1]
    assert numbers(result)["arms"][0] == numbers(found)["arms"][0]
    assert not list(tmp_path.glob("*.checkpoint"))


def test_more_arms_and_seeds_build_on_a_store(
    tmp_path: Path, found: TuneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(arms=["lora"], seeds=(1,), store=tmp_path)
    original, calls = tune_run.train_once, []

    def train_once(task: Any, arm: str, *given: Any, **options: Any) -> Any:
        calls.append(arm)
        return original(task, arm, *given, **options)

    monkeypatch.setattr("flexure.methods.tune.train_once", train_once)
    result = compare(arms=["lora"], store=tmp_path)
    assert calls == ["probe", "lora"]  # the second seed of each
    assert numbers(result)["arms"][1] == numbers(found)["arms"][2]


FOREIGN = {
    "model": ({"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))},
              "another model"),
    "epochs": ({"epochs": 3}, r"another training \(2 epochs.* there, 3 epochs.* here\)"),
    "schedule": ({"schedule": None}, "another schedule"),
    "batches": ({"batch_size": 30}, "another training"),
    "where": ({"where": ["2"]}, r"another where \(None there, \['2'\] here\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_the_store_of_another_comparison_is_refused(name: str, tmp_path: Path) -> None:
    changes, what = FOREIGN[name]
    compare(arms=["probe"], store=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FlexureError, match=what):
        compare(arms=["probe"], store=tmp_path, **changes)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_store_of_other_data_is_refused(tmp_path: Path) -> None:
    compare(arms=["probe"], store=tmp_path)
    train, val, test = data()
    changed = {
        "validation labels": {"val": [(x, (y + 1) % 3) for x, y in val]},
        "train data": {"train": [(x + 1, y) for x, y in train]},
        "test data": {"test": [(x + 1, y) for x, y in test]},
    }
    for what, other in changed.items():
        with pytest.raises(FlexureError, match=f"another.*{what.replace('validation', 'val')}"):
            compare(arms=["probe"], store=tmp_path, **other)


def test_a_file_that_lies_is_refused_and_a_damaged_one_replaced(
    tmp_path: Path, found: TuneResult
) -> None:
    compare(arms=["lora"], store=tmp_path)
    probe, lora = sorted(tmp_path.glob("probe-*-1.safetensors")), sorted(tmp_path.glob("lora-*"))
    whole = lora[0].read_bytes()
    lora[0].write_bytes(whole[: len(whole) // 2])
    assert numbers(compare(arms=["lora"], store=tmp_path))["arms"][1] == numbers(found)["arms"][2]
    shutil.copy(probe[0], lora[0])
    with pytest.raises(FlexureError, match="to hold the run that its name says"):
        compare(arms=["lora"], store=tmp_path)


def test_batches_may_come_from_a_function_of_the_seed(found: TuneResult) -> None:
    train, val, test = data()
    x, y = (torch.cat(parts) for parts in zip(*train, strict=True))

    def shuffled(seed: int) -> Any:
        return Shuffled(x, y, 8, seed=seed, device=torch.device("cpu"))

    result = tune(network(), train=shuffled, val=val, test=test, arms=["lora"], **FAST)
    assert result.batch_size == 8
    accuracy = result["lora"].accuracy
    assert accuracy is not None
    assert accuracy.samples == found.samples["test"]
    again = tune(network(), train=shuffled, val=val, test=test, arms=["lora"], **FAST)
    assert numbers(again) == numbers(result)


def test_the_order_of_the_training_data_does_not_matter(found: TuneResult, tmp_path: Path) -> None:
    """As of a loader that shuffles: another order each time, the same comparison."""
    train, *_ = data()
    x, y = (torch.cat(parts) for parts in zip(*train, strict=True))
    order = torch.randperm(90, generator=torch.Generator().manual_seed(5))
    mixed = list(zip(x[order].split(30), y[order].split(30), strict=True))
    compare(arms=["probe"], store=tmp_path)
    result = compare(arms=["probe"], store=tmp_path, train=mixed)
    assert numbers(result)["arms"][0] == numbers(compare(arms=["probe"], train=mixed))["arms"][0]
    assert numbers(result)["arms"][0] == numbers(found)["arms"][0]


def test_progress_is_told_in_steps() -> None:
    told: list[tuple[str, int, int]] = []
    compare(arms=["lora"], progress=lambda *given: told.append(given))
    assert told[-1] == ("lora", 3 * 2 * 12, 3 * 2 * 12)
    for name in ("probe", "lora"):
        done = [d for arm, d, _ in told if arm == name]
        assert done == sorted(done)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown arm": ({"arms": ["magic"]}, "expected arms among probe, steered"),
    "no arm": ({"arms": []}, "got none"),
    "arm without a method": ({"arms": {"mine": []}}, "at least one method"),
    "class for a method": ({"arms": {"mine": LoRA}}, "such as LoRA"),
    "the same twice": ({"arms": {"mine": [LoRA(), LoRA()]}}, "one twice"),
    "arm like a path": ({"arms": {"../mine": LinearProbe()}}, "letters, digits"),
    "no epochs": ({"epochs": 0}, "epochs"),
    "no batch": ({"batch_size": 0}, "batch_size"),
    "seeds twice": ({"seeds": (1, 1)}, "different whole seeds"),
    "no seeds": ({"seeds": ()}, "different whole seeds"),
    "factor 0": ({"rate_factors": (1, 0)}, "positive factors"),
    "no head": ({"head": "nowhere"}, "nowhere"),
    "a head that is none": ({"head": "3"}, "'3'"),
    "no site": ({"where": ["layer9"]}, r"the arm 'steered' does not fit.*layer9.*leave it out"),
    "a seed too large": ({"seeds": (1, 2**64)}, r"below 2\^64"),
    "a negative seed": ({"seeds": (-1,)}, "at least 0"),
    "too large a batch": ({"batch_size": 10**22}, r"below 2\^31"),
    "head's rate 0": ({"head_learning_rate": 0}, "above 0 and at most 1000, got 0"),
    "head's rate nan": ({"head_learning_rate": float("nan")}, "at most 1000, got nan"),
    "head's rate 1e30": ({"head_learning_rate": 1e30}, r"at most 1000, got 1e\+30"),
    "head's rate a word": ({"head_learning_rate": "a"}, "at most 1000, got 'a'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name: str) -> None:
    options, message = MISTAKES[name]
    with pytest.raises(FlexureError, match=message):
        compare(**options)


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "where": ({"where": ["layer9"]}, "'steered' does not fit"),
    "a later trial": (
        {"arms": {"full": FullFinetune(), "mine": [LoRA(), LoRA(where=["nowhere"])]}},
        "'mine' does not fit",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_arm_that_does_not_fit_is_told_before_any_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, message = UNFIT[name]
    model, trained = network(), []
    before = fingerprint(model), torch.get_rng_state()
    original = tune_run.fit
    monkeypatch.setattr(tune_run, "fit", lambda *a, **o: trained.append(1) or original(*a, **o))
    with pytest.raises(FlexureError, match=f"{message}.*or leave it out.*arms="):
        compare(model, store=tmp_path, **options)
    assert not trained
    assert fingerprint(model) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert not list(tmp_path.iterdir())
    compare(model, store=tmp_path, arms=["probe"], epochs=1)  # the folder is nobody's yet


def test_data_for_two_purposes_is_refused() -> None:
    train, val, test = data()
    with pytest.raises(DataError, match="the same object"):
        tune(network(), train=train, val=val, test=val, **FAST)
    with pytest.raises(DataError, match="must be disjoint"):
        tune(network(), train=train, val=val, test=[(x.clone(), y) for x, y in val], **FAST)
    with pytest.raises(DataError, match="at least two classes"):
        tune(network(), train=[(x, y * 0) for x, y in train], val=val, test=test, **FAST)


def test_an_adapted_model_is_refused() -> None:
    model = network()
    adaptation = flexure.methods.adapt.adapt(model, LinearProbe(), example=torch.zeros(2, 1, 8, 8))
    with pytest.raises(FlexureError, match=r"'default'.*disable"):
        compare(model)
    adaptation.disable()
    compare(model, arms=["probe"], epochs=1)


def test_the_table_is_printed(found: TuneResult) -> None:
    text = str(found)
    assert all(arm.name in text for arm in found.arms)
    assert "95 % intervals over test samples and 2 seeds; differences are paired." in text
