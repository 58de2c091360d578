"""Files of adaptations: bit-equal after loading, refused when damaged or foreign; the hub."""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import flexure
from flexure.contracts import AdapterError, FlexureError, MissingExtraError
from flexure.methods.adapt import adapt
from flexure.methods.baselines import LinearProbe
from flexure.methods.catalogue import METHODS
from flexure.methods.load import load_adapter
from flexure.methods.lora import LoRA
from flexure.methods.trainable_ct import TrainableCT
from tests.methods.adapted import Net, batch, contents, net, put, same, state, train

EVERY = pytest.mark.parametrize("name", METHODS)
X, Y = batch()
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def model() -> Net:
    return net()


def saved(name: str, folder: Path, **options: Any) -> Tensor:
    """Saves a trained adaptation of a fresh network; what that network gives, in eval mode."""
    model = net()
    adaptation = put(model, name, **{"classes": 4, **options})
    train(adaptation, rate=0.05)
    adaptation.save(folder)
    return model.eval()(X).detach()


def edit(folder: Path, change: Callable[[dict[str, Any]], object], which: str = CONFIG) -> None:
    """Changes one of the two files; the tensors without a digest, so that they are looked at."""
    path = folder / which
    if which == CONFIG:
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))
    else:
        values = load_file(path)
        change(values)
        save_file(values, path)
        edit(folder, lambda c: c.pop("digest", None))


class TestRoundTrip:
    @EVERY
    @pytest.mark.parametrize("classes", [4, None])
    def test_bit_equal(self, name: str, classes: int | None, model: Net, tmp_path: Path) -> None:
        before = state(model)
        expected = saved(name, tmp_path, classes=classes)
        loaded = load_adapter(model, tmp_path, name="loaded")
        assert torch.equal(model(X), expected)
        assert (loaded.name, loaded.head, loaded.active) == ("loaded", "head", True)
        loaded.save(tmp_path / "again")
        for file in (CONFIG, TENSORS):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()
        train(loaded)
        assert not torch.equal(model.eval()(X), expected)
        loaded.remove()
        model.eval()
        assert state(model) == before

    def test_bit_equal_in_a_fresh_process(self, tmp_path: Path) -> None:
        for name in METHODS:
            y = saved(name, tmp_path / name)
            torch.save(y, tmp_path / name / "y.pt")
        code = (
            "import sys, torch, flexure\n"
            "from tests.methods.adapted import net, batch\n"
            "for folder in sys.argv[1:]:\n"
            "    model = net()\n"
            "    adaptation = flexure.load_adapter(model, folder)\n"
            "    assert torch.equal(model(batch()[0]), torch.load(folder + '/y.pt')), folder\n"
            "print('equal')"
        )
        folders = [str(tmp_path / name) for name in METHODS]
        out = subprocess.run(
            [sys.executable, "-c", code, *folders], capture_output=True, text=True, check=False
        )
        assert (out.stdout, out.returncode) == ("equal\n", 0), out.stderr

    @EVERY
    def test_settings_travel(self, name: str, model: Net, tmp_path: Path) -> None:
        saved(name, tmp_path)
        config = json.loads((tmp_path / CONFIG).read_text())
        loaded = load_adapter(model, tmp_path)
        assert config["method"] == name
        assert config["settings"] == json.loads(json.dumps(vars(loaded.method)))
        assert type(loaded.method) is METHODS[name]

    @pytest.mark.parametrize(
        "method",
        [
            TrainableCT(share=True, parameterization="sigmoid", init_beta=0.7, init_c=0.1),
            TrainableCT(learning_rate=0.3),
            LoRA(rank=2, alpha=3.0, where=("conv", "m*")),
        ],
        ids=repr,
    )
    def test_other_settings(self, method: Any, model: Net, tmp_path: Path) -> None:
        options = {"where": ["act", "slope"]} if isinstance(method, TrainableCT) else {}
        adaptation = adapt(model, method, example=X, **options)
        train(adaptation)
        expected = model.eval()(X)
        adaptation.save(tmp_path)
        adaptation.remove()
        loaded = load_adapter(model, tmp_path)
        assert torch.equal(model(X), expected)
        assert loaded.method == method
        assert loaded.count == adaptation.count

    def test_a_predicate_is_not_stored_but_its_choice_is(self, model: Net, tmp_path: Path) -> None:
        adaptation = adapt(model, LoRA(where=lambda path, module: path == "conv"), example=X)
        train(adaptation)
        expected = model.eval()(X)
        adaptation.save(tmp_path)
        adaptation.remove()
        assert torch.equal(load_adapter(model, tmp_path).model(X), expected)

    def test_several_files_on_one_model(self, model: Net, tmp_path: Path) -> None:
        expected = {name: saved(name, tmp_path / name) for name in METHODS}
        made = {name: load_adapter(model, tmp_path / name, name=name) for name in METHODS}
        for name, adaptation in made.items():
            adaptation.enable()
            assert torch.equal(model(X), expected[name])
        with pytest.raises(FlexureError, match="new name"):
            load_adapter(model, tmp_path / "lora", name="lora")
        assert adaptation.active

    @EVERY
    def test_saved_while_disabled_removed_or_frozen(
        self, name: str, model: Net, tmp_path: Path
    ) -> None:
        adaptation = put(model, name, classes=4)
        train(adaptation)
        adaptation.save(tmp_path / "0")
        adaptation.disable()
        adaptation.save(tmp_path / "1")
        adaptation.enable()
        adaptation.freeze()
        adaptation.save(tmp_path / "2")
        adaptation.remove()
        adaptation.save(tmp_path / "3")
        for file in (CONFIG, TENSORS):
            assert len({(tmp_path / str(i) / file).read_bytes() for i in range(4)}) == 1
        loaded = load_adapter(model, tmp_path / "2")
        assert loaded.trainable

    def test_composed_heads(self, tmp_path: Path) -> None:
        def build() -> nn.Module:
            torch.manual_seed(0)
            head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
            return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), head)

        model, x = build(), torch.randn(8, 4)
        adaptation = adapt(model, TrainableCT(), example=x, head="2")
        optimizer = torch.optim.Adam(adaptation.parameter_groups())
        F.cross_entropy(model.train()(x), Y).backward()
        optimizer.step()
        adaptation.save(tmp_path)
        expected = model.eval()(x)
        other = build().eval()
        before = contents(other)
        loaded = load_adapter(other, tmp_path)
        assert torch.equal(other(x), expected)
        loaded.remove()
        assert same(contents(other), before)

    def test_nothing_is_pickled(self, tmp_path: Path) -> None:
        saved("trainable_ct", tmp_path)
        assert sorted(os.listdir(tmp_path)) == [CONFIG, TENSORS]
        json.loads((tmp_path / CONFIG).read_text())
        assert "act.raw_beta" in {
            key.removeprefix("method.") for key in load_file(tmp_path / TENSORS)
        }

    def test_other_dtypes_of_the_model(self, model: Net, tmp_path: Path) -> None:
        saved("trainable_ct", tmp_path)
        load_adapter(model.half(), tmp_path)
        assert model.act.raw_beta.dtype == torch.float32
        assert model.head.weight.dtype == torch.float16
        assert model(X.half()).isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    @EVERY
    def test_every_method_in_the_dtype_of_the_model(
        self, name: str, dtype: torch.dtype, model: Net, tmp_path: Path
    ) -> None:
        expected = saved(name, tmp_path)
        loaded = load_adapter(model.to(dtype), tmp_path)
        assert model.conv.weight.dtype == model.norm.running_var.dtype == dtype
        y = model(X.to(dtype)).float()
        near = 1e-4 if dtype == torch.float64 else 0.05 * float(expected.abs().max())
        torch.testing.assert_close(y, expected, rtol=0, atol=near)
        loaded.remove()

    def test_infinities_that_the_model_has_itself(self, model: Net, tmp_path: Path) -> None:
        mask = torch.tensor([0.0, -math.inf])
        model.register_buffer("mask", mask)
        adaptation = put(model, "full_finetune")
        adaptation.save(tmp_path)
        adaptation.remove()
        assert torch.equal(load_adapter(model, tmp_path).model.mask, mask)


class Other(nn.Module):
    """Has a head like `Net`'s, and else nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 6), nn.GELU())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1)))


class TestWrongModel:
    EXPECTED = (
        ("steered_probe", r"missing sites: act \(relu\).*unexpected sites: body\.1 \(gelu"),
        ("trainable_ct", r"missing sites: act \(relu\).*unexpected sites: body\.1 \(gelu"),
        ("lora", r"(?s)missing layers: conv .*unexpected layers: body\.0"),
        ("full_finetune", r"missing tensors: body\.0\.bias.*unexpected tensors: conv\.bias"),
    )

    @pytest.mark.parametrize(("name", "message"), EXPECTED)
    def test_lists_missing_and_unexpected(self, name: str, message: str, tmp_path: Path) -> None:
        saved(name, tmp_path)
        other = Other()
        inner = adapt(other, LinearProbe(), example=X, name="inner")
        inner.disable()
        before = state(other)
        inner.enable()
        with pytest.raises(AdapterError, match=message):
            load_adapter(other, tmp_path)
        assert inner.active
        inner.disable()
        assert state(other) == before

    def test_the_table_names_every_method_with_layers(self) -> None:
        assert {name for name, _ in self.EXPECTED} == METHODS.keys() - {"linear_probe"}

    def test_other_widths_are_named_when_the_model_runs(self, tmp_path: Path) -> None:
        def build(width: int) -> nn.Module:
            layers = nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 6), nn.Linear(6, 3)
            return nn.Sequential(*layers).eval()

        x = torch.randn(2, 4)
        adapt(build(8), TrainableCT(), example=x).save(tmp_path)
        loaded = load_adapter(wide := build(16), tmp_path)
        with pytest.raises(FlexureError, match=r"(?s)site '1': expected 8 .*an adapter fits only"):
            wide(x)
        loaded.remove()
        assert wide(x).isfinite().all()

    @EVERY
    def test_a_head_of_another_model(self, name: str, model: Net, tmp_path: Path) -> None:
        saved(name, tmp_path)
        model.head = nn.Linear(7, 3)
        before = state(model)
        with pytest.raises(AdapterError, match="takes 6 features, the model's 'head' takes 7"):
            load_adapter(model, tmp_path)
        edit(tmp_path, lambda c: c.update(head="nowhere"))
        with pytest.raises(AdapterError, match="belongs at 'nowhere'"):
            load_adapter(model, tmp_path)
        assert state(model) == before


def _cut(folder: Path) -> None:
    path = folder / TENSORS
    path.write_bytes(path.read_bytes()[:-9])


def _first(prefix: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in sorted(tensors) if key.startswith(prefix))
        tensors[key] = change(tensors[key])

    return apply


CONFIGS: dict[str, Callable[[dict[str, Any]], object]] = {
    "newer format": lambda c: c.update(format=99),
    "unknown method": lambda c: c.update(method="sorcery"),
    "method is a list": lambda c: c.update(method=["lora"]),
    "no settings": lambda c: c.pop("settings"),
    "settings are a list": lambda c: c.update(settings=[1]),
    "unknown setting": lambda c: c["settings"].update(speed=1),
    "no head": lambda c: c.pop("head"),
    "head is a number": lambda c: c.update(head=3),
    "head is a list": lambda c: c.update(head=["head"]),
    "another library": lambda c: c.update(library="peft"),
    "two saves": lambda c: c.update(digest="0" * 32),
}
BAD_TENSORS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "head nan": _first("head.", lambda t: t * math.nan),
    "head shape": _first("head.weight", lambda t: t[0]),
    "head of integers": _first("head.weight", lambda t: t.int()),
    "no head": lambda t: [t.pop(key) for key in list(t) if key.startswith("head.")],
    "one more": lambda t: t.update({"head.extra": torch.zeros(1)}),
}
WEIGHTS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "nan in a buffer": _first("method.norm.running_mean", lambda t: t * math.nan),
    "inf in a buffer": _first("method.norm.running_var", lambda t: t + math.inf),
    "a counter in floating point": _first("method.norm.num_batches_tracked", lambda t: t.float()),
}
METHOD_TENSORS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "nan": _first("method.", lambda t: t * math.nan),
    "shape": _first("method.", lambda t: t.reshape(-1)[:1]),
    "integers": _first("method.", lambda t: t.int()),
    "one missing": lambda t: t.pop(next(key for key in sorted(t) if key.startswith("method."))),
}
SETTINGS = {
    "steered_probe": {"beta": 2.0},
    "trainable_ct": {"parameterization": ["sigmoid"]},
    "lora": {"rank": -1},
    "full_finetune": {"learning_rate": "fast"},
}


class TestDamage:
    def refused(self, folder: Path) -> None:
        model = net()
        before = state(model)
        with pytest.raises(AdapterError):
            load_adapter(model, folder)
        assert state(model) == before

    @EVERY
    def test_files(self, name: str, tmp_path: Path) -> None:
        self.refused(tmp_path / "nowhere")
        saved(name, tmp_path / "whole")
        for what in (CONFIG, TENSORS):
            folder = tmp_path / f"no {what}"
            shutil.copytree(tmp_path / "whole", folder)
            (folder / what).unlink()
            self.refused(folder)
        _cut(tmp_path / "whole")
        self.refused(tmp_path / "whole")
        torch.save({"a": 1}, tmp_path / "whole" / TENSORS)
        self.refused(tmp_path / "whole")

    @EVERY
    @pytest.mark.parametrize("what", CONFIGS)
    def test_configs(self, what: str, name: str, tmp_path: Path) -> None:
        saved(name, tmp_path)
        edit(tmp_path, CONFIGS[what])
        self.refused(tmp_path)

    @EVERY
    @pytest.mark.parametrize("what", BAD_TENSORS)
    def test_heads(self, what: str, name: str, tmp_path: Path) -> None:
        saved(name, tmp_path)
        edit(tmp_path, BAD_TENSORS[what], TENSORS)
        self.refused(tmp_path)

    @pytest.mark.parametrize("name", ["trainable_ct", "lora", "full_finetune"])
    @pytest.mark.parametrize("what", METHOD_TENSORS)
    def test_tensors(self, what: str, name: str, tmp_path: Path) -> None:
        saved(name, tmp_path)
        edit(tmp_path, METHOD_TENSORS[what], TENSORS)
        self.refused(tmp_path)

    @pytest.mark.parametrize("what", WEIGHTS)
    def test_weights(self, what: str, tmp_path: Path) -> None:
        saved("full_finetune", tmp_path)
        edit(tmp_path, WEIGHTS[what], TENSORS)
        self.refused(tmp_path)

    def test_numbers_beyond_the_dtype_of_the_model(self, model: Net, tmp_path: Path) -> None:
        saved("full_finetune", tmp_path)
        edit(tmp_path, _first("method.norm.running_var", lambda t: t + 1e6), TENSORS)
        with pytest.raises(AdapterError, match=r"running_var to be finite.*float16"):
            load_adapter(model.half(), tmp_path)

    @EVERY
    def test_unexpected_tensors(self, name: str, tmp_path: Path) -> None:
        saved(name, tmp_path)
        edit(tmp_path, lambda t: t.update({"method.more": torch.zeros(2)}), TENSORS)
        self.refused(tmp_path)

    @pytest.mark.parametrize("name", SETTINGS)
    def test_settings_out_of_range(self, name: str, tmp_path: Path) -> None:
        saved(name, tmp_path)
        edit(tmp_path, lambda c: c["settings"].update(SETTINGS[name]))
        self.refused(tmp_path)

    @pytest.mark.parametrize("name", ["trainable_ct", "steered_probe"])
    @pytest.mark.parametrize("key", ["sites", "routes", "chosen", "complete"])
    def test_structures(self, key: str, name: str, tmp_path: Path) -> None:
        saved(name, tmp_path)
        edit(tmp_path, lambda c: c.pop(key))
        self.refused(tmp_path)

    def test_an_axis_that_was_lost(self, tmp_path: Path) -> None:
        saved("trainable_ct", tmp_path)
        edit(tmp_path, lambda c: c["sites"][0].update(axis=None))
        self.refused(tmp_path)

    def test_interrupted_save(
        self, model: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        adaptation = put(model, "trainable_ct")
        adaptation.save(tmp_path)
        whole = {file: (tmp_path / file).read_bytes() for file in (CONFIG, TENSORS)}
        train(adaptation)
        monkeypatch.setattr("flexure.surgery.adapter.write_json", _full)
        with pytest.raises(AdapterError, match="cannot write"):
            adaptation.save(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole

    @EVERY
    @pytest.mark.parametrize("at", [-1, -7])
    def test_flipped_bits(self, name: str, at: int, tmp_path: Path) -> None:
        saved(name, tmp_path)
        path = tmp_path / TENSORS
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
        model = net()
        before = state(model)
        with pytest.raises(AdapterError, match=r"is damaged: .* digest"):
            load_adapter(model, tmp_path)
        assert state(model) == before

    def test_a_digest_in_one_file_only(self, tmp_path: Path) -> None:
        saved("trainable_ct", tmp_path)
        save_file(load_file(tmp_path / TENSORS), tmp_path / TENSORS)
        with pytest.raises(AdapterError, match="two files of one save"):
            load_adapter(net(), tmp_path)
        edit(tmp_path, lambda c: c.pop("digest"))
        load_adapter(net(), tmp_path)

    def test_half_of_another_save(self, model: Net, tmp_path: Path) -> None:
        adaptation = put(model, "trainable_ct")
        adaptation.save(tmp_path / "a")
        train(adaptation)
        adaptation.save(tmp_path / "b")
        shutil.copy(tmp_path / "b" / TENSORS, tmp_path / "a" / TENSORS)
        adaptation.remove()
        with pytest.raises(AdapterError, match="those of two"):
            load_adapter(model, tmp_path / "a")


def _full(*args: object, **options: object) -> None:
    raise OSError("No space left on device")


class Hub:
    """In the place of huggingface_hub: repositories are folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[dict[str, Any]] = []

    def HfApi(self, token: str | None = None) -> Hub:
        self.calls.append({"token": token})
        return self

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        self.calls.append({"repo": repo, "private": private})
        (self.root / repo).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str]) -> None:
        for name in allow_patterns:
            shutil.copy(Path(folder_path) / name, self.root / repo_id / name)

    def snapshot_download(self, repo: str, *, allow_patterns: list[str]) -> str:
        self.calls.append({"patterns": allow_patterns})
        if not (self.root / repo).is_dir():
            raise OSError(f"404: {repo}")
        return str(self.root / repo)


class TestHub:
    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
        hub = Hub(tmp_path)
        monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
        return hub

    def test_there_and_back(self, hub: Hub, model: Net) -> None:
        adaptation = put(model, "trainable_ct", classes=4)
        train(adaptation)
        expected = model.eval()(X)
        adaptation.push_to_hub("someone/digits", private=True, token="secret")
        assert hub.calls == [{"token": "secret"}, {"repo": "someone/digits", "private": True}]
        assert sorted(os.listdir(hub.root / "someone/digits")) == [CONFIG, TENSORS]
        other = net()
        load_adapter(other, "hf:someone/digits")
        assert hub.calls[-1] == {"patterns": [CONFIG, TENSORS]}
        assert torch.equal(other(X), expected)

    def test_errors(self, hub: Hub, model: Net, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(AdapterError, match=r"hf:no/body.*404"):
            load_adapter(model, "hf:no/body")
        adaptation = put(model, "linear_probe")
        monkeypatch.setattr(Hub, "create_repo", _full)
        with pytest.raises(AdapterError, match="No space left"):
            adaptation.push_to_hub("some/one")

    def test_the_library_takes_these_arguments(self) -> None:
        library = pytest.importorskip("huggingface_hub")
        for name in ("create_repo", "upload_folder"):
            ours = inspect.signature(getattr(Hub, name)).parameters
            assert set(ours) - {"repo"} <= set(
                inspect.signature(getattr(library.HfApi, name)).parameters
            )
        assert "allow_patterns" in inspect.signature(library.snapshot_download).parameters

    def test_without_the_library(self, model: Net, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        adaptation = put(model, "linear_probe")
        with pytest.raises(MissingExtraError, match="pip install"):
            adaptation.push_to_hub("some/one")
        with pytest.raises(MissingExtraError, match="pip install"):
            load_adapter(model, "hf:some/one")


def test_steering_files_still_load(model: Net, tmp_path: Path) -> None:
    with flexure.steer(model, beta=0.8, example=X) as steering:
        expected = model(X)
        steering.save(tmp_path)
    edit(tmp_path, lambda t: None, TENSORS)  # as files were before, with no digest
    with load_adapter(model, tmp_path):
        assert torch.equal(model(X), expected)
    model.head = nn.Identity()
    with flexure.steer(model, beta=0.8, example=X) as steering:
        model.head = nn.Linear(6, 2)
        expected = model(X)
        steering.save(tmp_path, head="head")
    model.head = nn.Identity()
    with load_adapter(model, tmp_path):
        assert torch.equal(model(X), expected)
