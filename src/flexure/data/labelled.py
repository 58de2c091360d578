"""Labelled data in memory or decoded on demand, and the checks that every data set passes.

Here is what satisfies `contracts.LabelledData`. Reading files is the work of `sources` and
`images`; splitting and batching that of `batches`.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexure.addresses import first_line
from flexure.contracts import DataError, LabelledData

__all__ = [
    "ArrayData",
    "LazyData",
    "check_splits",
    "class_names",
    "decode_image",
    "from_arrays",
    "image_tensor",
    "integer_labels",
]

_MOST_CLASSES = 100_000
"""A label above this is taken for a mistake (an identifier, an overflow), not for a class."""


@dataclass(frozen=True, eq=False)
class ArrayData:
    """Labelled data held in memory.

    Attributes:
        items: `(N, C, H, W)` uint8 images, or `(N, D)` float32 vectors.
        labels: `(N,)` int64.
        classes: one name a class.
    """

    items: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_count(len(self.items), self.labels, source="ArrayData")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tensor:
        return self.items[index]


@dataclass(frozen=True, eq=False)
class LazyData:
    """Labelled data decoded when it is asked for.

    Attributes:
        decode: position in `range(N)` -> one item.
        labels: `(N,)` int64.
        classes: one name a class.
    """

    decode: Callable[[int], Tensor]
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tensor:
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} items")
        return self.decode(position)


def from_arrays(
    x: Any, y: Any, *, classes: Sequence[str] | None = None, source: str = "arrays"
) -> ArrayData:
    """Labelled data from two arrays.

    Args:
        x: `(N, H, W)`, `(N, H, W, C)` or `(N, C, H, W)` uint8 images with C 1 or 3, or `(N, D)`
            numbers.
        y: `(N,)` or `(N, 1)` integers.
        classes: one name a class; default: the numbers `0 ... max(y)`.
        source: how messages call the data.

    Raises:
        DataError: a shape, type or count is wrong, or a vector is not finite.
    """
    items = _items(np.asarray(x), source=source)
    labels = integer_labels(y, source=source)
    _check_count(len(items), labels, source=source)
    names = tuple(classes) if classes is not None else class_names([labels], source=source)
    return ArrayData(items, labels, names)


def integer_labels(y: Any, *, source: str) -> Tensor:
    """`y` as `(N,)` int64.

    Raises:
        DataError: not whole numbers, or not one a sample.
    """
    array = np.asarray(y)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"{source}: expected one integer label a sample, got {array.dtype} of shape "
            f"{array.shape}; store class numbers 0, 1, 2, ... as integers"
        )
    return torch.from_numpy(array.astype(np.int64))


def class_names(labels: Sequence[Tensor], *, source: str) -> tuple[str, ...]:
    """Names `"0"`, `"1"`, ... for the classes in all splits' labels.

    Raises:
        DataError: no labels, or a label that cannot be a class number.
    """
    present = [part for part in labels if len(part)]
    if not present:
        raise DataError(f"{source}: expected labelled samples, got none; check the file")
    lowest, highest = (int(end) for end in torch.cat(present).aminmax())
    if lowest < 0 or highest >= _MOST_CLASSES:
        raise DataError(
            f"{source}: expected labels in 0 ... number of classes - 1, got labels from {lowest} "
            f"to {highest}; renumber them from 0"
        )
    return tuple(str(number) for number in range(highest + 1))


def check_splits(splits: Mapping[str, LabelledData], *, source: str) -> None:
    """The checks that every data set passes, whatever it was read from.

    Raises:
        DataError: no training data, an empty split, fewer than two classes, two classes of one
            name, splits that disagree about the classes, or labels out of range.
    """
    if "train" not in splits:
        raise DataError(f"{source}: expected training data, got only {sorted(splits)}; add it")
    classes = splits["train"].classes
    if len(set(classes)) < len(classes):
        ((repeated, count),) = Counter(classes).most_common(1)
        raise DataError(
            f"{source}: expected a name of its own for every class, got {count} classes called "
            f"{repeated!r}; rename them"
        )
    for name, data in splits.items():
        where = f"{source}, {name}"
        if len(data) == 0:
            raise DataError(f"{where}: expected samples, got none; add some or remove the split")
        _check_count(len(data), data.labels, source=where)
        if data.classes != classes:
            raise DataError(
                f"{where}: expected the classes of the training data, got {len(data.classes)} "
                f"classes against {len(classes)}; use the same classes in all splits"
            )
        lowest, highest = (int(end) for end in data.labels.aminmax())
        if lowest < 0 or highest >= len(classes):
            raise DataError(
                f"{where}: expected labels in 0 ... {len(classes) - 1}, got labels from {lowest} "
                f"to {highest}; renumber them, or name all classes"
            )
    found = set(splits["train"].labels.tolist())
    if len(found) < 2:
        raise DataError(
            f"{source}: expected at least two classes in the training data, got only class "
            f"{classes[found.pop()]!r}; add samples of another class"
        )


def decode_image(file: Path | bytes, *, name: str) -> Tensor:
    """One image file as `(3, H, W)` uint8.

    Args:
        file: its path, or its content.
        name: how messages call it.

    Raises:
        DataError: it is missing, damaged, or has more than 8 bits a channel.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            return image_tensor(image, name=name)
    except DataError:
        raise
    # PIL reports damage with all of these; SyntaxError is a broken PNG.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"expected an image in {name}, got: {first_line(error)}; repair or remove it"
        ) from error


def image_tensor(image: Any, *, name: str) -> Tensor:
    """A PIL image, upright, as `(3, H, W)` uint8.

    Raises:
        DataError: it has more than 8 bits a channel, which a conversion to RGB would cut off.
    """
    from PIL import ImageOps

    if image.mode.startswith("I") or image.mode == "F":
        raise DataError(
            f"expected 8 bits a channel in {name}, got mode {image.mode}; convert the image first"
        )
    upright = ImageOps.exif_transpose(image)
    pixels = np.array(upright.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _check_count(count: int, labels: Tensor, *, source: str) -> None:
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise DataError(
            f"{source}: expected (N,) int64 labels, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}; convert them with .long()"
        )
    if count != len(labels):
        raise DataError(
            f"{source}: expected as many labels as samples, got {len(labels)} labels for {count} "
            f"samples; check that both belong together"
        )


def _items(x: np.ndarray[Any, Any], *, source: str) -> Tensor:
    if x.ndim == 2 and x.dtype.kind in "iufb":
        vectors = torch.from_numpy(x.astype(np.float32))
        if not bool(vectors.isfinite().all()):
            raise DataError(
                f"{source}: expected finite numbers, got nan or infinity; fill or drop them"
            )
        return vectors
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise DataError(
            f"{source}: expected (N, D) numbers or uint8 images (N, H, W), (N, H, W, C) or "
            f"(N, C, H, W), got {x.dtype} of shape {x.shape}; scale images to 0 ... 255 as uint8"
        )
    channels_first = x[:, None] if x.ndim == 3 else _channels_first(x, source=source)
    return torch.from_numpy(np.array(channels_first, order="C"))


def _channels_first(x: np.ndarray[Any, Any], *, source: str) -> np.ndarray[Any, Any]:
    first, last = x.shape[1] in (1, 3), x.shape[3] in (1, 3)
    if first == last:
        raise DataError(
            f"{source}: expected images with 1 or 3 channels, first or last, got shape {x.shape}, "
            f"where {'both' if first else 'neither'} could be; store them as (N, H, W, C)"
        )
    return x if first else np.moveaxis(x, 3, 1)
