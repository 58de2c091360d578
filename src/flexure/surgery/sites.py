"""What the census found: sites, refusals, and the report that prints them.

Plain frozen data; nothing here runs or changes a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

from flexure.columns import aligned
from flexure.contracts import SiteError
from flexure.units.catalogue import SPECS
from flexure.units.spec import Point

__all__ = ["Event", "Refusal", "Site", "SiteReport", "Where"]


@dataclass(frozen=True)
class Site:
    """One call of an activation.

    Attributes:
        name: unique: the activation module's path, or `caller:index` where a path does not tell
            the call (a function, a module called in several places).
        kind: `module`, swapped for a unit; or `call`, routed to one while its caller runs.
        activation: catalogue row.
        params: the activation's own constants (`slope`, `cap`, `beta`, `approximate`).
        caller: path of the module whose `forward` makes the call ("" is the model).
        index: which of its caller's activation calls it is, from 0.
        modules: every path of the activation module; empty for a function.
        calls: how often the example called it.
        inplace: whether the call overwrites its input.
        shape: of the input, at the first call.
        axis: channel axis, counted from the end; None where the producing layer does not tell.
        channels: size of that axis.
    """

    name: str
    kind: Literal["module", "call"]
    activation: str
    params: Mapping[str, Any]
    caller: str
    index: int
    modules: tuple[str, ...]
    calls: int
    inplace: bool
    shape: tuple[int, ...]
    axis: int | None
    channels: int | None

    @property
    def point(self) -> Point:
        """The CTU nearest to the original activation."""
        return SPECS[self.activation].point(self.params)

    @property
    def exact_at_relu(self) -> bool:
        """Whether beta = 1 is the original activation, whatever c."""
        return self.point.error == 0 and self.point.beta == 1

    @property
    def action(self) -> str:
        """What steering does here, in words."""
        verb = "swap for a CTU" if self.kind == "module" else "route to a CTU"
        return f"{verb}; {self.point}"


@dataclass(frozen=True)
class Refusal:
    """An activation that is not steered.

    Attributes:
        name: where it is.
        activation: what it is.
        reason: why not.
        blocking: a rectifier that cannot be reached: steering everything would be incomplete, so
            it stops with an error unless `where` leaves this one out.
        calls: how often the example called it.
    """

    name: str
    activation: str
    reason: str
    blocking: bool
    calls: int = 1


@dataclass(frozen=True)
class Event:
    """One visible activation function call of a caller: which row, and which site makes it."""

    activation: str
    owner: str


Where: TypeAlias = "str | Sequence[str] | Callable[[Site], bool] | None"
"""Which sites: glob patterns of names, a predicate, or None for all."""


@dataclass(frozen=True)
class SiteReport:
    """Every activation of a network: what will change, what cannot, and on which axis.

    Attributes:
        sites: what can be steered, in the order of the first call.
        refused: what is left, each with its reason.
        events: for each caller the activation functions that it is seen to call, in order.
        fast_paths: modules that would bypass Python (`nn.TransformerEncoderLayer`).
        unreached: modules that the example did not enter, and that may hold activations.
    """

    sites: tuple[Site, ...]
    refused: tuple[Refusal, ...] = ()
    events: Mapping[str, tuple[Event, ...]] = field(default_factory=dict, repr=False)
    fast_paths: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()

    def select(self, where: Where) -> tuple[Site, ...]:
        """The sites that `where` names, in order.

        Raises:
            SiteError: nothing can be steered; a pattern matches nothing, or only refused
                activations; or, without `where`, a rectifier cannot be reached.
        """
        if where is None:
            self._check_reached(self.refused)
            chosen = self.sites
        elif callable(where):
            chosen = tuple(site for site in self.sites if where(site))
        else:
            patterns = [where] if isinstance(where, str) else list(where)
            for pattern in patterns:
                self._check_pattern(pattern)
            self._check_reached(
                r for r in self.refused if any(fnmatchcase(r.name, p) for p in patterns)
            )
            chosen = tuple(
                site for site in self.sites if any(fnmatchcase(site.name, p) for p in patterns)
            )
        if not chosen:
            raise SiteError(self._nothing())
        return chosen

    def rows(self) -> list[dict[str, str]]:
        """The table, one dictionary a row, in reading order."""
        rows = [
            {
                "site": site.name,
                "kind": site.kind,
                "activation": _describe(site.activation, site.params),
                "calls": str(site.calls),
                "axis": "?" if site.axis is None else str(site.axis),
                "channels": "?" if site.channels is None else str(site.channels),
                "what will happen": site.action,
            }
            for site in self.sites
        ]
        rows += [
            {
                "site": refusal.name or "(model)",
                "kind": "-",
                "activation": refusal.activation,
                "calls": str(refusal.calls),
                "axis": "-",
                "channels": "-",
                "what will happen": ("CANNOT STEER: " if refusal.blocking else "left: ")
                + refusal.reason,
            }
            for refusal in self.refused
        ]
        return rows

    @property
    def summary(self) -> str:
        """One line: how many sites, how many exact at beta = 1, how many left."""
        exact = sum(site.exact_at_relu for site in self.sites)
        parts = [
            f"{len(self.sites)} site{'s' * (len(self.sites) != 1)} to steer",
            f"{exact} exact at beta = 1",
            f"{sum(not r.blocking for r in self.refused)} left as they are",
        ]
        blocking = sum(r.blocking for r in self.refused)
        if blocking:
            parts.append(f"{blocking} that cannot be steered")
        if self.unreached:
            parts.append(f"not reached by the example: {', '.join(self.unreached)}")
        return "; ".join(parts)

    def __str__(self) -> str:
        rows = self.rows()
        if not rows:
            return self.summary
        return "\n".join([*aligned(rows, ruled=True), self.summary])

    def _check_reached(self, refusals: Iterable[Refusal]) -> None:
        blocking = [refusal for refusal in refusals if refusal.blocking]
        if blocking:
            listed = "\n".join(
                f"  {r.name or '(model)'}: {r.activation}: {r.reason}" for r in blocking
            )
            raise SiteError(
                f"expected to reach every rectifier, but cannot steer:\n{listed}\n"
                "change the model, or name other sites to steer with where="
            )

    def _check_pattern(self, pattern: str) -> None:
        if any(fnmatchcase(site.name, pattern) for site in self.sites):
            return
        refused = [r for r in self.refused if fnmatchcase(r.name, pattern)]
        if refused:
            reasons = "; ".join(f"{r.name}: {r.activation}: {r.reason}" for r in refused)
            raise SiteError(f"pattern {pattern!r} matches only what cannot be steered: {reasons}")
        names = ", ".join(site.name for site in self.sites[:8])
        more = ", ..." if len(self.sites) > 8 else ""
        raise SiteError(
            f"pattern {pattern!r} matches no site; the sites are {names or 'none'}{more}"
        )

    def _nothing(self) -> str:
        if self.sites:
            return "expected at least one site, got none from where="
        found = "; ".join(
            f"{r.name or '(model)'}: {r.activation}: {r.reason}" for r in self.refused
        )
        return "no activation that can be steered was called by the example" + (
            f"; found only {found}" if found else ""
        )


def _describe(activation: str, params: Mapping[str, Any]) -> str:
    shown = [
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in params.items()
        if isinstance(value, (int, float, str)) and not isinstance(value, bool)
    ]
    return activation + (f"({', '.join(shown)})" if shown else "")
