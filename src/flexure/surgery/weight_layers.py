"""Layers with a weight that can be changed: their kinds, and finding them in a model.

Changes nothing; what a change is, is `low_rank.py`'s.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass

from torch import nn

__all__ = ["CHILD", "LAYER_KINDS", "LayerKind", "WeightLayer", "weight_layers"]

CHILD = "low_rank"
"""Name of the child of a changed layer that holds the factors."""


@dataclass(frozen=True)
class LayerKind:
    """A row: a class of layers whose `weight` can be changed, or that are refused.

    Attributes:
        name: in adapter files.
        module: where the class lives; it is never imported from here.
        classname: its name there.
        inputs_first: whether the weight is `(in, out)`; the factors are those of its transpose.
        refusal: why such a layer cannot be changed; None where it can.
    """

    name: str
    module: str
    classname: str
    inputs_first: bool = False
    refusal: str | None = None

    def describes(self, layer: nn.Module) -> bool:
        """Whether `layer` is of this kind."""
        owner = sys.modules.get(self.module)
        return owner is not None and isinstance(layer, getattr(owner, self.classname, ()))


LAYER_KINDS: tuple[LayerKind, ...] = (
    LayerKind("script", "torch.jit", "ScriptModule", refusal="TorchScript hides its weights"),
    LayerKind(
        "quantized",
        "torch.ao.nn.quantized.modules.utils",
        "WeightedQuantizedModule",
        refusal="its weight is quantised",
    ),
    LayerKind(
        "peft",
        "peft.tuners.tuners_utils",
        "BaseTunerLayer",
        refusal="PEFT adapts it already; merge_and_unload() that first",
    ),
    LayerKind("linear", "torch.nn", "Linear"),
    LayerKind("conv1d", "torch.nn", "Conv1d"),
    LayerKind("conv2d", "torch.nn", "Conv2d"),
    LayerKind("conv3d", "torch.nn", "Conv3d"),
    LayerKind("conv_transpose1d", "torch.nn", "ConvTranspose1d"),
    LayerKind("conv_transpose2d", "torch.nn", "ConvTranspose2d"),
    LayerKind("conv_transpose3d", "torch.nn", "ConvTranspose3d"),
    LayerKind("linear_inputs_first", "transformers.pytorch_utils", "Conv1D", inputs_first=True),
)
"""The catalogue of layers; the first row that describes a layer counts."""


@dataclass(frozen=True)
class WeightLayer:
    """A layer of a row of `LAYER_KINDS`.

    Attributes:
        paths: every path of the layer in the model; the first is its name.
        kind: its row.
        module: the layer.
    """

    paths: tuple[str, ...]
    kind: LayerKind
    module: nn.Module

    @property
    def path(self) -> str:
        """The layer's name."""
        return self.paths[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight; empty where there is none to change."""
        weight = self.module._parameters.get("weight")
        known = weight is not None and not isinstance(weight, nn.UninitializedParameter)
        return tuple(weight.shape) if known and weight is not None else ()

    @property
    def refusal(self) -> str | None:
        """Why the weight cannot be changed; None where it can."""
        if self.kind.refusal is not None:
            return self.kind.refusal
        if CHILD in self.module._modules:
            return "it has a low-rank change already; remove() that one first"
        weight = self.module._parameters.get("weight")
        if weight is None:
            return "its weight is computed (parametrised, pruned, weight_norm or spectral_norm)"
        if isinstance(weight, nn.UninitializedParameter):
            return "its weight has no shape yet; run the model once"
        if hasattr(self.module, CHILD):
            return f"it has an attribute named {CHILD!r}"
        if weight.is_meta:
            return "its weight is on the meta device; load the weights first"
        if not weight.is_floating_point() or type(weight) is not nn.Parameter:
            return f"its weight is a {type(weight).__name__} of {weight.dtype}, not plain numbers"
        return None


def weight_layers(model: nn.Module, *, outside: str | None = None) -> tuple[WeightLayer, ...]:
    """Every layer of a row of `LAYER_KINDS`, refused ones included, in the model's order.

    `nn.MultiheadAttention`'s `in_proj_weight`, embeddings and recurrent layers have no row.

    Args:
        model: the network.
        outside: path of a module that is left out with all that is in it.
    """
    left_out = set() if outside is None else {id(m) for m in model.get_submodule(outside).modules()}
    paths: dict[nn.Module, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) not in left_out:
            paths[module].append(path)
    found = []
    for module, names in paths.items():
        kind = next((kind for kind in LAYER_KINDS if kind.describes(module)), None)
        if kind is not None:
            found.append(WeightLayer(tuple(names), kind, module))
    return tuple(found)
