"""Low-rank changes of weights: putting them in place, taking them out, merging them.

A layer in place has a class made from its own, whose `weight` is computed whenever it is read. The
layer keeps its Parameter under its name and in its order, so that state dicts, optimisers and
`functional_call` see what they saw before, and the factors besides. Unlike
`torch.nn.utils.parametrize`, this leaves copies independent of the original, and pickles.

Which layers there are, is `weight_layers.py`'s; which to choose, and files, `methods/lora.py`'s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from flexure.contracts import SiteError
from flexure.surgery.follow import move
from flexure.surgery.weight_layers import CHILD, WeightLayer
from flexure.wide import kept_wide

__all__ = ["LowRank", "LowRankWeights"]


class LowRank(nn.Module):
    r"""The change \(W + \frac{\alpha}{r} B A\) of one weight (Hu et al. 2021, eq. 3).

    The weight is taken as a matrix `(shape[0], rest)`. The factors are float32, or wider where the
    weight is: in half precision the steps of an optimiser would be rounded away. The sum is formed
    in their precision, autocast or not, and rounded to the weight's dtype; with a half-precision
    weight, a change below half its last place is not seen. Keep such weights in float32 and use
    autocast.

    Attributes:
        A: `(rank, rest)`, uniform within 1/sqrt(rest): kaiming_uniform with a = sqrt(5), as in
            the authors' loralib.
        B: `(shape[0], rank)`, zero at first, so that the weight is unchanged.
        scale: alpha / rank.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        rank: int,
        alpha: float,
        inputs_first: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        """Draws A on the CPU, so that every device gets the same.

        Args:
            weight: the weight to be changed, for its shape, dtype and device.
            rank: at least 1; above `min(shape[0], rest)` it is allowed, and wasteful.
            alpha: numerator of the scale.
            inputs_first: whether to take the transpose of the weight, which is `(in, out)`.
            generator: of the draw; None: the CPU's default one.
        """
        super().__init__()
        shape = tuple(weight.shape)
        rows, rest = shape[::-1] if inputs_first else (shape[0], prod(shape[1:]))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        drawn = torch.empty(rank, rest).uniform_(-(rest**-0.5), rest**-0.5, generator=generator)
        self.A = nn.Parameter(drawn.to(device=weight.device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(rows, rank, device=weight.device, dtype=dtype))
        self.scale = alpha / rank
        self.inputs_first = inputs_first

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight, of the same shape and dtype."""
        with torch.autocast(weight.device.type, enabled=False):
            change = (self.scale * self.B) @ self.A
            change = change.T if self.inputs_first else change.reshape(weight.shape)
            return (weight + change).to(weight.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRank:
        with kept_wide(self, ("A", "B")):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Rank and scale."""
        return f"rank={self.A.shape[0]}, scale={self.scale:g}"


class LowRankWeights:
    """Low-rank changes of some layers of a model, in place or withdrawn.

    Layers that share one Parameter share their factors: the weight stays tied, is counted once and
    trained once.

    Attributes:
        factors: name of the (first) layer -> its change.
        layers: that name -> the layers that have it.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[WeightLayer],
        *,
        rank: int,
        alpha: float,
        generator: torch.Generator | None = None,
    ) -> None:
        """Makes the changes and puts them in place.

        Raises:
            SiteError: a layer cannot be changed, or shares its weight with something else; the
                model is unchanged.
        """
        _check(model, layers)
        groups: dict[nn.Parameter, list[WeightLayer]] = defaultdict(list)
        for layer in layers:
            groups[_own_weight(layer.module)].append(layer)
        self.layers = {group[0].path: tuple(group) for group in groups.values()}
        self.factors = {
            group[0].path: LowRank(
                weight,
                rank=rank,
                alpha=alpha,
                inputs_first=group[0].kind.inputs_first,
                generator=generator,
            )
            for weight, group in groups.items()
        }
        self._merged: dict[str, tuple[nn.Parameter, nn.Parameter]] | None = None
        self._in_place = False
        self.insert()

    @property
    def merged(self) -> bool:
        """Whether the changes have become constants."""
        return self._merged is not None

    def insert(self) -> None:
        """Puts the changes, or the merged weights, in place; in place: does nothing."""
        if self._in_place:
            return
        if self._merged is None:
            _check_free(layer for group in self.layers.values() for layer in group)
            for path, layer in self._each():
                _attach(layer.module, self.factors[path])
        else:
            for path, layer in self._each():
                _exchange(layer.module, self._merged[path][1])
        self._in_place = True

    def withdraw(self) -> None:
        """Restores every layer exactly; withdrawn: does nothing.

        Raises:
            SiteError: something else has changed a layer's class meanwhile; nothing is withdrawn.
        """
        if not self._in_place:
            return
        if self._merged is None:
            for _, layer in self._each():
                _check_attached(layer)
            for _, layer in self._each():
                _detach(layer.module)
        else:
            for path, layer in self._each():
                _exchange(layer.module, self._merged[path][0])
        self._in_place = False

    def merge(self) -> None:
        """Turns the changed weights into constants, plain Parameters that need no gradient.

        The original Parameters are kept, for `withdraw`; a second call does nothing.
        """
        if self._merged is not None:
            return
        before = self._in_place
        self.withdraw()
        merged = {}
        for path, factors in self.factors.items():
            weight = _own_weight(self.layers[path][0].module)
            _follow(factors, weight)
            with torch.no_grad():
                merged[path] = (weight, nn.Parameter(factors(weight), requires_grad=False))
        self._merged = merged
        if before:
            self.insert()

    def _each(self) -> list[tuple[str, WeightLayer]]:
        return [(path, layer) for path, group in self.layers.items() for layer in group]


def _check(model: nn.Module, layers: Sequence[WeightLayer]) -> None:
    """Checks that every layer can be changed, and that all who share its weight are changed too."""
    _check_free(layers)
    chosen = {id(layer.module): layer.kind.inputs_first for layer in layers}
    users: dict[int, list[tuple[str, nn.Module, str]]] = defaultdict(list)
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                users[id(parameter)].append((path, module, name))
    for layer in layers:
        for path, module, name in users[id(layer.module._parameters["weight"])]:
            if name != "weight" or chosen.get(id(module)) != layer.kind.inputs_first:
                raise SiteError(
                    f"layer {layer.path!r} shares its weight with {path or 'the model'!r} "
                    f"({type(module).__name__}.{name}), which is not changed likewise: they would "
                    "no longer be tied; leave the layer out with where=, or name both"
                )


def _check_free(layers: Iterable[WeightLayer]) -> None:
    for layer in layers:
        if layer.refusal is not None:
            raise SiteError(
                f"expected a weight that can be changed, got {layer.path!r} "
                f"({type(layer.module).__name__}): {layer.refusal}; or leave it out with where="
            )


def _own_weight(layer: nn.Module) -> nn.Parameter:
    """The layer's own Parameter, whatever its `weight` gives."""
    weight = layer._parameters["weight"]
    if weight is None:
        raise SiteError(f"expected {type(layer).__name__} to have a weight, got None")
    return weight


def _attach(layer: nn.Module, factors: LowRank) -> None:
    _follow(factors, _own_weight(layer))
    factors.train(layer.training)
    layer._modules[CHILD] = factors
    layer.__class__ = _changed_class(type(layer))


def _detach(layer: nn.Module) -> None:
    layer.__class__ = type(layer).__mro__[1]
    del layer._modules[CHILD]


def _check_attached(layer: WeightLayer) -> None:
    found = type(layer.module)
    if found is not _changed_class(found.__mro__[1]):
        raise SiteError(
            f"layer {layer.path!r} has become a {found.__name__} since its weight was changed; "
            "undo that first (parametrisations, weight_norm, ...)"
        )


def _exchange(layer: nn.Module, weight: nn.Parameter) -> None:
    held = _own_weight(layer)
    move(weight, held.device, held.dtype)
    layer._parameters["weight"] = weight


def _follow(factors: LowRank, weight: nn.Parameter) -> None:
    """Follows a model that was moved, or cast to a wider dtype, meanwhile."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    for factor in factors.parameters():
        # Never to a narrower one: what was learned is kept.
        move(factor, weight.device, torch.promote_types(factor.dtype, wide))


def _changed_class(base: Any) -> Any:
    """A subclass of `base` whose `weight` is the changed one; the same one each time."""
    if base not in _CHANGED:
        members = {
            "__module__": __name__,
            "__doc__": f"{base.__name__} with a low-rank change of its weight.",
            "__reduce_ex__": _reduce,
            "weight": property(_changed_weight),
        }
        _CHANGED[base] = type(f"LowRank{base.__name__}", (base,), members)
    return _CHANGED[base]


_CHANGED: dict[Any, Any] = {}


def _changed_weight(layer: Any) -> Any:
    # By key: an AttributeError in a property makes nn.Module look for a Parameter of this name,
    # and the unchanged weight would be used in silence.
    return layer._modules[CHILD](layer._parameters["weight"])


def _reduce(layer: Any, protocol: int) -> tuple[Any, ...]:
    """Pickles and copies by the class that this one was made from, which can be imported."""
    base: Any = type(layer).__mro__[1]
    _, _, *state = base.__reduce_ex__(layer, protocol)
    return (_make_empty, (base,), *state)


def _make_empty(base: Any) -> Any:
    made = _changed_class(base)
    return made.__new__(made)
