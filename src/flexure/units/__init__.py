"""The mathematics of an activation: the unit, its catalogue, its module."""

from flexure.units.bounds import (
    UnitBounds,
    centered_softplus_bounds,
    ctu_bounds,
    module_unit_bounds,
    unit_bounds,
)
from flexure.units.catalogue import CATALOGUE
from flexure.units.functional import centered_softplus, ctu
from flexure.units.parameterization import PARAMETERIZATIONS, Parameterization, saturated_share
from flexure.units.smooth import CenteredSoftplus, Softplus
from flexure.units.spec import Point, UnitSpec
from flexure.units.trainable import TrainableCTU
from flexure.units.unit import CTU

__all__ = [
    "CATALOGUE",
    "CTU",
    "PARAMETERIZATIONS",
    "CenteredSoftplus",
    "Parameterization",
    "Point",
    "Softplus",
    "TrainableCTU",
    "UnitBounds",
    "UnitSpec",
    "centered_softplus",
    "centered_softplus_bounds",
    "ctu",
    "ctu_bounds",
    "module_unit_bounds",
    "saturated_share",
    "unit_bounds",
]
