"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import flexure
from tests.cli.commands import interrupted, run

MODEL = """
import time

import torch
from torch import nn

def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5)
    ).eval()

class Slowly(nn.Module):
    def forward(self, x):
        time.sleep(0.01)
        return x

def slow():
    return nn.Sequential(Slowly(), small())

def chatty():
    print("made")

    class Chatty(nn.Module):
        def forward(self, x):
            print("ran")
            return x

    return nn.Sequential(Chatty(), small())

class Ending(nn.Module):
    def forward(self, x):
        raise SystemExit(0)

def ending():
    return nn.Sequential(Ending(), nn.ReLU())

def cells():
    return small(), cell

def cell(image):
    raise ValueError("one channel only")

def wide():
    return nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 5))

def tanh():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 5))
"""

FAST = ["--betas", "0.5,0.8", "--train-size", "300", "--val-size", "100", "--test-size", "150"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "models.py"
    path.write_text(MODEL)
    return f"{path}:small"


def test_sites_prints_the_table(model: str, capsys) -> None:
    code, out, err = run("sites", model, "--data", "sklearn:digits", capsys=capsys)
    assert (code, err) == (0, "")
    assert "2 sites to steer; 2 exact at beta = 1; 0 left as they are" in out
    code, out, _ = run("sites", model, "--input-shape", "1,8,8", "--json", capsys=capsys)
    rows = json.loads(out)["sites"]
    assert [(row["site"], row["axis"], row["channels"]) for row in rows] == [
        ("2", "-1", "24"), ("4", "-1", "16"),
    ]  # fmt: skip


def test_sites_of_an_image_model_needs_no_data(capsys) -> None:
    code, out, err = run("sites", "flexure:resnet20", capsys=capsys)
    assert code == 0
    assert "19 sites to steer" in out
    assert err == ("flexure: warning: flexure:resnet20 without ?weights=FILE has random weights\n")


def test_steer_writes_everything_and_its_adapter_loads(model: str, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    code, text, err = run(
        "steer", model, "--data", "sklearn:digits", *FAST, "--out", str(out), capsys=capsys
    )
    assert (code, err) == (0, "")
    assert "gain" in text
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "report.html", "results.json"]
    results = json.loads((out / "results.json").read_text())
    assert results["config"]["data"] == "sklearn:digits"
    assert results["numbers"]["samples"] == {"train": 300, "val": 100, "test": 150}
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    loaded = flexure.load_model(model).model
    with flexure.load_adapter(loaded, out / "adapter") as steering:
        assert steering.beta == results["numbers"]["best"]["beta"]
        assert loaded[5].out_features == 10
    assert loaded[5].out_features == 5


def test_steer_json_is_the_results_file(model: str, tmp_path, capsys) -> None:
    arguments = ["steer", model, "--data", "sklearn:digits", *FAST, "--out", str(tmp_path / "a")]
    code, text, err = run(*arguments, "--json", "--c", "0.3,balanced", capsys=capsys)
    assert (code, err) == (0, "")
    assert json.loads(text) == json.loads((tmp_path / "a" / "results.json").read_text())
    assert len(json.loads(text)["numbers"]["settings"]) == 5


def test_the_same_seed_gives_the_same_numbers(model: str, tmp_path, capsys) -> None:
    found = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        arguments = ["steer", model, "--data", "sklearn:digits", *FAST, "--seed", seed]
        _, text, _ = run(*arguments, "--out", str(tmp_path / name), "--json", capsys=capsys)
        numbers = json.loads(text)["numbers"]
        found.append((numbers["settings"], numbers["gain"], numbers["test"]))
    assert found[0] == found[1]
    assert found[0] != found[2]


def _no_class(path: Path) -> str:
    np.savez(path / "one.npz", x=np.zeros((40, 64), np.float32), y=np.zeros(40, int))
    return f"npz:{path / 'one.npz'}"


def _nan(path: Path) -> str:
    x = np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32)
    x[3] = np.nan
    np.savez(path / "nan.npz", x=x, y=np.arange(200) % 4)
    return f"npz:{path / 'nan.npz'}"


def _labels(path: Path) -> str:
    np.savez(path / "labels.npz", x=np.zeros((40, 64), np.float32), y=np.arange(40) % 2 - 1)
    return f"npz:{path / 'labels.npz'}"


MISTAKES = {
    "unknown command": (["stear"], "No such command"),
    "unknown option": (["demo", "--fast"], "No such option"),
    "unknown model": (["sites", "nothing:at-all"], "flexure:, hf:"),
    "no such file": (["sites", "flexure:resnet20?weights=absent.safetensors"], "absent"),
    "no factory": (["sites", "{folder}/models.py:large"], "large"),
    "unknown data": (["steer", "{model}", "--data", "made:up", "--out", "{out}"], "sklearn:"),
    "no data": (["steer", "{model}", "--data", "npz:absent.npz", "--out", "{out}"], "absent"),
    "other inputs": (
        ["steer", "{folder}/models.py:wide", "--data", "sklearn:digits", "--out", "{out}"],
        "for inputs (1, 8, 8) (mat1 and mat2",
    ),
    "preprocessing that fails": (
        ["steer", "{folder}/models.py:cells", "--data", "sklearn:digits", "--out", "{out}"],
        "ValueError",
    ),
    "beta out of range": (["--betas", "0.5,1.5"], "beta"),
    "beta not a number": (["--betas", "low"], "--betas"),
    "beta backwards": (["--betas", "0.9:0.7:0.1"], "--betas"),
    "c out of range": (["--c", "2"], "c in"),
    "c not a number": (["--c", "half"], "--c"),
    "unknown protocol": (["--protocol", "sloppy"], "protocol"),
    "no such head": (["--head", "nowhere"], "nowhere"),
    "head that is no head": (["--head", "2"], "'2'"),
    "no such site": (["--where", "layer9.*"], "layer9"),
    "too many samples": (["--train-size", "99999"], "99999"),
    "device": (["--device", "tpu9"], "tpu9"),
    "device that keeps data": (["--device", "meta"], "meta"),
    "device that is no module": (["--device", "hpu"], "hpu"),
    "beta infinite": (["--betas", "0.7:inf:0.1"], "--betas"),
    "beta nan": (["--betas", "0.7,nan"], "--betas"),
    "betas of two": (["--betas", "0.7:0.8"], "--betas"),
    "too many betas": (["--betas", "0:1:1e-7"], "at most 10,000"),
    "negative shape": (["sites", "{model}", "--input-shape=-3,4"], "--input-shape"),
    "huge shape": (["sites", "{model}", "--input-shape", "9" * 30], "--input-shape"),
    "shape missing": (["sites", "{model}"], "give --data or --input-shape"),
    "no image": (["sites", "{folder}/models.py:cells"], "give --data or --input-shape"),
    "model that ends": (["sites", "{folder}/models.py:ending"], "SystemExit"),
    "unwritable": (["--out", "{file}/out"], "out"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_exit_2(name: str, model: str, tmp_path, capsys) -> None:
    arguments, expected = MISTAKES[name]
    (tmp_path / "file").write_text("")
    if arguments and arguments[0].startswith("--"):
        arguments = ["steer", "{model}", "--data", "sklearn:digits", "--out", "{out}", *arguments]
    places = {
        "folder": tmp_path,
        "model": model,
        "out": tmp_path / "out",
        "file": tmp_path / "file",
    }
    code, _, err = run(*(str(a).format(**places) for a in arguments), capsys=capsys)
    assert code == 2
    assert err.startswith("flexure: ")
    assert err.count("\n") == 1
    assert expected in err
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("make", "expected"), [(_no_class, "class"), (_nan, "finite"), (_labels, "label")]
)
def test_bad_data_is_one_line_and_exit_2(make, expected: str, model: str, tmp_path, capsys) -> None:
    arguments = ["steer", model, "--data", make(tmp_path), "--out", str(tmp_path / "out")]
    code, _, err = run(*arguments, "--betas", "0.5", capsys=capsys)
    assert code == 2
    assert err.count("\n") == 1
    assert expected in err


def test_nothing_to_steer_is_a_mistake(model: str, tmp_path, capsys) -> None:
    arguments = ["steer", model.replace("small", "tanh"), "--data", "sklearn:digits"]
    code, _, err = run(*arguments, "--out", str(tmp_path / "out"), capsys=capsys)
    assert code == 2
    assert "tanh: bounded on both sides" in err


def test_no_arguments_print_the_help_and_nothing_else(capsys) -> None:
    code, out, err = run(capsys=capsys)
    assert (code, err) == (2, "")
    assert all(word in out for word in ("Usage", "sites", "steer", "demo"))


def test_what_a_model_prints_is_kept_out_of_the_json(model: str, tmp_path, capsys) -> None:
    model = model.replace("small", "chatty")
    code, out, err = run("sites", model, "--data", "sklearn:digits", "--json", capsys=capsys)
    assert code == 0
    assert len(json.loads(out)["sites"]) == 2
    assert {"made", "ran"} <= set(err.splitlines())
    arguments = ["steer", model, "--data", "sklearn:digits", *FAST, "--out", str(tmp_path / "a")]
    code, out, err = run(*arguments, "--json", capsys=capsys)
    assert code == 0
    assert json.loads(out)["numbers"]["samples"]["train"] == 300
    assert {"made", "ran"} <= set(err.splitlines())


def test_steer_deletes_only_what_it_wrote(model: str, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    mine = [out / "search" / "thesis.txt", out / ".flexure-search" / "notes.txt"]
    for path in mine:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    left_over = out / ".flexure-search" / ".0.5.safetensors.1-2.tmp"
    left_over.write_text("half of a file")
    code, _, err = run(
        "steer", model, "--data", "sklearn:digits", *FAST, "--out", str(out), capsys=capsys
    )
    assert (code, err) == (0, "")
    assert [path.read_text() for path in mine] == ["mine", "mine"]
    assert [path.name for path in (out / ".flexure-search").iterdir()] == ["notes.txt"]


def test_an_unfinished_search_is_not_overwritten(
    model: str, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "out" / ".flexure-search"
    store.mkdir(parents=True)
    (store / "a.safetensors").write_text("hours of work")
    monkeypatch.setattr(
        "flexure.cli.common.load_model", lambda address: pytest.fail("work was begun")
    )
    arguments = ["steer", model, "--data", "sklearn:digits", *FAST, "--out", str(store.parent)]
    code, _, err = run(*arguments, capsys=capsys)
    assert code == 2
    assert "holds an unfinished search; add --resume to continue it, or choose another" in err
    assert (store / "a.safetensors").read_text() == "hours of work"


@pytest.mark.parametrize("command", ["sites", "steer", "demo"])
def test_only_steer_speaks_of_resuming(
    command: str, model: str, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments, **more):
        raise KeyboardInterrupt

    for name in ("sites.find_sites", "steer.search_beta"):
        monkeypatch.setattr(f"flexure.cli.{name}", interrupt)
    monkeypatch.setattr("flexure.recipes.demo.run", interrupt)
    arguments = {
        "sites": [model, "--data", "sklearn:digits"],
        "steer": [model, "--data", "sklearn:digits", "--out", str(tmp_path / "out")],
        "demo": ["--out", str(tmp_path / "out")],
    }
    code, _, err = run(command, *arguments[command], capsys=capsys)
    advice = "; what is finished is kept, --resume continues it" if command == "steer" else ""
    assert (code, err) == (130, f"flexure: interrupted{advice}\n")


def test_the_default_grid_is_the_librarys(
    model: str, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexure.cli.steer.BETAS", (0.25,))
    arguments = ["steer", model, "--data", "sklearn:digits", *FAST[2:], "--json"]
    _, text, _ = run(*arguments, "--out", str(tmp_path / "out"), capsys=capsys)
    results = json.loads(text)
    assert results["config"]["betas"] == [0.25]
    assert [setting["beta"] for setting in results["numbers"]["settings"]] == [0.25, 1.0]


def test_the_demo_takes_a_seed(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexure.recipes import demo

    asked = []

    def run_demo(config, out, *, progress):
        asked.append((config, progress))
        return demo.Summary(("found",), out / "results.json", out / "report.html", 0.0, {})

    monkeypatch.setattr(demo, "run", run_demo)
    for arguments in ([], ["--seed", "7"]):
        assert run("demo", "--out", str(tmp_path), *arguments, capsys=capsys)[0] == 0
    assert [config for config, _ in asked] == [demo.Config.small(), demo.Config.small(seed=7)]
    assert [progress for _, progress in asked] == [None, None]  # stderr is no terminal here


def test_version_and_module(capsys) -> None:
    assert run("--version", capsys=capsys)[:2] == (0, f"{flexure.__version__}\n")
    done = subprocess.run(
        [sys.executable, "-m", "flexure", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{flexure.__version__}\n"


def test_interrupted_and_resumed_equals_undisturbed(model: str, tmp_path, capsys) -> None:
    """Ctrl-C in the middle of a search: finished betas are kept, and the result is the same."""
    betas = ",".join(f"{0.5 + 0.01 * i:.2f}" for i in range(12))
    given = ["steer", model.replace("small", "slow"), "--data", "sklearn:digits"]
    given += ["--betas", betas, "--out"]
    cut, store = tmp_path / "cut", tmp_path / "cut" / ".flexure-search"
    err, _ = interrupted(*given, str(cut), store=store, parts=3)
    assert err.count("\n") == 1
    assert "--resume" in err
    for folder, more in ((cut, ["--resume"]), (tmp_path / "whole", [])):
        assert run(*given, str(folder), *more, capsys=capsys)[0] == 0
    assert not store.exists()
    numbers = []
    for name in ("cut", "whole"):
        found = json.loads((tmp_path / name / "results.json").read_text())["numbers"]
        found.pop("timing")
        numbers.append(found)
    assert numbers[0] == numbers[1]


def test_the_model_is_on_the_device_that_was_asked_for(model: str, tmp_path, capsys) -> None:
    arguments = ["sites", model, "--input-shape", "64", "--device", "cpu:0"]
    assert run(*arguments, capsys=capsys)[0] == 0
    assert torch.get_default_device().type == "cpu"
