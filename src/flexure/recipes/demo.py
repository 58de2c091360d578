"""The demo: the digits' transfer and the spiral, in one results file and one report.

Composes two recipes; measures nothing itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from flexure.recipes import digits, spiral
from flexure.record import check_writable, record, write_json
from flexure.report import run_table, write_page

__all__ = ["Config", "Summary", "run"]


@dataclass(frozen=True)
class Config:
    """Settings of both recipes."""

    digits: digits.Config = field(default_factory=digits.Config)
    spiral: spiral.Config = field(default_factory=spiral.Config)

    @classmethod
    def small(cls, *, seed: int = 50) -> Config:
        """What `flexure demo` runs: the digits with five seeds from `seed` on, and the spiral."""
        return cls(digits.Config.small(seed=seed), spiral.Config.small(seed=seed))


@dataclass(frozen=True)
class Summary:
    """What to print at the end.

    Attributes:
        lines: what was found, one sentence each, with intervals.
        results: path of the results file.
        report: path of the HTML page.
        seconds: how long it took.
        payload: content of the results file.
    """

    lines: tuple[str, ...]
    results: Path
    report: Path
    seconds: float
    payload: dict[str, Any] = field(repr=False)

    def __str__(self) -> str:
        return "\n".join([*self.lines, f"Report:  {self.report}", f"Results: {self.results}"])


def run(
    config: Config, out: str | os.PathLike[str], *, progress: Callable[[str], None] | None = None
) -> Summary:
    """Runs both, and writes `results.json` and `report.html` into `out`.

    Args:
        config: settings of both.
        out: the folder.
        progress: is told of every stage, one line each.

    Raises:
        FlexureError: `out` cannot be written; checked before anything is computed.
    """
    folder = check_writable(out)
    start = perf_counter()
    transferred = digits.measure(config.digits, progress=progress)
    steered = spiral.measure(config.spiral, progress=progress)
    lines = (*digits.summary(transferred), *spiral.summary(steered))
    payload: dict[str, Any] = record(
        config=config,
        seed=config.digits.seeds[0],
        numbers={"digits": digits.numbers(transferred), "spiral": spiral.numbers(steered)},
    )
    results = write_json(folder / "results.json", payload)
    report = write_page(
        folder / "report.html",
        title="Steering pretrained networks with one dial",
        summary=lines,
        sections=[*digits.sections(transferred), *spiral.sections(steered)],
        shows=(*digits.SHOWS, *spiral.SHOWS),
        does_not_show=(*digits.DOES_NOT_SHOW, *spiral.DOES_NOT_SHOW),
        run=run_table(payload),
    )
    return Summary(lines, results, report, perf_counter() - start, payload)
