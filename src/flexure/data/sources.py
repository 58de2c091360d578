"""Data by address: the catalogue of prefixes, and the sources that hold arrays.

Folders and the datasets library are read by `images`; splits and batches are made by `batches`.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from flexure.addresses import existing_path, first_line, look_up, split_options
from flexure.contracts import AddressError, DataError, DataLoader, LabelledData
from flexure.data.batches import Subset
from flexure.data.corrupted_files import OFFICIAL
from flexure.data.generated import GENERATED, load_generated
from flexure.data.images import SPLIT_NAMES, load_folder, load_hub
from flexure.data.labelled import (
    ArrayData,
    LazyData,
    check_splits,
    class_names,
    decode_image,
    from_arrays,
    integer_labels,
)

__all__ = ["CATALOGUE", "load_data"]


def load_data(address: str) -> dict[str, LabelledData]:
    """The labelled data behind an address, as named splits.

    Args:
        address: `sklearn:digits`, `sklearn:moons?noise=0.1`, `npz:FILE`, `idx:DIR`, `folder:DIR`,
            `hf:NAME[:config]`, or corrupted images, `cifar10-c:DIR?corruption=fog&severity=3`
            (`cifar100-c:`, `imagenet-c:`).

    Returns:
        Always `"train"`, and `"validation"` and `"test"` where the source has them.

    Raises:
        AddressError: the address cannot be resolved.
        DataError: what is there cannot be used.
        MissingExtraError: the source needs a library that is not installed.
    """
    load, rest = look_up(address, CATALOGUE, kind="data")
    splits = load(rest)
    check_splits(splits, source=address)
    return splits


def _load_sklearn(rest: str) -> dict[str, LabelledData]:
    """`sklearn:NAME`: the data sets that scikit-learn ships, or generates (see `generated`).

    `digits` gives `(1, 8, 8)` uint8 images, its grey levels v in 0 ... 16 as round(255 v / 16);
    the others give vectors in their original units.
    """
    from sklearn import datasets

    if rest.partition("?")[0] in GENERATED:
        return load_generated(rest)
    if rest not in _SKLEARN:
        known = ", ".join(f"sklearn:{name}" for name in (*_SKLEARN, *GENERATED))
        raise AddressError(f"expected one of {known}, got sklearn:{rest}; choose one of them")
    bunch = getattr(datasets, f"load_{rest}")()
    is_image = rest == "digits"
    x = np.rint(bunch.images * (255 / 16)).astype(np.uint8) if is_image else bunch.data
    names = [str(name) for name in bunch.target_names]
    return {"train": from_arrays(x, bunch.target, classes=names, source=f"sklearn:{rest}")}


def _load_npz(rest: str) -> dict[str, LabelledData]:
    """`npz:FILE`: arrays `x`, `y` (or `images`, `labels`, or `jpeg`, `offsets`, `labels`).

    Names may carry a split before or after them (`x_train`, `test_images`); without one they are
    the training data. `jpeg` holds image files end to end, image i at `offsets[i]:offsets[i+1]`.
    `classes` may hold the names of the classes. Nothing is unpickled.

    `npz:FILE?rows=OTHER.npz:NAME` gives the training data alone, row after row as the integers in
    that array say: the versions here of the samples there, in their order.
    """
    name, options = split_options(rest, known=("rows",))
    path = existing_path(name, folder=False)
    splits = _npz_splits(_read_npz(path), path)
    if "rows" in options:
        return {"train": Subset(splits["train"], _rows(options["rows"], len(splits["train"])))}
    return splits


def _npz_splits(arrays: Mapping[str, np.ndarray[Any, Any]], path: Path) -> dict[str, LabelledData]:
    parts = {split: _npz_split(arrays, split, source=str(path)) for split in SPLIT_NAMES}
    found = {split: part for split, part in parts.items() if part is not None}
    if "train" not in found:
        raise DataError(
            f"{path}: expected arrays x and y, or images and labels, for training, got "
            f"{sorted(arrays)}; rename them"
        )
    labels = [part[1] for part in found.values()]
    names = arrays.get("classes")
    classes = (
        class_names(labels, source=str(path))
        if names is None
        else _given_names(names, source=str(path))
    )
    return {
        split: ArrayData(items, y, classes)
        if isinstance(items, Tensor)
        else LazyData(items, y, classes)
        for split, (items, y) in found.items()
    }


def _load_idx(rest: str) -> dict[str, LabelledData]:
    """`idx:DIR`: MNIST's format, `train-*` and `t10k-*`, plain or gzip-compressed.

    With only one of the two pairs, that pair is the training data.
    """
    folder = existing_path(rest, folder=True)
    parts = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        images, labels = (_idx_file(folder, stem, what) for what in ("images", "labels"))
        if images is None and labels is None:
            continue
        if images is None or labels is None:
            raise DataError(
                f"expected {stem}-images and {stem}-labels in {folder}, got only one of them; "
                f"add the other file"
            )
        parts[split] = (_read_idx(images, ndim=3), _read_idx(labels, ndim=1))
    if not parts:
        raise AddressError(
            f"expected train-images-idx3-ubyte or t10k-images-idx3-ubyte (or .gz) in {folder}, "
            f"got neither; check the folder"
        )
    if "train" not in parts:
        parts = {"train": parts["test"]}
    numbers = [integer_labels(y, source=str(folder)) for _, y in parts.values()]
    classes = class_names(numbers, source=str(folder))
    return {
        split: from_arrays(x, y, classes=classes, source=f"{folder}, {split}")
        for split, (x, y) in parts.items()
    }


CATALOGUE: Mapping[str, DataLoader] = {
    "sklearn": _load_sklearn,
    "npz": _load_npz,
    "idx": _load_idx,
    "folder": load_folder,
    "hf": load_hub,
    **OFFICIAL,
}
"""Address prefix -> loader. A new source is one function and one row."""

_SKLEARN = ("digits", "wine", "breast_cancer", "iris")


@dataclass(frozen=True, eq=False)
class _EncodedImages:
    """Image files end to end in one array."""

    content: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any]
    source: str

    def __call__(self, index: int) -> Tensor:
        encoded = self.content[self.offsets[index] : self.offsets[index + 1]].tobytes()
        return decode_image(encoded, name=f"image {index} of {self.source}")


def _rows(text: str, count: int) -> Tensor:
    """The row numbers in the array `FILE.npz:NAME`, of `count` rows."""
    file, _, name = text.rpartition(":")
    found = _read_npz(existing_path(file, folder=False), wanted={name}).get(name)
    if found is None or found.ndim != 1 or found.dtype.kind not in "iu" or not len(found):
        raise DataError(
            f"expected a list of row numbers {name!r} in {file}, got "
            f"{'none' if found is None else f'{found.dtype} of shape {found.shape}'}; write "
            f"rows=FILE.npz:NAME"
        )
    if found.min() < 0 or found.max() >= count:
        raise DataError(
            f"expected row numbers from 0 to {count - 1} in {text}, got {found.min()} to "
            f"{found.max()}; choose the file that they belong to"
        )
    return torch.from_numpy(found.astype(np.int64))


def _read_npz(path: Path, wanted: Collection[str] | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """All arrays of the file that could matter; the rest is not even decompressed."""
    if wanted is None:
        wanted = {spelling for words in _SPELLINGS.values() for spelling in words} | {"classes"}
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if name in wanted}
    # A plain .npy has no context manager (TypeError); pickled content is a ValueError.
    except (OSError, EOFError, ValueError, TypeError, BadZipFile, zlib.error, KeyError) as error:
        raise DataError(
            f"expected an .npz file of plain arrays at {path}, got: {first_line(error)}; write it "
            f"with numpy.savez and numeric arrays (pickled ones are refused)"
        ) from error


def _given_names(names: np.ndarray[Any, Any], *, source: str) -> tuple[str, ...]:
    if names.ndim != 1:
        raise DataError(
            f"{source}: expected classes to be a list of names, got an array of shape "
            f"{names.shape}; store one name a class"
        )
    return tuple(str(name) for name in names)


def _npz_split(
    arrays: Mapping[str, np.ndarray[Any, Any]], split: str, *, source: str
) -> tuple[Tensor | _EncodedImages, Tensor] | None:
    """Items and labels of one split, or None where the file has neither."""
    keys = {
        base: [name for name in _SPELLINGS[base, split] if name in arrays] for base in _NPZ_NAMES
    }
    x = keys["x"] + keys["images"] + keys["jpeg"]
    y = keys["y"] + keys["labels"]
    if not x and not y:
        return None
    if len(x) != 1 or len(y) != 1:
        raise DataError(
            f"{source}: expected one array of samples and one of labels for {split}, got "
            f"{x or 'none'} and {y or 'none'}; keep one pair"
        )
    if not keys["jpeg"]:
        data = from_arrays(arrays[x[0]], arrays[y[0]], source=f"{source}, {split}")
        return data.items, data.labels
    labels = integer_labels(arrays[y[0]], source=source)
    offsets = [arrays[name] for name in keys["offsets"]]
    if len(offsets) != 1 or not _offsets_fit(offsets[0], arrays[x[0]], len(labels)):
        raise DataError(
            f"{source}: expected {len(labels) + 1} rising integer offsets into the uint8 array "
            f"{x[0]}, one more than labels, got something else; write them again"
        )
    return _EncodedImages(arrays[x[0]], offsets[0], source), labels


def _offsets_fit(offsets: np.ndarray[Any, Any], content: np.ndarray[Any, Any], count: int) -> bool:
    return bool(
        content.ndim == 1
        and content.dtype == np.uint8
        and offsets.shape == (count + 1,)
        and offsets.dtype.kind in "iu"
        and offsets[0] == 0
        # Compared, not subtracted: unsigned differences wrap round.
        and (offsets[1:] > offsets[:-1]).all()
        and offsets[-1] == len(content)
    )


def _spellings(base: str, split: str) -> tuple[str, ...]:
    """How an array's name may say its split; without a word it is the training data."""
    words = SPLIT_NAMES[split]
    plain = (base,) if split == "train" else ()
    return plain + tuple(n for word in words for n in (f"{base}_{word}", f"{word}_{base}"))


_NPZ_NAMES = ("x", "y", "images", "labels", "jpeg", "offsets")
_SPELLINGS = {
    (base, split): _spellings(base, split) for base in _NPZ_NAMES for split in SPLIT_NAMES
}


def _idx_file(folder: Path, stem: str, what: str) -> Path | None:
    """The file as distributed, or with the dot that some archives put before `idx`."""
    dims = {"images": 3, "labels": 1}[what]
    names = (f"{stem}-{what}{sep}idx{dims}-ubyte{gz}" for sep in "-." for gz in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_idx(path: Path, *, ndim: int) -> np.ndarray[Any, Any]:
    """An idx array of unsigned bytes: `0 0 8 ndim`, big-endian sizes, then the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"expected a readable file at {path}, got: {first_line(error)}; download it again"
        ) from error
    start = 4 + 4 * ndim
    if len(content) < start or content[:4] != bytes((0, 0, 8, ndim)):
        raise DataError(
            f"expected the idx header 0 0 8 {ndim} (unsigned bytes, {ndim} dimensions) in {path}, "
            f"got {list(content[:4])} in {len(content)} bytes; download it again"
        )
    shape = struct.unpack(f">{ndim}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"expected {math.prod(shape)} values of shape {shape} in {path}, got "
            f"{len(content) - start}; download it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
