"""What dials that were chosen elsewhere do on test data: rows, a curve over beta, and an oracle.

Nothing here changes a choice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from flexure.contracts import Attack
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
from flexure.progress import ProgressReporter

__all__ = ["Report", "TestData"]

_PAPER_C = 0.5


@dataclass(frozen=True)
class Report:
    """See `RobustDialSearch`, where each of these is."""

    rows: tuple[DialRow, ...]
    oracle: DialRow | None
    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class TestData:
    """The test data, and how dials are attacked on them."""

    __test__ = False  # not a test case, whatever pytest makes of the name

    bench: DialBench
    x: Tensor
    y: Tensor
    norm: str
    eps: float
    radii: tuple[float, ...]
    report_radii: tuple[float, ...]
    attack: str | Attack
    clean_loss: float
    seed: int
    batch_size: int
    folder: Path | None
    reporter: ProgressReporter

    def report(
        self,
        candidates: Sequence[DialCandidate],
        chosen: DialCandidate,
        grid: Sequence[RobustDial],
        *,
        oracle: bool,
    ) -> Report:
        """The rows of the best dials of each kind, the curve, and the oracle if it is asked for."""
        named = dict(_kinds(candidates, chosen))
        found: dict[str, AttackedModel] = {}
        plain = self._attacked(None, found)
        rows = [self._row(name, one.dial, plain, found) for name, one in named.items()]
        best = self._oracle(grid) if oracle else None
        told = None if best is None else self._row(ORACLE, best, plain, found)
        shared = max(
            (one for one in candidates if one.stage == "shared" and one.allowed),
            key=lambda one: one.objective,
            default=candidates[0],
        )
        return Report(tuple(rows), told, tuple(self._curve(shared.dial, grid)))

    def _attacked(self, dial: RobustDial | None, known: dict[str, AttackedModel]) -> AttackedModel:
        """A dial under the attack of the report, once."""
        name = json.dumps(self.bench.model.key(dial))
        if name not in known:
            digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
            bench = Bench(
                [Task(self.norm, self.report_radii, (self.attack,))], self.x, self.y,
                seed=self.seed, batch_size=self.batch_size, every=False, keep=0,
                store=None if self.folder is None else self.folder / digest,
                reporter=self.reporter,
            )  # fmt: skip
            model = self.bench.model
            model.turn(dial)
            told = "plain network" if dial is None else str(dial)
            known[name], _ = bench.attacked(0, f"test, {told}", model.bounded)
        return known[name]

    def _row(
        self,
        name: str,
        dial: RobustDial | None,
        plain: AttackedModel,
        known: dict[str, AttackedModel],
    ) -> DialRow:
        found = self._attacked(dial, known)
        clean = paired_share(found.clean, plain.clean)
        pairs = list(zip(found.at, plain.at, strict=True))
        return DialRow(
            name,
            dial,
            share(found.clean),
            {at.eps: at.accuracy for at in found.at},
            clean,
            {at.eps: paired_share(at.robust, other.robust) for at, other in pairs},
            mean_within=clean.value >= -self.clean_loss - 1e-9,
            interval_within=clean.low >= -self.clean_loss - 1e-9,
        )

    def _oracle(self, grid: Sequence[RobustDial]) -> RobustDial | None:
        """The most robust shared dial on the test data that keeps the clean accuracy there."""
        least = self.bench.clean(None) - self.clean_loss - 1e-9
        found = []
        for done, dial in enumerate(grid, 1):
            if self.bench.clean(dial) >= least:
                robust = self.bench(dial, ()).robust[self.eps]
                found.append((float(robust.double().mean()), dial))
            self.reporter("test, oracle", done, len(grid))
        return max(found, key=lambda one: one[0], default=(0.0, None))[1]

    def _curve(self, dial: RobustDial | None, grid: Sequence[RobustDial]) -> Iterator[CurvePoint]:
        """All betas of the grid at the c and the calibration of one dial."""
        if dial is None:
            return
        betas = sorted({one.betas[ALL_SITES] for one in grid})
        for done, beta in enumerate(betas, 1):
            here = replace(dial, betas={ALL_SITES: beta})
            if beta == 1.0:
                here = grid[-1]
            found = self.bench(here, self.radii)
            robust = {eps: share(hits) for eps, hits in sorted(found.robust.items())}
            c, match = dial.cs[ALL_SITES], dial.match
            yield CurvePoint(beta, c, match, share(found.right), robust)
            self.reporter("test, curve over beta", done, len(betas))


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


def _cs(one: DialCandidate) -> tuple[float, ...]:
    return () if one.dial is None else tuple(one.dial.cs.values())
