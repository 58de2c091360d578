"""What dials that were chosen elsewhere do on test data: rows, a curve over beta, and an oracle.

Nothing here changes a choice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flexure.fingerprints import described
from flexure.methods.attack_model_bench import Bench, Task
from flexure.methods.attack_model_result import AttackedModel
from flexure.methods.attack_model_shares import paired_share, share
from flexure.methods.robust_dial_bench import DialBench
from flexure.methods.robust_dial_groups import ALL_SITES
from flexure.methods.robust_dial_result import (
    ORACLE,
    CurvePoint,
    DialCandidate,
    DialRow,
    RobustDial,
)
from flexure.methods.robust_dial_setup import DialSettings
from flexure.progress import ProgressReporter

__all__ = ["Report", "Reporting"]

_PAPER_C = 0.5
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Report:
    """See `RobustDialSearch`, where each of these is."""

    rows: tuple[DialRow, ...]
    oracle: DialRow | None
    curve: tuple[CurvePoint, ...]
    notes: tuple[str, ...] = ()


class Reporting:
    """The test data, and how dials are attacked on them.

    Args:
        bench: on test data.
        settings: of the search.
        folder: of finished attacks; None: none are kept.
        reporter: is told how far it is.
    """

    def __init__(
        self,
        bench: DialBench,
        settings: DialSettings,
        folder: Path | None,
        reporter: ProgressReporter,
    ) -> None:
        self._bench, self._settings, self._folder = bench, settings, folder
        self._reporter = reporter
        self._known: dict[str, AttackedModel] = {}
        self._warned: list[tuple[str, str]] = []

    def report(
        self,
        candidates: Sequence[DialCandidate],
        chosen: DialCandidate,
        *,
        oracle: bool,
    ) -> Report:
        """The rows of the best dials of each kind, the curve, and the oracle if it is asked for."""
        grid = self._settings.grid(self._bench.model.plain_at_one)
        rows = [self._row(name, one.dial) for name, one in _kinds(candidates, chosen)]
        best = self._oracle(grid) if oracle else None
        told = None if best is None else self._row(ORACLE, best)
        base, notes = _base(candidates)
        curve = () if base is None else tuple(self._curve(base, grid))
        warned = (f"{name}: {text}" for name, text in self._warned)
        return Report(tuple(rows), told, curve, (*dict.fromkeys(warned), *notes))

    def _attacked(self, dial: RobustDial | None) -> AttackedModel:
        """A dial under the attack of the report, once."""
        told, settings, model = _told(dial), self._settings, self._bench.model
        key = json.dumps([model.key(dial), described(settings.report_attack), settings.reported])
        if key not in self._known:
            digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
            bench = Bench(
                [Task(settings.norm, settings.reported, (settings.report_attack,))],
                self._bench.x, self._bench.y, seed=settings.seed, batch_size=settings.batch_size,
                every=False, keep=0, reporter=self._reporter,
                store=None if self._folder is None else self._folder / digest,
            )  # fmt: skip
            model.turn(dial)
            self._known[key], _ = bench.attacked(0, f"test, {told}", model.bounded)
            self._warned += [(told, text) for text in self._known[key].warnings]
        return self._known[key]

    def _row(self, name: str, dial: RobustDial | None) -> DialRow:
        plain, found = self._attacked(None), self._attacked(dial)
        clean = paired_share(found.clean, plain.clean)
        pairs = list(zip(found.at, plain.at, strict=True))
        least = -self._settings.clean_loss - _ROUNDING
        return DialRow(
            name,
            dial,
            share(found.clean),
            {at.eps: at.accuracy for at in found.at},
            clean,
            {at.eps: paired_share(at.robust, other.robust) for at, other in pairs},
            mean_within=clean.value >= least,
            interval_within=dial is None or clean.low >= least,
        )

    def _oracle(self, grid: Sequence[RobustDial]) -> RobustDial | None:
        """The most robust shared dial on the test data that keeps the clean accuracy there."""
        least = self._bench.clean(None) - self._settings.clean_loss - _ROUNDING
        found = []
        for done, dial in enumerate(grid, 1):
            if self._bench.clean(dial) >= least:
                robust = self._bench(dial, ()).robust[self._settings.eps]
                found.append((float(robust.double().mean()), dial))
            self._reporter("test, oracle", done, len(grid))
        return max(found, key=lambda one: one[0], default=(0.0, None))[1]

    def _curve(self, dial: RobustDial, grid: Sequence[RobustDial]) -> Iterator[CurvePoint]:
        """All betas of the grid at the c and the calibration of one dial."""
        betas = sorted({one.betas[ALL_SITES] for one in grid})
        ends = {one.match: one for one in grid if one.betas[ALL_SITES] == 1}
        for done, beta in enumerate(betas, 1):
            here = replace(dial, betas={ALL_SITES: beta})
            if beta == 1:
                here = ends.get(dial.match, grid[-1])
            found = self._bench(here, self._settings.all_radii)
            robust = {eps: share(hits) for eps, hits in sorted(found.robust.items())}
            c, match = dial.cs[ALL_SITES], dial.match
            yield CurvePoint(beta, c, match, share(found.right), robust)
            self._reporter("test, curve over beta", done, len(betas))


def _kinds(
    candidates: Sequence[DialCandidate], chosen: DialCandidate
) -> Iterator[tuple[str, DialCandidate]]:
    """The best candidate of each kind, on validation data."""
    yield "plain network", candidates[0]
    shared = [one for one in candidates if one.stage == "shared" and one.dial is not None]
    plain = [one for one in shared if one.dial is not None and one.dial.match is None]
    kinds: Mapping[str, list[DialCandidate]] = {
        f"shared, c = {_PAPER_C:g}": [one for one in plain if _PAPER_C in _cs(one)],
        "shared": plain,
        "shared, calibrated": [one for one in shared if one not in plain],
        "groups": [one for one in candidates if one.stage == "groups"],
    }
    for name, some in kinds.items():
        allowed = [one for one in some if one.allowed]
        if allowed:
            best = max(allowed, key=lambda one: one.objective)
            yield name + (" (chosen)" if best == chosen else ""), best


def _base(candidates: Sequence[DialCandidate]) -> tuple[RobustDial | None, tuple[str, ...]]:
    """The dial whose c and calibration the curve is at, and what must be told of it.

    At beta = 1, c has no effect, and calibration often none: it tells neither.
    """
    shared = [one for one in candidates if one.stage == "shared" and one.dial is not None]
    below = [one for one in shared if one.dial is not None and one.dial.betas[ALL_SITES] < 1]
    allowed = [one for one in below if one.allowed]
    best = max(allowed or below or shared, key=lambda one: one.objective, default=None)
    if best is None:
        return None, ()
    if allowed or not below:
        return best.dial, ()
    return best.dial, (
        "no shared dial with beta below 1 keeps the clean accuracy; the curve over beta is at c "
        "and calibration of the one of highest objective",
    )


def _cs(one: DialCandidate) -> tuple[float, ...]:
    return () if one.dial is None else tuple(one.dial.cs.values())


def _told(dial: RobustDial | None) -> str:
    return "plain network" if dial is None else str(dial)
