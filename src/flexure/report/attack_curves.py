"""What attacks left, in a report: accuracy against radius and reference, attack by attack.

Each maker takes a finished `AttackReport` and gives the sections that it has. Examples are in
`attack_examples.py`, masking is in `attack_masking.py`, the page is `attack.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flexure.methods.attack_model_result import (
    WORST,
    AccuracyCurve,
    AttackedAt,
    AttackedModel,
    AttackReport,
    radius_text,
)
from flexure.methods.attack_model_shares import PairedShare, Share, share
from flexure.report.attack_lines import Line, labelled_lines
from flexure.report.canvas import Picture
from flexure.report.page import Section
from flexure.report.plots import Estimate
from flexure.report.tables import Table, table_of

__all__ = [
    "CERTIFIED_NORM",
    "NORMS",
    "PUBLISHED",
    "STANDARD",
    "curve_sections",
    "difference_sections",
    "eps_scale",
    "estimate_of",
    "look_of",
    "paired_text",
    "published_sections",
    "radius_axis",
    "share_text",
    "stage_sections",
]

STANDARD, PUBLISHED = "standard", "published"
NORMS = {"linf": "l∞", "l2": "l2"}
"""Norm -> how a report writes it."""

CERTIFIED_NORM = "l2"
"""The norm of certified radii (`CertifiedShare`)."""

_LEVELS = 255.0
_ALONE = (
    " Each attack ran on all samples: a line is the accuracy under it alone, the worst case counts "
    "what any of them beat."
)
_CASCADE = (
    " Attacks ran one after the other, each on the samples that withstood those before it: a line "
    "is the accuracy after its attack and all before it, and no attack's accuracy alone."
)
_PUBLISHED_IS = (
    "The published code of Curvature Tuning changes normalised inputs and clamps them to [0, 1], "
    "as if those were pixels. Most of what changes is the clamp's doing, and lies outside of the "
    "ball of the radius: these numbers are no l_p robustness, and are here for comparison with "
    "that paper alone. The table tells how far the changes really go."
)


@dataclass(frozen=True)
class _Group:
    """The curves of one model by one norm and protocol.

    `alone`: of each attack by itself, on all samples; else after it and those before it.
    """

    model: AttackedModel
    norm: str
    protocol: str
    attacks: tuple[AccuracyCurve, ...]
    worst: AccuracyCurve
    alone: bool


def estimate_of(told: Share | None, label: str = "") -> Estimate | None:
    """A share as what pictures draw, in per cent."""
    if told is None:
        return None
    return Estimate(label, 100 * told.value, 100 * told.low, 100 * told.high)


def share_text(told: Share | None) -> str | None:
    """A share in per cent with its interval; None where there is none."""
    return None if told is None or math.isnan(told.value) else str(told)


def paired_text(told: PairedShare | None) -> str | None:
    """A difference in percentage points with its interval, where it has one."""
    if told is None or math.isnan(told.value):
        return None
    return f"{100 * told.value:+.1f}" if math.isnan(told.low) else str(told)


def look_of(index: int) -> int:
    """Which of all looks the index-th ordinary line has: the worst case alone has its colour."""
    return index + index // 5


def eps_scale(norm: str, radii: Sequence[float]) -> float:
    """255 where all radii are a simple number of grey levels, else 1."""
    some = [eps for eps in radii if eps > 0]
    grey = bool(some) and all(radius_text(eps, norm).endswith("/255") for eps in some)
    return _LEVELS if grey else 1.0


def radius_axis(norm: str, scale: float) -> str:
    """Label of an axis of radii."""
    unit = "1/255 of the pixel range" if scale > 1 else "input units"
    return f"eps ({NORMS.get(norm, norm)} norm, {unit})"


def curve_sections(found: AttackReport) -> list[Section]:
    """Accuracy against the radius: one picture a model and norm, a line an attack."""
    groups = [group for group in _groups(found) if group.protocol == STANDARD]
    if not groups:
        return []
    order = ""
    if any(len(group.attacks) > 1 for group in groups):
        order = _ALONE if all(group.alone for group in groups) else _CASCADE
    certified = (
        " The certified accuracy is a bound from below: no change within the radius whatever can "
        "make these samples wrong; the truth lies between it and the worst case."
        if found.certified
        else ""
    )
    return [
        Section(
            "Accuracy against the radius",
            pictures=tuple(_curve_picture(found, group) for group in groups),
            caption=f"Bands are 95 % intervals over {found.samples} samples. At radius 0 is the "
            f"accuracy without an attack; a sample that is wrong there counts as wrong at every "
            f"radius.{order}{certified}",
        )
    ]


def difference_sections(found: AttackReport) -> list[Section]:
    """The first model against the reference, on the same samples."""
    if len(found.models) < 2:
        return []
    first, second, *_ = found.models
    pictures = [
        _pair_picture(found, norm)
        for norm in dict.fromkeys(at.norm for at in first.at if at.protocol == STANDARD)
    ]
    return [
        Section(
            f"{first.name} against {second.name}",
            pictures=tuple(pictures),
            table=_difference_table(found, STANDARD),
            caption="Worst case over all attacks, each model attacked for itself. In brackets 95 % "
            "intervals over samples; the difference is paired sample by sample, in percentage "
            "points. Won: right under attack with the first alone; lost: with the second alone.",
        )
    ]


def stage_sections(found: AttackReport) -> list[Section]:
    """What each attack did at each radius, and what it warned of."""
    rows = [
        (model.name, at, stage) for model in found.models for at in model.at for stage in at.stages
    ]
    if not rows:
        return []
    columns = ("model", "norm", "radius", "attack", "tried", "beaten", "right after it, %",
               "s per tried sample", "s per survivor")  # fmt: skip
    cells = [
        (name, _norm_text(at), radius_text(at.eps, at.norm), stage.name,
         int(stage.tried.sum()), stage.found, share_text(_share_after(at, stage.name)),
         _seconds(stage.seconds_per_attacked), _seconds(stage.seconds_per_survivor))
        for name, at, stage in rows
    ]  # fmt: skip
    warned = dict.fromkeys((stage.name, text) for _, _, stage in rows for text in stage.warnings)
    sections = [
        Section(
            "Attack by attack",
            table=table_of(columns, cells, *columns[4:]),
            caption="Right after it: after this attack, all before it, and smaller radii of the "
            "norm, which hand on what withstood them. Seconds are by the wall clock; those of a "
            "survivor also pay for the samples that were beaten, and without one there are none.",
        )
    ]
    if warned:
        table = table_of(("attack", "warning"), warned)
        sections.append(Section("What attacks warned of", table=table))
    return sections


def published_sections(found: AttackReport) -> list[Section]:
    """The published evaluation, beside the standard one where both are there."""
    groups = [group for group in _groups(found) if group.protocol == PUBLISHED]
    if not groups:
        return []
    columns = ("model", "norm", "radius as published", "largest change, normalised",
               "largest change, input units", "published protocol, % right",
               "standard at the same number, % right")  # fmt: skip
    rows = [
        (group.model.name, NORMS.get(at.norm, at.norm), radius_text(at.eps, at.norm),
         *((None, None) if at.reached is None else (f"{size:.3g}" for size in at.reached)),
         share_text(at.accuracy), share_text(_standard(group.model, at)))
        for group in groups
        for at in group.model.at
        if (at.norm, at.protocol) == (group.norm, PUBLISHED)
    ]  # fmt: skip
    return [
        Section(
            "The published protocol: not an l_p robustness",
            (_PUBLISHED_IS,),
            table=table_of(columns, rows, *columns[2:]),
            caption="In brackets 95 % intervals over samples. The columns have the same number as "
            "radius, in different spaces: of normalised inputs, and of pixels.",
        )
    ]


def _groups(found: AttackReport) -> list[_Group]:
    """The curves by model, norm and protocol, in their order."""
    curves = found.curves
    groups = []
    for model in found.models:
        for norm, protocol in dict.fromkeys((at.norm, at.protocol) for at in model.at):
            mine = [
                c for c in curves if (c.model, c.norm, c.protocol) == (model.name, norm, protocol)
            ]
            worst = next(c for c in mine if c.attack == WORST)
            alone = _alone(model, worst)
            attacks = alone or tuple(c for c in mine if c.attack != WORST)
            groups.append(_Group(model, norm, protocol, attacks, worst, bool(alone)))
    return groups


def _alone(model: AttackedModel, worst: AccuracyCurve) -> tuple[AccuracyCurve, ...]:
    """The accuracy under each attack by itself; empty where attacks got survivors of others."""
    rows = [at for at in model.at if (at.norm, at.protocol) == (worst.norm, worst.protocol)]
    names = dict.fromkeys(stage.name for at in rows for stage in at.stages)
    curves = []
    for name in names:
        hits = [None if (stage := at.stage(name)) is None else stage.alone for at in rows]
        known = [share(one) for one in hits if one is not None]
        if len(known) < len(rows):
            return ()
        accuracy = (model.clean_accuracy, *known)
        curves.append(replace(worst, attack=name, accuracy=accuracy))
    return tuple(curves)


def _curve_picture(found: AttackReport, group: _Group) -> Picture:
    """One model under the attacks of one norm."""
    attacks, worst = group.attacks, _line(group.worst, WORST, role="worst")
    if len(attacks) == 1 or (attacks and not group.alone):  # the last one would lie below the other
        more = "+ " if len(attacks) > 1 else ""
        attacks, worst = attacks[:-1], replace(worst, label=f"{WORST}: {more}{attacks[-1].attack}")
    lines = [
        _line(
            curve, f"+ {curve.attack}" if k and not group.alone else curve.attack, look=look_of(k)
        )
        for k, curve in enumerate(attacks)
    ]
    lines += _certified(found, group)
    norm = NORMS.get(group.norm, group.norm)
    scale = eps_scale(group.norm, group.worst.eps)
    return labelled_lines(
        [*lines, worst],
        title=f"{group.model.name} under {norm} attacks" if len(found.models) > 1
        else f"Accuracy under {norm} attacks",
        x_label=radius_axis(group.norm, scale),
        y_label="accuracy (%)",
        scale=scale,
        rooted=True,
    )  # fmt: skip


def _line(curve: AccuracyCurve, label: str, *, role: str = "line", look: int = 0) -> Line:
    values = [estimate_of(told) for told in curve.accuracy]
    return Line(label, curve.eps, values, role, role == "worst", look)


def _certified(found: AttackReport, group: _Group) -> list[Line]:
    """The bound from below, of the first model in the norm that it was computed in."""
    if not found.certified or group.model is not found.models[0] or group.norm != CERTIFIED_NORM:
        return []
    radii = [told.eps for told in found.certified]
    values = [estimate_of(told.accuracy) for told in found.certified]
    return [Line("certified (from below)", radii, values, "certified", True)]


def _pair_picture(found: AttackReport, norm: str) -> Picture:
    """The worst cases of both models."""
    groups = [g for g in _groups(found) if (g.norm, g.protocol) == (norm, STANDARD)]
    first, *others = groups
    lines = [
        replace(_line(group.worst, group.model.name, look=k), band=True)
        for k, group in enumerate(others)
    ]
    scale = eps_scale(norm, first.worst.eps)
    return labelled_lines(
        [*lines, _line(first.worst, first.model.name, role="worst")],
        title=f"Worst case, {NORMS.get(norm, norm)} attacks",
        x_label=radius_axis(norm, scale),
        y_label="accuracy (%)",
        scale=scale,
        rooted=True,
    )


def _difference_table(found: AttackReport, protocol: str) -> Table:
    first, second, *_ = found.models
    columns = ("norm", "radius", f"{first.name}, %", f"{second.name}, %", "difference, points",
               "won / lost")  # fmt: skip
    told = found.difference()
    rows: list[tuple[str | None, ...]] = [(None, "0: no attack", share_text(first.clean_accuracy),
             share_text(second.clean_accuracy), paired_text(told), _won(told))]  # fmt: skip
    for at in first.at:
        other = second.found(at.norm, at.eps, at.protocol)
        if at.protocol != protocol or other is None:
            continue
        told = found.difference(at.norm, at.eps, at.protocol)
        rows.append((NORMS.get(at.norm, at.norm), radius_text(at.eps, at.norm),
                     share_text(at.accuracy), share_text(other.accuracy), paired_text(told),
                     _won(told)))  # fmt: skip
    return table_of(columns, rows, *columns[1:])


def _won(told: PairedShare | None) -> str | None:
    return None if told is None else f"{told.won} / {told.lost}"


def _share_after(at: AttackedAt, name: str) -> Share:
    return share(at.after(name))


def _standard(model: AttackedModel, at: AttackedAt) -> Share | None:
    other = model.found(at.norm, at.eps, STANDARD)
    return None if other is None else other.accuracy


def _norm_text(at: AttackedAt) -> str:
    norm = NORMS.get(at.norm, at.norm)
    return norm if at.protocol == STANDARD else f"{norm}, {at.protocol}"


def _seconds(number: float) -> str | None:
    return None if math.isnan(number) else f"{number:.3g}"
