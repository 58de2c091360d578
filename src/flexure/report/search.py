"""What a search over beta says in a report: its sentences, its sections, its page.

Reads a finished search (`SearchLike`); chooses and computes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from flexure.report.canvas import Curve, Picture
from flexure.report.page import Section, write_page
from flexure.report.plots import score_against_beta
from flexure.report.tables import Table, gain_text, percent, site_table

__all__ = ["SearchLike", "search_page", "search_sections", "search_summary", "verdict"]

SHOWS = (
    "Which beta a linear probe on the frozen, steered network prefers on the validation data, and "
    "how sharply.",
    "With test data: what that choice gained over {baseline} on samples that took no part in it.",
)
DOES_NOT_SHOW = (
    "That the chosen beta is the best one: the values within one standard error of it cannot be "
    "told apart from it.",
    "What another split, another seed of the data or another network would give: this is one "
    "search, and the interval covers only the draw of its test samples.",
    "Anything about robustness, or about training the network further.",
)


class SearchLike(Protocol):
    """What a finished search offers to a report; `flexure.methods.search.BetaSearch` does."""

    @property
    def settings(self) -> Sequence[Any]:
        """Every setting with `.beta`, `.c`, `.score`, `.error`; by c, then beta; beta = 1 last."""

    @property
    def best(self) -> Any:
        """The chosen setting."""

    @property
    def baseline(self) -> Any:
        """The unchanged network's setting; its beta is None where beta = 1 is not that."""

    @property
    def within_one_se(self) -> Sequence[Any]:
        """The settings that cannot be told apart from the best."""

    @property
    def gain(self) -> Any:
        """`.points`, `.low`, `.high`, `.level`, `.wins`, `.losses`, `.n`; or None."""

    @property
    def test(self) -> Any:
        """`.best` and `.baseline`, shares; or None."""

    @property
    def report(self) -> Any:
        """The site report, with `.rows()` and `.summary`."""

    @property
    def notes(self) -> Sequence[str]:
        """What else a reader of the numbers must know, one clause each."""

    @property
    def samples(self) -> Mapping[str, int]:
        """Number of samples of `"val"`."""


def search_page(
    path: str | os.PathLike[str], search: SearchLike, *, title: str, run: Table | None = None
) -> Path:
    """Writes the page of one search to `path`; see `write_page`."""
    return write_page(
        path,
        title=title,
        summary=search_summary(search),
        sections=search_sections(search),
        shows=[text.format(baseline=_baseline_name(search)) for text in SHOWS],
        does_not_show=DOES_NOT_SHOW,
        run=run,
    )


def search_summary(search: SearchLike) -> tuple[str, ...]:
    """What the search found, in sentences."""
    best, count = search.best, len(search.within_one_se)
    chosen = (
        f"Chosen on {search.samples['val']} validation samples: {_dial(best)}, accuracy "
        f"{_score(best)}; {_baseline_name(search)}: {_score(search.baseline)}. "
        f"{count} of {len(search.settings)} settings lie within one standard error of the best."
    )
    notes = [f"{note[0].upper()}{note[1:]}." for note in search.notes]
    if search.baseline.beta is None:
        notes.insert(0, "The untouched network took no part in the choice.")
    return chosen, _gain_sentence(search), *notes


def search_sections(search: SearchLike, *, title: str = "Score against beta") -> list[Section]:
    """The score of every setting, and the sites."""
    return [
        Section(
            title,
            (_gain_sentence(search),),
            (_picture(search),),
            caption="Validation accuracy of a linear probe on the frozen network at each beta. The "
            "score of the chosen beta is optimistic, since it was chosen by it.",
        ),
        Section("What is steered", table=site_table(search.report), caption=search.report.summary),
    ]


def _picture(search: SearchLike) -> Picture:
    lines = [_curve(row) for row in _rows(search.settings)]
    return score_against_beta(
        lines,
        chosen=(_beta(search.best), 100 * search.best.score),
        within=[(_beta(s), 100 * s.score) for s in search.within_one_se],
        baseline=100 * search.baseline.score,
        baseline_label=_baseline_name(search),
        axis="beta (no unit; 1 is the unchanged network)"
        if search.baseline.beta is not None
        else "beta (no unit; the unchanged network is not beta = 1)",
    )


def _rows(settings: Sequence[Any]) -> list[list[Any]]:
    """One row for each choice of the second dial; all of them end in the shared beta = 1."""
    *others, last = settings
    starts = [0] + [i for i, (a, b) in enumerate(pairwise(others), 1) if b.beta <= a.beta]
    return [
        [*others[start:end], last]
        for start, end in zip(starts, [*starts[1:], len(others)], strict=True)
    ]


def _curve(row: Sequence[Any]) -> Curve:
    cs = {setting.c for setting in row[:-1]}
    return Curve(
        f"c = {cs.pop():.4g}" if len(cs) == 1 else "balanced c",
        [_beta(s) for s in row],
        [100 * s.score for s in row],
        [100 * s.error for s in row],
    )


def _gain_sentence(search: SearchLike) -> str:
    gain, test = search.gain, search.test
    if gain is None or test is None:
        return (
            "No test data was given, so no gain is reported: on the validation data it would be "
            "optimistic, since beta was chosen by them."
        )
    if search.best is search.baseline:
        return f"The choice is {_baseline_name(search)}: nothing was gained and nothing lost."
    if not gain.wins + gain.losses:
        return (
            f"On {gain.n} test samples: no discordant samples, both get the same ones right "
            f"({percent(test.best)}); no gain has been shown."
        )
    return (
        f"On {gain.n} test samples: {gain_text(gain.points, gain.low, gain.high, level=gain.level)}"
        f", paired bootstrap, exact; {percent(test.best)} against {percent(test.baseline)} at "
        f"{_baseline_name(search)}; {gain.wins} samples won, {gain.losses} lost. "
        + verdict(gain.low, gain.high)
    )


def verdict(low: float, high: float) -> str:
    """What an interval of a gain allows to say."""
    if low > 0:
        return "The interval lies above zero."
    if high < 0:
        return "The interval lies below zero: the choice made it worse."
    return "The interval contains zero: no gain has been shown."


def _baseline_name(search: SearchLike) -> str:
    return "the untouched network" if search.baseline.beta is None else "beta = 1"


def _dial(setting: Any) -> str:
    return f"beta = {setting.beta:.4g}" + ("" if setting.beta == 1 else f", c = {setting.c:.4g}")


def _beta(setting: Any) -> float:
    return float(setting.beta)


def _score(setting: Any) -> str:
    return f"{percent(setting.score)} ± {100 * setting.error:.1f}"
