"""Labelled data by address, seeded stratified splits, preprocessed batches, augmentation."""

from flexure.data.augment import Augmentation
from flexure.data.batches import (
    PreparedBatches,
    Splits,
    Subset,
    batches,
    only_classes,
    split,
    stratified_split,
)
from flexure.data.corruptions import CORRUPTIONS, Corrupted, Corruption, corrupt
from flexure.data.labelled import ArrayData, LazyData, from_arrays
from flexure.data.sources import CATALOGUE, load_data

__all__ = [
    "CATALOGUE",
    "CORRUPTIONS",
    "ArrayData",
    "Augmentation",
    "Corrupted",
    "Corruption",
    "LazyData",
    "PreparedBatches",
    "Splits",
    "Subset",
    "batches",
    "corrupt",
    "from_arrays",
    "load_data",
    "only_classes",
    "split",
    "stratified_split",
]
