"""The mathematics of an activation: the unit, its catalogue, its module."""

from flexure.units.catalogue import CATALOGUE
from flexure.units.functional import centered_softplus, ctu
from flexure.units.spec import Point, UnitSpec
from flexure.units.unit import CTU

__all__ = ["CATALOGUE", "CTU", "Point", "UnitSpec", "centered_softplus", "ctu"]
