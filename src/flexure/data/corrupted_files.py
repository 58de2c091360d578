"""The official files of corrupted images: CIFAR-10-C, CIFAR-100-C and ImageNet-C.

Corrupting clean images is the business of `corruptions`; the catalogue of addresses is `sources`'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexure.addresses import existing_path, first_line, split_options
from flexure.contracts import AddressError, DataError, DataLoader, LabelledData
from flexure.data.corruptions import SEVERITIES
from flexure.data.images import load_folder
from flexure.data.labelled import LazyData, integer_labels

__all__ = ["OFFICIAL", "official_files"]

_LABELS = "labels.npy"


def official_files(address: str) -> tuple[Path, ...]:
    """The files that an address of one of `OFFICIAL` reads; () for other addresses.

    Raises:
        AddressError: no such folder, or an option is missing.
    """
    prefix, _, rest = address.partition(":")
    return _FILES[prefix](*_wanted(rest)) if prefix in _FILES else ()


def _load_cifar(rest: str, *, classes: tuple[str, ...]) -> dict[str, LabelledData]:
    """`cifar10-c:DIR?corruption=fog&severity=3`, and `cifar100-c:`: one severity of one corruption.

    The folder as distributed: `CORRUPTION.npy`, (5 n, 32, 32, 3) uint8, the severities end to end,
    n = 10,000 in the test set's order, and `labels.npy`, (5 n,). Images stay on disk until they are
    asked for; nothing is unpickled. They are the training data of this address: the only split.
    """
    folder, corruption, severity = _wanted(rest)
    path = folder / f"{corruption}.npy"
    if not path.is_file():
        found = sorted(file.stem for file in folder.glob("*.npy") if file.name != _LABELS)
        raise AddressError(
            f"expected {path.name} in {folder}, got {', '.join(found) or 'no such files'}; choose "
            f"one of them, or download it"
        )
    images = _array(path)
    labels = integer_labels(_array(existing_path(str(folder / _LABELS), folder=False)), source=rest)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise DataError(
            f"expected images (N, H, W, 3) uint8 in {path}, got {images.dtype} of shape "
            f"{images.shape}; download it again"
        )
    if len(images) != len(labels) or len(images) % len(SEVERITIES):
        raise DataError(
            f"expected five severities of as many images in {path}, and a label for each, got "
            f"{len(images)} images and {len(labels)} labels; download both again"
        )
    each = len(images) // len(SEVERITIES)
    if bool((labels.reshape(len(SEVERITIES), each) != labels[:each]).any()):
        raise DataError(
            f"expected the same labels for each of five severities in {folder / _LABELS}, got "
            f"others; the severities are versions of the same images: download it again"
        )
    start = (severity - 1) * each
    return {"train": LazyData(_Stacked(images, start), labels[start : start + each], classes)}


def _load_imagenet(rest: str) -> dict[str, LabelledData]:
    """`imagenet-c:DIR?corruption=fog&severity=3`: one severity of one corruption.

    The folder as distributed: `CORRUPTION/SEVERITY/WNID/*.JPEG`, with the archives of all groups
    unpacked into one folder. Classes are numbered in the order of their WNIDs, as usual, so that
    all 1,000 must be there for a network of 1,000 classes.
    """
    folder, corruption, severity = _wanted(rest)
    if not (folder / corruption).is_dir():
        found = sorted(part.name for part in folder.iterdir() if part.is_dir())
        raise AddressError(
            f"expected a folder {corruption} in {folder}, got {', '.join(found) or 'no folders'}; "
            f"choose one of them, or download it"
        )
    return load_folder(str(folder / corruption / str(severity)))


def _wanted(rest: str) -> tuple[Path, str, int]:
    """Folder, corruption and severity.

    Raises:
        AddressError: one of them is missing, or is no such thing.
    """
    name, options = split_options(rest, known=("corruption", "severity"))
    corruption, severity = options.get("corruption", ""), options.get("severity", "")
    if not corruption or severity not in map(str, SEVERITIES):
        raise AddressError(
            f"expected DIR?corruption=NAME&severity=1, ..., 5, got {rest!r}; name both"
        )
    if corruption in (".", "..") or any(mark in corruption for mark in "/\\"):
        raise AddressError(
            f"expected a corruption's name without a path, got {corruption!r}; choose the folder "
            f"before the question mark"
        )
    return existing_path(name, folder=True), corruption, int(severity)


def _array(path: Path) -> np.ndarray[Any, Any]:
    """What is in an .npy file, mapped into memory.

    Raises:
        DataError: it is damaged, or not a plain array.
    """
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"expected an .npy file of a plain array at {path}, got: {first_line(error)}; download "
            f"it again"
        ) from error


@dataclass(frozen=True, eq=False)
class _Stacked:
    """Images (N, H, W, C) of one array, from a place on."""

    images: np.ndarray[Any, Any]
    start: int

    def __call__(self, index: int) -> Tensor:
        image = np.array(self.images[self.start + index])
        return torch.from_numpy(image).permute(2, 0, 1).contiguous()


_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"

_CIFAR100 = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus "
    "butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch "
    "crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo "
    "keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse "
    "mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy "
    "porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television "
    "tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)

OFFICIAL: Mapping[str, DataLoader] = {
    "cifar10-c": partial(_load_cifar, classes=tuple(_CIFAR10.split())),
    "cifar100-c": partial(_load_cifar, classes=tuple(_CIFAR100.split())),
    "imagenet-c": _load_imagenet,
}
"""Address prefix -> loader; each takes `DIR?corruption=NAME&severity=1`, ..., 5."""


def _cifar_files(folder: Path, corruption: str, severity: int) -> tuple[Path, ...]:
    return folder / f"{corruption}.npy", folder / _LABELS


def _imagenet_files(folder: Path, corruption: str, severity: int) -> tuple[Path, ...]:
    inside = (folder / corruption / str(severity)).rglob("*")
    return tuple(sorted(path for path in inside if path.is_file()))


_FILES: Mapping[str, Callable[[Path, str, int], tuple[Path, ...]]] = {
    "cifar10-c": _cifar_files,
    "cifar100-c": _cifar_files,
    "imagenet-c": _imagenet_files,
}
"""Address prefix -> the files of folder, corruption and severity."""
