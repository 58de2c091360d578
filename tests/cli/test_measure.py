"""`flexure measure` from end to end, on tiny networks and the digits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flexure
from flexure.cli.chosen import drawn
from tests.cli.commands import interrupted, run, written

MODEL = """
import time
import torch
from torch import nn

def made(activation, classes=10):
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 12), activation, nn.Linear(12, classes)]
    return nn.Sequential(*layers).eval()

def small():
    return made(nn.ReLU())

def smooth():
    return made(nn.Tanh())

def halved():
    return made(nn.Tanh()), half

def half(item):
    return item / 2

def wide():
    return nn.Linear(3, 10).eval()

def constant():
    model = made(nn.ReLU())
    nn.init.zeros_(model[1].weight)
    return model

def few():
    return made(nn.ReLU(), classes=3)

class Slowly(nn.Module):
    def forward(self, x):
        time.sleep(0.01)
        return x

def slow():
    return nn.Sequential(Slowly(), made(nn.Tanh()))
"""

FAST = ["--samples", "24", "--rate-samples", "10", "--noise-samples", "8", "--batch-size", "8"]
FAST += ["--directions", "2", "--radii", "0.01,0.1"]


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexure.methods.paired._RESAMPLES", 100)


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "models.py"
    path.write_text(MODEL)
    return f"{path}:small"


def measure(*args: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `flexure measure ARGS` on the digits."""
    given = list(args) if "--data" in args else [*args, "--data", "sklearn:digits"]
    return run("measure", *given, capsys=capsys)


def test_measure_writes_everything(model: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    code, text, err = measure(model, *FAST, "--out", str(out), capsys=capsys)
    assert (code, err) == (0, "")
    assert "normalised curvature (1 / input unit), median" in text
    assert text.startswith("24 samples; means over samples unless stated; 95 % intervals")
    assert "Note: model has no rate: " in text
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.json"]
    payload = json.loads((out / "results.json").read_text())
    (found,) = payload["numbers"]["models"]
    assert set(found["refusals"]) == {"rate", "bound"}
    assert len(found["summaries"]["curvature"]["result"]["normalized"]) == 24
    assert len(found["summaries"]["gradient_change"]["result"]["change"]) == 8
    assert payload["config"]["split"] == "train"
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_steer_compares_with_the_unsteered(model: str, tmp_path: Path, capsys) -> None:
    arguments = [model, *FAST, "--out", str(tmp_path / "a"), "--json"]
    code, text, err = measure(*arguments, "--steer", "0.8,0.25", capsys=capsys)
    assert (code, err) == (0, "")
    payload = json.loads(text)
    assert payload == json.loads((tmp_path / "a" / "results.json").read_text())
    numbers = payload["numbers"]
    assert [found["name"] for found in numbers["models"]] == ["beta 0.8, c 0.25", "unsteered"]
    assert [set(found["refusals"]) for found in numbers["models"]] == [set(), {"rate", "bound"}]
    ratio = next(
        d for d in numbers["differences"]
        if (d["quantity"], d["statistic"]) == ("normalized", "median")
    )  # fmt: skip
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    # The same numbers from Python, on the same samples.
    plain = flexure.load_model(model).model
    x = numbers["models"][1]["summaries"]["calibration"]["result"]["nll"]
    loaded = flexure.load_data("sklearn:digits")["train"]
    rows = torch.randperm(len(loaded), generator=torch.Generator().manual_seed(42))[:24]
    prepare = flexure.load_model(model).preprocess
    images = torch.stack([prepare(loaded[int(i)]) for i in rows])
    nll = torch.nn.functional.cross_entropy(plain(images), loaded.labels[rows], reduction="none")
    assert torch.allclose(torch.tensor(x), nll, atol=1e-5)


def test_two_models_side_by_side(model: str, tmp_path: Path, capsys) -> None:
    other = model.replace("small", "smooth")
    arguments = [model, "--against", other, *FAST, "--out", str(tmp_path / "a")]
    code, text, err = measure(*arguments, "--measures", "curvature,calibration", capsys=capsys)
    assert (code, err) == (0, "")
    head = text.splitlines()[1].split()
    assert head == ["model", "against", "difference"]
    numbers = json.loads((tmp_path / "a" / "results.json").read_text())["numbers"]
    assert set(numbers["models"][0]["summaries"]) == {"curvature", "calibration"}
    assert {d["measure"] for d in numbers["differences"]} == {"curvature", "calibration"}


def test_another_preprocessing_is_told(model: str, tmp_path: Path, capsys) -> None:
    other = model.replace("small", "halved")
    arguments = [model, "--against", other, *FAST, "--measures", "calibration"]
    code, _, err = measure(*arguments, "--out", str(tmp_path / "a"), capsys=capsys)
    assert code == 0
    assert f"flexure: warning: {other} has another preprocessing" in err


def test_an_adapter_is_measured_in_place(model: str, tmp_path: Path, capsys) -> None:
    loaded = flexure.load_model(model).model
    with flexure.steer(loaded, beta=0.6, example=torch.zeros(2, 64)) as steering:
        steering.save(tmp_path / "adapter")
    found = []
    for name, more in (("a", ["--adapter", str(tmp_path / "adapter")]), ("b", ["--steer", "0.6"])):
        arguments = [model, *FAST, "--measures", "curvature", "--out", str(tmp_path / name)]
        code, text, _ = measure(*arguments, *more, "--json", capsys=capsys)
        assert code == 0
        found.append(json.loads(text)["numbers"]["models"][0])
    assert found[0]["name"] == "adapted"
    assert found[0]["estimates"] == found[1]["estimates"]


def test_splits_and_sizes(model: str, tmp_path: Path, capsys) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        f"{kind}_{split}": values
        for split, n in (("train", 30), ("test", 12))
        for kind, values in (
            ("x", generator.normal(size=(n, 64)).astype(np.float32)),
            ("y", np.arange(n) % 10),
        )
    }
    np.savez(tmp_path / "data.npz", **arrays)
    given = ["--data", f"npz:{tmp_path / 'data.npz'}", "--measures", "calibration", "--json"]
    for more, split, samples in (([], "test", 12), (["--split", "train"], "train", 24)):
        out = ["--out", str(tmp_path / split)]
        code, text, err = measure(model, *FAST, *given, *out, *more, capsys=capsys)
        assert (code, err) == (0, "")
        config = json.loads(text)["config"]
        assert (config["split"], config["samples"]) == (split, samples)
    code, _, err = measure(model, *given, "--split", "validation", capsys=capsys)
    assert code == 2
    assert "expected --split among test, train" in err


def labelled(path: Path, labels: np.ndarray, rows: int = 64) -> str:
    generator = np.random.default_rng(0)
    np.savez(path, x=generator.normal(size=(len(labels), rows)).astype(np.float32), y=labels)
    return f"npz:{path}"


def test_the_first_samples_are_of_all_classes(model: str, tmp_path: Path, capsys) -> None:
    """Of data that are sorted by class too: costly measures take the first ones."""
    data = ["--data", labelled(tmp_path / "sorted.npz", np.repeat(np.arange(10), 20))]
    arguments = [model, *FAST, "--samples", "100", *data, "--measures", "calibration", "--json"]
    labels = []
    for seed in ("0", "1", "0"):
        out = ["--seed", seed, "--out", str(tmp_path / "out")]
        code, text, _ = measure(*arguments, *out, capsys=capsys)
        assert code == 0
        result = json.loads(text)["numbers"]["models"][0]["summaries"]["calibration"]["result"]
        labels.append(result["nll"])
    assert labels[0] == labels[2] != labels[1]
    chosen, _ = drawn(flexure.load_data(data[1]), None, 100, 0)
    assert len(set(chosen.labels[:16].tolist())) > 5


def test_wrong_labels_leave_nothing_behind(model: str, tmp_path: Path, capsys) -> None:
    """And the corrected command runs."""
    out, labels = tmp_path / "out", np.arange(40) % 10
    shifted = labelled(tmp_path / "shifted.npz", labels)
    arguments = [*FAST, "--measures", "calibration", "--out", str(out)]
    three = model.replace("small", "few")
    code, text, err = measure(three, *arguments, "--data", shifted, capsys=capsys)
    assert (code, text) == (2, "")
    assert "expected labels from 0 to 2, the 3 classes of model, got 0 to 9" in err
    assert not out.exists()
    right = labelled(tmp_path / "right.npz", labels % 3)
    assert measure(three, *arguments, "--data", right, capsys=capsys)[0] == 0


def test_memory_that_nothing_fits_is_told_as_an_option(model: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    arguments = [model, *FAST, "--measures", "curvature", "--out", str(out)]
    code, text, err = measure(*arguments, "--memory", "1KiB", capsys=capsys)
    assert (code, text) == (2, "")
    least = re.search(r"expected --memory of at least (\d+KiB), got 1KiB; raise it", err)
    assert "check=" not in err
    assert not out.exists()
    while least is not None:  # the check and the measurement each say what they need
        code, _, err = measure(*arguments, "--memory", least.group(1), capsys=capsys)
        least = re.search(r"of at least (\d+KiB)", err)
    assert (code, err) == (0, "")


def test_a_launch_of_several_processes_is_refused(
    model: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = measure(model, *FAST, "--out", str(tmp_path / "out"), capsys=capsys)
    assert code == 2
    assert err.startswith("flexure: expected a command in one process, got one of a launch of 2")
    assert err.count("\n") == 1


def test_a_constant_network_says_why_numbers_are_missing(
    model: str, tmp_path: Path, capsys
) -> None:
    arguments = [model.replace("small", "constant"), *FAST, "--out", str(tmp_path / "out")]
    code, text, err = measure(*arguments, capsys=capsys)
    assert (code, err) == (0, "")
    assert "Note: model: 24 of 24 samples have no normalised curvature" in text
    assert "nan" not in text


MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown measure": (["--measures", "beauty"], "expected measures (--measures) among curvature"),
    "no measure": (["--measures", ","], "curvature, rate"),
    "dial that is no number": (["--steer", "low"], "--steer"),
    "three dials": (["--steer", "0.8,0.5,0.3"], "--steer"),
    "beta out of range": (["--steer", "1.5"], "beta"),
    "steered and adapted": (["--steer", "0.8", "--adapter", "x"], "--steer or --adapter"),
    "no such adapter": (["--adapter", "absent"], "absent"),
    "orders": (["--orders", "1,two"], "--orders"),
    "one order": (["--orders", "2"], "order"),
    "normalization": (["--normalization", "none"], "normalization"),
    "radii": (["--radii", "wide"], "--radii"),
    "radius 0": (["--radii", "0"], "expected radii (--radii) that increase from above 0, got 0;"),
    "radii that fall": (["--radii", "0.1,0.0031622776601683794"], "got 0.1, 0.00316; give for"),
    "no product": (["--max-products", "0"], "--max-products"),
    "samples": (["--samples", "0"], "--samples"),
    "memory": (["--memory", "little"], "memory"),
    "tolerance": (["--tol", "nan"], "tol"),
    "device": (["--device", "tpu9"], "tpu9"),
    "other model": (["--against", "nothing:at-all"], "flexure:, hf:"),
    "fewer classes": (["--against", "{folder}/models.py:few"], "label"),
    "other inputs": (
        ["--against", "{folder}/models.py:wide"],
        "for inputs (1, 8, 8) (mat1 and mat2",
    ),
    "nothing fits": (["--measures", "rate,bound"], "steer"),
    "no data": (["--data", "npz:absent.npz"], "absent"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_exit_2(name: str, model: str, tmp_path: Path, capsys) -> None:
    arguments, expected = MISTAKES[name]
    arguments = [text.format(folder=tmp_path) for text in arguments]
    out = tmp_path / "out"
    code, _, err = measure(model, "--out", str(out), *FAST[:-2], *arguments, capsys=capsys)
    assert code == 2
    assert err.startswith("flexure: ")
    assert err.count("\n") == 1
    assert expected in err
    assert not out.exists()


def test_a_refused_run_removes_only_the_empty_folders_that_it_made(
    model: str, tmp_path: Path, capsys
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for out in (there / "a" / "b", there):
        code, _, _ = measure(model, *FAST, "--split", "absent", "--out", str(out), capsys=capsys)
        assert code == 2
        assert list(there.iterdir()) == []
    (there / "mine").touch()
    assert measure(model, "--split", "absent", "--out", str(there), capsys=capsys)[0] == 2
    assert [path.name for path in there.iterdir()] == ["mine"]


def test_more_products_let_samples_converge(model: str, tmp_path: Path, capsys) -> None:
    arguments = [model, *FAST, "--steer", "0.8", "--measures", "curvature,gradient_change"]
    remedy = "raise max_products (--max-products) or tol"
    for products, told in ((2, True), (64, False)):
        more = ["--max-products", str(products), "--out", str(tmp_path / str(products))]
        code, text, err = measure(*arguments, *more, capsys=capsys)
        assert (code, err) == (0, "")
        assert (f"did not converge: their Hessian norms are lower bounds; {remedy}" in text) is told
        assert (f"rest on lower bounds of Hessian norms; {remedy}" in text) is told
        payload = json.loads((tmp_path / str(products) / "results.json").read_text())
        assert payload["config"]["max_products"] == products
        assert payload["numbers"]["settings"]["max_products"] == products
        taken = payload["numbers"]["models"][0]["summaries"]["curvature"]["result"]["products"]
        assert max(taken) <= products


def test_the_help_names_measures_and_defaults(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, text, _ = run("measure", "--help", capsys=capsys)
    assert code == 0
    text = " ".join(re.sub("[│╭╮╰╯─|]", " ", text).split())
    for told in (
        "curvature, rate, gradient_change, calibration, bound.",
        "default: 0.001, 0.00316, 0.01, 0.0316, 0.1.",
        "smaller is stricter.",
        "--max-products",
    ):
        assert told in text


def numbers_of(folder: Path) -> Any:
    found = json.loads((folder / "results.json").read_text())["numbers"]
    for model in found["models"]:
        model.pop("seconds")
    return found


def test_interrupted_and_resumed_equals_undisturbed(model: str, tmp_path: Path, capsys) -> None:
    """Ctrl-C in the middle: finished batches are kept, and the result is the same."""
    arguments = [model.replace("small", "slow"), "--against", model, *FAST, "--samples", "48"]
    cut, store = tmp_path / "cut", tmp_path / "cut" / ".flexure-measure"
    given = [*arguments, "--data", "sklearn:digits", "--out", str(cut)]
    err, kept = interrupted("measure", *given, store=store, parts=3)
    assert err == "flexure: interrupted; what is finished is kept, --resume continues it\n"
    code, _, err = measure(*arguments, "--out", str(cut), capsys=capsys)
    assert code == 2
    assert "holds an unfinished measurement; add --resume to continue it" in err
    other = [*arguments, "--out", str(cut), "--resume", "--tol", "0.1"]
    code, _, err = measure(*other, capsys=capsys)
    assert code == 2
    assert "another tol" in err
    assert written(store) == kept
    for folder, more in ((cut, ["--resume"]), (tmp_path / "whole", [])):
        code, _, err = measure(*arguments, "--out", str(folder), *more, capsys=capsys)
        assert (code, err) == (0, "")
    assert numbers_of(cut) == numbers_of(tmp_path / "whole")
    assert not store.exists()
