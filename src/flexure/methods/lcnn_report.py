"""What a low-curvature network is made of, layer by layer, with its constants as they are now.

Turning a network into one is `lcnn.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flexure.columns import aligned
from flexure.contracts import Example, FlexureError
from flexure.layers import LipschitzBatchNorm, spectral_norms
from flexure.layers.residual import ResidualSum
from flexure.surgery.weight_uses import weight_uses
from flexure.surgery.wrapped import unwrapped
from flexure.units import CenteredSoftplus

__all__ = [
    "LCNNReport",
    "Part",
    "check_example",
    "largest_size",
    "lcnn_report",
    "parts_of",
    "remember_parts",
    "report_of",
]


@dataclass(frozen=True)
class Part:
    """One part of a network that was looked at.

    Attributes:
        kind: `activation`, `linear`, `norm`, `sum`, `pool` or `factor`.
        name: where it is: a path, or as the site report names calls.
        was: what it was; empty where that is not known.
        became: what it is now; empty where it was left.
        note: why it was left, or what else is to be said.
        path: of the module that holds its constant now; None where there is none.
        constant: beta of an activation, the largest slope of a normalisation (gamma, or less where
            no channel reaches it), a certified upper bound of the operator norm of a layer, the
            factor of a sum; nan where there is none.
    """

    kind: str
    name: str
    was: str
    became: str = ""
    note: str = ""
    path: str | None = None
    constant: float = math.nan

    @property
    def left(self) -> bool:
        """Whether it is as it was."""
        return not self.became


@dataclass(frozen=True)
class LCNNReport:
    """The parts of a low-curvature network, and the Lipschitz bound that results.

    Attributes:
        parts: by kind, in the model's order.
        lipschitz: upper bound of the Lipschitz constant from input to logits in eval mode, in
            2-norms; nan where none is known.
        reason: why none is known; empty where one is.
    """

    parts: tuple[Part, ...]
    lipschitz: float
    reason: str = ""

    def of(self, kind: str, *, left: bool = False) -> tuple[Part, ...]:
        """The parts of a kind that were changed, or that were left."""
        return tuple(part for part in self.parts if part.kind == kind and part.left == left)

    @property
    def left(self) -> tuple[Part, ...]:
        """All parts that were left as they were."""
        return tuple(part for part in self.parts if part.left)

    def rows(self) -> list[dict[str, str]]:
        """The table, one dictionary a row, in reading order."""
        return [
            {
                "part": part.kind,
                "name": part.name or "(model)",
                "was": part.was or "-",
                "is now": part.became or "left",
                "constant": "-" if math.isnan(part.constant) else _constant(part),
                "note": part.note,
            }
            for part in self.parts
        ]

    @property
    def summary(self) -> str:
        """One line: how many parts of each kind were changed, how many left, and the bound."""
        counts = [
            f"{len(self.of(kind))} {plural if len(self.of(kind)) != 1 else one}"
            for kind, (one, plural) in _KINDS.items()
            if self.of(kind)
        ]
        one_left = len(self.left) == 1
        left = f"; {len(self.left)} left as {'it is' if one_left else 'they are'}"
        left = left if self.left else ""
        bound = f"unknown ({self.reason})" if self.reason else f"at most {self.lipschitz:.4g}"
        return f"LCNN: {', '.join(counts) or 'nothing'}{left}; Lipschitz constant {bound}"

    def __str__(self) -> str:
        rows = self.rows()
        if not rows:
            return self.summary
        return "\n".join([*aligned(rows, ruled=True), self.summary])


def lcnn_report(model: nn.Module, example: Example) -> LCNNReport:
    """The report of a low-curvature network with its constants as they are now.

    After training, say: betas, gammas and running statistics have moved, and so has the bound.
    The model is not changed.

    Args:
        model: what `flexure.to_lcnn` returned or `flexure.models` built as one, or a copy.
        example: one input; its sizes are what the constants and the bound are for.

    Raises:
        FlexureError: the model is no low-curvature network, or the example no input.
        SiteError: the example does not run through the model.
    """
    check_example(example)
    inside = unwrapped(model)
    parts = parts_of(inside)
    if not parts:
        raise FlexureError(
            "expected a low-curvature network, got one without any of its parts; convert it with "
            "flexure.to_lcnn first"
        )
    return report_of(inside, parts, example)


def report_of(model: nn.Module, parts: tuple[Part, ...], example: Example) -> LCNNReport:
    """The report with the constants of these parts for the example's sizes, and the bound."""
    calls = weight_uses(model, example).inputs
    norms = spectral_norms(model)
    before = {path: norm.size for path, norm in norms.items()}
    for path, norm in norms.items():
        norm.size = largest_size(calls.get(path, ()), len(norm.size)) or norm.size
    try:
        read = tuple(_read(model, part, calls) for part in parts)
    finally:
        for path, norm in norms.items():
            norm.size = before[path]
    bound, reason = _lipschitz(model, example)
    return LCNNReport(read, bound, reason)


def check_example(example: Any) -> None:
    """Makes sure that an example has a tensor in it.

    Raises:
        FlexureError: it has none.
    """
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(example)):
        raise FlexureError(
            f"expected example to be one input, a tensor or a tuple or dict of them, got "
            f"{type(example).__name__}; give one batch of what the model takes"
        )


def largest_size(shapes: Sequence[tuple[int, ...]], axes: int) -> tuple[int, ...] | None:
    """The largest spatial size among shapes along each axis; None for none, or of no axes."""
    sizes = [shape[len(shape) - axes :] for shape in shapes]
    return tuple(max(axis) for axis in zip(*sizes, strict=True)) or None


def parts_of(model: nn.Module) -> tuple[Part, ...]:
    """The parts that a conversion has remembered, or else those that a built LCNN shows."""
    remembered: tuple[Part, ...] | None = model.__dict__.get(_KEY)
    return tuple(_found(model)) if remembered is None else remembered


def remember_parts(model: nn.Module, parts: tuple[Part, ...]) -> Callable[[], Any]:
    """Notes on the model what was converted; copies of it, pickled ones too, keep the note.

    Returns:
        A function that takes the note away.
    """
    model.__dict__[_KEY] = parts
    return lambda: model.__dict__.pop(_KEY, None)


_KEY = "_flexure_lcnn"

_KINDS: Mapping[str, tuple[str, str]] = {
    "activation": ("activation", "activations"),
    "linear": ("layer normalised", "layers normalised"),
    "norm": ("BatchNorm bounded", "BatchNorms bounded"),
    "sum": ("residual sum scaled", "residual sums scaled"),
    "pool": ("pooling averaged", "poolings averaged"),
    "factor": ("factor", "factors"),
}
"""Kinds of parts, in the report's order, with what the summary calls one and several."""


def _found(model: nn.Module) -> Iterator[Part]:
    """The parts of a network that was built as an LCNN."""
    named = list(model.named_modules())
    for path, module in named:
        if isinstance(module, CenteredSoftplus):
            yield Part("activation", path, "", "centered softplus", path=path)
    for path in spectral_norms(model):
        yield Part("linear", path, "", "norm 1", path=path)
    for path, module in named:
        if isinstance(module, LipschitzBatchNorm):
            yield Part("norm", path, "", "gamma-Lipschitz", path=path)
    for path, module in named:
        if isinstance(module, ResidualSum):
            yield Part("sum", path, "", "a multiple of a + b", path=path)


def _constant(part: Part) -> str:
    return f"{_SYMBOLS[part.kind]} {part.constant:.4g}"


_SYMBOLS = {"activation": "beta", "linear": "norm <=", "norm": "slope <=", "sum": "factor"}


def _read(model: nn.Module, part: Part, calls: Mapping[str, Any]) -> Part:
    """A part with its constant now, and of a layer with the size that it is for."""
    read = replace(part, constant=_constant_of(model, part))
    if part.kind != "linear" or part.path is None:
        return read
    size, module = spectral_norms(model)[part.path].size, model.get_submodule(part.path)
    every = [path for path, m in model.named_modules(remove_duplicate=False) if m is module]
    shapes = calls.get(part.path, ())
    notes = [
        f"input {' x '.join(map(str, size))}" if size else "",
        "the largest of several" if size and len({s[-len(size) :] for s in shapes}) > 1 else "",
        "" if shapes else "not called by the example",
        f"also {', '.join(p for p in every if p != part.path)}" if len(every) > 1 else "",
    ]
    return replace(read, note="; ".join(filter(None, notes)))


def _constant_of(model: nn.Module, part: Part) -> float:
    """A part's constant now; what it carries, where no module does."""
    if part.path is None:
        return part.constant
    return _READERS[part.kind](model, part.path)


def _beta(model: nn.Module, path: str) -> float:
    return _number(model.get_submodule(path).beta)


def _gamma(model: nn.Module, path: str) -> float:
    return _number(model.get_submodule(path).lipschitz)


def _factor(model: nn.Module, path: str) -> float:
    return _number(model.get_submodule(path).factor)


def _norm(model: nn.Module, path: str) -> float:
    from flexure.calling import evaluating

    with evaluating(model):
        return spectral_norms(model)[path].certified()


_READERS: Mapping[str, Callable[[nn.Module, str], float]] = {
    "activation": _beta,
    "linear": _norm,
    "norm": _gamma,
    "sum": _factor,
}


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def _lipschitz(model: nn.Module, example: Example) -> tuple[float, str]:
    """The bound of the Lipschitz constant for inputs of the example's shape, or why none."""
    from flexure.measure.lipschitz import lipschitz_bound

    inputs = example if isinstance(example, tuple) else (example,)
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        return math.nan, "the bound is for models of one tensor"
    try:
        return float(lipschitz_bound(model, tuple(inputs[0].shape[1:])).value), ""
    except FlexureError as error:
        return math.nan, str(error)
