"""Our own networks by address: `flexure:NAME?option=value&...`.

A network is one row: what its options are, and how it is built. `sources` has the other prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from warnings import warn

from torch import Tensor, nn

from flexure.addresses import existing_path, first_line, split_options
from flexure.calling import seeded
from flexure.contracts import AddressError, FlexureError, LoadedModel
from flexure.models.builder import RESIDUAL_FACTORS
from flexure.models.mlp import MLP
from flexure.models.preprocess import CIFAR, AsFloat
from flexure.models.resnet import DEPTHS, CifarResNet, resnet18, resnet34
from flexure.models.vgg import vgg11
from flexure.models.weights import load_weights, read_safetensors

__all__ = ["NETWORKS", "load_own"]

_Options: TypeAlias = Mapping[str, Callable[[str, str], Any]]


def load_own(rest: str) -> LoadedModel:
    """`flexure:NAME[?weights=FILE][&seed=0]` with the network's own options.

    Options: `num_classes` of every network but the MLP; `lcnn=1`, `width`, `input_size` of
    `resnet18`, `resnet34` and `vgg11`, `residual=mean|sqrt2|sum` of the first two; of `mlp`,
    `sizes=2-64-64-2` and `activation=relu|tanh|softplus`.

    The number of classes is taken from the weights. Without weights the network is random, made
    from `seed`, and a warning says so.

    Raises:
        AddressError: an unknown network or option, a value that is none, or weights that do not
            fit.
    """
    name = rest.partition("?")[0]
    if name not in NETWORKS:
        raise AddressError(
            f"expected one of {', '.join(f'flexure:{known}' for known in NETWORKS)}, got "
            f"flexure:{name}; choose one of them"
        )
    network = NETWORKS[name]
    _, options = split_options(rest, known=("weights", "seed", *network.options))
    settings = {
        key: read(options[key], key) for key, read in network.options.items() if key in options
    }
    seed = _whole(options.get("seed", "0"), "seed")
    path = options.get("weights")
    file = None if path is None else existing_path(path, folder=False)
    if file is not None and "num_classes" in network.options:
        settings.update(_classes(file, network.head))
    model = _built(network, settings, seed, rest)
    if file is None:
        warn(f"flexure:{name} without ?weights=FILE has random weights", stacklevel=3)
    else:
        load_weights(model, file)
    return LoadedModel(model, network.preprocess(settings), rest, network.head)


@dataclass(frozen=True)
class Network:
    """One of our networks.

    Attributes:
        build: from the options that were given, by keyword, to the network.
        options: name -> reader of the text after the equals sign.
        preprocess: from the options to the network's preprocessing.
        head: path of the classification layer.
    """

    build: Callable[..., nn.Module]
    options: _Options
    preprocess: Callable[[Mapping[str, Any]], Callable[[Tensor], Tensor]]
    head: str = "linear"


def _classes(file: Path, head: str) -> dict[str, int]:
    bias = read_safetensors(file).get(f"{head}.bias")
    return {} if bias is None else {"num_classes": len(bias)}


def _built(network: Network, settings: Mapping[str, Any], seed: int, rest: str) -> nn.Module:
    """A network whose random weights depend on `seed` alone; the global generator is restored."""
    try:
        with seeded(seed):
            return network.build(**settings).eval()
    except FlexureError as error:
        raise AddressError(f"flexure:{rest}: {error}") from error
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        raise AddressError(
            f"expected a network that fits into memory, got flexure:{rest}: {first_line(error)}; "
            f"choose smaller numbers"
        ) from error


def _whole(text: str, what: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > _DIGITS or int(text) >= 2**64:
        raise AddressError(
            f"expected a whole number below 2^64 for {what}, got {text!r}; correct it"
        )
    return int(text)


def _flag(text: str, what: str) -> bool:
    if text not in ("0", "1"):
        raise AddressError(f"expected {what}=0 or {what}=1, got {text!r}; correct it")
    return text == "1"


def _one_of(known: Mapping[str, Any], text: str, what: str) -> str:
    if text not in known:
        raise AddressError(
            f"expected {what} to be one of {', '.join(known)}, got {text!r}; choose one of them"
        )
    return text


def _sizes(text: str, what: str) -> tuple[int, ...]:
    return tuple(_whole(part, what) for part in text.split("-"))


def _mlp(sizes: tuple[int, ...] = (2, 64, 64, 2), activation: str = "relu") -> nn.Module:
    return MLP(sizes, _ACTIVATIONS[activation])


def _sized(settings: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    size = settings.get("input_size", 32)
    return replace(CIFAR, size=(size, size))


_DIGITS = len(str(2**64))
_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "softplus": nn.Softplus}
_IMAGES: _Options = {"num_classes": _whole, "lcnn": _flag, "width": _whole, "input_size": _whole}
_RESIDUAL: _Options = {**_IMAGES, "residual": partial(_one_of, RESIDUAL_FACTORS)}

NETWORKS: Mapping[str, Network] = {
    **{
        name: Network(partial(CifarResNet, depth), {"num_classes": _whole}, _sized)
        for name, depth in DEPTHS.items()
    },
    "resnet18": Network(resnet18, _RESIDUAL, _sized),
    "resnet34": Network(resnet34, _RESIDUAL, _sized),
    "vgg11": Network(vgg11, _IMAGES, _sized),
    "mlp": Network(
        _mlp,
        {"sizes": _sizes, "activation": partial(_one_of, _ACTIVATIONS)},
        lambda settings: AsFloat(),
        head="head",
    ),
}
"""Name -> network. A new one is one row."""
