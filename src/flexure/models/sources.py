"""Models by address: the catalogue of prefixes, and Python files.

Our own networks are loaded by `own`, other libraries' by `libraries`. Devices are the caller's:
everything is loaded on the CPU.
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

from torch import nn

from flexure.addresses import existing_path, first_line, look_up
from flexure.contracts import AddressError, FlexureError, LoadedModel, ModelLoader
from flexure.models.libraries import (
    load_robustbench,
    load_timm,
    load_torchvision,
    load_transformers,
)
from flexure.models.own import load_own
from flexure.models.preprocess import AsFloat

__all__ = ["CATALOGUE", "load_model"]


def load_model(address: str) -> LoadedModel:
    """The pretrained model behind an address, in eval mode on the CPU.

    Args:
        address: `flexure:resnet20?weights=FILE` or another of `flexure.models.NETWORKS`,
            `hf:NAME_OR_DIR`, `timm:NAME`, `torchvision:NAME`,
            `robustbench:NAME?dataset=cifar10&threat=Linf` or `FILE.py:factory`. A Python file is
            executed; weights are never unpickled.

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
    "flexure": load_own,
    "hf": load_transformers,
    "timm": load_timm,
    "torchvision": load_torchvision,
    "robustbench": load_robustbench,
    "file": _load_file,
}
"""Address prefix -> loader (`file:` may be left out). A new source is one function and one row."""


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
