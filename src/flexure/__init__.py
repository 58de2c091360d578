"""Measure, steer and train the curvature of neural networks in input space.

The names a user meets; `README.md` shows them at work. Heavy parts load when first used.
"""

from importlib import import_module
from typing import Any

from flexure import units
from flexure.contracts import (
    AdapterError,
    AddressError,
    DataError,
    FlexureError,
    LoadedModel,
    MissingExtraError,
    SiteError,
)
from flexure.data import load_data
from flexure.measure.curvature import Curvature, curvature
from flexure.methods.adapt import Adaptation, adapt
from flexure.methods.adaptations import adaptations
from flexure.methods.baselines import FullFinetune, LinearProbe, SteeredProbe
from flexure.methods.load import load_adapter
from flexure.methods.lora import LoRA
from flexure.methods.search import search_beta
from flexure.methods.search_result import BetaSearch
from flexure.methods.steer import Steering, steer
from flexure.methods.trainable_ct import TrainableCT
from flexure.models import load_model
from flexure.surgery import SiteReport, sites
from flexure.train.fit import History, fit

__version__ = "0.1.0"

__all__ = [
    "Adaptation",
    "AdapterError",
    "AddressError",
    "BetaSearch",
    "Calibration",
    "Curvature",
    "DataError",
    "FlexureError",
    "FullFinetune",
    "HessianBound",
    "History",
    "LinearProbe",
    "LoRA",
    "LoadedModel",
    "MissingExtraError",
    "SiteError",
    "SiteReport",
    "SteeredProbe",
    "Steering",
    "Summary",
    "TrainableCT",
    "TuneResult",
    "adapt",
    "adaptations",
    "calibration",
    "curvature",
    "fit",
    "jet",
    "hessian_bound",
    "load_adapter",
    "load_data",
    "load_model",
    "over",
    "recipes",
    "report",
    "search_beta",
    "sites",
    "steer",
    "tune",
    "units",
]

_LAZY = {
    "Calibration": "measure.calibration",
    "HessianBound": "measure.bounds",
    "Summary": "measure.over",
    "TuneResult": "methods.tune_result",
    "calibration": "measure.calibration",
    "hessian_bound": "measure.bounds",
    "over": "measure.over",
    "jet": "measure.jets",
    "recipes": None,
    "report": None,
    "tune": "methods.tune",
}
"""Names that load when first used: a module, or what is in one."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'flexure' has no attribute {name!r}")
    place = _LAZY[name]
    return (
        import_module(f"flexure.{name}")
        if place is None
        else getattr(import_module(f"flexure.{place}"), name)
    )
