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
from flexure.data.labelled import ArrayData, LazyData, from_arrays
from flexure.data.sources import CATALOGUE, load_data

__all__ = [
    "CATALOGUE",
    "ArrayData",
    "Augmentation",
    "LazyData",
    "PreparedBatches",
    "Splits",
    "Subset",
    "batches",
    "from_arrays",
    "load_data",
    "only_classes",
    "split",
    "stratified_split",
]
