"""Which layers and normalisations of a network are bounded, which cannot be, and how it is done.

Everything is looked at before anything is changed. Activations and sums are `lcnn.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from inspect import unwrap
from itertools import chain

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from flexure.contracts import FlexureError
from flexure.layers import LipschitzBatchNorm, spectral_norm
from flexure.methods.lcnn_report import Part, largest_size
from flexure.surgery.replace import replace_module
from flexure.surgery.weight_layers import WeightLayer, weight_layers
from flexure.surgery.weight_uses import WeightUses

__all__ = ["Change", "linear_changes", "norm_changes"]


@dataclass(frozen=True)
class Change:
    """What will be changed in a network.

    Attributes:
        parts: what is looked at, changed or left.
        make: changes the network, and leaves with the stack how to undo it.
    """

    parts: tuple[Part, ...]
    make: Callable[[ExitStack], None]


def linear_changes(model: nn.Module, uses: WeightUses, leave: tuple[str, ...]) -> Change:
    """Spectral normalisation of every linear layer and convolution.

    Args:
        model: the network.
        uses: how it uses its weights.
        leave: patterns of what may stay as it is.

    Raises:
        FlexureError: weights that cannot be normalised and that no pattern names, listed; or a
            pattern that matches nothing.
    """
    layers = {layer.path: layer for layer in weight_layers(model)}
    refused = dict(_refused(model, layers, uses))
    _check_patterns(leave, [*layers, *refused])
    open_ = {name: why for name, why in refused.items() if not _matches(name, leave)}
    if open_:
        listed = "\n".join(f"  {name}: {why}" for name, why in open_.items())
        raise FlexureError(
            f"expected layers whose operator norm can be divided out, got some that cannot be "
            f"normalised:\n{listed}\nreplace them by layers that the model calls, or name them "
            f"with leave= (nothing then bounds their norm)"
        )
    chosen = [
        layer
        for path, layer in layers.items()
        if path not in refused and not _matches(path, leave) and path in uses.inputs
    ]
    named = {path: "named by leave=" for path in layers if _matches(path, leave)} | refused
    missed = {path: _IDLE for path in layers if path not in uses.inputs and path not in named}
    left = [
        Part("linear", name, _kind(layers, name), note=why)
        for name, why in chain(named.items(), missed.items())
    ]
    done = [
        Part("linear", layer.path, _shown(layer), "norm 1", path=layer.path) for layer in chosen
    ]

    def make(undo: ExitStack) -> None:
        for layer in chosen:
            _normalise(layer, largest_size(uses.inputs[layer.path], len(layer.shape) - 2), undo)

    return Change((*done, *left), make)


def norm_changes(model: nn.Module, uses: WeightUses, gamma: float) -> Change:
    """Every BatchNorm bounded by gamma; other normalisations left.

    Args:
        model: the network.
        uses: which normalisations it calls as functions.
        gamma: the largest slope at the start.

    Raises:
        FlexureError: a BatchNorm that is not torch's own, or that is the whole model.
    """
    named = dict(model.named_modules())
    found = {path: module for path, module in named.items() if isinstance(module, _BatchNorm)}
    if "" in found:
        raise FlexureError(
            f"expected a network with normalisations inside, got a {type(model).__name__} itself; "
            f"wrap it in nn.Sequential"
        )
    bounded = {
        path: LipschitzBatchNorm.from_batch_norm(module, gamma=gamma)
        for path, module in found.items()
        if path in uses.inputs
    }
    done = [
        Part("norm", path, type(named[path]).__name__, "gamma-Lipschitz", path=path)
        for path in bounded
    ]
    left = [
        Part("norm", path, type(module).__name__, note=_UNBOUNDED if path in uses.inputs else _IDLE)
        for path, module in named.items()
        if isinstance(module, _NORMALISATIONS) or path in found.keys() - bounded.keys()
    ]
    left += [
        Part("norm", path, name, note=_CALLED)
        for path, name in uses.functions
        if not isinstance(named[path], _NORMALISATIONS)
    ]

    def make(undo: ExitStack) -> None:
        for path, norm in bounded.items():
            undo.callback(replace_module(model, path, norm))

    return Change((*done, *left), make)


_IDLE = "not called by the example"
_UNBOUNDED = "scales by each sample's own values: only its eps bounds the slope; use BatchNorm"
_CALLED = "called as a function: nothing holds its gamma; use nn.BatchNorm2d"
_NORMALISATIONS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.modules.instancenorm._InstanceNorm,
)


def _refused(
    model: nn.Module, layers: dict[str, WeightLayer], uses: WeightUses
) -> Iterator[tuple[str, str]]:
    """Name -> why, of every weight that the network uses and that cannot be normalised."""
    inside = []
    for path, layer in layers.items():
        why = _RESIZED if path in uses.resized else _why_not(layer)
        if why is not None and path in uses.inputs:
            inside.append(f"{path}." if path else "")
            yield path, why
    for use in uses.bare:
        # What a refused layer computes its weight from is named by the layer already.
        if not use.weight.startswith(tuple(inside)):
            yield (
                use.weight,
                f"used by {use.function} in {use.caller or 'the model'!r}, not by its layer",
            )
    for path, module in model.named_modules():
        known = path in layers or f"{path}.".startswith(tuple(inside))
        if path not in uses.inputs or known or isinstance(module, _NORMALISATIONS):
            continue
        for name, parameter in module._parameters.items():
            full = f"{path}.{name}" if path else name
            if parameter is not None and parameter.dim() > 1 and full in uses.used:
                yield full, f"a weight of {type(module).__name__}, which has no operator norm here"


_RESIZED = "called with output_size, which changes its norm; give it an output_padding"


def _why_not(layer: WeightLayer) -> str | None:
    if layer.refusal is not None:
        return layer.refusal
    if layer.kind.inputs_first:
        return "its weight is (in, out): use nn.Linear"
    own = type(layer.module)
    # `_conv_forward` is torch's own hook of its convolutions for what comes before the weight.
    for name in ("forward", "_conv_forward"):
        if hasattr(own, name) and not _is_of_torch(own, name):
            return f"{own.__name__} does something else in its forward; use torch's own layer"
    return None


def _is_of_torch(cls: type[nn.Module], name: str) -> bool:
    return str(unwrap(getattr(cls, name)).__module__).startswith("torch.nn.modules.")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern names a layer, one of its weights, or a module around it."""
    parts = name.split(".")
    around = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(fnmatchcase(path, pattern) for path in around for pattern in patterns)


def _check_patterns(patterns: tuple[str, ...], names: list[str]) -> None:
    for pattern in patterns:
        if not any(_matches(name, (pattern,)) for name in names):
            raise FlexureError(
                f"expected each pattern of leave= to name a layer or a weight, got {pattern!r}, "
                f"which names none; the layers are {', '.join(names[:8]) or 'none'}"
                + (", ..." if len(names) > 8 else "")
            )


def _kind(layers: dict[str, WeightLayer], name: str) -> str:
    return type(layers[name].module).__name__ if name in layers else "weight"


def _shown(layer: WeightLayer) -> str:
    return f"{type(layer.module).__name__} {tuple(layer.shape)}"


def _normalise(layer: WeightLayer, size: tuple[int, ...] | None, undo: ExitStack) -> None:
    module = layer.module
    hooks, order = set(module._forward_pre_hooks), list(module._parameters)
    spectral_norm(module, input_size=size)

    def put_back() -> None:
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        # In the order that optimisers know them by.
        for name in order:
            module._parameters[name] = module._parameters.pop(name)
        for key in set(module._forward_pre_hooks) - hooks:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)

    undo.callback(put_back)
