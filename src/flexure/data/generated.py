"""Data sets drawn anew from a seed: scikit-learn's two moons and two circles.

Their addresses are `sklearn:moons` and `sklearn:circles`; the catalogue of addresses is `sources`'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flexure.addresses import split_options
from flexure.contracts import AddressError, LabelledData
from flexure.data.labelled import from_arrays

__all__ = ["GENERATED", "load_generated"]


@dataclass(frozen=True)
class _Option:
    """How an option of an address is read, and what it is where it is left out."""

    default: float
    read: Callable[[str], float]
    fits: Callable[[float], bool]
    wanted: str


_COMMON = {
    "n": _Option(2000, int, lambda n: 4 <= n <= 10**7, "a number of samples, at least 4"),
    "noise": _Option(0.1, float, lambda s: 0 <= s < math.inf, "a standard deviation, at least 0"),
    "seed": _Option(0, int, lambda s: 0 <= s < 2**32, "an integer from 0 to 2**32 - 1"),
}

GENERATED: Mapping[str, Mapping[str, _Option]] = {
    "moons": _COMMON,
    "circles": {**_COMMON, "factor": _Option(0.5, float, lambda f: 0 < f < 1, "in (0, 1)")},
}
"""Name -> its options. A new one is a row here; scikit-learn has it as `make_NAME`."""


def load_generated(rest: str) -> dict[str, LabelledData]:
    """`sklearn:moons?n=2000&noise=0.1&seed=0`, and `sklearn:circles` with `factor=0.5` besides.

    `(2,)` float32 vectors of two classes, as many of each; where n is odd, one more of the second:
    two interleaved half circles of radius 1, or two circles of radii 1 and `factor`, with normal
    noise added to each coordinate. The values above are the defaults; the same address gives the
    same data.

    Raises:
        AddressError: an unknown option, or a value that does not fit.
    """
    from sklearn import datasets

    name, given = split_options(rest, known=GENERATED[rest.partition("?")[0]])
    options = {
        key: _value(option, given[key], f"{key}=... in sklearn:{rest}")
        if key in given
        else option.default
        for key, option in GENERATED[name].items()
    }
    samples, seed = int(options.pop("n")), int(options.pop("seed"))
    make: Callable[..., Any] = getattr(datasets, f"make_{name}")
    x, y = make(n_samples=samples, random_state=seed, **options)
    return {"train": from_arrays(x, y, source=f"sklearn:{rest}")}


def _value(option: _Option, text: str, where: str) -> float:
    try:
        value = option.read(text)
    except ValueError:
        value = math.nan
    if not option.fits(value):
        raise AddressError(f"expected {where} to be {option.wanted}, got {text!r}; change it")
    return value
