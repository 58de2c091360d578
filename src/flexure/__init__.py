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
    "AttackReport",
    "AttackResult",
    "BetaSearch",
    "BoundaryError",
    "Bounded",
    "Calibration",
    "Certificates",
    "CorruptionAccuracy",
    "Curvature",
    "CurvatureRate",
    "DataError",
    "Discrepancy",
    "FlatTraining",
    "FlexureError",
    "FullFinetune",
    "GradientChange",
    "HessianBound",
    "History",
    "LCNNReport",
    "LinearProbe",
    "LipschitzBound",
    "LoRA",
    "LoadedModel",
    "MaskingCheck",
    "MaskingReport",
    "Measurements",
    "MissingExtraError",
    "PublishedRobustness",
    "RobustDialSearch",
    "Robustness",
    "SiteError",
    "SiteReport",
    "SobolevSeminorm",
    "SteeredProbe",
    "Steering",
    "Summary",
    "TrainableCT",
    "TuneResult",
    "adapt",
    "adaptations",
    "attack_model",
    "boundary_error",
    "calibration",
    "certified_radius",
    "corruption_accuracy",
    "curvature",
    "curvature_rate",
    "discrepancy",
    "fit",
    "gradient_change",
    "hessian_bound",
    "jet",
    "lcnn_report",
    "lipschitz_bound",
    "load_adapter",
    "load_data",
    "load_model",
    "masking_report",
    "measure_model",
    "over",
    "penalties",
    "recipes",
    "report",
    "robust_accuracy",
    "search_beta",
    "search_robust_dial",
    "sites",
    "sobolev_seminorm",
    "steer",
    "to_lcnn",
    "train_flat",
    "tune",
    "units",
]

_LAZY = {
    "AttackReport": "methods.attack_model_result",
    "AttackResult": "attacks.robustness",
    "BoundaryError": "measure.boundary",
    "Bounded": "attacks.bounded",
    "Calibration": "measure.calibration",
    "Certificates": "measure.certificates",
    "CorruptionAccuracy": "methods.corruption_accuracy_result",
    "CurvatureRate": "measure.rate",
    "Discrepancy": "measure.discrepancy",
    "FlatTraining": "methods.flat_result",
    "GradientChange": "measure.robustness_of_gradients",
    "HessianBound": "measure.bounds",
    "LCNNReport": "methods.lcnn_report",
    "LipschitzBound": "measure.lipschitz",
    "MaskingCheck": "attacks.masking_result",
    "MaskingReport": "attacks.masking_result",
    "Measurements": "methods.measurements",
    "PublishedRobustness": "attacks.published",
    "RobustDialSearch": "methods.robust_dial_result",
    "Robustness": "attacks.evaluate",
    "SobolevSeminorm": "measure.sobolev",
    "Summary": "measure.over",
    "TuneResult": "methods.tune_result",
    "attack_model": "methods.attack_model",
    "boundary_error": "measure.boundary",
    "calibration": "measure.calibration",
    "certified_radius": "measure.certificates",
    "corruption_accuracy": "methods.corruption_accuracy",
    "curvature_rate": "measure.rate",
    "discrepancy": "measure.discrepancy",
    "gradient_change": "measure.robustness_of_gradients",
    "hessian_bound": "measure.bounds",
    "jet": "measure.jets",
    "lcnn_report": "methods.lcnn_report",
    "lipschitz_bound": "measure.lipschitz",
    "masking_report": "attacks.masking",
    "measure_model": "methods.measurements",
    "over": "measure.over",
    "penalties": None,
    "recipes": None,
    "report": None,
    "robust_accuracy": "attacks.evaluate",
    "search_robust_dial": "methods.robust_dial",
    "sobolev_seminorm": "measure.sobolev",
    "to_lcnn": "methods.lcnn",
    "train_flat": "methods.flat",
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
