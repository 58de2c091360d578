"""Attacks on inputs, and models whose inputs are pixels within bounds."""

from flexure.attacks.adversarial import Adversarial
from flexure.attacks.bounded import Bounded
from flexure.attacks.evaluate import AttackResult, Robustness, robust_accuracy
from flexure.attacks.library import APGD, FAB, Square
from flexure.attacks.pgd import PGD
from flexure.attacks.published import PublishedRobustness

__all__ = [
    "APGD",
    "FAB",
    "PGD",
    "Adversarial",
    "AttackResult",
    "Bounded",
    "PublishedRobustness",
    "Robustness",
    "Square",
    "robust_accuracy",
]
