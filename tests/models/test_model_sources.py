"""Every row of the catalogue of model sources, and what each source refuses."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flexure.contracts import AddressError, FlexureError, LoadedModel, MissingExtraError
from flexure.data import batches, load_data
from flexure.models import CATALOGUE, CIFAR, AsFloat, CifarResNet, Preprocess, load_model

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if "num_batches" not in k}


def make_flexure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    save_file(plain_weights(CifarResNet(20, num_classes=4)), folder / "w+1.safetensors")
    return f"flexure:resnet20?weights={folder / 'w+1.safetensors'}"


def make_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=4)
    ResNetForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessorPil(
        size={"shortest_edge": 384}, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
    return f"hf:{folder}"


class FakeTransform:
    """PIL image -> (3, size, size), like the evaluation transforms of timm and torchvision."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, picture: Image.Image) -> Tensor:
        assert picture.mode == "RGB"
        pixels = np.array(picture.resize((self.size, self.size)))
        return torch.from_numpy(pixels).permute(2, 0, 1) / 255

    def __repr__(self) -> str:
        return f"Compose(\n    Resize({self.size})\n)"


class FakeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.top = nn.Sequential(nn.Flatten(), nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.body(x))

    def get_classifier(self) -> nn.Module:
        return self.top[1]


def make_timm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A stand-in with the four functions that are called, checking how they are called."""

    def create_model(name: str, *, pretrained: bool) -> nn.Module:
        if name != "net.a1_in1k" or not pretrained:
            raise RuntimeError(f"Unknown model ({name})")
        return FakeNet().train()

    def create_transform(*, is_training: bool, input_size: tuple[int, ...]) -> FakeTransform:
        assert not is_training
        return FakeTransform(input_size[-1])

    timm, data = ModuleType("timm"), ModuleType("timm.data")
    timm.create_model = create_model
    data.resolve_model_data_config = lambda model: {"input_size": (3, 12, 12)}
    data.create_transform = create_transform
    timm.data = data
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "timm.data", data)
    return "timm:net.a1_in1k"


def make_torchvision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    weights = SimpleNamespace(transforms=lambda: FakeTransform(12))

    def get_model_weights(name: str) -> SimpleNamespace:
        if name != "net18":
            raise ValueError(f"Unknown model {name}")
        return SimpleNamespace(DEFAULT=weights)

    def get_model(name: str, *, weights: SimpleNamespace) -> nn.Module:
        assert weights is get_model_weights(name).DEFAULT
        return FakeNet().train()

    torchvision, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    models.get_model_weights, models.get_model = get_model_weights, get_model
    torchvision.models = models
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    return "torchvision:net18"


class RobustDataset(Enum):
    cifar_10 = "cifar10"
    imagenet = "imagenet"


class RobustThreat(Enum):
    Linf = "Linf"
    L2 = "L2"


def make_robustbench(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A stand-in with the two functions that are called, writing where the library would."""

    def load_model(
        model_name: str,
        model_dir: Path = Path("models"),
        dataset: RobustDataset = RobustDataset.cifar_10,
        threat_model: RobustThreat = RobustThreat.Linf,
    ) -> nn.Module:
        found = {"Carmon2019Unlabeled": FakeNet}[model_name]().train()
        kept = model_dir / RobustDataset(dataset).value / RobustThreat(threat_model).value
        kept.mkdir(parents=True, exist_ok=True)
        (kept / f"{model_name}.pt").touch()
        return found

    def get_preprocessing(
        dataset: RobustDataset, threat_model: RobustThreat, model_name: str, preprocessing: None
    ) -> FakeTransform:
        assert dataset is RobustDataset.imagenet
        assert preprocessing is None
        return FakeTransform(12)

    names = ("robustbench", *(f"robustbench.{n}" for n in ("utils", "data", "model_zoo")))
    made = {name: ModuleType(name) for name in (*names, "robustbench.model_zoo.enums")}
    made["robustbench.utils"].load_model = load_model
    made["robustbench.data"].get_preprocessing = get_preprocessing
    enums = made["robustbench.model_zoo.enums"]
    enums.BenchmarkDataset, enums.ThreatModel = RobustDataset, RobustThreat
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder / "hub"))
    return "robustbench:Carmon2019Unlabeled"


def make_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (folder / "net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(3, 4, 3)\n"
        "    def forward(self, x):\n"
        "        return self.conv(x).relu().mean((2, 3))\n"
    )
    return f"{folder / 'net.py'}:Net"


MAKERS: dict[str, Callable[[Path, pytest.MonkeyPatch], str]] = {
    "flexure": make_flexure,
    "hf": make_hub,
    "timm": make_timm,
    "torchvision": make_torchvision,
    "robustbench": make_robustbench,
    "file": make_file,
}


def test_every_row_is_tested() -> None:
    assert set(MAKERS) == set(CATALOGUE)


@pytest.mark.parametrize("prefix", CATALOGUE)
def test_source_keeps_the_contract(prefix: str, tmp_path: Path, monkeypatch) -> None:
    address = MAKERS[prefix](tmp_path, monkeypatch)
    loaded = load_model(address)
    assert loaded.address == address
    assert not any(module.training for module in loaded.model.modules())
    assert all(
        p.dtype == torch.float32 and p.device.type == "cpu" for p in loaded.model.parameters()
    )
    x = loaded.preprocess(torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8))
    assert x.dtype == torch.float32
    output = loaded.model(x[None])
    assert getattr(output, "logits", output).shape == (1, 4)
    if loaded.head is not None:
        assert loaded.model.get_submodule(loaded.head).out_features == 4
    copy = pickle.loads(pickle.dumps(loaded))
    torch.testing.assert_close(copy.model(x[None]), output)
    assert repr(copy.preprocess) == repr(loaded.preprocess)
    assert "\n" not in repr(loaded.preprocess)


@pytest.mark.parametrize("prefix", [p for p in CATALOGUE if p != "file"])
def test_any_image_fits(prefix: str, tmp_path: Path, monkeypatch) -> None:
    """Grey and RGB images of any size become inputs of one shape, so that they can be stacked."""
    loaded = load_model(MAKERS[prefix](tmp_path, monkeypatch))
    shapes = {
        tuple(loaded.preprocess(torch.randint(0, 256, shape, dtype=torch.uint8)).shape)
        for shape in ((3, 40, 50), (1, 8, 8), (3, 3, 3), (1, 3, 5))
    }
    assert len(shapes) == 1


@pytest.mark.parametrize("prefix", ["flexure", "timm", "torchvision", "robustbench", "file"])
def test_unknown_name(prefix: str, tmp_path: Path, monkeypatch) -> None:
    MAKERS[prefix](tmp_path, monkeypatch)
    with pytest.raises(AddressError, match="absent"):
        load_model(f"{prefix}:absent")


def test_unknown_prefix_lists_all_rows() -> None:
    with pytest.raises(AddressError) as caught:
        load_model("keras:net")
    assert all(f"{prefix}:" in str(caught.value) for prefix in CATALOGUE)


@pytest.mark.parametrize(
    ("address", "module", "install"),
    [
        ("hf:some/model", "transformers", r"pip install 'flexure\[hf\]'"),
        ("timm:resnet18", "timm", r"pip install 'flexure\[timm\]'"),
        ("torchvision:resnet18", "torchvision", "pip install torchvision"),
        ("robustbench:Standard", "robustbench", "then pip install robustbench"),
    ],
)
def test_missing_library(address: str, module: str, install: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=install):
        load_model(address)


# flexure:


def test_weights_arrive_and_the_generator_is_untouched(tmp_path: Path, monkeypatch) -> None:
    address = make_flexure(tmp_path, monkeypatch)
    state = torch.random.get_rng_state()
    loaded = load_model(address)
    assert torch.equal(state, torch.random.get_rng_state())
    stored = load_file(tmp_path / "w+1.safetensors")
    assert all(torch.equal(loaded.model.state_dict()[k], v) for k, v in stored.items())
    assert (loaded.head, loaded.preprocess) == ("linear", CIFAR)


def test_random_weights_warn_and_follow_the_seed() -> None:
    made = []
    state = torch.random.get_rng_state()
    for query in ("", "?seed=0", "?seed=1", "?num_classes=3"):
        with pytest.warns(UserWarning, match="random weights"):
            made.append(load_model(f"flexure:resnet20{query}").model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(made[0].linear.weight, made[1].linear.weight)
    assert not torch.equal(made[0].linear.weight, made[2].linear.weight)
    assert made[3].linear.out_features == 3


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?depth=3", r"weights=\.\.\."),
        ("?seed=x", "whole number"),
        ("?num_classes=0", "0 classes"),
        ("?weights=a&b.safetensors", "& is written %26"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*random weights")
def test_wrong_options(query: str, message: str) -> None:
    with pytest.raises(FlexureError, match=message):
        load_model(f"flexure:resnet20{query}")


def test_wrong_weights_are_listed(tmp_path: Path) -> None:
    weights = plain_weights(CifarResNet(20))
    path = tmp_path / "w.safetensors"

    def refused(changed: dict[str, Tensor]) -> str:
        save_file(changed, path)
        with pytest.raises(AddressError) as caught:
            load_model(f"flexure:resnet20?weights={path}")
        return str(caught.value)

    prefixed = refused({f"module.{k}": v for k, v in weights.items()})
    assert "missing keys: bn1.bias, bn1.running_mean, " in prefixed
    assert "unexpected keys: module.bn1.bias" in prefixed
    assert f"and {len(weights) - 5} more" in prefixed
    shape = refused(weights | {"conv1.weight": torch.zeros(16, 3, 5, 5)})
    assert "conv1.weight (16, 3, 5, 5) instead of (16, 3, 3, 3)" in shape
    assert "missing keys" not in shape
    deeper = refused(plain_weights(CifarResNet(32)))
    assert "unexpected keys: layer1.3.bn1.bias" in deeper


def test_weights_are_never_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(plain_weights(CifarResNet(20)), path)
    with pytest.raises(AddressError, match="expected a safetensors file"):
        load_model(f"flexure:resnet20?weights={path}")
    with pytest.raises(AddressError, match="nothing is there"):
        load_model(f"flexure:resnet20?weights={tmp_path / 'absent'}")


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_published_weights_load_strictly(depth: int, real_data: Path) -> None:
    file = real_data / "resnet-cifar10" / f"resnet{depth}.safetensors"
    model = load_model(f"flexure:resnet{depth}?weights={file}").model
    model.load_state_dict(load_file(file), strict=True)


def test_published_accuracy(real_data: Path) -> None:
    """ResNet-20 on the lossless CIFAR-10 images: the published 91.73 %, to the image."""
    file = real_data / "resnet-cifar10" / "resnet20.safetensors"
    loaded = load_model(f"flexure:resnet20?weights={file}")
    data = load_data(f"npz:{real_data / 'cifar10-lossless' / 'test846.npz'}")["train"]
    with torch.no_grad():
        right = sum(
            int((loaded.model(x).argmax(1) == y).sum())
            for x, y in batches(data, preprocess=loaded.preprocess, batch_size=282)
        )
    assert (right, len(data)) == (776, 846)


# hf:


def test_processor_resizes_crops_and_normalises(tmp_path: Path, monkeypatch) -> None:
    loaded = load_model(make_hub(tmp_path, monkeypatch))
    x = torch.randint(0, 256, (3, 384, 384), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    # At its own size of 384, this processor only scales and normalises.
    torch.testing.assert_close(loaded.preprocess(x), (x / 255 - mean) / std)
    thin = torch.full((3, 3, 200), 255, dtype=torch.uint8)
    torch.testing.assert_close(loaded.preprocess(thin)[:, 5, 5], ((1 - mean) / std).flatten())
    assert "image_mean" in repr(loaded.preprocess)
    assert "\n" not in repr(loaded.preprocess)


def test_half_precision_checkpoint_is_loaded_in_single(tmp_path: Path, monkeypatch) -> None:
    address = make_hub(tmp_path, monkeypatch)
    from transformers import AutoModelForImageClassification

    half = AutoModelForImageClassification.from_pretrained(tmp_path).half()
    half.save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(address).model.parameters()} == {torch.float32}


def test_hub_refuses_pickled_weights_and_empty_folders(tmp_path: Path, monkeypatch) -> None:
    address = make_hub(tmp_path, monkeypatch)
    weights = tmp_path / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(AddressError, match="safetensors weights"):
        load_model(address)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AddressError, match="check the name or folder"):
        load_model(f"hf:{tmp_path / 'empty'}")


# timm:, torchvision:, robustbench:


def test_timm_names_its_head(tmp_path: Path, monkeypatch) -> None:
    assert load_model(make_timm(tmp_path, monkeypatch)).head == "top.1"


def test_robust_models_take_pixels(tmp_path: Path, monkeypatch) -> None:
    """Scaled to [0, 1] and not normalised: that is inside of them."""
    loaded = load_model(make_robustbench(tmp_path, monkeypatch))
    x = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(loaded.preprocess(x), x / 255)
    assert isinstance(loaded.preprocess, Preprocess)  # its space is known to be that of pixels
    kept = tmp_path / "hub" / "robustbench" / "cifar10" / "Linf" / "Carmon2019Unlabeled.pt"
    assert kept.is_file()


def test_robust_models_by_data_set_norm_and_folder(tmp_path: Path, monkeypatch) -> None:
    address = make_robustbench(tmp_path, monkeypatch)
    loaded = load_model(f"{address}?dataset=imagenet&threat=L2&folder={tmp_path / 'zoo'}")
    assert (tmp_path / "zoo" / "imagenet" / "L2" / "Carmon2019Unlabeled.pt").is_file()
    assert loaded.preprocess(torch.zeros(3, 40, 50, dtype=torch.uint8)).shape == (3, 12, 12)
    assert loaded.address.endswith(f"folder={tmp_path / 'zoo'}")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?dataset=mnist", "'mnist' is not a valid"),
        ("?threat=l2", "'l2' is not a valid"),
        ("?norm=L2", r"dataset=\.\.\., threat=\.\.\., folder=\.\.\."),
    ],
)
def test_robust_models_that_are_none(query: str, message: str, tmp_path: Path, monkeypatch) -> None:
    address = make_robustbench(tmp_path, monkeypatch)
    with pytest.raises(AddressError, match=message):
        load_model(address + query)


# file.py:factory


def write(folder: Path, text: str) -> Path:
    (folder / "made.py").write_text(text)
    return folder / "made.py"


def test_file_may_return_a_pair_or_everything(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "from torch import nn\n"
        "from flexure.contracts import LoadedModel\n"
        "from beside import SIZE\n"
        "def plain(): return nn.Linear(SIZE, 2).train()\n"
        "def pair(): return nn.Linear(SIZE, 2), abs\n"
        "def whole(): return LoadedModel(nn.Linear(SIZE, 2), abs, 'mine', '')\n",
    )
    (tmp_path / "beside.py").write_text("SIZE = 3\n")
    before = list(sys.path)
    plain, pair, whole = (load_model(f"{path}:{name}") for name in ("plain", "pair", "whole"))
    assert sys.path == before
    assert isinstance(plain, LoadedModel)
    assert plain.preprocess == AsFloat()
    assert (plain.head, whole.head) == (None, "")
    assert pair.preprocess is whole.preprocess is abs
    assert not whole.model.training
    assert load_model(f"file:{path}:plain").model.in_features == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def other(): pass", r"function 'make' in .*made\.py, got only \['other'\]"),
        ("make = 3", "function 'make'"),
        ("def make(): return 3", "return a torch.nn.Module.*got int"),
        ("def make(): 1 / 0", "ZeroDivisionError"),
        ("1 / 0", "ZeroDivisionError"),
        ("def make(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("def make(): raise SystemExit", "SystemExit"),
        ("import absent_module", "absent_module"),
    ],
)
def test_file_that_makes_no_model(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(AddressError, match=message):
        load_model(f"{path}:make")


def test_file_that_fails_is_not_left_among_the_modules(tmp_path: Path) -> None:
    before = set(sys.modules)
    with pytest.raises(AddressError):
        load_model(f"{write(tmp_path, '1 / 0')}:make")
    assert not [name for name in set(sys.modules) - before if "made" in name]


def test_missing_file() -> None:
    with pytest.raises(AddressError, match="nothing is there"):
        load_model("absent.py:make")
