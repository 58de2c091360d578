"""What a search for a robust dial found, and how to use it. The search itself is in `robust_dial`.

Frozen, printable, and in JSON terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexure.columns import aligned
from flexure.contracts import FlexureError
from flexure.methods.attack_model_result import radius_text
from flexure.methods.attack_model_shares import PairedShare, Share
from flexure.methods.robust_dial_groups import ALL_SITES
from flexure.methods.steer import Steering
from flexure.record import to_json

__all__ = [
    "ORACLE",
    "CurvePoint",
    "DialCandidate",
    "DialRow",
    "RobustDial",
    "RobustDialSearch",
    "within_text",
]


ORACLE = "oracle: best shared dial on test data"
"""What a row is called that no honest choice could have made."""

_MOST_LISTED = 4
_NOTHING = "-"


@dataclass(frozen=True)
class RobustDial:
    """A position of the dials.

    Attributes:
        betas: group of sites -> beta.
        cs: group of sites -> c.
        match: what calibration keeps: "mean", "mean+std", or None for no calibration.
    """

    betas: Mapping[str, float]
    cs: Mapping[str, float]
    match: str | None

    @property
    def shared(self) -> bool:
        """Whether all sites have the same."""
        return ALL_SITES in self.betas

    def __str__(self) -> str:
        beta, c = (_listed(list(each.values())) for each in (self.betas, self.cs))
        kept = "not calibrated" if self.match is None else f"calibrated on {self.match}"
        return f"beta {beta}; c {c}; {kept}"


@dataclass(frozen=True)
class DialCandidate:
    """A dial and how the network does with it on validation data.

    Attributes:
        dial: its position; None: the network as it was.
        stage: "plain", "shared", or "groups".
        clean: accuracy without an attack.
        robust: radius -> accuracy under the attack of the search: at the chosen radius alone.
        objective: what the search maximises.
        allowed: whether the clean accuracy is as high as asked for.
    """

    dial: RobustDial | None
    stage: str
    clean: float
    robust: Mapping[float, float]
    objective: float
    allowed: bool


@dataclass(frozen=True)
class DialRow:
    """One dial on test data, attacked by the attack of the report.

    Attributes:
        name: how the dial was chosen.
        dial: its position; None: the network as it was.
        clean: accuracy without an attack.
        robust: radius -> accuracy under attack.
        clean_difference: to the plain network on the same samples.
        robust_difference: radius -> likewise.
        mean_within: whether the clean accuracy is not more than `clean_loss` below the plain
            network's.
        interval_within: whether the lower end of the interval of the difference is not, either.
    """

    name: str
    dial: RobustDial | None
    clean: Share
    robust: Mapping[float, Share]
    clean_difference: PairedShare
    robust_difference: Mapping[float, PairedShare]
    mean_within: bool
    interval_within: bool


@dataclass(frozen=True)
class CurvePoint:
    """One beta on test data, by the attack of the search.

    All are at c and the calibration of the best shared dial with beta below 1.

    Attributes:
        beta: for all sites.
        c: likewise.
        match: what calibration keeps.
        clean: accuracy without an attack.
        robust: radius -> accuracy under attack.
    """

    beta: float
    c: float
    match: str | None
    clean: Share
    robust: Mapping[float, Share]


@dataclass(frozen=True)
class RobustDialSearch:
    """The result of `search_robust_dial`.

    Attributes:
        candidates: every dial that was tried, the plain network first, in the order of the search;
            on validation data.
        chosen: the best of them that is allowed.
        rows: on test data: the plain network, and the best dials of each kind; empty without.
        oracle: the shared dial that does best on the test data themselves under the attack of the
            search, told for comparison only; None where it was not asked for. Dials by groups are
            not among those that it is the best of, and may do better.
        curve: on test data, by beta.
        groups: name -> sites.
        norm: of the attacks.
        eps: the radius that the dial is chosen for.
        radii: all radii, increasing.
        clean_loss: that was accepted.
        attack: of the search.
        report_attack: of `rows` and `oracle`.
        samples: split -> number of samples.
        shared_samples: that occur in both splits.
        seed: of everything random.
        plain_at_one: whether beta = 1 is the network as it was: not where activations are smooth.
        notes: what a reader must know, such as warnings of the attack of the report.
        seconds: stage -> wall-clock time.
    """

    candidates: tuple[DialCandidate, ...]
    chosen: DialCandidate
    rows: tuple[DialRow, ...]
    oracle: DialRow | None
    curve: tuple[CurvePoint, ...]
    groups: Mapping[str, tuple[str, ...]]
    norm: str
    eps: float
    radii: tuple[float, ...]
    clean_loss: float
    attack: str
    report_attack: str
    samples: Mapping[str, int]
    shared_samples: int
    seed: int
    plain_at_one: bool
    notes: tuple[str, ...]
    seconds: Mapping[str, float] = field(compare=False)
    _install: Callable[[], Steering] | None = field(repr=False, compare=False)

    @property
    def plain(self) -> DialCandidate:
        """The network as it was, on validation data."""
        return self.candidates[0]

    @property
    def gain(self) -> PairedShare | None:
        """Robust accuracy of the chosen dial minus the plain network's, on test data, at `eps`."""
        return None if self.row is None else self.row.robust_difference[self.eps]

    @property
    def row(self) -> DialRow | None:
        """The chosen dial on test data; None without test data."""
        return next((row for row in self.rows if row.dial == self.chosen.dial), None)

    def install(self) -> Steering:
        """Steers the model at the chosen dial.

        Returns:
            The handle whose `remove()` restores the model exactly.

        Raises:
            FlexureError: the network does best as it was, or changed since; or the search was
                copied or stored, which leaves the network behind.
            SiteError: the model is steered already.
        """
        if self._install is None:
            raise FlexureError(
                "expected the search as it was returned, got a copy, which holds no network; "
                "install from the original and save that as an adapter"
            )
        return self._install()

    def to_dict(self) -> dict[str, Any]:
        """The result in JSON terms."""
        names = (name for name in self.__dataclass_fields__ if not name.startswith("_"))
        found = {name: to_json(_keyed(getattr(self, name))) for name in names}
        return found | {"gain": to_json(self.gain), "oracle_label": ORACLE}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_install": None}

    def __str__(self) -> str:
        told = [*self._lines()]
        if self.shared_samples:
            told.append(f"Note: {self.shared_samples} samples are in both splits")
        return "\n".join([*told, *(f"Note: {note}" for note in self.notes)])

    def _lines(self) -> list[str]:
        at = radius_text(self.eps, self.norm)
        head = [
            f"robust dial for {self.norm} {at}, chosen on {self.samples['val']} validation samples "
            f"among {len(self.candidates)} candidates by {self.attack}:",
            f"  {self.chosen.dial or 'the network as it was'}: clean {self.chosen.clean:.1%}, "
            f"robust {self.chosen.robust[self.eps]:.1%} there (plain network "
            f"{self.plain.clean:.1%}, {self.plain.robust[self.eps]:.1%})",
        ]
        if not self.rows:
            return [*head, "no test data: nothing is reported"]
        shown = [*self.rows, *([] if self.oracle is None else [self.oracle])]
        radii = [radius_text(eps, self.norm) for eps in self.rows[0].robust]
        head += [
            f"on {self.samples['test']} test samples, by {self.report_attack}: % and paired "
            f"difference to the plain network [95 %], at {', '.join(radii)}"
        ]
        return [*head, *aligned([self._told(row) for row in shown], ruled=True)]

    def _told(self, row: DialRow) -> dict[str, str]:
        plain = row.dial is None
        told = {
            "": row.name,
            "dial": "" if plain else str(row.dial),
            "clean": str(row.clean) if plain else f"{row.clean} ({row.clean_difference})",
        }
        for eps, found in row.robust.items():
            more = "" if plain else f" ({row.robust_difference[eps]})"
            told[radius_text(eps, self.norm)] = f"{found}{more}"
        points = 100 * self.clean_loss
        told[f"clean within {points:g} points: mean, interval"] = (
            _NOTHING if plain else within_text(row)
        )
        return told


def within_text(row: DialRow) -> str:
    """Whether the loss of clean accuracy is within what was accepted: of mean and interval."""
    interval = math.isfinite(row.clean_difference.low)
    return f"{_yes(row.mean_within)}, {_yes(row.interval_within) if interval else _NOTHING}"


def _listed(values: Sequence[float]) -> str:
    """Values in words; of many, their range."""
    if len(values) > _MOST_LISTED:
        return f"{min(values):g} to {max(values):g} in {len(values)} groups"
    return ", ".join(f"{value:g}" for value in values)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _keyed(value: Any) -> Any:
    """With texts for keys, which JSON needs."""
    if isinstance(value, Mapping):
        return {str(key): _keyed(item) for key, item in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return {name: _keyed(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_keyed(item) for item in value]
    return value
