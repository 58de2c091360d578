"""Adversarial examples in a report: as pictures where inputs are images, else as a table.

Reads the `AdversarialExamples` of a finished `AttackReport`; how an image is drawn is
`attack_images.py`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flexure.methods.attack_model_result import AdversarialExamples, radius_text
from flexure.report.attack_curves import NORMS
from flexure.report.attack_images import (
    Example,
    affordable,
    drawable_as_image,
    example_picture,
)
from flexure.report.page import Section
from flexure.report.tables import Table, table_of

__all__ = ["class_name", "example_sections"]

_NOT_FINITE = "none (logits are not finite)"
_WORST = {"linf": lambda change: change.abs().max(), "l2": lambda change: change.norm()}


def class_name(classes: Sequence[str] | None, label: int) -> str:
    """What a class is called; its number where it has no name."""
    if label < 0:
        return _NOT_FINITE
    return str(classes[label]) if classes and label < len(classes) else str(label)


def example_sections(
    examples: AdversarialExamples, classes: Sequence[str] | None = None
) -> list[Section]:
    """The examples, as many as the page can hold; none where nothing was found."""
    if not len(examples):
        return []
    rows = _spread(examples, affordable(examples.x.shape[1:]) if _is_image(examples) else None)
    shown = "" if len(rows) == len(examples) else f" {len(rows)} of {len(examples)} are drawn."
    if not _is_image(examples):
        return [
            Section(
                "Adversarial examples",
                table=_table(examples, rows, classes),
                caption="Inputs are no images of 1 or 3 channels, so none are drawn. Norms are "
                "those of the change, in input units.",
            )
        ]
    return [
        Section(
            "Adversarial examples",
            pictures=tuple(example_picture(_example(examples, row, classes)) for row in rows),
            caption="Each at the smallest of the radii at which an attack succeeded. The change is "
            "the adversarial version minus the original, enlarged by the factor above it and added "
            f"to mid-grey: mid-grey is no change.{shown}",
        )
    ]


def _is_image(examples: AdversarialExamples) -> bool:
    return drawable_as_image(tuple(examples.x.shape[1:]))


def _spread(examples: AdversarialExamples, room: int | None) -> list[int]:
    """So many, of each norm in turn; in their order."""
    norms = list(dict.fromkeys(examples.norms))
    queues = [[k for k, norm in enumerate(examples.norms) if norm == one] for one in norms]
    turns = [
        k
        for turn in range(max(map(len, queues)))
        for queue in queues
        for k in queue[turn : turn + 1]
    ]
    return sorted(turns[:room])


def _example(examples: AdversarialExamples, k: int, classes: Sequence[str] | None) -> Example:
    return Example(
        x=examples.x[k].double().numpy(),
        x_adv=examples.x_adv[k].double().numpy(),
        label=class_name(classes, int(examples.labels[k])),
        predicted=class_name(classes, int(examples.after[k])),
        size=_size(examples, k),
        name=f"sample {int(examples.positions[k])}, {examples.attacks[k]}, "
        f"radius {radius_text(examples.radii[k], examples.norms[k])}",
        bounds=_bounds(examples),
    )


def _bounds(examples: AdversarialExamples) -> tuple[float, float]:
    """Of the pictures: those of the inputs, or where these have none all that occurs."""
    if examples.bounds is not None:
        return examples.bounds
    both = (examples.x.double(), examples.x_adv.double())
    low, high = min(float(x.min()) for x in both), max(float(x.max()) for x in both)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _size(examples: AdversarialExamples, k: int) -> str:
    norm = examples.norms[k]
    change: Tensor = examples.x_adv[k].double() - examples.x[k].double()
    return f"{NORMS.get(norm, norm)} norm {_length(float(_WORST[norm](change)), norm)}"


def _length(size: float, norm: str) -> str:
    """In grey levels where a length rounds to simple ones, up to float32."""
    levels = round(size * 255, 3)
    return f"{levels:.3g}/255" if norm == "linf" and levels else f"{size:.3g}"


def _table(
    examples: AdversarialExamples, rows: Sequence[int], classes: Sequence[str] | None
) -> Table:
    columns = ("sample", "label", "predicted", "change", "radius", "attack")
    cells = [
        (int(examples.positions[k]), class_name(classes, int(examples.labels[k])),
         class_name(classes, int(examples.after[k])), _size(examples, k),
         radius_text(examples.radii[k], examples.norms[k]), examples.attacks[k])
        for k in rows
    ]  # fmt: skip
    return table_of(columns, cells, "sample", "radius")
