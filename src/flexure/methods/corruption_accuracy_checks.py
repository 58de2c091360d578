"""Which settings of `corruption_accuracy` fit together; nothing is measured or read here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from flexure.contracts import DataError, FlexureError, LabelledData
from flexure.data.corruptions import CONSTANTS, CORRUPTIONS, SEVERITIES
from flexure.methods.corruption_accuracy_result import ALL, COLUMNS

__all__ = ["check_chosen", "check_images", "check_names", "check_sources"]


def check_images(data: LabelledData) -> None:
    """Images that can be corrupted, and enough of them for an interval.

    Raises:
        DataError: they are not.
    """
    if len(data) < 2:
        raise DataError(f"expected at least two images, got {len(data)}; give more")
    if data[0].dim() != 3 or data[0].dtype != torch.uint8:
        raise DataError(
            f"expected images (C, H, W) uint8, got {data[0].dtype} of shape "
            f"{tuple(data[0].shape)}; common corruptions are defined for pixels only"
        )


def check_chosen(corruptions: Sequence[str] | None, severities: Sequence[int], seed: int) -> None:
    """Corruptions and severities, each once; whether there are such corruptions is not known here.

    Raises:
        FlexureError: they, or the seed, are no such things.
    """
    if corruptions is not None and (
        isinstance(corruptions, str)
        or not isinstance(corruptions, Sequence)
        or not all(isinstance(name, str) for name in corruptions)
    ):
        raise FlexureError(
            f"expected corruptions to be several names, got {corruptions!r}; give for example "
            f"['fog'], or None for all"
        )
    if (
        not isinstance(severities, Sequence)
        or not severities
        or not all(type(each) is int and each in SEVERITIES for each in severities)
    ):
        raise FlexureError(
            f"expected severities among the whole numbers 1, ..., 5, got {severities!r}; give for "
            f"example [1, 3, 5]"
        )
    for what, given in (("corruptions", corruptions or ()), ("severities", severities)):
        twice = _repeated(given)
        if twice:
            raise FlexureError(
                f"expected each of the {what} once, got {', '.join(map(repr, twice))} more than "
                f"once; it would weigh more in the means: name it once"
            )
    if type(seed) is not int or seed < 0:
        raise FlexureError(f"expected a seed of at least 0, got {seed!r}; choose another")


def check_sources(sources: str | None, constants: str | None) -> None:
    """Official files, or a set of strengths for what is generated.

    Raises:
        FlexureError: both of them, or no such set.
    """
    if constants is not None and constants not in CONSTANTS:
        raise FlexureError(f"expected constants among {CONSTANTS}, got {constants!r}; choose one")
    if sources is not None and constants is not None:
        raise FlexureError(
            f"expected constants for generated corruptions only, got {constants!r} with the files "
            f"of {sources}, which have their own; leave one of them out"
        )


def check_names(
    names: tuple[str, str],
    shifts: Iterable[str],
    corruptions: Sequence[str],
    severities: Sequence[int],
) -> None:
    """What the models and the shifts are called: nothing that the table calls otherwise.

    Raises:
        FlexureError: a name is missing, or means something else.
    """
    if len(names) != 2 or names[0] == names[1] or not all(map(_is_name, names)):
        raise FlexureError(f"expected two different names of models, got {names!r}; rename one")
    columns = {*COLUMNS, *map(str, severities)}
    groups = {CORRUPTIONS[name].group if name in CORRUPTIONS else "extra" for name in corruptions}
    # A star marks what is a substitute.
    rows = {"clean", ALL, *corruptions, *groups}
    for what, told, taken in (("models", names, columns), ("shifts", shifts, rows)):
        for name in told:
            if not _is_name(name) or name.rstrip("*") in taken:
                raise FlexureError(
                    f"expected names of {what} that nothing else in the table has, got {name!r}; "
                    f"choose another than {', '.join(sorted(taken))}"
                )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _repeated(values: Sequence[Any]) -> list[Any]:
    counts: Mapping[Any, int] = {value: values.count(value) for value in values}
    return [value for value, count in counts.items() if count > 1]
