"""Small finished searches for robust dials for the tests of their reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexure.methods.attack_model_shares import paired_share, share
from flexure.methods.robust_dial_groups import ALL_SITES
from flexure.methods.robust_dial_result import (
    ORACLE,
    CurvePoint,
    DialCandidate,
    DialRow,
    RobustDial,
    RobustDialSearch,
)
from tests.report.attack_results import hits

RADII = tuple(k / 255 for k in (0.5, 1, 2))
EPS = 1 / 255
TEST = 100
BETAS, CS = (0.6, 0.7, 0.8, 0.9, 1.0), (0.0, 0.25, 0.5)


def shared(beta: float, c: float, match: str | None = None) -> RobustDial:
    return RobustDial({ALL_SITES: beta}, {ALL_SITES: c}, match)


def candidate(
    dial: RobustDial | None, stage: str, clean: float, robust: float, plain: float = 0.91
) -> DialCandidate:
    return DialCandidate(dial, stage, clean, {EPS: robust}, robust, clean >= plain - 0.01)


def grid(matches: Sequence[str | None] = (None, "mean")) -> list[DialCandidate]:
    """Robust accuracy rises towards small beta and c = 0.25, where clean accuracy falls."""
    found = []
    for match in matches:
        for beta in BETAS[:-1]:
            for c in CS:
                clean = 0.92 - 0.2 * (1 - beta) * abs(c - 0.25) - 0.1 * max(0, 0.7 - beta)
                robust = 0.16 + 0.8 * (1 - beta) - 0.2 * abs(c - 0.25)
                found.append(candidate(shared(beta, c, match), "shared", clean, robust))
    return [*found, candidate(shared(1.0, 0.5), "shared", 0.91, 0.16)]


def groups_dial(count: int = 4, match: str | None = "mean") -> RobustDial:
    names = [f"layer{k}" for k in range(count)]
    return RobustDial(
        {name: 0.6 + 0.1 * (k % 5) for k, name in enumerate(names)},
        {name: 0.2 * (k % 6) for k, name in enumerate(names)},
        match,
    )


def row(name: str, dial: RobustDial | None, clean: int, robust: Sequence[int]) -> DialRow:
    plain = hits(TEST, 91), [hits(TEST, count, 9) for count in (40, 16, 1)]
    mine = hits(TEST, clean), [hits(TEST, count, 9) for count in robust]
    difference = paired_share(mine[0], plain[0])
    pairs = list(zip(RADII, mine[1], plain[1], strict=True))
    return DialRow(
        name, dial, share(mine[0]), {eps: share(one) for eps, one, _ in pairs}, difference,
        {eps: paired_share(one, other) for eps, one, other in pairs},
        mean_within=difference.value >= -0.01, interval_within=difference.low >= -0.01,
    )  # fmt: skip


def curve(c: float = 0.25, match: str | None = None) -> tuple[CurvePoint, ...]:
    return tuple(
        CurvePoint(
            beta, c, match, share(hits(TEST, round(91 - 20 * (0.8 - min(beta, 0.8))))),
            {eps: share(hits(TEST, round(40 / k - 60 * abs(beta - 0.7) / k)))
             for k, eps in enumerate(RADII, 1)},
        )
        for beta in BETAS
    )  # fmt: skip


def searched(**changes: Any) -> RobustDialSearch:
    """A search whose choice is a dial by groups, with everything there is."""
    plain = candidate(None, "plain", 0.91, 0.16)
    best = candidate(groups_dial(), "groups", 0.905, 0.5)
    candidates = (plain, *grid(), candidate(groups_dial(4, None), "groups", 0.9, 0.3), best)
    rows = (
        row("plain network", None, 91, (40, 16, 1)),
        row("shared, c = 0.5", shared(0.8, 0.5), 90, (50, 30, 4)),
        row("shared", shared(0.7, 0.25), 91, (60, 38, 8)),
        row("groups (chosen)", groups_dial(), 90, (66, 45, 12)),
    )
    oracle = row(ORACLE, shared(0.6, 0.25, "mean"), 92, (64, 47, 13))
    given: dict[str, Any] = {
        "candidates": candidates, "chosen": best, "rows": rows, "oracle": oracle,
        "curve": curve(), "groups": {f"layer{k}": (f"layer{k}.<act>",) for k in range(4)},
        "norm": "linf", "eps": EPS, "radii": RADII, "clean_loss": 0.01, "attack": "PGD(steps=8)",
        "report_attack": "apgd-ce", "samples": {"val": 300, "test": TEST}, "shared_samples": 0,
        "seed": 42, "plain_at_one": True, "notes": (), "seconds": {"search": 12.5, "report": 3.0},
        "_install": lambda: None,
    }  # fmt: skip
    return RobustDialSearch(**(given | changes))
