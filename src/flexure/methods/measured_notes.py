"""What a reader must know of a measurement besides its numbers, in sentences.

What a single measure has to say of its result is its row in `measures.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from flexure.measure.over import Summary
from flexure.methods.measurements_result import ModelMeasurements
from flexure.methods.measures import FEW, MEASURES
from flexure.methods.paired import MEAN, Quantity

__all__ = ["effective_number", "notes"]


def notes(models: Sequence[ModelMeasurements]) -> Iterator[str]:
    """Refusals, samples without a value or not converged, means of few samples, first samples."""
    for model in models:
        yield from (f"{model.name} {told}" for told in _refused(model))
        yield from (f"{model.name}: {told}" for told in _found(model))
    for measure, summary in models[0].summaries.items():
        if len(summary) < models[0].samples:
            yield f"{measure}: the first {len(summary)} of {models[0].samples} samples"


def effective_number(values: Tensor) -> float:
    """(Σx)² / Σx²: so many equal values would carry their sum; 0 where there is none.

    Args:
        values: (N,) at least 0; those that are not finite are left out.
    """
    used = values[values.isfinite()].double()
    if not len(used) or not used.any():
        return 0.0
    used = used / used.max()
    return float(used.sum().square() / used.square().sum())


def _refused(model: ModelMeasurements) -> Iterator[str]:
    for measure, reason in model.refusals.items():
        yield f"has no {measure}: {reason}"


def _found(model: ModelMeasurements) -> Iterator[str]:
    for measure, summary in model.summaries.items():
        yield from _unconverged(measure, summary)
        yield from _without_value(model, measure, summary)
        if (caution := MEASURES[measure].caution(summary.result)) is not None:
            yield caution
    yield from _carried_by_few(model)


def _unconverged(measure: str, summary: Summary[Any]) -> Iterator[str]:
    """How many samples did not converge; where they have a value, what it is and what helps."""
    missed = ~summary.result.converged
    told = MEASURES[measure].unconverged
    count = f"of {len(summary)} samples of {measure} did not converge"
    if told is not None:
        field, meaning = told
        values = summary.result.samples()[field].reshape(len(summary), -1)
        bounds = missed & values.isfinite().all(1)
        if bounds.any():
            yield f"{int(bounds.sum())} {count}: {meaning}"
        missed = missed & ~bounds
    if missed.any():
        yield f"{int(missed.sum())} {count}{': they are not finite' if told else ''}"


def _without_value(model: ModelMeasurements, measure: str, summary: Summary[Any]) -> Iterator[str]:
    """Samples that no estimate of a quantity rests on, and why."""
    total = len(summary)
    known: dict[tuple[int, str], list[str]] = defaultdict(list)
    for quantity in MEASURES[measure].quantities:
        rests = [
            one.samples
            for one in model.estimates
            if (one.measure, one.quantity) == (measure, quantity.name)
        ]
        if rests and min(rests) < total:
            gone = total - min(rests)
            known[gone, _reason(quantity, summary, gone)].append(quantity.label)
    for (gone, reason), labels in known.items():
        yield f"{gone} of {total} samples have no {', '.join(labels)}: {reason}"


def _reason(quantity: Quantity, summary: Summary[Any], gone: int) -> str:
    unknown = "there they are not numbers"
    if quantity.masked is None:
        return unknown
    field, why = quantity.masked
    masked = int(summary.result.samples()[field].sum())
    if masked >= gone:
        return f"there {why}"
    return f"at {masked} of them {why}; at the others they are not numbers" if masked else unknown


def _carried_by_few(model: ModelMeasurements) -> Iterator[str]:
    """The t-interval of a mean that few samples carry is too narrow, and may reach below zero."""
    found = {
        quantity.label: least
        for measure, summary in model.summaries.items()
        for quantity in MEASURES[measure].quantities
        if (least := min(_few(quantity, summary), default=None)) is not None
    }
    if found:
        yield (
            f"few samples carry the means of {', '.join(found)}, as few as "
            f"{min(found.values()):.1f} equal ones would: the intervals of these means and of "
            f"their differences are too narrow; more samples help, and medians do not suffer"
        )


def _few(quantity: Quantity, summary: Summary[Any]) -> Iterator[float]:
    """Effective numbers of a positive quantity's means, where they are small."""
    values = summary.result.samples().get(quantity.name)
    if MEAN not in quantity.statistics or values is None or not values.is_floating_point():
        return
    for column in values.detach().cpu().reshape(len(values), -1).T:
        effective = effective_number(column)
        # Half of them: a handful of samples that are alike is few, and carried by all.
        if 0 < effective < min(FEW, int(column.isfinite().sum()) / 2):
            yield effective
