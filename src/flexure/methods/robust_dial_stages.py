"""The stages of a search for a robust dial, and what they maximise; on validation data only.

How a dial is evaluated is `robust_dial_bench`'s business, where to go next that of
`robust_dial_moves`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from flexure.methods.robust_dial_bench import DialBench, Outcome
from flexure.methods.robust_dial_groups import ALL_SITES
from flexure.methods.robust_dial_moves import SEARCHES, Moves, Point
from flexure.methods.robust_dial_result import DialCandidate, RobustDial
from flexure.methods.robust_dial_setup import DialSettings
from flexure.progress import ProgressReporter

__all__ = ["DialObjective", "Stages"]

_SOFTNESS = 0.15
"""Of the median margin: so near to the boundary, an attacked sample counts in part."""

_FORFEIT = 3.0
"""Robust samples that one lost clean sample costs; above 1, for else losing them could pay."""

_ROUNDING = 1e-9


@dataclass(frozen=True)
class DialObjective:
    """What the search maximises, so that dials with the same counts differ.

    J = ½ mean σ(m/t) + ½ r − 3 max(0, p − ½ loss − a),

    with m the margins under attack, t 0.15 times the median |margin| without one (so that J does
    not change with the scale of the logits), r and a the robust and the clean accuracy, and p the
    plain network's clean accuracy. Shares of N samples move in steps of 1/N: a small turn of a
    dial shows in none of them, or by luck; margins tell how far samples are from the boundary.
    Clean accuracy costs from half of what may be lost on: what is best of many on validation data
    is worse on others.

    Attributes:
        plain: p.
        clean_loss: how much clean accuracy may be lost.
    """

    plain: float
    clean_loss: float

    def __call__(self, found: Outcome, robust: float) -> float:
        """J of a dial whose robust accuracy is `robust`."""
        sizes = found.margins[found.margins.isfinite()].abs()
        scale = float(sizes.median()) if len(sizes) else 0.0
        tiny = torch.finfo(torch.float64).tiny
        soft = float(torch.sigmoid(found.attacked / max(_SOFTNESS * scale, tiny)).mean())
        lost = max(0.0, self.plain - self.clean_loss / 2 - found.clean)
        return 0.5 * soft + 0.5 * robust - _FORFEIT * lost

    def allowed(self, found: Outcome) -> bool:
        """Whether no more clean accuracy is lost than accepted."""
        return found.clean >= self.plain - self.clean_loss - _ROUNDING


class Stages:
    """Stage after stage, the candidates that were tried.

    Args:
        bench: on validation data.
        settings: of the search.
        reporter: is told how far it is.

    Attributes:
        candidates: in the order of the search, the plain network first.
    """

    def __init__(
        self, bench: DialBench, settings: DialSettings, reporter: ProgressReporter
    ) -> None:
        self._bench, self._settings, self._reporter = bench, settings, reporter
        plain = bench(None, ())
        self._objective = DialObjective(plain.clean, settings.clean_loss)
        self.candidates = [self._candidate(None, "plain", plain)]
        self._scores: dict[str, float] = {}

    def shared(self) -> None:
        """Tries every shared dial."""
        grid = self._settings.grid(self._bench.model.plain_at_one)
        for done, dial in enumerate(grid, 1):
            self._tried(dial, "shared")
            self._reporter("shared dials", done, len(grid))

    def groups(self, names: tuple[str, ...], search: str) -> None:
        """Tries a dial for each group of sites, from the best shared dials on."""
        for number, (dial, score) in enumerate(self._starts(), 1):
            here: Point = tuple(
                values[ALL_SITES] for values in (dial.betas, dial.cs) for _ in names
            )
            moves = SEARCHES[search](here, score, self._settings.seed)
            self._follow(moves, names, dial.match, f"group dials, start {number}")

    def best(self) -> DialCandidate:
        """Of all that are allowed, the highest objective; of equals the first."""
        return max((one for one in self.candidates if one.allowed), key=lambda one: one.objective)

    def _starts(self) -> list[tuple[RobustDial, float]]:
        """The best shared dial of each calibration with its objective, best first."""
        found: dict[str | None, tuple[RobustDial, float]] = {}
        for one in sorted(self.candidates, key=lambda one: -one.objective):
            if one.stage == "shared" and one.allowed and one.dial is not None:
                found.setdefault(one.dial.match, (one.dial, one.objective))
        return list(found.values())[: self._settings.starts]

    def _follow(self, moves: Moves, names: tuple[str, ...], match: str | None, told: str) -> None:
        """One search to its end, or until the budget is spent: known points cost nothing."""
        spent, point = 0, next(moves, None)
        while point is not None and spent < self._settings.budget:
            betas, cs = point[: len(names)], point[len(names) :]
            dial = RobustDial(
                dict(zip(names, betas, strict=True)), dict(zip(names, cs, strict=True)), match
            )
            score = self._scores.get(self._key(dial))
            if score is None:
                score = self._tried(dial, "groups")
                spent += 1
                self._reporter(told, spent, self._settings.budget)
            try:
                point = moves.send(score)
            except StopIteration:
                break

    def _tried(self, dial: RobustDial, stage: str) -> float:
        """The objective of a dial that is new."""
        self.candidates.append(self._candidate(dial, stage, self._bench(dial, ())))
        score = self._scores[self._key(dial)] = self.candidates[-1].objective
        return score

    def _key(self, dial: RobustDial) -> str:
        return json.dumps(self._bench.model.key(dial))

    def _candidate(self, dial: RobustDial | None, stage: str, found: Outcome) -> DialCandidate:
        robust = {eps: float(hits.double().mean()) for eps, hits in sorted(found.robust.items())}
        objective = self._objective(found, robust[self._settings.eps])
        allowed = self._objective.allowed(found)
        return DialCandidate(dial, stage, found.clean, robust, objective, allowed)
