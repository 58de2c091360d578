"""Errors, and the protocols of every extension point.

Nothing here computes. Every other module may import this one; it imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

__all__ = [
    "AdapterError",
    "AddressError",
    "Batches",
    "DataError",
    "DataLoader",
    "Example",
    "FlexureError",
    "LabelledData",
    "LoadedModel",
    "MissingExtraError",
    "ModelLoader",
    "RecipeConfig",
    "SiteError",
]

Example: TypeAlias = "Tensor | tuple[Any, ...] | dict[str, Any]"
"""What a model is called with: one tensor, positional arguments, or keyword arguments."""

Batches: TypeAlias = "Iterable[tuple[Any, Tensor]]"
"""Any iterable of `(x, y)`; `x` is an `Example`, `y` a `(B,)` integer tensor of labels."""


class FlexureError(ValueError):
    """A mistake that the caller can mend. The message says expected, got and remedy."""


class SiteError(FlexureError):
    """An activation site that is missing, ambiguous, or cannot be steered."""


class DataError(FlexureError):
    """Data that cannot be used: empty, one class, non-finite, labels out of range."""


class AddressError(FlexureError):
    """A model or data address that cannot be resolved."""


class AdapterError(FlexureError):
    """An adapter file that is damaged, foreign, or made for another model."""


class MissingExtraError(FlexureError, ImportError):
    """An optional dependency that is not installed; the message names the extra."""


@runtime_checkable
class LabelledData(Protocol):
    """A finite, indexable, labelled data set.

    Items are unprocessed: images are `(C, H, W)` uint8 tensors (sizes may differ between items),
    vectors are `(D,)` float32 tensors. A model's own preprocessing turns them into its input.
    """

    @property
    def labels(self) -> Tensor:
        """`(N,)` int64, in `range(len(classes))`."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """One name a class."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...


@dataclass(frozen=True)
class LoadedModel:
    """A pretrained model with what is needed to feed it.

    Attributes:
        model: the network, in eval mode.
        preprocess: one unprocessed item (see `LabelledData`) -> one model input, without the
            batch dimension. The backbone's own preprocessing, never the data set's statistics.
        address: where it came from.
        head: path of the classification layer, if the source knows it.
    """

    model: nn.Module
    preprocess: Callable[[Tensor], Tensor]
    address: str
    head: str | None = None


class ModelLoader(Protocol):
    """Loads what stands behind a model address prefix; `rest` is the text after the colon."""

    def __call__(self, rest: str) -> LoadedModel:
        """Loads it, or raises `AddressError`."""
        ...


class DataLoader(Protocol):
    """Loads what stands behind a data address prefix, as named splits.

    The key `"train"` is always there; `"validation"` and `"test"` where the source has them.
    """

    def __call__(self, rest: str) -> dict[str, LabelledData]:
        """Loads it, or raises `AddressError` or `DataError`."""
        ...


class RecipeConfig(Protocol):
    """A frozen configuration of one experiment; `small()` runs everywhere in minutes."""

    @classmethod
    def small(cls) -> RecipeConfig:
        """The configuration that runs everywhere in under two minutes."""
        ...
