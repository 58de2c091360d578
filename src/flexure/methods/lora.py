"""LoRA: a low-rank change of the weights of chosen layers, and its place in adapter files.

The change itself is `surgery/low_rank.py`'s; the head, freezing and training are the harness's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from flexure.contracts import AdapterError, Example, FlexureError, SiteError
from flexure.methods.settings import check_positive, check_unused
from flexure.surgery.low_rank import LowRankWeights
from flexure.surgery.weight_layers import CHILD, WeightLayer, weight_layers

__all__ = ["InstalledLoRA", "Layers", "LoRA"]

Layers: TypeAlias = "str | Sequence[str] | Callable[[str, nn.Module], bool] | None"
"""Which layers: glob patterns of paths, a predicate of path and module, or None for all."""


@dataclass(frozen=True)
class LoRA:
    r"""Low-rank adaptation of every linear layer and convolution (Hu et al. 2021).

    \(W + \frac{\alpha}{r} B A\), with W as a matrix `(shape[0], rest)`; all that a layer does with
    its weight stays as it is. Weights that are used without calling their layer are reached.
    `nn.MultiheadAttention`'s `in_proj_weight` is no layer's, and is left as it is.

    Attributes:
        rank: of the change; 0 changes nothing, which is the linear probe. Above the rank of a
            weight it is allowed, as in PEFT, and wasteful.
        alpha: the change is scaled by alpha / rank.
        where: which layers (see `Layers`); the head never is one of them.
        learning_rate: with Adam; the default is the head's own, and comparisons sweep it.
        name: in adapter files.
        freezes: all but the factors and the head stays as it is.
    """

    name: ClassVar[str] = "lora"
    freezes: ClassVar[bool] = True
    optimizer_settings: ClassVar[Mapping[str, float]] = {}

    rank: int = 1
    alpha: float = 1.0
    where: Layers = None
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        """Raises `FlexureError` for settings out of range."""
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 0:
            raise FlexureError(
                f"expected rank to be a whole number, at least 0, got {self.rank!r}; "
                "0 trains the head alone"
            )
        check_positive("alpha", self.alpha)
        check_positive("learning_rate", self.learning_rate)
        object.__setattr__(self, "where", _checked(self.where))

    def install(
        self, model: nn.Module, *, example: Example, where: Any, axis: Any, head: str | None
    ) -> InstalledLoRA:
        """Changes the chosen layers; the first factors come from the CPU's default generator.

        Args:
            model: the network; changed in place.
            example: not needed.
            where: as the setting of this name; give one of the two.
            axis: of activations: leave it out.
            head: path of the module that is left as it is, with all that is in it.

        Raises:
            SiteError: a pattern matches no layer; there is no layer; or a chosen one cannot be
                changed. The model is unchanged.
            FlexureError: `axis` is given.
        """
        check_unused(self.name, None, axis)
        if where is not None and self.where is not None:
            raise SiteError("where= is given twice, to LoRA and to adapt; give it once")
        where = _checked(self.where if where is None else where)
        layers = _choose(weight_layers(model, outside=head), where, head) if self.rank else ()
        weights = LowRankWeights(model, layers, rank=self.rank, alpha=self.alpha)
        return InstalledLoRA(weights, complete=where is None, head=head)

    def load(
        self, model: nn.Module, structure: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> InstalledLoRA:
        """Changes the stored layers by the stored factors; no generator is touched.

        Raises:
            AdapterError: the model lacks layers of the file, or has others; or a tensor is
                missing, of another shape, or not finite. The model is unchanged.
        """
        stored, complete, head = _read(structure)
        found = _outside(model, head)
        if self.rank:
            _check_layers(stored, found, complete)
        layers = [layer for path, layer in found.items() if path in stored]
        try:
            weights = LowRankWeights(
                model, layers, rank=self.rank, alpha=self.alpha, generator=torch.Generator()
            )
        except SiteError as error:
            raise AdapterError(f"the adapter does not fit the model: {error}") from error
        installed = InstalledLoRA(weights, complete=complete, head=head)
        try:
            _fill(installed.parameters, tensors)
        except BaseException:
            installed.withdraw()
            raise
        return installed


class InstalledLoRA:
    """LoRA in a model: an `InstalledMethod`.

    Attributes:
        weights: the changes.
    """

    def __init__(self, weights: LowRankWeights, *, complete: bool, head: str | None) -> None:
        """Takes what `LoRA` has put in place."""
        self.weights = weights
        self._complete = complete
        self._head = head

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Full name in the model, while in place -> parameter."""
        return {} if self.weights.merged else self._factors()

    def insert(self) -> None:
        """Puts the same factors back in place."""
        self.weights.insert()

    def withdraw(self) -> None:
        """Restores the model exactly."""
        self.weights.withdraw()

    def freeze(self) -> None:
        """Merges the changes into the weights."""
        self.weights.merge()

    def tensors(self) -> Mapping[str, Tensor]:
        """The factors, merged or not."""
        return {name: factor.detach() for name, factor in self._factors().items()}

    def structure(self) -> Mapping[str, Any]:
        """The layers by path: kind, shape, and the layer whose factors they use (tied weights)."""
        return {
            "layers": {
                layer.path: {"kind": layer.kind.name, "shape": list(layer.shape), "factors": first}
                for first, group in self.weights.layers.items()
                for layer in group
            },
            "complete": self._complete,
            "head": self._head,
        }

    def betas(self) -> Mapping[str, Tensor]:
        """None."""
        return {}

    def cs(self) -> Mapping[str, Tensor]:
        """None."""
        return {}

    def _factors(self) -> dict[str, nn.Parameter]:
        return {
            ".".join(filter(None, (path, CHILD, name))): parameter
            for path, factors in self.weights.factors.items()
            for name, parameter in factors.named_parameters()
        }


def _checked(where: Layers) -> Layers:
    """`where`, with a tuple for any other sequence: what can be hashed, and compared."""
    if where is None or isinstance(where, str) or callable(where):
        return where
    if isinstance(where, Sequence) and all(isinstance(pattern, str) for pattern in where):
        return tuple(where)
    raise FlexureError(
        f"expected where to be patterns of layers' paths, or a predicate, got {where!r}"
    )


def _choose(
    layers: tuple[WeightLayer, ...], where: Layers, head: str | None
) -> tuple[WeightLayer, ...]:
    if callable(where):
        chosen = tuple(layer for layer in layers if where(layer.path, layer.module))
    elif where is None:
        chosen = layers
    else:
        patterns = [where] if isinstance(where, str) else list(where)
        for pattern in patterns:
            if not any(_matches(layer, pattern) for layer in layers):
                raise SiteError(
                    f"pattern {pattern!r} matches no layer outside the head {head!r}; "
                    f"the layers are {_listed(layers)}"
                )
        chosen = tuple(layer for layer in layers if any(_matches(layer, p) for p in patterns))
    if not chosen:
        raise SiteError(
            f"expected linear layers or convolutions to adapt outside the head {head!r}, chose "
            f"none of {_listed(layers)}; change where=, or use LinearProbe()"
        )
    return chosen


def _matches(layer: WeightLayer, pattern: str) -> bool:
    return any(fnmatchcase(path, pattern) for path in layer.paths)


def _listed(layers: Sequence[WeightLayer]) -> str:
    names = ", ".join(layer.path or "(model)" for layer in layers[:_SHOWN])
    return (names or "none") + (", ..." if len(layers) > _SHOWN else "")


_SHOWN = 12  # as many names as an error can hold and still be read


@dataclass(frozen=True)
class _Stored:
    """A layer as a file has it."""

    kind: str
    shape: tuple[int, ...]
    factors: str

    def __str__(self) -> str:
        return f"{self.kind} {self.shape}"


def _read(structure: Mapping[str, Any]) -> tuple[dict[str, _Stored], bool, str | None]:
    try:
        stored = {
            str(path): _Stored(str(row["kind"]), tuple(map(int, row["shape"])), str(row["factors"]))
            for path, row in structure["layers"].items()
        }
        head = structure["head"]
        return stored, bool(structure["complete"]), None if head is None else str(head)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(
            f"the adapter's structure is damaged: {type(error).__name__}: {error}; save it again"
        ) from error


def _outside(model: nn.Module, head: str | None) -> dict[str, WeightLayer]:
    if head is not None and head not in dict(model.named_modules(remove_duplicate=False)):
        raise AdapterError(f"the adapter's head belongs at {head!r}; the model has no such module")
    return {layer.path: layer for layer in weight_layers(model, outside=head)}


def _check_layers(
    stored: Mapping[str, _Stored], found: Mapping[str, WeightLayer], complete: bool
) -> None:
    owners: dict[int, str] = {}  # id of a weight -> the first layer that has it
    for layer in found.values():
        owners.setdefault(id(layer.module._parameters.get("weight")), layer.path)
    missing = []
    for path, row in stored.items():
        candidate = found.get(path)
        if candidate is None:
            missing.append(f"{path} ({row})")
            continue
        owner = owners[id(candidate.module._parameters.get("weight"))]
        here = _Stored(candidate.kind.name, candidate.shape, owner)
        if here != row:
            tied = "" if here.factors == row.factors else f" tied to {row.factors}"
            missing.append(f"{path} ({row}{tied}; the model's is {here})")
    unexpected = [
        f"{path} ({layer.kind.name} {layer.shape})"
        for path, layer in found.items()
        if complete and path not in stored
    ]
    if missing or unexpected:
        raise AdapterError(
            "the adapter was made for another model.\n"
            f"missing layers: {', '.join(missing) or 'none'}\n"
            f"unexpected layers: {', '.join(unexpected) or 'none'}"
        )


def _fill(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise AdapterError(f"the adapter's tensors lack {name}: the file is damaged")
        if tensor.shape != parameter.shape or not tensor.is_floating_point():
            raise AdapterError(
                f"expected {name} to be numbers of shape {tuple(parameter.shape)}, got "
                f"{tensor.dtype} of {tuple(tensor.shape)}: the file is damaged"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{name} is not finite: the file is damaged")
    for name, parameter in parameters.items():
        parameter.data = tensors[name].detach().to(parameter.device, copy=True)
