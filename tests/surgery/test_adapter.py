"""Adapter files: bit-equal after loading, and every wrong or damaged file is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from flexure.contracts import AdapterError, FlexureError
from flexure.methods.load import load_adapter
from flexure.methods.steer import steer
from flexure.surgery.adapter import AdapterFile, write_adapter
from tests.methods.test_steer import Routed, state
from tests.networks import resnet18

CASES = {
    "plain": {"beta": 0.8, "c": 0.3},
    "patterns": {"beta": {"layer1.0:*": 0.7, "layer2*": 0.9}, "c": {"*": 0.25}},
    "balanced, some": {"beta": 0.85, "c": "balanced", "where": "layer3*"},
    "calibrated": {"beta": 0.6, "c": 0.0, "match": "mean+std", "calibration": True},
}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    return resnet18(8).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32)


def unsign(folder: Path) -> None:
    """Takes the digest out of both files, so that changed tensors are looked at one by one."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "adapter_config.json").read_text())
    del config["digest"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = folder / "adapter_model.safetensors"
    save_file(load_file(tensors), tensors)


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_bit_equal_without_an_example(name: str, model, x, tmp_path) -> None:
    settings = dict(CASES[name])
    if settings.pop("calibration", False):
        settings["calibration"] = [x]
    plain, before = model(x), state(model)
    with steer(model, example=x, **settings) as steering:
        steered = model(x)
        steering.save(tmp_path)
    loaded = load_adapter(model, tmp_path)
    assert torch.equal(model(x), steered)
    assert (loaded.beta, loaded.c) == (settings["beta"], settings["c"])
    assert loaded.report.sites == steering.report.sites
    loaded.remove()
    assert state(model) == before
    assert torch.equal(model(x), plain)


def test_bit_equal_in_a_fresh_process(model, x, tmp_path) -> None:
    with steer(model, beta=0.8, example=x, calibration=[x]) as steering:
        steering.save(tmp_path / "adapter")
        torch.save({"weights": None, "x": x, "y": model(x)}, tmp_path / "batch.pt")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    code = (
        "import sys, torch, flexure; from tests.networks import resnet18\n"
        "torch.set_num_threads(2)\n"
        f"folder = {str(tmp_path)!r}\n"
        "model = resnet18(8).eval(); model.load_state_dict(torch.load(folder + '/weights.pt'))\n"
        "batch = torch.load(folder + '/batch.pt')\n"
        "flexure.load_adapter(model, folder + '/adapter')\n"
        "sys.exit(0 if torch.equal(model(batch['x']), batch['y']) else 1)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_trained_head_travels_along(model, x, tmp_path) -> None:
    before, plain, old = state(model), model(x), model.fc
    with steer(model, beta=0.8, example=x) as steering:
        model.fc = nn.Linear(64, 4)
        with_head = model(x)
        steering.save(tmp_path, head="fc")
        with pytest.raises(AdapterError, match=r"expected an nn\.Linear"):
            steering.save(tmp_path / "other", head="layer1")
        model.fc = old
    loaded = load_adapter(model, tmp_path)
    assert torch.equal(model(x), with_head)
    loaded.save(tmp_path / "again")
    loaded.remove()
    assert state(model) == before
    assert torch.equal(model(x), plain)
    with load_adapter(model, tmp_path / "again"):
        assert torch.equal(model(x), with_head)
    model.fc = nn.Linear(32, 10)
    with pytest.raises(AdapterError, match="takes 64 features, the model's 'fc' takes 32"):
        load_adapter(model, tmp_path)
    assert type(model.relu) is nn.ReLU


def test_nothing_is_pickled(model, x, tmp_path) -> None:
    with steer(model, beta=0.8, example=x) as steering:
        steering.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    json.loads((tmp_path / "adapter_config.json").read_text())


def test_dial_can_be_turned_after_loading(model, x, tmp_path) -> None:
    with steer(model, beta=0.8, example=x) as steering:
        steering.save(tmp_path)
        steering.beta = 0.6
        expected = model(x)
    with load_adapter(model, tmp_path) as loaded:
        loaded.beta = 0.6
        assert torch.equal(model(x), expected)


def test_calibrated_dial_turned_after_loading_says_what_it_needs(model, x, tmp_path) -> None:
    with steer(model, beta=0.8, example=x, calibration=[x]) as steering:
        steering.save(tmp_path)
    with load_adapter(model, tmp_path) as loaded:
        calibrated = model(x)
        with pytest.raises(AdapterError, match="calibrat"):
            loaded.beta = 0.6
        assert torch.equal(model(x), calibrated)


def test_wrong_model_lists_missing_and_unexpected(model, x, tmp_path) -> None:
    with steer(model, beta=0.8, example=x) as steering:
        steering.save(tmp_path)
    other = Routed()
    before = state(other)
    with pytest.raises(
        AdapterError, match=r"missing sites: .*layer1\.0:0.*unexpected sites: .*act \(relu\)"
    ):
        load_adapter(other, tmp_path)
    assert state(other) == before
    model.layer1[0].extra = nn.GELU()
    with pytest.raises(
        AdapterError, match=r"missing sites: none; unexpected sites: layer1\.0\.extra"
    ):
        load_adapter(model, tmp_path)


def test_other_channels_are_named_when_the_model_runs(model, x, tmp_path) -> None:
    with steer(model, beta=0.8, example=x) as steering:
        steering.save(tmp_path)
    wider = resnet18(16).eval()
    with (
        load_adapter(wider, tmp_path),
        pytest.raises(ValueError, match=r"(?s)site '.*': expected 8 channels.* adapter fits only"),
    ):
        wider(x)


DAMAGE = {
    "no folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no tensors": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "cut tensors": lambda folder: (folder / "adapter_model.safetensors").write_bytes(
        (folder / "adapter_model.safetensors").read_bytes()[:-9]
    ),
    "pickle": lambda folder: torch.save({"a": 1}, folder / "adapter_model.safetensors"),
    "not json": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "binary": lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff\xfe"),
    "a list": lambda folder: (folder / "adapter_config.json").write_text("[]"),
    "PEFT's": lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
}

EDITS = {
    "newer format": {"format": 99},
    "unknown method": {"method": "sorcery"},
    "no sites": {"sites": None},
    "unknown site": {"chosen": ["nowhere"]},
    "wrong types": {"routes": {"layer1.0": 3}},
}


@pytest.mark.parametrize("name", [*DAMAGE, *EDITS])
def test_damaged_or_foreign_files(name: str, model, x, tmp_path) -> None:
    with steer(model, beta=0.8, example=x) as steering:
        steering.save(tmp_path)
    if name in DAMAGE:
        DAMAGE[name](tmp_path)
    else:
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **EDITS[name]}))
    before = state(model)
    with pytest.raises(AdapterError):
        load_adapter(model, tmp_path)
    assert state(model) == before


def test_values_out_of_range_are_refused(model, x, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    with steer(model, beta=0.8, example=x) as steering:
        steering.save(tmp_path)
    unsign(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    before = state(model)
    for bad in (
        {**tensors, name: torch.tensor(2.0)},
        {k: v for k, v in tensors.items() if k != name},
    ):
        save_file(bad, path)
        with pytest.raises(ValueError):
            load_adapter(model, tmp_path)
        assert state(model) == before


def test_unwritable_folder(model, x, tmp_path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with steer(model, beta=0.8, example=x) as steering, pytest.raises(AdapterError, match="write"):
        steering.save(blocked / "adapter")


def test_constants_of_an_activation_must_agree(tmp_path) -> None:
    x = torch.randn(4, 6)
    source, target = (nn.Sequential(nn.Linear(6, 6), nn.LeakyReLU(s)) for s in (0.3, 0.01))
    with steer(source, beta=0.8, example=x) as steering:
        steering.save(tmp_path)
    with pytest.raises(AdapterError, match=r"missing sites: 1 \(leaky_relu\)"):
        load_adapter(target, tmp_path)
    with load_adapter(nn.Sequential(nn.Linear(6, 6), nn.LeakyReLU(0.3)), tmp_path):
        pass


BROKEN = {
    "no beta in settings": (lambda c: c["settings"].pop("beta"), None),
    "no settings": (lambda c: c.update(settings=None), None),
    "beta is text": (lambda c: c["settings"].update(beta="x"), None),
    "unknown kind": (lambda c: c["sites"][0].update(kind="zzz"), None),
    "axis is text": (lambda c: c["sites"][0].update(axis="a"), None),
    "axis too far": (lambda c: c["sites"][0].update(axis=-9), None),
    "no routes": (lambda c: c.update(routes={}), None),
    "nothing chosen": (lambda c: c.update(chosen=[]), None),
    "module without names": (lambda c: c["sites"][0].update(modules=[]), None),
    "method is a list": (lambda c: c.update(method=["steer"]), None),
    "nan shift": (None, lambda t: t.update({"relu.shift": t["relu.shift"] * torch.nan})),
    "short shift": (None, lambda t: t.update({"relu.shift": t["relu.shift"][:2]})),
    "one shift missing": (None, lambda t: t.pop("relu.shift")),
    "one scale missing": (None, lambda t: t.pop("layer1.0:0.scale")),
    "vector beta": (None, lambda t: t.update({"relu.beta": torch.full((3,), 0.5)})),
}


@pytest.mark.parametrize("name", BROKEN)
def test_inconsistent_files_change_nothing(name: str, model, x, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    with steer(model, beta=0.8, example=x, calibration=[x]) as steering:
        steering.save(tmp_path)
    unsign(tmp_path)
    edit_config, edit_tensors = BROKEN[name]
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    if edit_config:
        edit_config(config)
    else:
        edit_tensors(tensors)
    path.write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    before = state(model)
    with pytest.raises(FlexureError):
        load_adapter(model, tmp_path)
    assert state(model) == before


def test_both_files_are_ordinary_ones(tmp_path: Path) -> None:
    """Whoever may read the one may read the other."""
    write_adapter(tmp_path / "a", AdapterFile("method", {}, {}, {"x": torch.ones(2)}))
    (tmp_path / "ordinary").write_text("")
    modes = {path.stat().st_mode for path in (tmp_path / "a").iterdir()}
    assert modes == {(tmp_path / "ordinary").stat().st_mode}
    assert len(list((tmp_path / "a").iterdir())) == 2
