"""`flexure train` from end to end, on tiny networks, moons and digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.cli.commands import interrupted, run, written

MODEL = """
import torch
from torch import nn
from flexure.models import Preprocess

def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2))

def fixed():
    torch.manual_seed(0)
    return small()

def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1))
"""

FAST = ["--epochs", "1", "--samples", "6", "--batch-size", "16", "--radii", "0.1"]
SIZES = ["--train-size", "80", "--val-size", "40", "--test-size", "40"]
OWN = "flexure:mlp?sizes=2-6-2"


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "models.py"
    path.write_text(MODEL)
    return f"{path}:small"


def train(*args: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `flexure train ARGS` on two moons."""
    return run("train", *args, "--data", "sklearn:moons", *SIZES, capsys=capsys)


def starts(payload: Any) -> list[list[str]]:
    return [[run["start"] for run in row["runs"]] for row in payload["numbers"]["rows"]]


def test_train_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    methods = ["--method", "standard", "--method", "lcnn + gradreg"]
    arguments = [OWN, *methods, *FAST, "--seeds", "2", "--weight", "gradreg=0.5", "--save"]
    code, text, err = train(*arguments, "--out", str(out), capsys=capsys)
    assert (code, err) == (0, "")
    assert "Initial weights: new weights from each seed" in text
    assert "lcnn+gradreg" in text
    assert "minus standard, paired" in text
    assert sorted(p.name for p in out.iterdir()) == ["report.html", "results.json", "weights"]
    payload = json.loads((out / "results.json").read_text())
    assert payload["config"]["strengths"] == {"gradreg": 0.5}
    numbers = payload["numbers"]
    assert list(numbers["methods"]) == ["standard", "lcnn+gradreg"]
    assert numbers["samples"] == {"train": 80, "val": 40, "test": 40, "measured": 6}
    first, second = starts(payload)
    assert first == second
    assert first[0] != first[1]
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    weights = sorted(p.name for p in (out / "weights").iterdir())
    assert weights == [
        f"{m}-{s}.safetensors" for m in ("lcnn+gradreg", "standard") for s in (42, 43)
    ]
    assert "head.weight" in load_file(out / "weights" / "standard-42.safetensors")


def test_json_is_the_results_file(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [model, *FAST, "--method", "relu", "--out", str(tmp_path / "a"), "--json"]
    code, text, err = train(*arguments, "--seeds", "2", capsys=capsys)
    assert (code, err) == (0, "")
    assert json.loads(text) == json.loads((tmp_path / "a" / "results.json").read_text())
    first, second = starts(json.loads(text))[0]
    assert first != second


def test_pretrained_weights_are_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = [OWN, *FAST, "--method", "relu", "--save", "--out", str(tmp_path / "a")]
    assert train(*begin, capsys=capsys)[0] == 0
    weights = tmp_path / "a" / "weights" / "relu-42.safetensors"
    address = f"{OWN}&weights={weights}"
    arguments = [address, *FAST, "--method", "relu", "--seeds", "2", "--json"]
    code, text, _ = train(*arguments, "--out", str(tmp_path / "b"), capsys=capsys)
    assert code == 0
    payload = json.loads(text)
    assert "for all seeds" in payload["config"]["start"]
    assert len(set(starts(payload)[0])) == 1


def test_a_factory_with_a_seed_of_its_own_is_told(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = model.replace("small", "fixed")
    arguments = [fixed, *FAST, "--method", "relu", "--seeds", "2", "--out", str(tmp_path / "a")]
    code, text, _ = train(*arguments, capsys=capsys)
    assert code == 0
    assert "same initial weights for every seed" in text


def test_images_are_pixels_in_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "models.py"
    path.write_text(
        "from torch import nn\n"
        "from flexure.models import Preprocess\n"
        "def digits():\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))\n"
        "    return net, Preprocess(None, (0.3,), (0.35,))\n"
    )
    arguments = [f"{path}:digits", "--data", "sklearn:digits", *FAST, "--method", "relu"]
    sizes = ["--train-size", "80", "--val-size", "40", "--test-size", "40"]
    more = ["--augment", "flip,crop", "--json", "--out", str(tmp_path / "a")]
    code, text, err = run("train", *arguments, *sizes, *more, capsys=capsys)
    assert (code, err) == (0, "")
    settings = json.loads(text)["numbers"]["settings"]
    assert (settings["mean"], settings["std"]) == ([0.3], [0.35])
    assert settings["bounds"] == [0.0, 1.0]
    assert settings["augment"] == {"flip": True, "crop": 4, "fill": 0.0}


MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown method": (["--method", "magic"], "softplus-wd"),
    "two activations": (["--method", "standard+lcnn"], "drop one of them"),
    "weight": (["--weight", "gradreg"], "gradreg=1e-2"),
    "weight of none": (["--method", "lcnn", "--weight", "gradreg=1"], "gradreg"),
    "weight below 0": (["--method", "gradreg", "--weight", "gradreg=-1"], "positive"),
    "weight twice": (
        ["--method", "gradreg", "--weight", "gradreg=1", "--weight", "gradreg=2"], "drop all but",
    ),
    "weight of parts": (["--method", "lcnn", "--weight", "lcnn=1"], "csoftplus or gammabn"),
    "idle residual": (["--residual", "mean"], "add lcnn"),
    "optimizer": (["--optimizer", "magic"], "sgd, adam"),
    "lr": (["--lr", "0"], "--lr"),
    "decay": (["--weight-decay", "-1"], "--weight-decay"),
    "clip": (["--clip", "nan"], "--clip"),
    "keep": (["--keep", "none"], "'last' or 'best'"),
    "residual": (["--method", "lcnn", "--residual", "magic"], "residual"),
    "radii": (["--radii", "much"], "--radii"),
    "radius 0": (["--radii", "0"], "--radii"),
    "epochs": (["--epochs", "0"], "epochs"),
    "augment": (["--augment", "magic"], "flip,crop"),
    "augmented vectors": (["--augment", "flip"], "images"),
    "device": (["--device", "tpu9"], "tpu9"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_exit_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = MISTAKES[name]
    out = tmp_path / "out"
    fast = ["--epochs", "1", "--samples", "6", "--method", "relu"][
        : 4 if "--method" in arguments else 6
    ]
    code, _, err = train(OWN, *fast, "--out", str(out), *arguments, capsys=capsys)
    assert code == 2
    assert err.startswith("flexure: ")
    assert err.count("\n") == 1
    assert expected in err
    assert not (out / "results.json").exists()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("flexure:mlp?sizes=2-6-2&seed=3", "leave seed= out"),
        ("flexure:mlp?sizes=3-6-2", "takes the data"),
        ("flexure:mlp?sizes=2-6-1", "at least 2 classes"),
        ("flexure:magic", "flexure:magic"),
    ],
)
def test_networks_that_do_not_fit(
    address: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = train(address, *FAST, "--out", str(tmp_path / "out"), capsys=capsys)
    assert code == 2
    assert expected in err


def test_nothing_finished_is_one_line_and_exit_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [OWN, *FAST, "--method", "relu", "--lr", "1e25", "--out", str(tmp_path)]
    code, text, err = train(*arguments, capsys=capsys)
    assert code == 1
    assert err.startswith("flexure: no training was finished; the first failed: ")
    assert err.count("\n") == 1
    assert "results.json" in text
    assert (tmp_path / "report.html").exists()


def test_an_interrupted_training_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    methods = ["--method", "relu", "--method", "standard"]
    arguments = [OWN, "--data", "sklearn:moons", *SIZES, *FAST, *methods, "--seeds", "2"]
    store = out / ".flexure-train"
    err, kept = interrupted("train", *arguments, "--out", str(out), store=store, parts=1)
    assert "--resume continues it" in err
    code, _, err = run("train", *arguments, "--out", str(out), capsys=capsys)
    assert (code, "unfinished comparison" in err) == (2, True)
    assert written(store).items() >= kept.items()
    code, text, err = run(
        "train", *arguments, "--out", str(out), "--resume", "--json", capsys=capsys
    )
    assert (code, err) == (0, "")
    assert not store.exists()
    whole = [*arguments, "--out", str(tmp_path / "whole"), "--json"]
    _, expected, _ = run("train", *whole, capsys=capsys)
    assert timeless(json.loads(text)) == timeless(json.loads(expected))


def timeless(payload: Any) -> Any:
    """All numbers but seconds."""
    if isinstance(payload, dict):
        out = ("timing", "date", "relative_time", "commit")
        return {k: timeless(v) for k, v in payload.items() if k not in out and "seconds" not in k}
    return [timeless(item) for item in payload] if isinstance(payload, list) else payload
