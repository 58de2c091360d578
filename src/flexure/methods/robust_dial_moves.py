"""How the dials of several groups are searched: which point to try next, given the scores so far.

What a point's score is, is the caller's. A search is a generator: it yields points and is sent
their scores.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from itertools import product
from typing import TypeAlias

import numpy as np

__all__ = ["LOWEST_BETA", "SEARCHES", "Moves", "Point"]

Point: TypeAlias = "tuple[float, ...]"
"""G betas, then G values of c."""

Moves: TypeAlias = "Generator[Point, float, None]"

LOWEST_BETA = 0.1
"""Of a group: below, a deep network loses its accuracy whatever the other groups do."""

_DIGITS = 4
_SHARE = 0.15
_FIRST_STEP, _LAST_STEP, _LONGEST_STEP = 0.1, 0.03, 0.2
_LONGER, _SHORTER = 1.25, 0.94
_STEPS = (0.1, 0.05, 0.025)
_NEAR_BETAS = (0.0, -0.15, -0.1, -0.05, 0.05, 0.1, 0.15)
_NEAR_CS = (0.0, -0.1, 0.1)


def _evolutionary(start: Point, score: float, seed: int) -> Moves:
    """(1+1) evolution with mirrored steps: a random step from the best point, then its opposite.

    Steps are normal, along a few of the coordinates: one in seven, and two at least on average.
    They get longer after a gain and shorter when neither a step nor its opposite gained anything,
    as in the one-fifth rule (Rechenberg 1973).
    """
    draws = np.random.default_rng(seed)
    best, length = np.array(start), _FIRST_STEP
    share = max(_SHARE, 2 / len(start))
    while True:
        change = length * draws.standard_normal(len(start)) * (draws.random(len(start)) < share)
        gained = False
        for step in (change, -change):
            point = _allowed(best + step)
            if point == _allowed(best):
                continue  # none of the coordinates was drawn, or all are at an end
            if (found := (yield point)) > score:
                best, score, gained = np.array(point), found, True
                break
        length = length * _LONGER if gained else length * _SHORTER
        length = min(max(length, _LAST_STEP), _LONGEST_STEP)


def _coordinate(start: Point, score: float, seed: int) -> Moves:
    """One dial at a time, up and down by a step; smaller steps once none of them helps."""
    best = start
    for step in _STEPS:
        gained = True
        while gained:
            gained = False
            for k, sign in product(range(len(best)), (-1, 1)):
                point = _moved(best, {k: sign * step})
                if point != best and (found := (yield point)) > score:
                    best, score, gained = point, found, True


def _greedy(start: Point, score: float, seed: int) -> Moves:
    """Group after group, the best of a small grid around where it is; each group once."""
    groups = len(start) // 2
    best = start
    for group in range(groups):
        here = best
        for by, by_c in product(_NEAR_BETAS, _NEAR_CS):
            point = _moved(here, {group: by, groups + group: by_c})
            if point != here and (found := (yield point)) > score:
                best, score = point, found


SEARCHES: Mapping[str, Callable[[Point, float, int], Moves]] = {
    "evolutionary": _evolutionary,
    "coordinate": _coordinate,
    "greedy": _greedy,
}
"""Name -> (start, its score, seed) -> the search; only the first never ends, or draws."""


def _moved(point: Point, changes: Mapping[int, float]) -> Point:
    return _allowed(np.array([value + changes.get(k, 0.0) for k, value in enumerate(point)]))


def _allowed(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Point:
    """Within range, and rounded, so that dials can be told in few digits."""
    groups = len(values) // 2
    low = np.array([LOWEST_BETA] * groups + [0.0] * groups)
    return tuple(np.round(np.clip(values, low, 1.0), _DIGITS).tolist())
