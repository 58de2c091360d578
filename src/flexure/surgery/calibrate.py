"""Calibrated steering: every channel keeps the mean, or mean and spread, it had before.

Works on installed units and unlabelled inputs; no gradients, no labels, no training. Goes beyond
the Curvature Tuning paper, whose fixed c = 0.5 only dampens the shift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from flexure.calling import call_model, copied, evaluating
from flexure.contracts import DataError, FlexureError, SiteError
from flexure.surgery.preserve import preserved
from flexure.units.unit import CTU

__all__ = ["Calibration", "Match"]

Match: TypeAlias = Literal["mean", "mean+std"]
Moments: TypeAlias = "tuple[Tensor, Tensor]"

SCALE_LIMITS = (0.5, 2.0)
"""A channel's spread is at most halved or doubled, lest channels of few inputs blow up."""


class Calibration:
    """The original activations' channel moments, and how to make units keep them.

    Unit k's output becomes a_k·phi + d_k per channel. One forward pass of all inputs records what
    each original activation gives; one more, through the units, chooses d_k (and a_k, for
    `"mean+std"`, clamped to [0.5, 2]) site after site, each from what the units before it already
    pass on. At a dial where the unit is the activation, a_k = 1 and d_k = 0 exactly.

    Args:
        model: the network with its units installed.
        units: site name -> unit.
        inputs: unlabelled batches, a few hundred items in all; `(x, y)` batches are taken too,
            and their labels ignored. All run as one batch, twice: memory is that of one forward
            pass without gradients.
        match: `"mean"` or `"mean+std"`.

    Raises:
        DataError: no inputs, or not finite.
        SiteError: the channel axis of a site is unknown, or a site is called more than once in a
            pass, so that no single correction can serve.
    """

    def __init__(
        self, model: nn.Module, units: Mapping[str, CTU], inputs: Iterable[Any], match: Match
    ) -> None:
        if match not in ("mean", "mean+std"):
            raise FlexureError(f'expected match "mean" or "mean+std", got {match!r}')
        unknown = [name for name, unit in units.items() if unit.axis is None]
        if unknown:
            raise SiteError(
                f"calibration needs the channel axis of {', '.join(unknown)}, which the producing "
                "layer does not tell; give axis="
            )
        self.model = model
        self.units = units
        self.match = match
        try:
            batches = list(inputs)
        except TypeError as error:
            raise DataError(f"calibration: expected an iterable of batches: {error}") from error
        self.x = _joined(batches)
        self.targets: dict[str, Moments] = {}
        self._run(self._keep_original)
        idle = [name for name in units if name not in self.targets]
        if idle:
            raise SiteError(f"the calibration inputs did not reach {', '.join(idle)}")

    def apply(self) -> None:
        """Chooses every unit's correction for the dial it has now."""
        for unit in self.units.values():
            unit.scale = unit.shift = None
        found: dict[str, Moments] = {}

        def choose(name: str, unit: CTU, original: Tensor, phi: Tensor) -> Tensor:
            found[name] = self._correction(name, unit, phi)
            unit.correct(*found[name])
            return unit.corrected(phi)

        self._run(choose)
        # The pass leaves no trace in the model, not even these.
        for name, correction in found.items():
            self.units[name].correct(*correction)

    def _run(self, visit: Callable[[str, CTU, Tensor, Tensor], Tensor]) -> None:
        handles = []
        seen: set[str] = set()
        for name, unit in self.units.items():
            visitor = _Visitor(name, visit, seen)
            handles.append(unit.register_forward_pre_hook(visitor.before, with_kwargs=True))
            handles.append(unit.register_forward_hook(visitor.after, with_kwargs=True))
        try:
            # The generators restart for each pass, so that random layers, if any, repeat.
            with torch.no_grad(), preserved(self.model), evaluating(self.model):
                call_model(self.model, copied(self.x))
        except FlexureError:
            raise
        except Exception as error:
            raise DataError(
                "the calibration inputs do not run through the model as one batch: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()

    def _keep_original(self, name: str, unit: CTU, original: Tensor, phi: Tensor) -> Tensor:
        moments = _moments(original, unit)
        if not all(bool(torch.isfinite(moment).all()) for moment in moments):
            raise DataError(f"calibration: the activations of site {name!r} are not finite")
        self.targets[name] = moments
        return original

    def _correction(self, name: str, unit: CTU, phi: Tensor) -> Moments:
        """a_k and d_k of one unit."""
        mean, std = _moments(phi, unit)
        target_mean, target_std = self.targets[name]
        scale = torch.ones_like(mean)
        if self.match == "mean+std":
            scale = torch.where(std > 0, target_std / std, scale).clamp(*SCALE_LIMITS)
        return scale, target_mean - scale * mean


class _Visitor:
    """Hooks of one unit: the original activation's output, taken before the unit may overwrite."""

    def __init__(
        self, name: str, visit: Callable[[str, CTU, Tensor, Tensor], Tensor], seen: set[str]
    ) -> None:
        self.name = name
        self.visit = visit
        self.seen = seen
        self.original: Tensor | None = None

    def before(self, unit: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self.name in self.seen:
            raise SiteError(
                f"calibration: site {self.name!r} is called more than once in a pass, and one "
                "correction cannot serve them all; leave it out with where="
            )
        self.seen.add(self.name)
        params = {key: value for key, value in kwargs.items() if key not in ("input", "inplace")}
        self.original = unit.reference(_first(args, kwargs), **params)

    def after(self, unit: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if self.original is None:
            raise SiteError(f"site {self.name!r} ran without its pre-hook")
        new = self.visit(self.name, unit, self.original, output)
        self.original = None
        # An activation in place must leave its result in its input.
        return output.copy_(new) if output is _first(args, kwargs) else new


def _first(args: Any, kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else kwargs["input"]
    return x


def _moments(y: Tensor, unit: CTU) -> Moments:
    """Mean and standard deviation per channel, `(channels,)` each, in float32 or wider."""
    if unit.axis is None:
        raise SiteError(f"site {unit.name!r} has no channel axis")
    wide = y.to(torch.promote_types(y.dtype, torch.float32)).movedim(unit.axis, 0).flatten(1)
    return wide.mean(1), wide.std(1, correction=0)


def _joined(batches: list[Any]) -> Any:
    """All batches as one."""
    items = [_input(batch) for batch in batches]
    if not items:
        raise DataError("calibration: expected some unlabelled inputs, got none")
    first = items[0]
    kinds = sorted({type(item).__name__ for item in items})
    if len(kinds) > 1 or not isinstance(first, Tensor | dict | tuple):
        raise DataError(f"calibration: expected batches of one kind of input, got {kinds}")
    try:
        if isinstance(first, Tensor):
            return torch.cat(items)
        if isinstance(first, dict):
            return {key: _column([item[key] for item in items]) for key in first}
        return tuple(_column(list(column)) for column in zip(*items, strict=True))
    except (RuntimeError, KeyError, ValueError) as error:
        raise DataError(f"calibration: the batches do not fit together: {error}") from error


def _column(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], Tensor) else values[0]


def _input(batch: Any) -> Any:
    """The input of a batch that may carry labels: `(x, y)` with y a vector of integers."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        x, y = batch
        labels = isinstance(y, Tensor) and y.ndim == 1 and not y.is_floating_point()
        if labels and isinstance(x, (Tensor, dict, tuple)):
            return x
    return tuple(batch) if isinstance(batch, list) else batch
