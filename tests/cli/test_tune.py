"""`flexure tune` from end to end, on a tiny network and the digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import flexure
from flexure.cli.common import working
from tests.cli.commands import interrupted, run, written

MODEL = """
import time
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(16, 5)).eval()

class Slowly(nn.Module):
    def forward(self, x):
        time.sleep(0.003)
        return x

def slow():
    return nn.Sequential(Slowly(), small())

def bare():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 5))
"""

FAST = ["--epochs", "2", "--seeds", "2", "--rate-factors", "1,10"]
SIZES = ["--train-size", "120", "--val-size", "60", "--test-size", "90"]


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "models.py"
    path.write_text(MODEL)
    return f"{path}:small"


def tune(*args: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `flexure tune ARGS` on the digits."""
    return run("tune", *args, "--data", "sklearn:digits", *SIZES, capsys=capsys)


def test_tune_writes_everything_and_its_adapters_load(model: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    code, text, err = tune(model, *FAST, "--out", str(out), capsys=capsys)
    assert (code, err) == (0, "")
    assert "2 sites to steer; 2 exact at beta = 1" in text
    assert "95 % intervals over test samples and 2 seeds" in text
    assert sorted(p.name for p in out.iterdir()) == ["adapters", "report.html", "results.json"]
    payload = json.loads((out / "results.json").read_text())
    assert payload["config"]["seeds"] == [42, 43]
    numbers = payload["numbers"]
    names = [arm["name"] for arm in numbers["arms"]]
    assert names == ["probe", "steered", "lora", "trainable_ct", "full"]
    assert numbers["samples"] == {"train": 120, "val": 60, "test": 90}
    assert {arm["head_parameters"] for arm in numbers["arms"]} == {16 * 10 + 10}
    assert len(numbers["arms"][3]["runs"][0]["betas"]) == 2
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 1 + 2 + 2 + 2
    assert "http" not in page.replace("http://www.w3.org", "")
    for name in names:
        adapted = flexure.load_model(model).model
        flexure.load_adapter(adapted, out / "adapters" / name)
        assert adapted[5].out_features == 10


def test_json_is_the_results_file(model: str, tmp_path: Path, capsys) -> None:
    arguments = [model, *FAST, "--arms", "lora", "--out", str(tmp_path / "a"), "--json"]
    code, text, err = tune(*arguments, capsys=capsys)
    assert (code, err) == (0, "")
    assert json.loads(text) == json.loads((tmp_path / "a" / "results.json").read_text())
    assert [arm["name"] for arm in json.loads(text)["numbers"]["arms"]] == ["probe", "lora"]


def test_a_network_without_sites_is_adapted_by_what_fits(
    model: str, tmp_path: Path, capsys
) -> None:
    bare = model.replace("small", "bare")
    arguments = [bare, *FAST, "--out", str(tmp_path / "a")]
    code, text, _ = tune(*arguments, "--arms", "lora,full", capsys=capsys)
    assert code == 0
    assert "0 sites to steer" in text
    code, _, err = tune(bare, *FAST, "--out", str(tmp_path / "b"), capsys=capsys)
    assert code == 2
    assert "tanh" in err


MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown arm": (["--arms", "probe,magic"], "probe, steered, lora, trainable_ct, full"),
    "no arm": (["--arms", ","], "got none"),
    "factors": (["--rate-factors", "much"], "--rate-factors"),
    "factor 0": (["--rate-factors", "0"], "positive factors"),
    "no epochs": (["--epochs", "0"], "epochs"),
    "no such head": (["--head", "nowhere"], "nowhere"),
    "no such site": (["--where", "layer9.*"], "layer9"),
    "rates beyond all bounds": (["--rate-factors", "1e300", "--arms", "lora"], "at most 1e+30"),
    "a rate that overflows": (["--rate-factors", "1e308", "--arms", "full"], "rate factors"),
    "seed": (["--seed", "99999999999999999999999"], "--seed"),
    "seeds": (["--seeds", "1000000000000000000000"], "--seeds"),
    "epochs": (["--epochs", "1000000000000000000000"], "--epochs"),
    "batch size": (["--batch-size", "1000000000000000000000"], "--batch-size"),
    "head's rate 0": (["--head-rate", "0"], "at most 1000, got 0.0"),
    "head's rate -1": (["--head-rate", "-1"], "at most 1000, got -1.0"),
    "head's rate nan": (["--head-rate", "nan"], "at most 1000, got nan"),
    "head's rate 1e30": (["--head-rate", "1e30"], "at most 1000, got 1e+30"),
    "device": (["--device", "tpu9"], "tpu9"),
    "nothing to resume from": (["--resume", "--arms", "probe,magic"], "magic"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_exit_2(name: str, model: str, tmp_path: Path, capsys) -> None:
    arguments, expected = MISTAKES[name]
    out = tmp_path / "out"
    code, _, err = tune(model, "--epochs", "1", "--out", str(out), *arguments, capsys=capsys)
    assert code == 2
    assert err.startswith("flexure: ")
    assert err.count("\n") == 1
    assert expected in err
    assert not (out / "results.json").exists()


def test_a_model_of_other_inputs_is_a_mistake(tmp_path: Path, capsys) -> None:
    path = tmp_path / "wide.py"
    path.write_text("from torch import nn\ndef wide():\n    return nn.Linear(3, 10)\n")
    code, _, err = tune(f"{path}:wide", "--out", str(tmp_path / "out"), capsys=capsys)
    assert code == 2
    assert "expected a model that takes the data, got RuntimeError" in err
    assert err.count("\n") == 1


def test_after_a_mistake_the_same_folder_is_taken(model: str, tmp_path: Path, capsys) -> None:
    arguments = [model, *FAST, "--arms", "probe,steered", "--out", str(tmp_path / "out")]
    code, _, err = tune(*arguments, "--where", "layer9", capsys=capsys)
    assert (code, "the arm 'steered' does not fit" in err) == (2, True)
    code, _, err = tune(*arguments, capsys=capsys)
    assert (code, err) == (0, "")


def test_a_folder_where_another_run_works_is_refused(model: str, tmp_path: Path, capsys) -> None:
    arguments = [model, *FAST, "--arms", "probe", "--out", str(tmp_path / "out")]
    with working(tmp_path / "out" / ".flexure-tune", "comparison", resume=False):
        for more in ([], ["--resume"]):
            code, _, err = tune(*arguments, *more, capsys=capsys)
            assert code == 2
            assert f"another run works in {tmp_path / 'out'}; wait for its end" in err
            assert err.count("\n") == 1
    code, _, err = tune(*arguments, capsys=capsys)
    assert (code, err) == (0, "")


def numbers_of(folder: Path) -> Any:
    found = json.loads((folder / "results.json").read_text())["numbers"]
    found.pop("timing")
    for arm in found["arms"]:
        arm.pop("seconds")
        for one in arm["runs"]:
            one.pop("seconds")
    return found


def test_interrupted_and_resumed_equals_undisturbed(model: str, tmp_path: Path, capsys) -> None:
    """Ctrl-C in the middle: finished runs are kept, and the result is the same."""
    arguments = [model.replace("small", "slow"), *FAST, "--arms", "lora"]
    cut, store = tmp_path / "cut", tmp_path / "cut" / ".flexure-tune"
    given = [*arguments, "--data", "sklearn:digits", *SIZES, "--out", str(cut)]
    err, kept = interrupted("tune", *given, store=store, parts=2)
    assert err == "flexure: interrupted; what is finished is kept, --resume continues it\n"
    (store / "thesis.txt").write_text("mine")
    code, _, err = tune(*arguments, "--out", str(cut), capsys=capsys)
    assert code == 2
    assert "holds an unfinished comparison; add --resume to continue it" in err
    code, _, err = tune(*arguments, "--out", str(cut), "--resume", "--batch-size", "7",
                        capsys=capsys)  # fmt: skip
    assert code == 2
    assert "another training" in err
    assert written(store) == kept
    for folder, more in ((cut, ["--resume"]), (tmp_path / "whole", [])):
        code, _, err = tune(*arguments, "--out", str(folder), *more, capsys=capsys)
        assert (code, err) == (0, "")
    assert numbers_of(cut) == numbers_of(tmp_path / "whole")
    assert [path.name for path in store.iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "whole" / ".flexure-tune").exists()
