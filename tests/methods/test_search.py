"""The search over beta: right numbers, honest comparisons, and a model left as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from flexure.contracts import DataError, FlexureError
from flexure.methods import search as search_module
from flexure.methods.probe import fit_probes
from flexure.methods.search import BETAS, search_beta
from flexure.methods.search_result import paired_gain, standard_error
from tests.reference.probe import train_sequentially

CLASSES, WIDTH = 3, 24


GRID = (0.3, 0.6, 0.8, 0.9)

Batch = tuple[Tensor, Tensor]


def network(activation: type[nn.Module] = nn.ReLU, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, WIDTH),
        activation(),
        nn.Linear(WIDTH, WIDTH),
        activation(),
        nn.Linear(WIDTH, 2),
    )


def samples(n: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    radius = x[:, :3].square().sum(1) + 0.7 * torch.randn(n, generator=generator)
    return x, (radius > 1.8).long() + (radius > 3.5).long()


def batches(n: int, seed: int, size: int = 50) -> list[Batch]:
    x, y = samples(n, seed)
    return list(zip(x.split(size), y.split(size), strict=True))


TRAIN, VAL, TEST = batches(240, 1), batches(150, 2), batches(200, 3)


def reference_features(model: nn.Sequential, data: list[Batch], beta: float, c: float) -> Tensor:
    """Equation 8 written down, in float64."""
    x = torch.cat([x for x, _ in data]).double()
    for layer in list(model)[:-1]:
        if isinstance(layer, nn.Linear):
            x = F.linear(x, layer.weight.double(), layer.bias.double())
        elif beta == 1:
            x = x.clamp_min(0)
        else:
            silu = x * torch.sigmoid(beta / (1 - beta) * x)
            x = c * silu + (1 - c) * (1 - beta) * F.softplus(x / (1 - beta), threshold=1e9)
    return x.detach()


def labels(data: list[Batch]) -> Tensor:
    return torch.cat([y for _, y in data])


class Counting:
    """Batches that count how often they are iterated."""

    def __init__(self, data: list[Batch]) -> None:
        self.data, self.passes = data, 0

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        return iter(self.data)


def frozen(model: nn.Module) -> dict[str, Any]:
    """Everything that a search must leave alone."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "training": [module.training for module in model.modules()],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "random": torch.random.get_rng_state(),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = frozen(model)
    for key in ("modules", "training", "hooks"):
        assert after[key] == before[key]
    assert after["state"].keys() == before["state"].keys()
    assert all(torch.equal(after["state"][k], before["state"][k]) for k in after["state"])
    assert torch.equal(after["random"], before["random"])


@pytest.mark.parametrize("c", [0.5, "balanced"])
def test_scores_are_those_of_probes_on_independently_computed_features(c: Any) -> None:
    model = network()
    result = search_beta(model, train=TRAIN, val=VAL, betas=GRID, c=c)
    assert result.betas == (*GRID, 1.0)
    cs = [b * b / (1 + b * b) if c == "balanced" else c for b in result.betas]
    assert result.cs == pytest.approx(cs)
    sets = [
        [reference_features(model, data, b, m) for b, m in zip(result.betas, cs, strict=True)]
        for data in (TRAIN, VAL)
    ]
    probes = fit_probes(sets[0], labels(TRAIN), val_features=sets[1], val_labels=labels(VAL))
    assert result.scores == tuple(probe.accuracy for probe in probes)
    assert result.errors == tuple(standard_error(p.accuracy, 150) for p in probes)
    assert len(set(result.scores)) > 2
    assert result.best.score == max(result.scores)
    assert result.baseline.beta == 1.0
    close = [s for s in result.settings if s.score >= result.best.score - result.best.error]
    assert list(result.within_one_se) == close
    assert result.best in close
    assert (result.head, result.classes) == ("4", CLASSES)
    assert result.features.used == "exact"


def test_the_published_protocol_picks_what_sequential_training_picks() -> None:
    model = network()
    with torch.no_grad():  # features that the published probe can learn from in 20 epochs
        model[2].weight.mul_(4.0)
    result = search_beta(model, train=TRAIN, val=VAL, betas=GRID, protocol="published", seed=43)
    scores = []
    for beta in result.betas:
        x, x_val = (reference_features(model, data, beta, 0.5).float() for data in (TRAIN, VAL))
        found = train_sequentially(
            x, labels(TRAIN), val_features=x_val, val_labels=labels(VAL), seed=43
        )
        scores.append(found.accuracy)
    assert result.scores == tuple(scores)
    assert len(set(scores)) > 1
    assert result.best_beta == max(zip(scores, result.betas, strict=True))[1]
    assert result.protocol == "published"


def test_the_model_is_left_as_it_was() -> None:
    model = network()
    model.train()
    model[2].eval()
    before = frozen(model)
    search_beta(model, train=TRAIN, val=VAL, test=TEST, betas=GRID)
    assert_unchanged(model, before)


def test_selection_never_sees_test_data() -> None:
    x, y = samples(200, 3)
    flipped = [(x, (y + 1) % CLASSES)]
    model, test = network(), Counting(TEST)
    plain = search_beta(model, train=TRAIN, val=VAL, test=test, betas=GRID)
    other = search_beta(model, train=TRAIN, val=VAL, test=flipped, betas=GRID)
    assert test.passes <= 4  # a look at its type, its labels, the best setting, the baseline
    assert (plain.scores, plain.best) == (other.scores, other.best)
    assert plain.test != other.test


def test_the_gain_is_on_test_data_and_paired() -> None:
    model = network()
    result = search_beta(model, train=TRAIN, val=VAL, test=TEST, betas=GRID)
    hits = []
    for setting in (result.best, result.baseline):
        x = reference_features(model, TEST, setting.beta, setting.c)
        hits.append(setting.probe.logits(x).argmax(1) == labels(TEST))
    assert result.best.beta != 1.0
    assert result.test is not None
    assert result.gain is not None
    assert result.test.best == int(hits[0].sum()) / 200
    assert result.test.baseline == int(hits[1].sum()) / 200
    assert result.gain.wins == int((hits[0] & ~hits[1]).sum())
    assert result.gain.losses == int((hits[1] & ~hits[0]).sum())
    assert result.gain.points == pytest.approx(100 * (result.test.best - result.test.baseline))
    assert result.gain.low < result.gain.points < result.gain.high
    assert result.gain == paired_gain(hits[0], hits[1])


def test_without_test_data_no_gain_is_claimed() -> None:
    result = search_beta(network(), train=TRAIN, val=VAL, betas=GRID)
    assert result.gain is None
    assert result.test is None
    assert result.validation_difference > 0
    assert "no gain" in str(result)
    assert result.to_dict()["gain"] is None


def test_the_gain_of_choosing_beta_one_is_exactly_zero() -> None:
    result = search_beta(network(), train=TRAIN, val=VAL, test=TEST, betas=[1.0])
    assert result.best is result.baseline
    assert result.gain is not None
    assert (result.gain.points, result.gain.low, result.gain.high) == (0, 0, 0)


def test_the_bootstrap_interval_agrees_with_resampling_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    best, baseline = (torch.rand(300, generator=generator) < p for p in (0.8, 0.7))
    gain = paired_gain(best, baseline)
    difference = 100.0 * (best.float() - baseline.float())
    draws = torch.randint(0, 300, (4000, 300), generator=generator)
    means = difference[draws].mean(1)
    assert gain.low == pytest.approx(float(means.quantile(0.025)), abs=0.5)
    assert gain.high == pytest.approx(float(means.quantile(0.975)), abs=0.5)
    swapped = paired_gain(baseline, best)
    assert (swapped.low, swapped.high) == (-gain.high, -gain.low)


def test_the_interval_is_that_of_the_exact_distribution() -> None:
    n, wins, losses = 12, 4, 1
    shares = {1: wins / n, -1: losses / n, 0: (n - wins - losses) / n}
    mass = {0: 1.0}
    for _ in range(n):
        following: dict[int, float] = {}
        for total, chance in mass.items():
            for step, share in shares.items():
                following[total + step] = following.get(total + step, 0.0) + chance * share
        mass = following
    best, baseline = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    best[:wins], baseline[wins : wins + losses] = True, True
    gain = paired_gain(best, baseline)
    low, high = round(gain.low * n / 100), round(gain.high * n / 100)
    assert (
        sum(m for d, m in mass.items() if d < low)
        <= 0.025
        < sum(m for d, m in mass.items() if d <= low)
    )
    assert (
        sum(m for d, m in mass.items() if d > high)
        <= 0.025
        < sum(m for d, m in mass.items() if d >= high)
    )


def test_without_discordant_samples_the_gain_says_so() -> None:
    hits = torch.arange(10) % 2 == 0
    gain = paired_gain(hits, hits)
    assert (gain.points, gain.low, gain.high) == (0, 0, 0)
    assert "no discordant samples" in str(gain)


def test_no_accuracy_is_certain() -> None:
    assert standard_error(0.5, 100) == 0.05
    assert standard_error(0.0, 98) == pytest.approx(0.01005, abs=1e-5)
    assert standard_error(1.0, 98) == pytest.approx(0.01005, abs=1e-5)


class Indifferent(nn.Module):
    """Its features do not depend on its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.linear = nn.ReLU(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + 0 * self.relu(x))


def test_ties_go_to_the_beta_nearest_one_and_the_grid_holds_one_once() -> None:
    result = search_beta(Indifferent(), train=TRAIN, val=VAL, betas=(0.5, 0.9), c=(0.0, 1.0, 0.4))
    assert list(zip(result.betas, result.cs, strict=True)) == [
        *((beta, c) for c in (0.0, 1.0, 0.4) for beta in (0.5, 0.9)),
        (1.0, 0.0),
    ]
    assert len(set(result.scores)) == 1
    assert result.best_beta == 1.0
    assert len(result.within_one_se) == 7
    assert 1.0 not in BETAS
    assert len(BETAS) == 30


def test_where_the_activation_is_no_relu_the_untouched_network_is_the_baseline() -> None:
    model = network(nn.SiLU)
    before = frozen(model)
    result = search_beta(model, train=TRAIN, val=VAL, test=TEST, betas=(0.5, 0.9), c=(1.0, 0.0))
    assert_unchanged(model, before)
    assert result.baseline.beta is None
    assert result.baseline not in result.settings
    silu = next(s for s in result.settings if (s.beta, s.c) == (0.5, 1.0))
    relu = next(s for s in result.settings if s.beta == 1.0)
    assert silu.score == result.baseline.score
    assert silu.probe.nll == pytest.approx(result.baseline.probe.nll, rel=1e-4)
    assert relu.probe.nll != pytest.approx(result.baseline.probe.nll, rel=1e-3)
    assert result.gain is not None


def test_interpolated_features_find_the_same_at_less_cost() -> None:
    model = network()
    exact = search_beta(model, train=TRAIN, val=VAL, test=TEST)
    cheap = search_beta(model, train=TRAIN, val=VAL, test=TEST, features="interpolated")
    assert cheap.features.used == "interpolated"
    assert cheap.features.evaluated <= 8
    assert exact.features.evaluated == cheap.features.total == 31
    assert len(cheap.features.checks) == 2
    for check in cheap.features.checks:
        assert check.beta not in check.nodes
        assert 0 < check.feature_error < 0.1
    differences = [abs(a - b) for a, b in zip(exact.scores, cheap.scores, strict=True)]
    assert max(differences) <= exact.best.error
    assert cheap.best.exact
    twin = next(s for s in exact.settings if s.beta == cheap.best_beta)
    assert cheap.best.probe.nll == pytest.approx(twin.probe.nll, rel=1e-4)
    assert cheap.best.score == twin.score


def test_the_best_of_interpolated_settings_is_the_best_after_computing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true = search_module.compare

    def flattering(*arguments: Any) -> Any:
        settings, info = true(*arguments)
        raised = [s if s.exact else replace(s, score=1 - s.beta / 1e3) for s in settings]
        return tuple(raised), info

    monkeypatch.setattr(search_module, "compare", flattering)
    exact = search_beta(network(), train=TRAIN, val=VAL)
    result = search_beta(network(), train=TRAIN, val=VAL, features="interpolated")
    assert result.best.exact
    assert result.best is max(result.settings, key=search_module._preference)
    assert result.best == exact.best
    assert "held-out betas" in str(result)


class Wild(nn.Module):
    """Its features oscillate as beta moves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.linear = nn.Linear(6, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear((300 * self.relu(self.first(x))).sin())


def test_interpolation_that_is_off_falls_back_to_exact_features() -> None:
    model = Wild()
    exact = search_beta(model, train=TRAIN, val=VAL)
    result = search_beta(model, train=TRAIN, val=VAL, features="interpolated")
    assert result.features.used == "exact"
    assert result.features.reason is not None
    assert "interpolated features were off" in result.features.reason
    assert max(check.feature_error for check in result.features.checks) > 0.1
    assert result.scores == exact.scores
    few = search_beta(model, train=TRAIN, val=VAL, betas=GRID, features="interpolated")
    assert few.features.reason is not None
    assert "too few" in few.features.reason


def test_installing_gives_the_tested_model_and_removing_the_old_one() -> None:
    model = network()
    before = frozen(model)
    result = search_beta(model, train=TRAIN, val=VAL, test=TEST, betas=GRID)
    x, y = samples(200, 3)
    installed = result.install()
    assert result.test is not None
    assert int((model(x).argmax(1) == y).sum()) / 200 == result.test.best
    assert model[4] is installed.head
    assert model[4].out_features == CLASSES
    assert installed.steering.beta == result.best_beta
    installed.remove()
    installed.remove()
    assert_unchanged(model, before)
    with result.install():
        assert model[4].out_features == CLASSES
    assert_unchanged(model, before)


class Stop:
    """A progress callback that interrupts after so many settings."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "features" and done == self.after:
            raise KeyboardInterrupt


def test_an_interrupted_search_resumes_without_losing_a_finished_beta(tmp_path: Path) -> None:
    model = network()
    before = frozen(model)
    with pytest.raises(KeyboardInterrupt):
        search_beta(model, train=TRAIN, val=VAL, betas=GRID, resume=tmp_path, progress=Stop(3))
    assert_unchanged(model, before)
    finished = sorted(path.name for path in tmp_path.glob("beta*.safetensors"))
    assert len(finished) == 3
    assert not list(tmp_path.glob(".*"))

    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    handle = model.register_forward_pre_hook(count)
    resumed = search_beta(model, train=TRAIN, val=VAL, betas=GRID, resume=tmp_path)
    handle.remove()
    per_setting = sum(-(-len(y) // 32) for _, y in (*TRAIN, *VAL))
    assert (
        forwards == 4 + 2 * per_setting
    )  # census, head twice, a stored one, and the two settings that were missing
    whole = search_beta(model, train=TRAIN, val=VAL, betas=GRID)
    assert resumed.settings == whole.settings
    assert torch.equal(resumed.best.probe.weight, whole.best.probe.weight)


def test_interrupted_data_leaves_the_model_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaking(Counting):
        def __iter__(self) -> Iterator[Batch]:
            self.passes += 1
            yield self.data[0]
            if self.passes == 4:  # after reading, the example and the first beta
                raise KeyboardInterrupt
            yield from self.data[1:]

    model = network()
    before = frozen(model)
    monkeypatch.setattr(search_module, "_CACHE_BYTES", 0)
    with pytest.raises(KeyboardInterrupt):
        search_beta(model, train=Breaking(TRAIN), val=VAL, betas=GRID, resume=tmp_path)
    assert_unchanged(model, before)
    assert len(list(tmp_path.glob("beta*.safetensors"))) == 1


def test_a_folder_of_another_search_is_refused(tmp_path: Path) -> None:
    model = network()
    search_beta(model, train=TRAIN, val=VAL, betas=[0.9], resume=tmp_path)
    # Another grid, protocol and seed share the features.
    search_beta(
        model, train=TRAIN, val=VAL, betas=[0.8], resume=tmp_path, protocol="published", seed=1
    )
    cases = [
        ({"train": TEST}, network(), "train data"),
        ({"val": TEST}, network(), "validation data"),
        ({}, network(seed=1), "model"),
        ({"where": "1"}, network(), "sites"),
    ]
    for change, other, name in cases:
        before = frozen(other)
        arguments = {"train": TRAIN, "val": VAL, "betas": [0.9], "resume": tmp_path} | change
        with pytest.raises(FlexureError, match=f"another {name}"):
            search_beta(other, **arguments)
        assert_unchanged(other, before)


def test_damaged_files_are_computed_again_or_refused(tmp_path: Path) -> None:
    model = network()
    first = search_beta(model, train=TRAIN, val=VAL, betas=[0.9], resume=tmp_path)
    next(tmp_path.glob("beta0.9*")).write_bytes(b"damaged")
    again = search_beta(model, train=TRAIN, val=VAL, betas=[0.9], resume=tmp_path)
    assert again.settings == first.settings
    (tmp_path / "fingerprint.json").write_text("{")
    with pytest.raises(FlexureError, match="cannot be read"):
        search_beta(model, train=TRAIN, val=VAL, betas=[0.9], resume=tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(FlexureError, match="folder that can be written"):
        search_beta(model, train=TRAIN, val=VAL, betas=[0.9], resume=blocked)


def test_shared_samples_are_refused() -> None:
    model = network()
    copied = [(x.clone(), y.clone()) for x, y in VAL]
    few = [*TEST, (VAL[0][0][:1], VAL[0][1][:1])]  # 1 of 201 samples: a duplicate in the data
    for arguments, message in (
        ({"test": VAL}, "val and test"),
        ({"test": copied}, "val and test"),
        ({"test": TRAIN}, "train and test"),
        ({"val": TRAIN}, "train and val"),
        ({"test": [*TEST, VAL[0]]}, "val and test"),
    ):
        with pytest.raises(DataError, match=message):
            search_beta(model, **({"train": TRAIN, "val": VAL, "betas": [0.9]} | arguments))
    relabelled = [(x, (y + 1) % CLASSES) for x, y in VAL]
    with pytest.raises(DataError, match="val and test"):
        search_beta(model, train=TRAIN, val=VAL, test=relabelled, betas=[0.9])
    result = search_beta(model, train=TRAIN, val=VAL, test=few, betas=[0.9])
    assert result.shared == {"val-train": 0, "test-train": 0, "test-val": 1}
    assert result.to_dict()["shared"]["test-val"] == 1
    assert "1 samples are in both test-val" in str(result)


class Reused:
    """Hands out views of one buffer, inputs and labels."""

    def __init__(self, data: list[Batch]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        x, y = (torch.empty_like(tensor) for tensor in self.data[0])
        for inputs, labels in self.data:
            x[: len(labels)], y[: len(labels)] = inputs, labels
            yield x[: len(labels)], y[: len(labels)]


def test_a_loader_may_reuse_its_buffer() -> None:
    plain = search_beta(network(), train=TRAIN, val=VAL, betas=GRID)
    for train, val in ((Reused(TRAIN), Reused(VAL)), (iter(Reused(TRAIN)), iter(Reused(VAL)))):
        found = search_beta(network(), train=train, val=val, betas=GRID)
        assert found.settings == plain.settings


def test_one_beta_and_numbers_of_other_kinds_are_accepted() -> None:
    for betas in (0.5, np.float32(0.5), torch.tensor([0.5]), np.array([0.5])):
        result = search_beta(network(), train=TRAIN, val=VAL, betas=betas, c=np.float32(0.5))
        assert (result.betas, result.cs) == ((0.5, 1.0), (0.5, 0.5))


X, Y = samples(40, 5)


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ([], VAL, "expected train samples, got none"),
        (TRAIN, [], "expected val samples, got none"),
        ([(X, torch.zeros(40, dtype=torch.int64))], VAL, "two classes in the train"),
        (TRAIN, [(X, torch.zeros(40, dtype=torch.int64))], "two classes in val"),
        ([(X, Y.float())], VAL, "integer tensor"),
        ([(X, Y - 1)], VAL, "labels >= 0"),
        ([(X, Y * 2)], VAL, "without gaps"),
        (TRAIN, [(X, Y + 1)], "every class is in train"),
        ([(X, F.one_hot(Y))], VAL, r"\(B,\) integer"),
        ([(X, Y[:-1])], VAL, "one row per label"),
        ([(list(X.tolist()), Y)], VAL, "one row per label"),
        ([X], VAL, "pair"),
        ([(X[:0], Y[:0])], VAL, "leave empty batches out"),
        ([(X.where(X < 1, torch.inf), Y)], VAL, r"finite features.*beta 0\.7"),
    ],
)
def test_bad_data_is_refused_and_changes_nothing(train: Any, val: Any, message: str) -> None:
    model = network()
    before = frozen(model)
    with pytest.raises(DataError, match=message):
        search_beta(model, train=train, val=val, betas=[0.7, 0.9])
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"betas": [0.5, 1.5]}, "beta in"),
        ({"betas": [float("nan")]}, "beta in"),
        ({"betas": ["0.5"]}, "beta in"),
        ({"betas": [True]}, "beta in"),
        ({"c": -0.1}, "c in"),
        ({"c": "even"}, "balanced"),
        ({"c": []}, "at least one c"),
        ({"c": None}, "c as a number"),
        ({"betas": 1.5}, "beta in"),
        ({"betas": [i / 6000 for i in range(6000)], "c": (0.0, 1.0)}, "at most 10000 settings"),
        ({"seed": -1}, "seed of at least 0"),
        ({"seed": 1.5}, "whole seed"),
        ({"train": 3}, "train data as an iterable"),
        ({"protocol": "quick"}, "converged, published"),
        ({"features": "some"}, "exact, interpolated"),
        ({"head": "nowhere"}, "linear layers are 0, 2, 4"),
        ({"where": "nowhere"}, "matches no site"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(arguments: Any, message: str) -> None:
    model = network()
    before = frozen(model)
    with pytest.raises(FlexureError, match=message):
        search_beta(model, **({"train": TRAIN, "val": VAL, "betas": [0.9]} | arguments))
    assert_unchanged(model, before)


class Odd(nn.Module):
    """A head that is called twice, never, or on something that is not (B, D)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.relu, self.head = kind, nn.ReLU(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        if self.kind == "twice":
            return self.head(x[:, :3]) + self.head(x[:, 3:])
        if self.kind == "tokens":
            return self.head(x.view(-1, 2, 3)).mean(1)
        return x[:, :2]


@pytest.mark.parametrize(
    ("kind", "message"),
    [("twice", "got 2 calls"), ("never", "calls an nn.Linear"), ("tokens", r"\(32, 2, 3\)")],
)
def test_heads_that_do_not_see_one_vector_per_sample_are_refused(kind: str, message: str) -> None:
    model = Odd(kind)
    before = frozen(model)
    with pytest.raises(FlexureError, match=message):
        search_beta(model, train=TRAIN, val=VAL, betas=[0.9])
    assert_unchanged(model, before)


class HeadFirst(nn.Module):
    """Its head is registered before the layers that it follows."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.head, self.scale = nn.Linear(WIDTH, 2), 1.0
        self.body = nn.Sequential(nn.Linear(6, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.scale * x).relu()).log_softmax(1)


def test_the_head_is_what_gives_the_logits_not_what_is_registered_last() -> None:
    model = HeadFirst()
    result = search_beta(model, train=TRAIN, val=VAL, betas=[0.9])
    assert result.head == "head"
    assert "'head'" in str(result)
    with result.install():
        assert model(X).shape == (40, CLASSES)
    with pytest.raises(FlexureError, match=r"'body.2' to be the model's logits.*head="):
        search_beta(model, train=TRAIN, val=VAL, betas=[0.9], head="body.2")


def test_stored_features_of_changed_code_are_refused(tmp_path: Path) -> None:
    model = HeadFirst()
    first = search_beta(model, train=TRAIN, val=VAL, betas=[0.9], resume=tmp_path)
    stored = next(tmp_path.glob("beta0.9*"))
    tensors = load(stored.read_bytes())
    for damaged in ({"train": tensors["train"]}, {**tensors, "val": tensors["val"][:3].clone()}):
        stored.write_bytes(save(damaged))
        again = search_beta(model, train=TRAIN, val=VAL, betas=[0.9], resume=tmp_path)
        assert again.settings == first.settings
    model.scale = 3.0
    with pytest.raises(FlexureError, match="code has changed"):
        search_beta(model, train=TRAIN, val=VAL, betas=[0.9], resume=tmp_path)
    (tmp_path / "fingerprint.json").unlink()
    with pytest.raises(FlexureError, match="got no fingerprint"):
        search_beta(model, train=TRAIN, val=VAL, betas=[0.9], resume=tmp_path)


def test_constants_of_the_model_are_part_of_its_fingerprint(tmp_path: Path) -> None:
    def leaky(slope: float) -> nn.Module:
        model = network()
        model[1] = nn.LeakyReLU(slope)
        return model

    search_beta(leaky(0.1), train=TRAIN, val=VAL, betas=[0.9], resume=tmp_path)
    with pytest.raises(FlexureError, match="another model"):
        search_beta(leaky(0.2), train=TRAIN, val=VAL, betas=[0.9], resume=tmp_path)


def test_a_model_without_a_linear_layer_needs_its_head_named() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Identity())
    with pytest.raises(FlexureError, match="head="):
        search_beta(model, train=TRAIN, val=VAL, betas=[0.9])
    result = search_beta(model, train=TRAIN, val=VAL, betas=[0.9], head="1")
    with result.install():
        assert model(X).shape == (40, CLASSES)
    assert isinstance(model[1], nn.Identity)


class Named(nn.Module):
    """Called by keyword, and answers with an object."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classifier = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, *, values: Tensor, mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.classifier(input=F.relu(self.body(values * mask))))


def test_models_called_by_keyword_with_functional_activations() -> None:
    def named(data: list[Batch]) -> list[tuple[dict[str, Tensor], Tensor]]:
        return [({"values": x, "mask": torch.ones_like(x)}, y) for x, y in data]

    model = Named()
    plain = nn.Sequential(model.body, nn.ReLU(), model.classifier)
    result = search_beta(model, train=named(TRAIN), val=named(VAL), betas=GRID)
    same = search_beta(copy.deepcopy(plain), train=TRAIN, val=VAL, betas=GRID)
    assert result.head == "classifier"
    assert result.scores == same.scores
    assert len(set(result.scores)) > 1


def test_passes_that_differ_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shuffled(Counting):
        def __iter__(self) -> Iterator[Batch]:
            self.passes += 1
            return iter(self.data[self.passes % 3 :] + self.data[: self.passes % 3])

    model = network()
    plain = search_beta(model, train=TRAIN, val=VAL, betas=GRID)
    kept = search_beta(model, train=Shuffled(TRAIN), val=VAL, betas=GRID)  # read once and kept
    assert kept.scores == pytest.approx(plain.scores, abs=0.02)
    monkeypatch.setattr(search_module, "_CACHE_BYTES", 0)
    unkept = search_beta(model, train=Counting(TRAIN), val=iter(VAL), betas=GRID)
    assert unkept.scores == plain.scores
    with pytest.raises(DataError, match="shuffling"):
        search_beta(model, train=Shuffled(TRAIN), val=VAL, betas=GRID)


def test_progress_is_told_and_a_bar_goes_to_stderr_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told: list[tuple[str, int, int]] = []
    search_beta(
        network(), train=TRAIN, val=VAL, betas=GRID, progress=lambda *step: told.append(step)
    )
    assert [step for step in told if step[0] == "features"] == [
        ("features", i, 5) for i in range(1, 6)
    ]
    assert capsys.readouterr() == ("", "")
    search_beta(network(), train=TRAIN, val=VAL, betas=GRID, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "5/5" in err


def test_the_result_has_a_json_form() -> None:
    import json

    result = search_beta(network(), train=TRAIN, val=VAL, test=TEST, betas=GRID)
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert stored["best"]["beta"] == result.best_beta
    assert stored["gain"]["points"] == result.gain.points
    assert [s["score"] for s in stored["settings"]] == list(result.scores)
    assert stored["features"]["used"] == "exact"
    assert len(stored["sites"]) == 2
    assert "probe" in stored["best"]
    assert "weight" not in stored["best"]["probe"]
    assert {"reading", "features", "probes", "test"} == stored["timing"].keys()
