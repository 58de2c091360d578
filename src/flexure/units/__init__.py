"""The mathematics of an activation: the unit, its catalogue, its module."""

from flexure.units.catalogue import CATALOGUE
from flexure.units.functional import centered_softplus, ctu
from flexure.units.parameterization import PARAMETERIZATIONS, Parameterization, saturated_share
from flexure.units.spec import Point, UnitSpec
from flexure.units.trainable import TrainableCTU
from flexure.units.unit import CTU

__all__ = [
    "CATALOGUE",
    "CTU",
    "PARAMETERIZATIONS",
    "Parameterization",
    "Point",
    "TrainableCTU",
    "UnitSpec",
    "centered_softplus",
    "ctu",
    "saturated_share",
]
