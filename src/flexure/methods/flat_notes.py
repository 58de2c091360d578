"""What a reader must know of the numbers of networks trained by several methods, in clauses.

The numbers themselves are `flat_result.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexure.methods.flat_result import FlatRow, FlatTraining

__all__ = ["BLIND", "flat_notes"]

BLIND = "no Hessian sees the jumps of the gradient there"
"""Why networks with kinks are not compared by what comes from the Hessian."""


def flat_notes(found: FlatTraining) -> tuple[str, ...]:
    """One clause each; what is said of several methods alike is said once."""
    notes = list(_samples(found))
    if len(found.seeds) == 2:
        notes.append("two seeds say little about their spread: the intervals are wide")
    notes += _kinks(found.rows)
    notes += [f"{row.method}: no rectifier to replace" for row in found.rows if _is_idle(row)]
    for row in found.rows:
        notes += [
            f"{row.method}, seed {r.seed}: failed ({r.failure})" for r in row.runs if r.failure
        ]
        notes += _unconverged(row)
    notes += [
        f"{_listed(methods)} {'has' if len(methods) == 1 else 'have'} no {what}: {why}"
        for (what, why), methods in _grouped(
            (row.method, refusal)
            for row in found.rows
            for run in row.runs
            for refusal in run.refusals.items()
        ).items()
    ]
    warned = _grouped(
        (row.method, (text,)) for row in found.rows for run in row.runs for text in run.warnings
    )
    notes += [f"{_listed(methods)}: {text}" for (text,), methods in warned.items()]
    return tuple(notes)


def _samples(found: FlatTraining) -> list[str]:
    """That accuracies with and without attack are those on different samples."""
    test, measured = found.samples.get("test", 0), found.samples.get("measured", 0)
    if test == measured or not any("clean" in row.estimates for row in found.rows):
        return []
    return [
        f"accuracy is that on all {test} test samples, accuracy under attack that on the first "
        f"{measured}, where without attack it is 'clean'"
    ]


def _kinks(rows: Iterable[FlatRow]) -> list[str]:
    grouped = _grouped((row.method, row.kinks) for row in rows if row.kinks)
    return [
        f"{_listed(methods)} {'has' if len(methods) == 1 else 'have'} kinks "
        f"({', '.join(functions)}): {BLIND}; not compared by Hessian norm and normalised curvature"
        for functions, methods in grouped.items()
    ]


def _is_idle(row: FlatRow) -> bool:
    """Whether a method that replaces rectifiers found none."""
    return any(run.changed.get("activation", 1) == 0 for run in row.runs)


def _unconverged(row: FlatRow) -> list[str]:
    """How many Hessian norms are lower bounds."""
    found = [run.test["curvature"].result.converged for run in row.runs if "curvature" in run.test]
    left = sum(int((~one).sum()) for one in found)
    total = sum(len(one) for one in found)
    return [f"{row.method}: {left} of {total} Hessian norms are lower bounds"] if left else []


def _grouped(
    pairs: Iterable[tuple[str, tuple[str, ...]]],
) -> dict[tuple[str, ...], list[str]]:
    """What is said -> the methods of which it is, each once."""
    found: dict[tuple[str, ...], list[str]] = {}
    for method, said in pairs:
        methods = found.setdefault(said, [])
        if method not in methods:
            methods.append(method)
    return found


def _listed(methods: list[str]) -> str:
    *some, last = methods
    return f"{', '.join(some)} and {last}" if some else last
