"""Models by address: the catalogue of prefixes, our own networks, and Python files.

Other libraries' models are loaded by `libraries`. Devices are the caller's: everything is loaded
on the CPU.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any
from warnings import warn

from torch import Tensor, nn

from flexure.addresses import existing_path, first_line, look_up, split_options
from flexure.calling import seeded
from flexure.contracts import AddressError, FlexureError, LoadedModel, ModelLoader
from flexure.models.libraries import load_timm, load_torchvision, load_transformers
from flexure.models.preprocess import CIFAR, AsFloat
from flexure.models.resnet import DEPTHS, CifarResNet

__all__ = ["CATALOGUE", "load_model", "load_weights"]


def load_model(address: str) -> LoadedModel:
    """The pretrained model behind an address, in eval mode on the CPU.

    Args:
        address: `flexure:resnet20?weights=FILE`, `hf:NAME_OR_DIR`, `timm:NAME`, `torchvision:NAME`
            or `FILE.py:factory`. A Python file is executed; weights are never unpickled.

    Raises:
        AddressError: the address cannot be resolved.
        MissingExtraError: the source needs a library that is not installed.
    """
    # A file's path comes before the colon, where the other addresses have a fixed prefix.
    is_file = address.rpartition(":")[0].endswith(".py") and not address.startswith("file:")
    load, rest = look_up(f"file:{address}" if is_file else address, CATALOGUE, kind="model")
    loaded = load(rest)
    loaded.model.eval()
    return replace(loaded, address=address)


def load_weights(model: nn.Module, path: Path) -> None:
    """Fills `model` from a safetensors file whose keys must be the model's, exactly.

    Raises:
        AddressError: the file is missing, damaged, or made for another model; the message lists
            the missing and unexpected keys and differing shapes. The model is then unchanged.
    """
    weights = _read_safetensors(path)
    expected = model.state_dict()
    # BatchNorm's step counter may be missing: torch fills it in, and evaluation ignores it.
    needed = {key for key in expected if not key.endswith("num_batches_tracked")}
    differing = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & weights.keys())
        if weights[key].shape != expected[key].shape
    ]
    wrong = {
        "missing keys": sorted(needed - weights.keys()),
        "unexpected keys": sorted(weights.keys() - expected.keys()),
        "shapes": differing,
    }
    if any(wrong.values()):
        got = "; ".join(f"{what}: {_shortened(items)}" for what, items in wrong.items() if items)
        raise AddressError(
            f"expected the weights of {type(model).__name__} in {path}, got {got}; use the file "
            f"made for this model"
        )
    model.load_state_dict(weights)


def _load_flexure(rest: str) -> LoadedModel:
    """`flexure:resnet20?weights=FILE[&num_classes=K][&seed=0]`: a CIFAR ResNet.

    The number of classes is taken from the weights. Without weights the network is random, made
    from `seed`, and a warning says so.
    """
    name, options = split_options(rest, known=("weights", "num_classes", "seed"))
    if name not in DEPTHS:
        raise AddressError(
            f"expected one of {', '.join(f'flexure:{known}' for known in DEPTHS)}, got "
            f"flexure:{name}; choose one of them"
        )
    seed = _whole(options.get("seed", "0"), what="seed")
    path = options.get("weights")
    if path is None:
        warn(f"flexure:{name} without ?weights=FILE has random weights", stacklevel=3)
        classes = _whole(options.get("num_classes", "10"), what="num_classes")
        return LoadedModel(_seeded_resnet(name, classes, seed), CIFAR, rest, "linear")
    file = existing_path(path, folder=False)
    classes = len(_read_safetensors(file).get("linear.bias", range(10)))
    model = _seeded_resnet(name, classes, seed)
    load_weights(model, file)
    return LoadedModel(model, CIFAR, rest, "linear")


def _load_file(rest: str) -> LoadedModel:
    """`FILE.py:factory`: runs the file, calls `factory()`.

    It returns a module, a pair (module, preprocess), or a `LoadedModel`. Without a preprocess,
    images are scaled to [0, 1].
    """
    file, _, name = rest.rpartition(":")
    if not file:
        raise AddressError(
            f"expected FILE.py:factory, got {rest!r}; name the function after a colon"
        )
    path = existing_path(file, folder=False).resolve()
    # Like `python FILE.py`: what lies beside the file can be imported.
    sys.path.insert(0, str(path.parent))
    try:
        made = _factory(_run_file(path), name, path)()
    except FlexureError:
        raise
    except (Exception, SystemExit) as error:  # a script may end itself when it is run
        raise AddressError(
            f"expected {name}() of {path} to make a model, got: {first_line(error)}; mend the file"
        ) from error
    finally:
        with suppress(ValueError):
            sys.path.remove(str(path.parent))
    return _as_loaded(made, rest)


CATALOGUE: Mapping[str, ModelLoader] = {
    "flexure": _load_flexure,
    "hf": load_transformers,
    "timm": load_timm,
    "torchvision": load_torchvision,
    "file": _load_file,
}
"""Address prefix -> loader (`file:` may be left out). A new source is one function and one row."""


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AddressError(
            f"expected a safetensors file at {path}, got: {first_line(error)}; weights of other "
            f"formats are not read (they may run code): convert them with safetensors.torch"
        ) from error
    return weights


def _shortened(items: list[str], most: int = 5) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def _whole(text: str, *, what: str) -> int:
    if not text.isdecimal():
        raise AddressError(f"expected a whole number for {what}, got {text!r}; correct it")
    return int(text)


def _seeded_resnet(name: str, num_classes: int, seed: int) -> CifarResNet:
    """A network whose random weights depend on `seed` alone; the global generator is restored."""
    with seeded(seed):
        return CifarResNet(DEPTHS[name], num_classes=num_classes).eval()


def _run_file(path: Path) -> ModuleType:
    # A name of its own, registered: what the file defines can then be pickled.
    name = f"flexure_file_{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise AddressError(f"expected a Python file at {path}, got another kind; rename it to .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _factory(module: ModuleType, name: str, path: Path) -> Callable[[], Any]:
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise AddressError(
            f"expected a function {name!r} in {path}, got only {known}; write FILE.py:factory"
        )
    return factory  # type: ignore[no-any-return]


def _as_loaded(made: Any, address: str) -> LoadedModel:
    if isinstance(made, LoadedModel):
        return made
    model, preprocess = made if isinstance(made, tuple) and len(made) == 2 else (made, AsFloat())
    if not isinstance(model, nn.Module) or not callable(preprocess):
        raise AddressError(
            f"expected {address} to return a torch.nn.Module, a pair (module, preprocess) or a "
            f"LoadedModel, got {type(made).__name__}; change what the factory returns"
        )
    return LoadedModel(model, preprocess, address)
