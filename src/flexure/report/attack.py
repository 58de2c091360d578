"""What attacks on one model or two say in a report: its sentences, sections and page.

Reads a finished `AttackReport`; attacks and measures nothing. Curves and tables are in
`attack_curves.py`, examples in `attack_examples.py`, masking in `attack_masking.py`; dials chosen
for robustness and common corruptions have pages of their own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from flexure.methods.attack_model_result import AttackedAt, AttackReport, radius_text
from flexure.report.attack_curves import (
    CERTIFIED_NORM,
    NORMS,
    STANDARD,
    curve_sections,
    difference_sections,
    paired_text,
    published_sections,
    stage_sections,
)
from flexure.report.attack_examples import example_sections
from flexure.report.attack_masking import masking_sections, masking_sentence
from flexure.report.page import Section, write_page
from flexure.report.tables import Table, table_of

__all__ = ["attack_page", "attack_sections", "attack_summary"]

SHOWS = (
    "How many of these samples each attack made the model get wrong, within each radius and within "
    "the bounds of inputs: every adversarial version was projected, checked and scored again.",
    "How sure the shares and the differences are, as far as the draw of samples goes.",
)
DOES_NOT_SHOW = (
    "That a model is robust: an attack bounds the robust accuracy from above. That nothing was "
    "found is no proof that there is nothing; another attack, or more steps, may find more.",
    "Anything of radii, norms and changes that were not tried.",
    "What another training of the same network would give: intervals are over samples.",
)
_UNMASKED = (
    "Whether gradients are masked: that was not examined here, and accuracies under gradient "
    "attacks alone may be too high for that reason."
)
_CERTIFIED = (
    "By the certified accuracy, how many samples no change whatever within the radius can make "
    "wrong: a bound from below, up to rounding in the last digits of a radius."
)
_LISTED = 5  # radii in a sentence


def attack_page(
    path: str | os.PathLike[str],
    found: AttackReport,
    *,
    title: str,
    run: Table | None = None,
    classes: Sequence[str] | None = None,
) -> Path:
    """Writes the page of one attack to `path`; see `write_page`.

    Args:
        path: of the file.
        found: the result.
        title: of the report.
        run: how it was run: settings, seeds, versions.
        classes: names of the classes, for examples; None: their numbers.

    Raises:
        FlexureError: the file cannot be written.
    """
    return write_page(
        path,
        title=title,
        summary=attack_summary(found),
        sections=attack_sections(found, classes=classes),
        shows=(*SHOWS, *([_CERTIFIED] if found.certified else [])),
        does_not_show=(*DOES_NOT_SHOW, *([_UNMASKED] if found.masking is None else [])),
        run=run,
    )


def attack_summary(found: AttackReport) -> tuple[str, ...]:
    """What was found, in sentences."""
    names = " and ".join(model.name for model in found.models)
    return (
        f"{names}, attacked on {found.samples} samples; intervals in brackets: 95 %, over samples.",
        _clean_sentence(found),
        *([] if found.masking is None else [masking_sentence(found.masking, found.models[0].name)]),
        *_worst_sentences(found),
        *_difference_sentences(found),
        *_certified_sentence(found),
        *(f"Note: {note.rstrip('.')}." for note in found.notes),
    )


def attack_sections(found: AttackReport, *, classes: Sequence[str] | None = None) -> list[Section]:
    """Pictures and tables: curves, comparison, examples, masking, and every attack's account."""
    return [
        *curve_sections(found),
        *difference_sections(found),
        *published_sections(found),
        *example_sections(found.examples, classes),
        *([] if found.masking is None else masking_sections(found.masking, found.models[0].name)),
        *_certified_sections(found),
        *stage_sections(found),
    ]


def _clean_sentence(found: AttackReport) -> str:
    values = "; ".join(f"{model.name} {model.clean_accuracy} %" for model in found.models)
    told = found.difference()
    between = "" if told is None else f"; difference {paired_text(told)} points, sample by sample"
    return f"Accuracy without an attack: {values}{between}."


def _worst_sentences(found: AttackReport) -> list[str]:
    """Accuracy of the first model over all attacks, norm by norm."""
    told = []
    for norm, rows in _by_norm(found).items():
        values = ", ".join(f"{at.accuracy} % at {radius_text(at.eps, norm)}" for at in rows)
        name = NORMS.get(norm, norm)
        told.append(f"{found.models[0].name} under {name} attacks, worst case: {values}.")
    return told


def _difference_sentences(found: AttackReport) -> list[str]:
    """How it differs from the reference, and where that is not sure."""
    if len(found.models) < 2:
        return []
    first, second, *_ = found.models
    told = []
    for norm, rows in _by_norm(found).items():
        pairs = [(radius_text(at.eps, norm), found.difference(norm, at.eps)) for at in rows]
        values = ", ".join(f"{paired_text(one)} at {radius}" for radius, one in pairs if one)
        unsure = ", ".join(radius for radius, one in pairs if one and not one.certain)
        doubt = f" The interval includes 0, no difference is shown, at: {unsure}." if unsure else ""
        told.append(
            f"{first.name} minus {second.name} under {NORMS.get(norm, norm)} attacks, points, "
            f"sample by sample: {values}.{doubt}"
        )
    return told


def _by_norm(found: AttackReport) -> dict[str, list[AttackedAt]]:
    """Norm -> the first model's results by the standard protocol that a sentence tells."""
    rows = [at for at in found.models[0].at if at.protocol == STANDARD]
    norms = dict.fromkeys(at.norm for at in rows)
    return {norm: _listed([at for at in rows if at.norm == norm]) for norm in norms}


def _listed(rows: Sequence[AttackedAt]) -> list[AttackedAt]:
    """Not more than a sentence holds, the first and the last among them."""
    if len(rows) <= _LISTED:
        return list(rows)
    step = (len(rows) - 1) / (_LISTED - 1)
    return [rows[round(k * step)] for k in range(_LISTED)]


def _certified_sentence(found: AttackReport) -> list[str]:
    if not found.certified:
        return []
    values = ", ".join(
        f"{one.accuracy} % at {radius_text(one.eps, CERTIFIED_NORM)}"
        for one in found.certified[:: -(-len(found.certified) // _LISTED)]
    )
    name = NORMS[CERTIFIED_NORM]
    return [f"{found.models[0].name}, certified in {name} (a bound from below): {values}."]


def _certified_sections(found: AttackReport) -> list[Section]:
    if not found.certified:
        return []
    rows = []
    for one in found.certified:
        at = found.models[0].found(CERTIFIED_NORM, one.eps)
        attacked = None if at is None else str(at.accuracy)
        rows.append((radius_text(one.eps, CERTIFIED_NORM), str(one.accuracy), attacked))
    columns = (f"{NORMS[CERTIFIED_NORM]} radius", "certified, % (from below)",
               "under attack, % (from above)")  # fmt: skip
    return [
        Section(
            "Certified accuracy",
            () if found.certificates is None else (f"{found.certificates!s}.",),
            table=table_of(columns, rows, *columns),
            caption="The true robust accuracy lies between both columns. The bound rests on the "
            "network's Lipschitz constant and holds at every input, so that it is low for "
            "networks that were not made for it, however robust they are.",
        )
    ]
