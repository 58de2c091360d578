"""Data sets of image files: folders, and the datasets library. Images are decoded on demand.

Arrays in files are read by `sources`, which also holds the catalogue of addresses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from flexure.addresses import existing_path, first_line, import_extra, split_options
from flexure.contracts import AddressError, DataError, LabelledData
from flexure.data.labelled import (
    LazyData,
    class_names,
    decode_image,
    image_tensor,
    integer_labels,
)

__all__ = ["SPLIT_NAMES", "load_folder", "load_hub"]

SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
"""What sources call the three splits."""

_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")
)
"""Formats that PIL reads on every platform."""


def load_folder(rest: str) -> dict[str, LabelledData]:
    """`folder:DIR`: one folder a class, or `train/`, `val/`, `test/` with one folder a class each.

    Class numbers follow the sorted names of the training folders. Images may lie in subfolders of
    a class folder; hidden folders and files that are no images are left out.

    Raises:
        AddressError: there is no such folder.
        DataError: a class folder holds no image, or a split has a class that `train/` lacks.
    """
    root = existing_path(rest, folder=True)
    parts = _split_folders(root)
    classes = tuple(child.name for child in _subfolders(parts["train"]))
    return {name: _folder_split(part, classes) for name, part in parts.items()}


def load_hub(rest: str) -> dict[str, LabelledData]:
    """`hf:NAME[:config][?image=COLUMN&label=COLUMN]`: a data set of the datasets library.

    NAME is a name on the hub, a local folder (images, parquet), or one made by `save_to_disk`.
    The columns are found by their types; a split without labels (all -1) is left out with a
    warning.

    Raises:
        MissingExtraError: datasets is not installed.
        AddressError: it cannot be loaded.
        DataError: no image or label column, or more than one to choose from.
    """
    name, options = split_options(rest, known=("image", "label"))
    loaded = _load_dataset(name)
    parts = {split: loaded[key] for split, key in _split_keys(loaded, source=rest).items()}
    features = parts["train"].features
    images = [k for k, kind in features.items() if type(kind).__name__ == "Image"]
    image = _column(features, images, options.get("image"), what="image", source=rest)
    labelled = _label_columns(features)
    label = _column(features, labelled, options.get("label"), what="label", source=rest)
    labels, classes = _hub_labels(parts, label, source=rest)
    return {
        split: LazyData(_HubImages(parts[split].select_columns([image]), image), y, classes)
        for split, y in labels.items()
    }


@dataclass(frozen=True)
class _Files:
    paths: tuple[Path, ...]

    def __call__(self, index: int) -> Tensor:
        return decode_image(self.paths[index], name=str(self.paths[index]))


@dataclass(frozen=True, eq=False)
class _HubImages:
    dataset: Any
    column: str

    def __call__(self, index: int) -> Tensor:
        name = f"row {index} of column {self.column!r}"
        try:
            image = self.dataset[index][self.column]
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"expected an image in {name}, got: {first_line(error)}; repair or remove it"
            ) from error
        if image is None:
            raise DataError(f"expected an image in {name}, got nothing; remove the row")
        return image_tensor(image, name=name)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _split_folders(root: Path) -> dict[str, Path]:
    """Split -> folder; the root itself is the training data unless all its folders are splits."""
    spelled = {word: split for split, words in SPLIT_NAMES.items() for word in words}
    children = _subfolders(root)
    # A class may be called "train" (vehicles), so every folder must be a split for this reading.
    if children and all(c.name in spelled and _subfolders(c) for c in children):
        found = {spelled[child.name]: child for child in children}
        if len(found) != len(children):
            raise DataError(
                f"expected one folder a split in {root}, got {[c.name for c in children]}; "
                f"keep one of those that mean the same"
            )
        if "train" in found:
            return found
    return {"train": root}


def _folder_split(root: Path, classes: tuple[str, ...]) -> LazyData:
    folders = _subfolders(root)
    extra = [folder.name for folder in folders if folder.name not in classes]
    if extra or not folders:
        raise DataError(
            f"expected one folder a class of the training data in {root}, got "
            f"{'the new classes ' + ', '.join(extra) if extra else 'no folder'}; "
            f"put each class's images in a folder named after it"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for folder in folders:
        inside = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES)
        files = [p for p in inside if p.is_file() and not p.name.startswith(".")]
        if not files:
            raise DataError(f"expected images in {folder}, got none; add some or remove it")
        paths += files
        labels += [classes.index(folder.name)] * len(files)
    return LazyData(_Files(tuple(paths)), torch.tensor(labels), classes)


def _load_dataset(name: str) -> Mapping[str, Any]:
    """The splits of a data set by name, local folder, or folder made by `save_to_disk`."""
    datasets = import_extra("datasets", install="pip install 'flexure[hf]'")
    local = Path(name).expanduser()
    hub_name, _, config = (str(local), "", "") if local.is_dir() else name.partition(":")
    try:
        saved = ("dataset_dict.json", "state.json")
        if local.is_dir() and any((local / file).is_file() for file in saved):
            loaded = datasets.load_from_disk(str(local))
        else:
            loaded = datasets.load_dataset(hub_name, config or None)
    except Exception as error:  # the library raises a dozen unrelated types for a wrong name
        raise AddressError(
            f"expected a data set at hf:{name}, got: {first_line(error)}; check the name, the "
            f"configuration after a second colon, and the connection"
        ) from error
    # A single split saved with save_to_disk comes without its name.
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


def _split_keys(loaded: Mapping[str, Any], *, source: str) -> dict[str, str]:
    found = {
        split: next((word for word in words if word in loaded), "")
        for split, words in SPLIT_NAMES.items()
    }
    if not found["train"]:
        if len(loaded) != 1:
            raise DataError(
                f"hf:{source}: expected a split named train, got {sorted(loaded)}; use a data set "
                f"or configuration that has one"
            )
        return {"train": next(iter(loaded))}
    return {split: key for split, key in found.items() if key}


def _label_columns(features: Mapping[str, Any]) -> list[str]:
    """Columns that look like labels: class labels, else integers or text called label(s)."""
    named = [k for k, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    return named or [k for k in features if k in ("label", "labels")]


def _column(
    features: Mapping[str, Any], found: list[str], wanted: str | None, *, what: str, source: str
) -> str:
    if wanted is not None:
        found = [wanted] if wanted in features else []
    if len(found) != 1:
        raise DataError(
            f"hf:{source}: expected one {what} column, got {found or 'none'} among "
            f"{list(features)}; name it in the address: ...?{what}=COLUMN"
        )
    return found[0]


def _hub_labels(
    parts: Mapping[str, Any], column: str, *, source: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Each split's labels, without the splits that have none, and the names of the classes."""
    kind = parts["train"].features[column]
    raw = {split: list(part[column]) for split, part in parts.items()}
    if any(value is None for values in raw.values() for value in values):
        raise DataError(f"hf:{source}: expected a label in every row, got none; remove such rows")
    if raw["train"] and isinstance(raw["train"][0], str):
        classes = tuple(sorted({value for values in raw.values() for value in values}))
        numbers = {name: number for number, name in enumerate(classes)}
        return {k: torch.tensor([numbers[v] for v in vs]) for k, vs in raw.items()}, classes
    labels = {
        split: integer_labels(values, source=f"hf:{source}, {split}")
        for split, values in raw.items()
        if values  # an empty split has no label, of any type
    }
    for split in [k for k, y in labels.items() if k != "train" and bool((y == -1).all())]:
        warn(f"hf:{source}: the split {split!r} has no labels and is left out", stacklevel=2)
        del labels[split]
    names = getattr(kind, "names", None)
    return labels, tuple(names or class_names(list(labels.values()), source=f"hf:{source}"))
