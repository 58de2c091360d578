"""`flexure attack` from end to end, on tiny networks and images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flexure
from flexure.attacks import Bounded, robust_accuracy
from flexure.cli.attack_plain import radii_of
from flexure.cli.attack_sweep import halves
from flexure.contracts import DataError
from flexure.data import from_arrays
from tests.cli.commands import run

MODEL = """
import torch
from torch import nn
from flexure.models import Preprocess

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)

def made(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 12), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(12, 3)).eval()
    with torch.no_grad():  # no class is larger than the others on noise
        model[5].bias -= model((torch.rand(200, 3, 8, 8) - 0.5) / 0.25).mean(0)
    return model

def small():
    return made(), Preprocess(None, MEAN, STD)

def other():
    return made(1), Preprocess(None, STD, MEAN)

def unknown():
    return made(), half

def half(item):
    return item / 2

def wide():
    return nn.Linear(3, 10).eval()
"""

ATTACK = ["--attack", "pgd", "--eps", "2/255,8/255", "--samples", "16", "--batch-size", "8"]
SWEEP = ["--sweep", "--attack", "pgd", "--eps", "2/255", "--target", "2/255", "--betas", "0.8"]
SWEEP += ["--cs", "0.25", "--match", "none", "--groups", "layers", "--budget", "2"]
SWEEP += ["--val-size", "16", "--test-size", "20", "--clean-loss", "0.5"]
CORRUPT = ["--corruptions", "--corruption", "contrast", "--severities", "1,5"]


@pytest.fixture(autouse=True)
def _pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages take longer than attacks on tiny networks: only where they are looked at."""
    if "page" not in request.fixturenames:
        monkeypatch.setattr("flexure.cli.attack_jobs._write_page", lambda *_: None)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """The page that is written."""
    return tmp_path / "out" / "report.html"


@pytest.fixture
def address(tmp_path: Path) -> str:
    path = tmp_path / "models.py"
    path.write_text(MODEL)
    return f"{path}:small"


@pytest.fixture
def data(tmp_path: Path, address: str) -> str:
    """48 images that the network gets right but for four."""
    images = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3), dtype=np.uint8)
    loaded = flexure.load_model(address)
    x = torch.stack([loaded.preprocess(torch.from_numpy(i).permute(2, 0, 1)) for i in images])
    labels = loaded.model(x).argmax(1).numpy()
    rows = np.concatenate([np.flatnonzero(labels == k)[:16] for k in range(3)])
    labels = labels[rows]
    labels[::12] = (labels[::12] + 1) % 3
    np.savez(tmp_path / "data.npz", images=images[rows], labels=labels)
    return f"npz:{tmp_path / 'data.npz'}"


@pytest.fixture
def attack(address: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Exit code, stdout and stderr of `flexure attack MODEL --data DATA ARGS`."""

    def attacked(*args: str, model: str = address, out: str = "out") -> tuple[int, str, str]:
        where = ["--data", data, "--out", str(tmp_path / out)]
        return run("attack", model, *where, *args, capsys=capsys)

    return attacked


def test_attack_writes_everything(attack, page, tmp_path: Path) -> None:
    code, text, err = attack(*ATTACK)
    assert (code, err) == (0, "")
    assert "linf  2/255  pgd" in text
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "results.json"]
    payload = json.loads((out / "results.json").read_text())
    assert payload["config"]["eps"] == {"linf": [2 / 255, 8 / 255]}
    assert payload["config"]["samples"] == 16
    (model,) = payload["numbers"]["models"]
    assert [at["eps"] for at in model["at"]] == [2 / 255, 8 / 255]
    written = page.read_text()
    assert "<svg" in written
    assert "http" not in written.replace("http://www.w3.org", "")


def test_radii_are_in_pixels_and_numbers_those_of_the_library(attack, address, data) -> None:
    code, text, _ = attack(*ATTACK, "--json")
    assert code == 0
    at = json.loads(text)["numbers"]["models"][0]["at"][0]
    loaded, images = flexure.load_model(address), flexure.load_data(data)["train"]
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(42))[:16]
    x = torch.stack([images[int(row)] for row in rows]).float() / 255
    bounded = Bounded(loaded.model, mean=loaded.preprocess.mean, std=loaded.preprocess.std)
    y = images.labels[rows]
    clean = bounded(x).argmax(1) == y
    found = robust_accuracy(
        bounded, x[clean], y[clean], attack="pgd", norm="linf", eps=2 / 255, seed=42, batch_size=8
    )
    assert torch.tensor(at["robust"])[clean].equal(found.robust)


def test_a_steered_network_beside_the_plain_one(attack, address, tmp_path: Path) -> None:
    code, text, err = attack(*ATTACK, "--steer", "0.6,0.25", "--json")
    assert (code, err) == (0, "")
    steered = json.loads(text)["numbers"]
    assert [model["name"] for model in steered["models"]] == ["beta 0.6, c 0.25", "unsteered"]
    assert steered["differences"]["attacked"][0]["difference"]["low"] <= 0.5
    _, plain, _ = attack(*ATTACK, "--json", out="plain")
    assert outcomes(steered)[1] == outcomes(json.loads(plain)["numbers"])[0]
    with flexure.steer(
        flexure.load_model(address).model, beta=0.6, c=0.25, example=torch.zeros(2, 3, 8, 8)
    ) as steering:
        steering.save(tmp_path / "adapter")
    code, text, err = attack(*ATTACK, "--adapter", str(tmp_path / "adapter"), "--json", out="b")
    assert (code, err) == (0, "")
    adapted = json.loads(text)["numbers"]
    assert [model["name"] for model in adapted["models"]] == ["adapted", "plain"]
    assert outcomes(adapted) == outcomes(steered)


def outcomes(numbers: dict[str, Any]) -> list[Any]:
    """Every sample's, model by model."""
    return [[at["robust"] for at in model["at"]] for model in numbers["models"]]


def test_two_networks_each_with_its_own_preprocessing(attack, address) -> None:
    code, text, err = attack(*ATTACK, "--against", address.replace("small", "other"), "--json")
    assert (code, err) == (0, "")  # each is normalised by its own: nothing to warn of
    numbers = json.loads(text)["numbers"]
    _, alone, _ = attack(*ATTACK, "--json", model=address.replace("small", "other"), out="b")
    assert outcomes(numbers)[1] == outcomes(json.loads(alone)["numbers"])[0]


def test_masking_certificates_and_the_published_protocol(attack) -> None:
    more = ["--masking", "--certify", "--protocol", "published"]
    code, text, err = attack(*ATTACK, "--eps", "l2:0.2", *more, "--json")
    assert (code, err) == (0, "")
    payload = json.loads(text)
    numbers = payload["numbers"]
    assert numbers["masking"]["verdict"] in ("masked", "not masked", "undecided")
    assert [one["eps"] for one in numbers["certified"]] == [0.2]
    assert payload["config"]["protocol"] == ["standard", "published"]
    told = {(at["norm"], at["protocol"]) for at in numbers["models"][0]["at"]}
    assert told == {(n, p) for n in ("linf", "l2") for p in ("standard", "published")}
    assert any("not an l_p robustness" in note for note in numbers["notes"])


def test_pixels_beside_other_inputs_are_refused(attack, address, tmp_path: Path) -> None:
    unknown = address.replace("small", "unknown")
    for model, against, whose in ((address, unknown, "--against"), (unknown, address, "MODEL's")):
        code, text, err = attack(*ATTACK, "--against", against, model=model)
        assert (code, text) == (2, "")
        assert "expected two models of pixels" in err
        assert whose in err
        assert len(err.splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_what_does_not_go_with_the_folder_of_a_sweep(attack, tmp_path: Path) -> None:
    swept = tmp_path / "swept"
    swept.mkdir()
    kept = swept / "results.json"
    kept.write_text("{}")
    code, _, err = attack(*ATTACK, "--after", str(tmp_path / "x" / ".." / "swept"), out="swept")
    assert code == 2
    assert "expected results in another folder than those of the sweep" in err
    assert kept.read_text() == "{}"
    files = ("--corruption-files", "cifar10-c:nowhere")
    code, _, err = attack(*CORRUPT, *files, "--after", str(swept))
    assert code == 2
    assert "expected --after without --corruption-files" in err


def test_unknown_bounds_are_told(attack, address) -> None:
    code, _, err = attack(*ATTACK, model=address.replace("small", "unknown"))
    assert code == 0
    assert "flexure: warning: " in err
    assert "no bounds of its inputs are known" in err


def test_a_sweep_chooses_and_saves_a_dial(attack, address, page, tmp_path: Path) -> None:
    code, text, err = attack(*SWEEP)
    assert (code, err) == (0, "")
    out = tmp_path / "out"
    payload = json.loads((out / "results.json").read_text())
    assert payload["numbers"]["samples"] == {"val": 16, "test": 20}
    assert payload["config"]["sizes"] == {"val": 16, "test": 20}
    assert "<svg" in page.read_text()
    chosen = payload["numbers"]["chosen"]["dial"]
    assert (out / "adapter").exists() == (chosen is not None)
    assert not (out / ".flexure-attack").exists()
    if chosen is not None:
        assert f"Adapter: {out / 'adapter'}" in text
        loaded = flexure.load_model(address)
        flexure.load_adapter(loaded.model, out / "adapter")


def test_a_sweep_without_a_dial_leaves_no_adapter_of_an_earlier_one(attack, tmp_path) -> None:
    adapter = tmp_path / "out" / "adapter"
    adapter.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "notes.txt"):
        (adapter / name).write_text("of an earlier sweep")
    alone = [*SWEEP[:-8], "--groups", "none", "--val-size", "16", "--test-size", "20"]
    code, text, err = attack(*alone, "--betas", "0", "--cs", "0", "--clean-loss", "0", "--json")
    assert (code, err) == (0, "")
    assert json.loads(text)["numbers"]["chosen"]["dial"] is None
    assert [path.name for path in adapter.iterdir()] == ["notes.txt"]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_text("of another sweep")
    code, _, err = attack("--after", str(tmp_path / "out"), out="more")
    assert code == 2
    assert "to have chosen a dial, got the network as it was" in err


def test_starts_are_those_of_the_library(attack) -> None:
    more = ("--match", "none,mean", "--starts", "2", "--budget", "1", "--json")
    code, text, err = attack(*SWEEP, *more)
    assert (code, err) == (0, "")
    candidates = json.loads(text)["numbers"]["candidates"]
    assert sum(one["stage"] == "groups" for one in candidates) == 2


def test_after_a_sweep_its_dial_is_attacked_on_what_it_reported_on(attack, data, tmp_path) -> None:
    code, text, err = attack(*SWEEP, "--json", out="swept")
    assert (code, err) == (0, "")
    swept = json.loads(text)
    after = ("--after", str(tmp_path / "swept"))
    if swept["numbers"]["chosen"]["dial"] is None:
        pytest.fail("this sweep is to choose a dial; change its settings")
    code, text, err = attack("--attack", "pgd", "--eps", "1/255", *after, "--json")
    assert (code, err) == (0, "")
    found = json.loads(text)
    assert found["config"]["samples"] == swept["config"]["sizes"]["test"] == 20
    row = next(
        r for r in swept["numbers"]["rows"] if r["dial"] == swept["numbers"]["chosen"]["dial"]
    )
    clean = [sum(model["clean"]) for model in found["numbers"]["models"]]
    plain = swept["numbers"]["rows"][0]
    assert clean == [round(20 * each["clean"]["value"]) for each in (row, plain)]
    shift = ("--shift", f"same={data}")
    code, text, err = attack(*CORRUPT, *after, *shift, "--json", out="corrupted")
    assert (code, err) == (0, "")
    assert json.loads(text)["config"]["samples"] == 20
    code, _, err = attack(*after, "--steer", "0.5")
    assert code == 2
    assert "--after alone" in err
    code, _, err = attack("--after", str(tmp_path))
    assert code == 2
    assert "finished sweep" in err
    (tmp_path / "swept" / "adapter" / "adapter_model.safetensors").unlink()
    code, _, err = attack(*after)
    assert code == 2
    assert "got no adapter there; run the sweep again" in err


def test_parts_of_a_sweep_are_no_larger_than_the_data() -> None:
    one = from_arrays(np.zeros((60, 4, 4, 3), dtype=np.uint8), np.arange(60) % 3)
    with pytest.raises(DataError, match="expected --val-size to be at most 60"):
        halves({"validation": one, "test": one}, {"val": 61, "test": None}, 3)
    with pytest.raises(DataError, match="--test-size to be together at most 60"):
        halves({"train": one}, {"val": None, "test": 60}, 3)


def test_a_sweep_chooses_on_other_samples_than_it_reports_on() -> None:
    images = np.zeros((60, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(60) % 3
    one = from_arrays(images, labels)
    parts = halves({"train": one}, {"val": None, "test": None}, 3)
    assert (len(parts.val), len(parts.test)) == (30, 30)
    assert not set(parts.val.indices.tolist()) & set(parts.test.indices.tolist())
    parts = halves({"train": one}, {"val": 12, "test": None}, 3)
    assert (len(parts.val), len(parts.test)) == (12, 48)
    parts = halves({"train": one}, {"val": None, "test": 12}, 3)
    assert (len(parts.val), len(parts.test)) == (48, 12)
    test = from_arrays(images[:30], labels[:30])
    parts = halves({"train": one, "test": test}, {"val": 12, "test": 12}, 3)
    assert parts.val.data is parts.test.data is test
    three = {"train": one, "validation": one, "test": test}
    parts = halves(three, {"val": None, "test": 12}, 3)
    assert parts.val.data is one
    assert len(parts.val) == 60
    assert len(parts.test) == 12


def test_corrupted_images(attack, data, page) -> None:
    code, text, err = attack(*CORRUPT, "--shift", f"same={data}", "--steer", "0.8", "--json")
    assert (code, err) == (0, "")
    payload = json.loads(text)
    assert payload["config"]["samples"] == 48
    numbers = payload["numbers"]
    told = {(cell["name"], cell["severity"]) for cell in numbers["cells"]}
    assert told == {("contrast", 1), ("contrast", 5)}
    assert numbers["shifts"][0]["right"] == numbers["clean"]["right"]
    assert "<svg" in page.read_text()
    code, text, err = attack(*CORRUPT, "--samples", "10", "--json", out="few")
    assert json.loads(text)["config"]["samples"] == 10


@pytest.mark.parametrize("arguments", [[*ATTACK, "--steer", "0.6"], SWEEP, CORRUPT])
def test_interrupted_and_resumed_is_uninterrupted(
    arguments, attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexure.store import Store

    put, parts = Store.put, []

    def interrupted(self: Store, *args: Any) -> None:
        put(self, *args)
        parts.append(self.path(args[0]))
        if len(parts) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "put", interrupted)
    code, _, err = attack(*arguments)
    assert code == 130
    assert "interrupted; what is finished is kept, --resume continues it" in err
    monkeypatch.setattr(Store, "put", put)
    code, _, err = attack(*arguments)
    assert code == 2
    assert "holds an unfinished attack; add --resume" in err
    kept = {path: path.stat().st_mtime_ns for path in parts}
    changed: list[Path] = []

    def watched(self: Store, *args: Any) -> None:
        put(self, *args)
        changed.append(self.path(args[0]))

    monkeypatch.setattr(Store, "put", watched)
    code, text, err = attack(*arguments, "--resume", "--json")
    assert (code, err) == (0, "")
    assert changed
    assert not set(changed) & set(kept)
    assert not (tmp_path / "out" / ".flexure-attack").exists()
    monkeypatch.setattr(Store, "put", put)
    code, whole, _ = attack(*arguments, "--json", out="whole")
    assert code == 0
    assert timeless(json.loads(text)["numbers"]) == timeless(json.loads(whole)["numbers"])


def timeless(value: Any) -> Any:
    """Without what was measured by a clock."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if "seconds" not in key}
    return [timeless(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eps", "small"], "expected --eps like 1/255 or 0.25, got 'small'"),
        (["--eps", "1/0"], "expected --eps like"),
        (["--eps", "l1:1"], "expected norm to be one of l2, linf, got 'l1'"),
        (["--eps", "0"], "expected radii above 0"),
        (["--attack", "none"], "expected attacks among pgd"),
        (["--protocol", "old"], "expected --protocol standard or published"),
        (["--steer", "a"], "expected --steer to be numbers"),
        (["--steer", "0.7", "--adapter", "x"], "expected --steer or --adapter, got both"),
        (["--split", "test"], "expected --split among train"),
        (["--device", "nowhere"], "expected a device that works here"),
        (["--sweep", "--corruptions"], "expected --sweep or --corruptions"),
        (["--sweep", "--masking"], "expected no --masking with --sweep"),
        (["--sweep", "--samples", "9"], "give --val-size and --test-size"),
        (["--sweep", "--eps", "1/255", "--eps", "l2:1"], "expected one norm and one --attack"),
        (["--sweep", "--attack", "none"], "expected --attack among pgd"),
        (["--sweep", "--groups", "some"], "expected --groups among layers"),
        (["--sweep", "--search", "some"], "expected --search among"),
        (["--sweep", "--match", "some"], "expected --match among none"),
        (["--sweep", "--betas", "x"], "expected --betas to be numbers"),
        (["--sweep", "--target", "x"], "expected --target like"),
        (
            ["--sweep", "--val-size", "40", "--test-size", "40"],
            "expected --val-size and --test-size to be together at most 48, the samples of train, "
            "got 40 and 40",
        ),
        (["--sweep", "--val-size", "200"], "at most 48, the samples of train, got 200 and a share"),
        (["--sweep", "--groups", "none", "--budget", "9"], "expected no --budget with --groups"),
        (["--sweep", "--groups", "none", "--search", "greedy"], "expected no --search with --gr"),
        (["--sweep", "--search", "none", "--groups", "sites"], "expected no --groups with --sea"),
        (["--sweep", "--search", "none", "--starts", "2"], "expected no --starts with --search"),
        (["--starts", "2"], "expected no --starts with an attack; add --sweep"),
        (["--betas", "0.7"], "expected no --betas with an attack; add --sweep"),
        (["--corruption", "fog"], "add --corruptions"),
        (["--corruptions", "--eps", "1/255"], "expected no --eps with --corruptions"),
        (["--corruptions", "--corruption", "rain"], "rain"),
        (["--corruptions", "--severities", "x"], "expected --severities to be numbers"),
        (["--corruptions", "--severities", "6"], "6"),
        (["--corruptions", "--shift", "jpeg"], "expected --shift like jpeg=npz:FILE"),
        (["--corruptions", "--corruption-files", "cifar10-c:nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments, message, attack, tmp_path: Path) -> None:
    code, text, err = attack(*arguments)
    assert (code, text) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_model_of_other_inputs_is_refused(attack, address) -> None:
    code, _, err = attack(*ATTACK, model=address.replace("small", "wide"))
    assert code == 2
    assert "expected a model that takes the data" in err


def test_radii() -> None:
    given = ["1/255, 2/255", "l2:0.25,1/2", "linf:0.5"]
    assert radii_of(given) == {"linf": [1 / 255, 2 / 255, 0.5], "l2": [0.25, 0.5]}
