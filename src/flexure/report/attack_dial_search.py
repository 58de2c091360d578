"""What a choice of a robust dial rests on, in a report: all candidates, both dials, each group's.

Reads a finished `RobustDialSearch`; what came of the choice on test data is in `attack_dials.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flexure.methods.attack_model_result import radius_text
from flexure.methods.robust_dial_groups import ALL_SITES
from flexure.methods.robust_dial_result import DialCandidate, RobustDial, RobustDialSearch
from flexure.report.attack_curves import NORMS
from flexure.report.attack_plots import (
    Candidates,
    GroupDial,
    candidate_scatter,
    dial_map,
    group_dials,
)
from flexure.report.canvas import Picture
from flexure.report.page import Section
from flexure.report.tables import table_of

__all__ = [
    "best_shared",
    "candidate_sections",
    "dial_text",
    "group_sections",
    "map_sections",
    "points_of",
    "radius_of",
]

_LONGEST = 12  # sites named in a table


def radius_of(found: RobustDialSearch) -> str:
    """The radius that the dial is chosen for, in words."""
    return f"{NORMS.get(found.norm, found.norm)} {radius_text(found.eps, found.norm)}"


def dial_text(dial: RobustDial | None) -> str:
    """A dial in words; one for many groups by its ranges."""
    if dial is None:
        return "the plain network"
    kept = "not calibrated" if dial.match is None else f"calibrated ({dial.match})"
    parts = []
    for name, values in (("beta", dial.betas.values()), ("c", dial.cs.values())):
        low, high = min(values), max(values)
        parts.append(f"{name} = {low:.4g}" if low == high else f"{name} {low:.3g} to {high:.3g}")
    groups = max(len(dial.betas), len(dial.cs))
    return f"{', '.join(parts)}" + (f" by {groups} groups" if groups > 1 else "") + f", {kept}"


def points_of(found: RobustDialSearch) -> str:
    """The loss of clean accuracy that was accepted, in words."""
    points = 100 * found.clean_loss
    return f"{points:g} point{'s' * (points != 1)}"


def best_shared(found: RobustDialSearch) -> DialCandidate | None:
    """Of the dials that all sites share, the best that may be chosen."""
    allowed = [one for one in found.candidates if one.stage == "shared" and one.allowed]
    return max(allowed, key=lambda one: one.objective, default=None)


def group_sections(found: RobustDialSearch) -> list[Section]:
    """The dial of each group, of the best of those that differ by group."""
    some = [one for one in found.candidates if one.allowed and _by_group(one.dial)]
    if found.chosen in some:
        best = found.chosen
    elif some:
        best = max(some, key=lambda one: one.objective)
    else:
        return []
    dial = best.dial
    if dial is None:
        return []
    names = list(dict.fromkeys([*dial.betas, *dial.cs]))
    groups = [
        GroupDial(name, dial.betas.get(name, math.nan), dial.cs.get(name, math.nan))
        for name in names
    ]
    who = "The chosen dial" if best is found.chosen else "The best dial by groups"
    kept = "not calibrated" if dial.match is None else f"calibrated ({dial.match})"
    table = table_of(
        ("group", "beta", "c", "sites"),
        [
            (group.label, f"{group.beta:.4g}", f"{group.c:.4g}",
             _sites(found.groups.get(group.label, ())))
            for group in groups
        ],
        "beta", "c",
    )  # fmt: skip
    chosen = "" if best is found.chosen else " It was not chosen: the choice is one for all sites."
    unit = "unchanged" if found.plain_at_one else "piecewise affine"
    return [
        Section(
            f"{who}, group by group",
            pictures=(group_dials(groups, title=f"{who}, {kept}"),),
            table=table,
            caption=f"Groups of sites in network order; at beta = 1 a unit is {unit}.{chosen}",
        )
    ]


def map_sections(found: RobustDialSearch) -> list[Section]:
    """Robust accuracy over both dials, one map a calibration; none where one dial was searched."""
    shared = [one for one in found.candidates if one.stage == "shared" and one.dial is not None]
    values = [100 * one.robust[found.eps] for one in (found.plain, *shared)]
    ends = (min(values), max(values))  # one colour for one accuracy in all maps
    pictures = []
    for match in dict.fromkeys(one.dial.match for one in shared if one.dial is not None):
        some = [one for one in shared if one.dial is not None and one.dial.match == match]
        picture = _map(found, some, match, ends)
        pictures += [] if picture is None else [picture]
    if not pictures:
        return []
    return [
        Section(
            "Both dials",
            pictures=tuple(pictures),
            caption=f"Accuracy under the attack of the search on validation data, "
            f"{radius_of(found)}, all sites with one dial. ×: without an attack it loses more than "
            f"{points_of(found)} to the plain network, and may not be chosen. The frame is the "
            f"best that may. At beta = 1, c has no effect.",
        )
    ]


def candidate_sections(found: RobustDialSearch) -> list[Section]:
    """Clean against robust accuracy of all dials on validation data."""
    kinds: dict[str, list[DialCandidate]] = {}
    for one in found.candidates:
        if one.dial is not None:
            kept = "not calibrated" if one.dial.match is None else f"calibrated: {one.dial.match}"
            kinds.setdefault(f"{one.stage}, {kept}", []).append(one)
    groups = [
        Candidates(
            name, [100 * one.clean for one in some], [100 * one.robust[found.eps] for one in some]
        )
        for name, some in kinds.items()
    ]
    chosen, plain = found.chosen, found.plain
    limit = 100 * (plain.clean - found.clean_loss)
    picture = candidate_scatter(
        groups,
        title="All candidates on validation data",
        x_label="accuracy without an attack (%)",
        y_label=f"accuracy under attack, {radius_of(found)} (%)",
        chosen=(100 * chosen.clean, 100 * chosen.robust[found.eps]),
        plain=(100 * plain.clean, 100 * plain.robust[found.eps]),
        limit=limit,
    )
    return [
        Section(
            "What the choice rests on",
            pictures=(picture,),
            caption=f"On {found.samples['val']} validation samples, by the attack of the search. A "
            "choice must not be left of the dashed line. Of the others the one of highest "
            "objective is chosen: robust accuracy and, since that moves in steps of one sample, "
            "margins under attack.",
        )
    ]


def _by_group(dial: RobustDial | None) -> bool:
    return dial is not None and (len(dial.betas) > 1 or len(dial.cs) > 1)


def _sites(names: Sequence[str]) -> str:
    if len(names) <= _LONGEST:
        return ", ".join(names)
    return f"{', '.join(names[:_LONGEST])} and {len(names) - _LONGEST} more"


def _map(
    found: RobustDialSearch,
    some: Sequence[DialCandidate],
    match: str | None,
    ends: tuple[float, float],
) -> Picture | None:
    import numpy as np

    known = {(one.dial.betas[ALL_SITES], one.dial.cs[ALL_SITES]): one for one in some if one.dial}
    end = next((one for (beta, _), one in known.items() if beta == 1.0), None)
    if end is None and found.plain_at_one:
        end = found.plain
    betas = sorted({beta for beta, _ in known} | ({1.0} if end is not None else set()))
    cs = sorted({c for beta, c in known if beta != 1.0})
    if len(cs) < 2 or len(betas) < 3:
        return None
    values = np.full((len(cs), len(betas)), np.nan)
    barred = np.zeros(values.shape, dtype=bool)
    for row, c in enumerate(cs):
        for column, beta in enumerate(betas):
            one = known.get((beta, c))
            if beta == 1.0:  # whatever c
                one = end
            if one is not None:
                values[row, column] = 100 * one.robust[found.eps]
                barred[row, column] = not one.allowed
    best = max((one for one in some if one.allowed), key=lambda one: one.objective, default=None)
    dial = None if best is None else best.dial
    return dial_map(
        betas, cs, values, title="Not calibrated" if match is None else f"Calibrated: {match}",
        value="accuracy under attack (%)", barred=barred, ends=ends,
        chosen=None if dial is None else (dial.betas[ALL_SITES], dial.cs[ALL_SITES]),
    )  # fmt: skip
