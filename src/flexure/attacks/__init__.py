"""Attacks on inputs, and models whose inputs are pixels within bounds."""

from flexure.attacks.bounded import Bounded
from flexure.attacks.pgd import PGD

__all__ = ["PGD", "Bounded"]
