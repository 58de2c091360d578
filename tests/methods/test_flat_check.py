"""What is found out before a training, and what is said of networks honestly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flexure
from flexure import record
from flexure.contracts import FlexureError
from flexure.methods import flat, flat_run
from flexure.methods.flat_result import FlatTraining
from flexure.methods.flat_run import weights_digest


def net(bend: Callable[[], nn.Module] = nn.ReLU) -> Callable[[int], nn.Module]:
    return lambda seed: nn.Sequential(nn.Linear(3, 4), bend(), nn.Linear(4, 2))


def batches(size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    x = torch.rand(size, 3, generator=torch.Generator().manual_seed(seed))
    return [(x, torch.arange(size) % 2)]


def trained(model: Any, methods: Any, **options: Any) -> FlatTraining:
    given: dict[str, Any] = {
        "train": batches(16, 0), "val": batches(8, 1), "test": batches(8, 2), "seeds": (1,),
        "epochs": 1, "batch_size": 8, "samples": 4, "radii": (0.1,),
    }  # fmt: skip
    return flexure.train_flat(model, methods=methods, **given | options)


UNFIT: dict[str, tuple[Any, str, str]] = {
    "rate of kinks": (net(nn.LeakyReLU), "crr", "'crr' does not fit.*leaky_relu"),
    "no rectifier": (net(nn.Tanh), "csoftplus", "rectifier in the network to replace, got none; l"),
    "no BatchNorm": (net(), "gammabn", "BatchNorm in the network to replace, got none; leave"),
    "one of two parts": (net(), "csoftplus+gammabn", "BatchNorm in the network"),
    "neither part": (net(nn.Tanh), "lcnn", "rectifier or BatchNorm .* take specnorm"),
    "nothing to smooth": (net(nn.Tanh), "softplus-wd", r"as it is \(relu\); or leave it out$"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_refused_before_training(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, method, told = UNFIT[name]
    monkeypatch.setattr(flat_run, "fit", None)
    with pytest.raises(FlexureError, match=told) as caught:
        trained(model, ("standard", method))
    assert str(caught.value).count("leave") == 1


@pytest.mark.parametrize(
    ("methods", "residual", "told"),
    [("standard", "mean", "add lcnn"), ("lcnn", "magic", "sum, mean, sqrt2, got 'magic'; choose")],
)
def test_a_residual_that_says_nothing_is_refused(methods: str, residual: str, told: str) -> None:
    with pytest.raises(FlexureError, match=told):
        trained(net(), methods, residual=residual)


def test_the_caller_s_random_numbers_are_left_alone() -> None:
    before = torch.get_rng_state()
    trained(net(), ("relu", "at"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def leaky() -> FlatTraining:
    return trained(net(nn.LeakyReLU), ("standard", "relu", "lcnn"), seeds=(1, 2))


def test_kinks_and_replacements_are_those_of_the_network(leaky: FlatTraining) -> None:
    assert [row.kinks for row in leaky.rows] == [("leaky_relu",), ("leaky_relu",), ()]
    assert [dict(row.runs[0].changed) for row in leaky.rows] == [
        {"activation": 0}, {}, {"activation": 1, "linear": 2, "norm": 0}
    ]  # fmt: skip
    assert leaky.methods["standard"].endswith("nothing to replace")
    assert "1 replaced" in leaky.methods["lcnn"]
    assert "learned gamma (penalty on log gamma 0.01), nothing to replace" in leaky.methods["lcnn"]
    assert "standard: no rectifier to replace" in leaky.notes
    [kinked] = [note for note in leaky.notes if "kinks (" in note]
    assert kinked.startswith("standard and relu have kinks (leaky_relu): no Hessian sees")


def test_what_is_said_of_several_methods_is_said_once(leaky: FlatTraining) -> None:
    [refused] = [note for note in leaky.notes if "no rate" in note]
    assert refused.startswith("standard and relu have no rate on test data: ")


def test_accuracy_with_and_without_attack_names_its_samples(leaky: FlatTraining) -> None:
    assert any("all 8 test samples" in n and "the first 4" in n for n in leaky.notes)
    for row in leaky.rows:
        clean = row.estimates["clean"]
        assert clean.samples == 4
        assert clean.value >= row.estimates["pgd_0.1"].value
    assert "clean" in leaky.table()[0]


def test_intervals_of_what_is_not_negative_are_not(leaky: FlatTraining) -> None:
    for row in leaky.rows:
        given = {name: e for name, e in row.estimates.items() if e.has_interval}
        assert all(e.low >= 0 for name, e in given.items() if name != "rate")  # a slope
        assert all(p.change.low >= 0 for p in row.noise if p.change.has_interval)
    assert any(e.low < 0 for row in leaky.rows for e in row.differences.values())


def test_no_interval_says_that_it_covers_nothing() -> None:
    told = str(trained(net(), "relu", samples=1))
    assert "no draw" not in told
    assert "95 % intervals over test samples; shares in %." in told


def test_weights_are_those_of_the_run(tmp_path: Path) -> None:
    store, weights = tmp_path / "store", tmp_path / "weights"
    file = weights / "relu-1.safetensors"
    run = trained(net(), "relu", store=store, weights=weights).runs[0]
    good = file.read_bytes()
    assert run.weights == weights_digest(file)
    file.write_bytes(b"another comparison's")
    again = trained(net(), "relu", store=store, weights=weights).runs[0]
    assert file.read_bytes() == good
    assert again == run
    for folder in (tmp_path / "other", tmp_path / "other"):  # at once, and read from the store
        file.write_bytes(good)
        failed = trained(net(), "relu", lr=1e25, store=folder, weights=weights).runs[0]
        assert failed.failure is not None
        assert (failed.weights, file.exists()) == (None, False)


def test_other_code_does_not_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(net(), "relu", store=tmp_path)
    monkeypatch.setattr(flat, "code_digest", lambda: "0" * 32)
    with pytest.raises(FlexureError, match="another code of flexure"):
        trained(net(), "relu", store=tmp_path)
    assert len(record.code_digest()) == 32
