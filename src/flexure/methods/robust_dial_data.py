"""The data of a search for a robust dial: splits that share no samples, inputs within bounds.

What is searched on them is not known here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from flexure.attacks.bounded import Bounded, check_within, limits_of
from flexure.contracts import Batches, DataError
from flexure.methods.samples import Samples, check_disjoint, read_samples

__all__ = [
    "Data",
    "calibrated_on",
    "calibration_inputs",
    "check_inputs",
    "normalised",
    "read_splits",
]

Data: TypeAlias = "Batches | tuple[Tensor, Tensor]"


def read_splits(val: Data, test: Data | None) -> tuple[dict[str, Samples], int]:
    """The splits that are given, and how many samples they share.

    Raises:
        DataError: no samples, or more than a few that are in both.
    """
    if val is None:
        raise DataError(
            "expected val, the data that dials are chosen on, got None; give batches (x, y), or a "
            "pair of tensors"
        )
    if test is val:
        raise DataError(
            "expected different data as val and test, got the same object; what is chosen by and "
            "what is reported must be disjoint"
        )
    given = {"val": val} if test is None else {"val": val, "test": test}
    read = {name: read_samples(_batches(data), name, cache_bytes=sys.maxsize)
            for name, data in given.items()}  # fmt: skip
    return read, _shared_samples(read["test"], read["val"]) if "test" in read else 0


def calibration_inputs(calibration: Iterable[Any] | Tensor, device: torch.device) -> Tensor:
    """Unlabelled inputs, a tensor or batches; labels are ignored.

    Raises:
        DataError: there are none.
    """
    given = [calibration] if isinstance(calibration, Tensor) else calibration
    parts = [one[0] if isinstance(one, tuple | list) else one for one in given]
    if not sum(map(len, parts)) or not all(isinstance(one, Tensor) for one in parts):
        raise DataError(
            "expected calibration inputs, a tensor or batches, got others; "
            "leave it out for the validation inputs"
        )
    return torch.cat([one.to(device) for one in parts])


def calibrated_on(inputs: Tensor, splits: Mapping[str, Samples]) -> tuple[str, ...]:
    """What must be told of calibration inputs, which may hardly be among the test data.

    Raises:
        DataError: more than a few of them are.
    """
    if "test" not in splits:
        return ()
    given: Any = [(inputs, torch.zeros(len(inputs), dtype=torch.int64))]
    read = read_samples(given, "calibration", cache_bytes=sys.maxsize)
    shared = _shared_samples(splits["test"], read)
    return (f"{shared} samples are in the calibration and the test data",) if shared else ()


def check_inputs(name: str, x: Tensor, bounded: Bounded) -> None:
    """Refuses inputs that are no floating-point numbers within the bounds.

    Raises:
        FlexureError: they are something else.
    """
    if not x.is_floating_point():
        raise DataError(
            f"expected {name} inputs of floating point, got {x.dtype}; give x.float() / 255 for "
            f"images, and the normalisation as mean and std"
        )
    check_within(x, limits_of(bounded, x.dtype))


def normalised(bounded: Bounded, x: Tensor) -> Tensor:
    """What the model inside is given."""
    inner = Bounded(nn.Identity(), mean=bounded.mean, std=bounded.std, bounds=None)
    found: Tensor = inner.to(x.device)(x)
    return found


def _shared_samples(first: Samples, second: Samples) -> int:
    """How many samples two splits share; a few are tolerated, but not most of a tiny one."""
    shared = check_disjoint(first, second)
    least = min(len(first), len(second))
    if 2 * shared > least:
        raise DataError(
            f"expected {first.name} and {second.name} to hold different samples, got {shared} of "
            f"{least} in both; what is chosen by and what is reported must be disjoint"
        )
    return shared


def _batches(data: Data) -> Any:
    pair = isinstance(data, tuple) and len(data) == 2 and all(isinstance(d, Tensor) for d in data)
    return [data] if pair else data
