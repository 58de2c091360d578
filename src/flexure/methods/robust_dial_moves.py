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

LOWEST_BETA = 0.3
"""Of a group: below, a deep network loses its accuracy whatever the other groups do."""

_DIGITS = 4
_PARENTS, _CHILDREN = 4, 10
_FIRST_STEP, _LAST_STEP, _SHRINKING = 0.12, 0.02, 0.93
_STEPS = (0.1, 0.05, 0.025)
_NEAR_BETAS = (0.0, -0.15, -0.1, -0.05, 0.05, 0.1, 0.15)
_NEAR_CS = (0.0, -0.1, 0.1)


def _evolutionary(start: Point, score: float, seed: int) -> Moves:
    """(mu, lambda) evolution: the mean of the best moves, normal steps that shrink.

    The best point so far stays among those that the mean is taken of. Of the coordinates, three in
    ten change, and three at least on average.
    """
    draws = np.random.default_rng(seed)
    best, mean, step = (score, start), np.array(start), _FIRST_STEP
    share = max(0.3, 3 / len(start))
    while True:
        population = []
        for _ in range(_CHILDREN):
            change = step * draws.standard_normal(len(start)) * (draws.random(len(start)) < share)
            child = _allowed(mean + change)
            population.append(((yield child), child))
        population = sorted([best, *population], key=lambda one: -one[0])
        best = population[0]
        mean = np.mean([point for _, point in population[:_PARENTS]], axis=0)
        step = max(step * _SHRINKING, _LAST_STEP)


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
