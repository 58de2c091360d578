"""Which networks and which samples the verbs of the command line take, and in which space.

Options, stores and printing are in `common.py`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexure.contracts import FlexureError, LabelledData, LoadedModel
from flexure.data import PreparedBatches, Subset
from flexure.methods.load import load_adapter
from flexure.methods.steer import steer as steer_model
from flexure.models.pixels import in_pixels
from flexure.record import check_writable

__all__ = [
    "SPLITS",
    "Pair",
    "Space",
    "described",
    "dials_of",
    "drawn",
    "numbers",
    "output",
    "same_inputs",
    "side_by_side",
    "space",
]

SPLITS = ("test", "validation", "train")
"""The first that the data have is what is measured."""


@dataclass(frozen=True)
class Pair:
    """What is measured, and what it is compared with if anything."""

    model: nn.Module
    against: nn.Module | None
    names: tuple[str, str]


def side_by_side(
    loaded: LoadedModel,
    other: LoadedModel | None,
    dials: tuple[float, float] | None,
    adapter: Path | None,
    given: PreparedBatches,
    *,
    beside_adapter: bool = False,
    alike: bool | None = None,
) -> Pair:
    """The model as it was asked for, and the other one.

    Args:
        loaded: the model.
        other: of another address; None: the model as it was, where it is changed.
        dials: (beta, c) to steer it to.
        adapter: folder of one to put into it.
        given: batches of its inputs.
        beside_adapter: whether a model with an adapter is beside itself without one too.
        alike: whether the other one takes these inputs as the model does; None: if both have the
            same preprocessing.

    Raises:
        FlexureError: no such dial, adapter, or sites; or both a dial and an adapter.
    """
    if dials is not None and adapter is not None:
        raise FlexureError("expected --steer or --adapter, got both; choose one")
    if alike is None:
        alike = other is None or described(loaded) == described(other)
    if other is not None and not alike:
        warnings.warn(
            f"{other.address} has another preprocessing than {loaded.address}; both are given what "
            f"{loaded.address} takes",
            stacklevel=2,
        )
    model, name = loaded.model, "model"
    second = None if other is None else other.model
    second_name = "against"
    if dials is not None:
        beta, c = dials
        if second is None:
            second, second_name = deepcopy(model), "unsteered"
        x, _ = next(iter(given))
        steer_model(model, beta=beta, c=c, example=x[:2])
        name = f"beta {beta:g}, c {c:g}"
    if adapter is not None:
        if second is None and beside_adapter:
            second, second_name = deepcopy(model), "plain"
        load_adapter(model, adapter)
        name = "adapted"
    return Pair(model, second, (name, second_name))


def described(loaded: LoadedModel) -> str:
    """The preprocessing in words, without addresses in memory."""
    return _words(loaded.preprocess)


def same_inputs(own: Space, other: Space) -> bool:
    """Whether two networks take inputs of one space, each with its own normalisation inside."""
    return own.bounds == other.bounds and _words(own.prepare) == _words(other.prepare)


def _words(preprocess: Any) -> str:
    return re.sub(r"0x[0-9a-f]+", "", repr(preprocess))


def drawn(
    data: dict[str, LabelledData], wanted: str | None, samples: int, seed: int
) -> tuple[Subset, str]:
    """So many samples of a split, drawn without regard to their class, in a random order.

    So that the first of them, which costly measures take, are such a draw too.
    """
    there = [name for name in SPLITS if name in data]
    name = there[0] if wanted is None else wanted
    if name not in data:
        raise FlexureError(f"expected --split among {', '.join(there)}, got {wanted!r}")
    whole = data[name]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(whole), generator=generator)[:samples]
    return Subset(whole, rows), name


def dials_of(text: str) -> tuple[float, float]:
    """`BETA` or `BETA,C`, the value of `--steer`."""
    values = numbers("--steer", text, float)
    if len(values) > 2:
        raise FlexureError(f"expected --steer like 0.8 or 0.8,0.5, got {text!r}")
    return values[0], values[1] if len(values) > 1 else 0.5


def numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """The value of an option with commas.

    Raises:
        FlexureError: one of them is no number of this kind.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise FlexureError(f"expected {option} to be numbers with commas, got {text!r}") from None


@contextmanager
def output(out: Path, name: str) -> Iterator[Path]:
    """The store in the output folder; after an error, no empty folder that was not there before.

    Raises:
        FlexureError: it is not a folder, or files cannot be written in it.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        yield check_writable(out) / name
    except BaseException:
        with suppress(OSError):  # not empty, and then its parents are not either
            for folder in made:
                folder.rmdir()
        raise


@dataclass(frozen=True)
class Space:
    """The space in which networks are attacked: pixels, where the model's normalisation is known.

    Attributes:
        prepare: one unprocessed item -> one input.
        mean: of the normalisation, to be moved into the model; None: there is none.
        std: likewise.
        bounds: lowest and highest value of an input; None: not known.
    """

    prepare: Callable[[Tensor], Tensor]
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    bounds: tuple[float, float] | None = None


def space(loaded: LoadedModel, data: LabelledData) -> Space:
    """Pixels in [0, 1] for images where the model's normalisation is known, else its own inputs."""
    pixels = in_pixels(loaded.preprocess) if data[0].dtype == torch.uint8 else None
    if pixels is None:
        return Space(loaded.preprocess)
    return Space(pixels.prepare, pixels.mean, pixels.std, (0.0, 1.0))
